"""`pad_collate`, forward: against an independent loop, as reference on the CPU and as kernel in the interpreter."""

import pytest
import torch
from pad_collate_cases import (
    FLOATS,
    IMAGENET,
    INTEGERS,
    INTERPRET,
    assert_as_exact,
    either,
    expect,
    generated_case,
    guarded_empty,
    image,
    small_tiles,
    values,
)

from detr_fast.ops import pad_collate, pad_collate_reference


def original(tensor_list):
    """The original's `nested_tensor_from_tensor_list`, told again."""
    sizes = [max(sizes) for sizes in zip(*[tensor.shape for tensor in tensor_list], strict=True)]
    batch = torch.zeros([len(tensor_list), *sizes], dtype=tensor_list[0].dtype)
    mask = torch.ones([len(tensor_list), *sizes[1:]], dtype=torch.bool)
    for index, tensor in enumerate(tensor_list):
        c, h, w = tensor.shape
        batch[index, :c, :h, :w].copy_(tensor)
        mask[index, :h, :w] = False
    return batch, mask


def check(images, options, monkeypatch):
    """`pad_collate` against `expect`, element by element, and nothing written beside its outputs."""
    computing = {key: options[key] for key in ("mean", "std", "dtype") if key in options}
    exact, exact_mask = expect(images, size_divisor=options.get("size_divisor", 1), **computing)
    plain, _ = pad_collate_reference(images, **options)
    with monkeypatch.context() as patch:
        intact = guarded_empty(patch)
        batch, mask = pad_collate(images, **options)
    intact()
    assert mask.dtype == torch.bool and torch.equal(mask, exact_mask)
    assert batch.shape == exact.shape and batch.dtype == plain.dtype and batch.stride() == plain.stride()
    if "mean" in options:
        assert_as_exact(batch, exact, plain)
        padding = ~expect([torch.ones(img.shape) for img in images], size_divisor=options.get("size_divisor", 1))[
            0
        ].bool()
        assert not batch[padding].any(), "padding is not exactly 0"
    else:
        assert torch.equal(batch, exact.to(plain.dtype))


@either
@pytest.mark.parametrize("seed", range(80))
def test_pad_collate_matches_expectation(seed, _implementation, monkeypatch):
    if INTERPRET:
        small_tiles(monkeypatch)
    check(*generated_case(seed), monkeypatch)


@either
@pytest.mark.parametrize("dtype", INTEGERS + FLOATS, ids=str)
def test_pad_collate_equals_the_original(dtype, _implementation):
    generator = torch.Generator().manual_seed(1)
    shapes = ((3, 5, 9), (2, 8, 4), (0, 3, 3), (3, 1, 1), (3, 0, 12))
    layouts = ("chw", "hwc", "crop", "steps", "hwc")
    images = [image(shape, dtype, layout, generator) for shape, layout in zip(shapes, layouts, strict=True)]
    for actual, expected in zip(pad_collate(images), original(images), strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@either
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    "source, dtype", [("hwc", torch.float32), ("crop", torch.float16), ("hwc", torch.float64)], ids=str
)
def test_pad_collate_normalises_uint8(dtype, source, channels_last, _implementation, monkeypatch):
    """In the kernel's own tiles, several of them in both directions."""
    generator = torch.Generator().manual_seed(2)
    images = [image((3, h, w), torch.uint8, source, generator) for h, w in ((33, 280), (2, 17))]
    check(images, {**IMAGENET, "dtype": dtype, "channels_last": channels_last, "size_divisor": 16}, monkeypatch)


@either
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_pad_collate_bfloat16(channels_last, _implementation):
    """Half an ulp from exact; a whole one in the interpreter, which truncates."""
    generator = torch.Generator().manual_seed(3)
    images = [image((3, h, w), torch.uint8, "hwc", generator) for h, w in ((9, 30), (12, 17))]
    exact, _ = expect(images, **IMAGENET)
    batch, _ = pad_collate(images, **IMAGENET, dtype=torch.bfloat16, channels_last=channels_last)
    assert batch.dtype == torch.bfloat16
    ulp = 2 ** (torch.frexp(exact).exponent - 8.0)  # one unit of bfloat16's 8 bits, at most
    assert bool(((batch.double() - exact).abs() <= ulp * (1.01 if INTERPRET else 0.51)).all())


@either
def test_pad_collate_many_images(_implementation, monkeypatch):
    if INTERPRET:
        small_tiles(monkeypatch)
    images = [torch.full((1, i % 5, i % 4), i, dtype=torch.int32) for i in range(140 if INTERPRET else 512)]
    for actual, expected in zip(pad_collate(images), original(images), strict=True):
        assert torch.equal(actual, expected)


