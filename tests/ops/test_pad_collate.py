"""`pad_collate`, forward: against an independent loop, as reference on the CPU and as kernel in the interpreter."""

import os

import pytest
import torch
from pad_collate_cases import (
    FLOATS,
    INTEGERS,
    assert_as_exact,
    expect,
    generated_case,
    guarded_empty,
    image,
    small_tiles,
    values,
)

from detr_fast.ops import pad_collate, pad_collate_reference
from detr_fast.ops._dispatch import HAS_TRITON

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# Which implementation runs on a CPU tensor depends on the process; both must pass.
either = pytest.mark.parametrize(
    "_implementation",
    [
        pytest.param(None, id="reference", marks=pytest.mark.skipif(INTERPRET, reason="runs without the interpreter")),
        pytest.param(None, id="interpreted", marks=pytest.mark.interpret),
    ],
)
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


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
        intact = guarded_empty(patch) if INTERPRET else None
        batch, mask = pad_collate(images, **options)
    if intact:
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
@pytest.mark.parametrize("source, dtype", [("hwc", torch.float32), ("crop", torch.float16), ("hwc", torch.float64)])
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
def test_pad_collate_ignores_the_default_device(_implementation):
    images = [torch.rand(3, 4, 5), torch.rand(3, 6, 2)]
    expected, _ = pad_collate(images, **IMAGENET)
    with torch.device("meta"):
        batch, mask = pad_collate(images, **IMAGENET)
    assert mask.device.type == "cpu" and torch.equal(batch, expected)


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


PICTURE = torch.zeros(3, 4, 5)
BYTES = torch.zeros(3, 4, 5, dtype=torch.uint8)


@pytest.mark.parametrize(
    "images, options, error, message",
    [
        ([], {}, ValueError, "got no image"),
        (torch.zeros(0, 3, 4, 5), {}, ValueError, "got no image"),
        ([PICTURE, torch.zeros(4, 5)], {}, ValueError, r"image 1 has shape \(4, 5\)"),
        ([torch.zeros(1, 3, 4, 5)], {}, ValueError, r"image 0 has shape \(1, 3, 4, 5\)"),
        (PICTURE, {}, ValueError, r"image 0 has shape \(4, 5\)"),
        ([PICTURE, "picture"], {}, TypeError, "image 1 is a str"),
        ([PICTURE.to_sparse()], {}, TypeError, "image 0 is a torch.float32 torch.sparse_coo"),
        ([PICTURE.to(torch.complex64)], {}, TypeError, "image 0 has dtype torch.complex64"),
        ([PICTURE, PICTURE.to("meta")], {}, ValueError, "image 1 is on meta, image 0 on cpu"),
        ([PICTURE.to("meta"), PICTURE], {}, ValueError, "image 1 is on cpu, image 0 on meta"),
        ([PICTURE], {"mean": (0, 0, 0)}, ValueError, "got only mean"),
        ([PICTURE], {"std": (1, 1, 1)}, ValueError, "got only std"),
        (
            [PICTURE],
            {"mean": (0, 0), "std": (1, 1, 1)},
            ValueError,
            "mean has 2 values; expected one for each of the 3",
        ),
        ([PICTURE], {"mean": (0, 0, 0), "std": (1,)}, ValueError, "std has 1 values"),
        ([PICTURE], {"mean": (0, 0, 0), "std": (1, 0, 1)}, ValueError, "expected no value below"),
        ([PICTURE], {"mean": (0, 0, float("nan")), "std": (1, 1, 1)}, ValueError, "expected finite"),
        ([PICTURE], {"mean": (0, 0, 0), "std": torch.ones(3, device="meta")}, TypeError, "std is on meta"),
        ([PICTURE.int()], IMAGENET, TypeError, "mean and std were given with images of torch.int32"),
        ([PICTURE.bool()], IMAGENET, TypeError, "expected uint8 or a floating dtype"),
        ([PICTURE], {"dtype": torch.uint8}, TypeError, "dtype is torch.uint8"),
        ([BYTES], {"dtype": torch.uint8, **IMAGENET}, TypeError, "dtype is torch.uint8"),
        ([PICTURE], {"size_divisor": 0}, ValueError, "size_divisor is 0"),
    ],
)
def test_pad_collate_rejects(images, options, error, message):
    with pytest.raises(error, match=message):
        pad_collate(images, **options)


@either
@pytest.mark.parametrize("second", [torch.zeros(3, 4), PICTURE.double()], ids=["2-D", "dtype"])
def test_pad_collate_op_rejects_mixed_images(second, _implementation):
    """The op itself: an image of another kind than the table says must never reach the kernel."""
    with pytest.raises(ValueError, match="image 1 is"):
        torch.ops.detr_fast.pad_collate([PICTURE, second], None, None, torch.float32, False, 1)


