"""`pad_collate` on a GPU: what the interpreter cannot show."""

import pytest
import torch
from pad_collate_cases import FLOATS, IMAGENET, INTEGERS, LAYOUTS, assert_as_exact, expect, generated_case, image

from detr_fast.ops import pad_collate, pad_collate_packed, pad_collate_reference
from detr_fast.ops.pad_collate import pack_images

pytestmark = pytest.mark.gpu


def pictures(sizes, layout="hwc", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [image((3, h, w), torch.uint8, layout, generator) for h, w in sizes]


def to_gpu(images):
    """The images on the GPU with the strides they have on the CPU."""
    return [torch.empty_strided(img.shape, img.stride(), dtype=img.dtype, device="cuda").copy_(img) for img in images]


@pytest.mark.parametrize("seed", range(60))
def test_pad_collate_matches_expectation(seed):
    images, options = generated_case(seed)
    computing = {key: options[key] for key in ("mean", "std", "dtype") if key in options}
    exact, exact_mask = expect(images, size_divisor=options["size_divisor"], **computing)
    plain, _ = pad_collate_reference(images, **options)
    batch, mask = pad_collate([img.cuda() for img in images], **options)
    assert torch.equal(mask.cpu(), exact_mask) and batch.stride() == plain.stride()
    if "mean" in options:
        assert_as_exact(batch.cpu(), exact, plain)
    else:
        assert torch.equal(batch.cpu(), plain)


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS, ids=str)
def test_pad_collate_every_layout(dtype):
    generator = torch.Generator().manual_seed(1)
    images = [image((3, 9 + i, 300 - i), dtype, layout, generator) for i, layout in enumerate(LAYOUTS)]
    images = [img for img in images if 0 not in img.stride()]
    batch, mask = pad_collate(to_gpu(images))
    expected, expected_mask = pad_collate_reference(images)
    assert torch.equal(batch.cpu(), expected) and torch.equal(mask.cpu(), expected_mask)


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS, ids=str)
def test_pad_collate_casts_as_copy_does(dtype):
    """Every pair of dtypes, bfloat16 among them, whose rounding the interpreter does not have; gradients, too."""
    generator = torch.Generator().manual_seed(4)
    images = [image((3, h, w), dtype, "chw", generator) for h, w in ((40, 300), (33, 64))]
    for target in FLOATS:
        batch, _ = pad_collate([img.cuda() for img in images], dtype=target)
        expected, _ = pad_collate_reference(images, dtype=target)
        assert torch.equal(batch.cpu(), expected)
        if dtype.is_floating_point:
            crops = torch.ops.detr_fast.pad_collate_backward(batch, [3, 40, 300, 3, 33, 64], None, dtype)
            assert torch.equal(crops[0].cpu(), expected[0].to(dtype))
            assert torch.equal(crops[1].cpu(), expected[1, :, :33, :64].to(dtype))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("divisor", [1, 32])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pad_collate_normalises(dtype, divisor, channels_last):
    images = pictures(((427, 640), (480, 333), (1, 1)))
    options = {**IMAGENET, "dtype": dtype, "channels_last": channels_last, "size_divisor": divisor}
    exact, _ = pad_collate_reference(images, **{**options, "dtype": torch.float64})
    plain, expected_mask = pad_collate_reference(images, **options)
    for batch, mask in (
        pad_collate([img.cuda() for img in images], **options),
        pad_collate_packed(*[part.cuda() if i == 0 else part for i, part in enumerate(pack_images(images))], **options),
    ):
        assert_as_exact(batch.cpu(), exact, plain)
        assert torch.equal(mask.cpu(), expected_mask) and not batch.cpu()[exact == 0].any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pad_collate_grad(dtype):
    images = [torch.rand(3, h, w, dtype=torch.float64).to(dtype) for h, w in ((40, 300), (33, 64))]
    weight = torch.randn(2, 3, 40, 300, dtype=torch.float64).to(dtype)
    grads = []
    for device in ("cuda", "cpu"):
        leaves = [img.to(device).requires_grad_() for img in images]
        batch, _ = pad_collate(leaves, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
        grads.append(torch.autograd.grad(batch, leaves, weight.to(device)))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual.cpu(), expected)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_pad_collate_beyond_int32(channels_last):
    """A batch, and an image's strides, of more than 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < 14 * 2**30:
        pytest.skip("needs 14 GiB of free GPU memory")
    height, width = 1 << 15, 22001
    large = torch.empty(3, height, width, dtype=torch.uint8, device="cuda").random_(0, 256)
    batch, mask = pad_collate([large, large[:, :5, :7]], channels_last=channels_last)
    assert batch.numel() > 2**32 and torch.equal(batch[0], large) and not mask[0].any()
    assert torch.equal(batch[1, :, :5, :7], large[:, :5, :7])
    assert int(batch[1].count_nonzero()) == int(large[:, :5, :7].count_nonzero())
    assert int(mask[1].count_nonzero()) == height * width - 35
    crops = torch.ops.detr_fast.pad_collate_backward(batch, [3, 9, 9, 3, 5, 7], None, torch.uint8)
    assert torch.equal(crops[0], large[:, :9, :9]) and torch.equal(crops[1], large[:, :5, :7])


def test_pad_collate_512_images():
    images = [torch.full((1, i % 40, i % 300), i, dtype=torch.int32) for i in range(512)]
    batch, mask = pad_collate([img.cuda() for img in images])
    expected, expected_mask = pad_collate_reference(images)
    assert torch.equal(batch.cpu(), expected) and torch.equal(mask.cpu(), expected_mask)


def test_pad_collate_is_deterministic():
    images = [img.cuda() for img in pictures(((427, 640), (480, 333)))]
    first = pad_collate(images, **IMAGENET, dtype=torch.bfloat16)
    for _ in range(100):
        again = pad_collate(images, **IMAGENET, dtype=torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_pad_collate_sources_may_be_freed_at_once():
    """On a side stream that lags behind; the freed memory is taken and overwritten from the main stream."""
    side = torch.cuda.Stream()
    for seed in range(20):
        images = pictures(((200, 300), (280, 133)), seed=seed)
        on_gpu = [img.cuda() for img in images]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(10_000_000)
            batch, mask = pad_collate(on_gpu)
        shapes = [img.shape for img in on_gpu]
        del on_gpu
        taken = [torch.full(shape, 255, dtype=torch.uint8, device="cuda") for shape in shapes]
        torch.cuda.synchronize()
        expected, expected_mask = pad_collate_reference(images)
        assert torch.equal(batch.cpu(), expected) and torch.equal(mask.cpu(), expected_mask)
        del taken


def test_pad_collate_does_not_wait():
    images = [img.cuda() for img in pictures(((200, 300), (280, 133)))]
    buffer, header = pack_images(pictures(((200, 300), (280, 133))))
    buffer = buffer.cuda()
    pad_collate(images, **IMAGENET)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pad_collate(images, **IMAGENET, channels_last=True)
        pad_collate_packed(buffer, header, **IMAGENET)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_pad_collate_replays_in_a_cuda_graph():
    """A replay reads what the captured images hold then."""
    images = [img.cuda() for img in pictures(((20, 30), (28, 13)))]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            pad_collate(images, **IMAGENET)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch, mask = pad_collate(images, **IMAGENET)
    for seed in range(3):
        for target, source in zip(images, pictures(((20, 30), (28, 13)), seed=seed), strict=True):
            target.copy_(source)
        for _ in range(8):  # other tables pass through the pinned memory's cache meanwhile
            pad_collate([img[:, 1:] for img in images])
        graph.replay()
        expected, expected_mask = pad_collate(images, **IMAGENET)
        assert torch.equal(batch, expected) and torch.equal(mask, expected_mask)


def test_pad_collate_rejects_several_devices():
    with pytest.raises(ValueError, match="image 1 is on cpu, image 0 on cuda:0"):
        pad_collate([torch.zeros(3, 4, 5, device="cuda"), torch.zeros(3, 4, 5)])
    with pytest.raises(TypeError, match="std is on cuda:0"):
        pad_collate([torch.zeros(1, 4, 5, device="cuda")], mean=[0.0], std=torch.ones(1, device="cuda"))
    with pytest.raises(ValueError, match="image 1 is"):
        images = [torch.zeros(3, 4, 5, device="cuda"), torch.zeros(3, 4, 5)]
        torch.ops.detr_fast.pad_collate(images, None, None, torch.float32, False, 1)