@either
@pytest.mark.parametrize("shapes", [[(3, 0, 0)], [(0, 4, 5), (0, 6, 2)], [(3, 0, 7), (3, 2, 0)], [(2, 0, 5)]], ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_pad_collate_empty_images(shapes, channels_last, _implementation, monkeypatch):
    check([torch.rand(shape) for shape in shapes], {"channels_last": channels_last}, monkeypatch)


@either
@pytest.mark.parametrize("options", [{}, {"mean": [0.5] * 3, "std": [0.2] * 3}], ids=["as they are", "normalised"])
def test_pad_collate_lacking_channels_are_zeros(options, _implementation, monkeypatch):
    """Also where no image has padding."""
    check([torch.rand(3, 4, 5), torch.rand(2, 4, 5)], options, monkeypatch)


@either
def test_pad_collate_keeps_special_values(_implementation):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 65504.0, 1e-40]).view(1, 2, 3)
    batch, _ = pad_collate([special, torch.zeros(1, 3, 3)])
    assert torch.equal(batch[0, :, :2].view(torch.int32), special.view(torch.int32))
    batch, _ = pad_collate([special, torch.zeros(1, 3, 3)], mean=[0.5], std=[0.5])
    assert torch.equal(batch[0, :, :2].isnan(), special.isnan()) and not batch[0, :, 2:].any()


@either
def test_pad_collate_converts_to_the_first_dtype(_implementation):
    images = [torch.rand(3, 4, 5), torch.randint(0, 256, (3, 6, 2), dtype=torch.uint8), torch.rand(3, 2, 2).double()]
    for actual, expected in zip(pad_collate(images), original(images), strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)


@either
def test_pad_collate_casts_as_copy_does(_implementation):
    """PyTorch rounds float64 to float32 and then to float16: 1 + 2^-11 + 2^-40 becomes 1, not 1 + 2^-10."""
    halfway = 1 + 2**-11 + 2.0 ** torch.arange(-45, -15, dtype=torch.float64).view(1, 5, 6)
    batch, _ = pad_collate([halfway], dtype=torch.float16)
    (grad,) = torch.ops.detr_fast.pad_collate_backward(halfway[None], [1, 5, 6], None, torch.float16)
    assert torch.equal(batch[0], halfway.half()) and torch.equal(grad, halfway.half())


@either
def test_pad_collate_strides_beyond_int32(_implementation, tmp_path):
    """Offsets of more than 2^32 elements, in a file without content but where the image lies."""
    strides = (2**31 + 9, 2**30 + 7, 1)
    memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2**32 + 64, dtype=torch.uint8)
    far = memory.as_strided((2, 3, 5), strides).copy_(values((2, 3, 5), torch.uint8, torch.Generator().manual_seed(5)))
    batch, _ = pad_collate([far, torch.zeros(2, 4, 6, dtype=torch.uint8)])
    assert torch.equal(batch[0, :, :3, :5], far)
    grad = memory.as_strided((1, 2, 3, 5), (0, *strides))
    assert torch.equal(torch.ops.detr_fast.pad_collate_backward(grad, [2, 3, 5], None, torch.uint8)[0], far)


@either
def test_pad_collate_takes_a_batched_tensor(_implementation):
    batch, mask = pad_collate(torch.arange(120.0).view(2, 3, 4, 5), size_divisor=8)
    assert torch.equal(batch[:, :, :4, :5], torch.arange(120.0).view(2, 3, 4, 5)) and batch.shape == (2, 3, 8, 8)
    assert not mask[:, :4, :5].any() and mask[:, 4:].all() and mask[:, :, 5:].all()


@either
def test_pad_collate_ignores_autocast(_implementation):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        batch, _ = pad_collate([torch.rand(3, 4, 5)], **IMAGENET)
    assert batch.dtype == torch.float32


def test_pad_collate_defaults_match_torchvision():
    """uint8 as `ToTensor` and `Normalize` take it, bit for bit on the reference."""
    picture = values((3, 6, 7), torch.uint8, torch.Generator().manual_seed(4))
    mean, std = (torch.tensor(IMAGENET[name])[:, None, None] for name in ("mean", "std"))
    batch, _ = pad_collate_reference([picture], **IMAGENET)
    assert batch.dtype == torch.float32 and torch.equal(batch[0], picture.float().div(255).sub(mean).div(std))
    tensors = {name: torch.tensor(value) for name, value in IMAGENET.items()}
    assert torch.allclose(pad_collate([picture], **tensors)[0], batch, atol=1e-6)