def test_pad_collate_rejects_vmap():
    with pytest.raises(NotImplementedError, match="does not support vmap"):
        torch.vmap(lambda picture: pad_collate([picture])[0])(torch.zeros(2, 3, 4, 5))


def test_pad_collate_on_meta():
    batch, mask = pad_collate([PICTURE.to("meta"), torch.zeros(3, 7, 2, device="meta")], size_divisor=4)
    assert batch.shape == (2, 3, 8, 8) and mask.shape == (2, 8, 8) and batch.device.type == "meta"


def _opcheck_images(dtype, layout):
    generator = torch.Generator().manual_seed(5)
    return [image((3, h, w), dtype, layout, generator) for h, w in ((4, 5), (6, 2))]


@pytest.mark.parametrize(
    "dtype, channels_last",
    [(dtype, dtype.itemsize == 2) for dtype in INTEGERS + FLOATS] + [(torch.uint8, True), (torch.float32, True)],
)
def test_pad_collate_opcheck(dtype, channels_last):
    images = _opcheck_images(dtype, "crop" if channels_last else "chw")
    torch.library.opcheck(torch.ops.detr_fast.pad_collate.default, (images, None, None, dtype, channels_last, 4))


@pytest.mark.parametrize(
    "dtype, layout",
    [(dtype, "hwc") for dtype in (torch.uint8, *FLOATS)] + [(torch.uint8, "chw"), (torch.float32, "chw")],
)
def test_pad_collate_opcheck_normalising(dtype, layout):
    images = [img.detach().requires_grad_(dtype.is_floating_point) for img in _opcheck_images(dtype, layout)]
    out = torch.bfloat16 if dtype != torch.bfloat16 else torch.float32
    arguments = (images, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7], out, layout == "hwc", 4)
    torch.library.opcheck(torch.ops.detr_fast.pad_collate.default, arguments)


@pytest.mark.parametrize(
    "options", [{}, {**IMAGENET, "channels_last": True, "size_divisor": 8}], ids=["plain", "fused"]
)
def test_pad_collate_compiles_dynamic(options):
    """One graph whatever the sizes: no break, no recompile."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(images):
        batch, mask = pad_collate(images, **options)
        return batch * 2, ~mask

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for height in (5, 9, 12, 30):
        images = [torch.rand(3, height, 7 + height, requires_grad=True), torch.rand(3, 10, 40 - height)]
        for actual, expected in zip(compiled(images), step(images), strict=True):
            assert actual.stride() == expected.stride() and torch.equal(actual, expected)
        (grad,) = torch.autograd.grad(compiled(images)[0].square().sum(), images[:1])
        (expected,) = torch.autograd.grad(step(images)[0].square().sum(), images[:1])
        assert torch.allclose(grad, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(INTERPRET or not HAS_TRITON, reason="needs Triton's compiler")
def test_pad_collate_kernels_compile_once():
    """The same two kernels for any number and sizes of images, as the JIT's key for them tells without a GPU."""
    from tests.kernels.cases import Case
    from tests.kernels.gate import record

    def run():
        for height, width in ((5, 9), (16, 43), (33, 301), (64, 1063)):
            for count in (1, 2, 7, 16):
                images = [torch.zeros(3, height, width - i % 5, requires_grad=True) for i in range(count)]
                batch, _ = pad_collate(images, **IMAGENET)
                batch.backward(torch.zeros_like(batch))

    launches, problems = record([Case("any batch", run)], 90)
    assert not problems
    assert sorted(launch.kernel.__name__ for launch in launches) == [
        "_pad_collate_backward_kernel",
        "_pad_collate_forward_kernel",
    ]


def test_pad_collate_exports():
    class Collate(torch.nn.Module):
        def forward(self, images):
            return pad_collate(images, **IMAGENET, size_divisor=4)

    sizes = [{1: torch.export.Dim(f"h{i}", min=2), 2: torch.export.Dim(f"w{i}", min=2)} for i in range(2)]
    program = torch.export.export(Collate(), ([torch.rand(3, 5, 9), torch.rand(3, 8, 6)],), dynamic_shapes=(sizes,))
    images = [torch.rand(3, 13, 4), torch.rand(3, 7, 21)]
    for actual, expected in zip(program.module()(images), pad_collate(images, **IMAGENET, size_divisor=4), strict=True):
        assert torch.equal(actual, expected)
