"""`pad_collate` as an op: what it refuses, opcheck, torch.compile, torch.export, one compiled kernel for any batch."""

import pytest
import torch
from pad_collate_cases import FLOATS, IMAGENET, INTEGERS, INTERPRET, either, image

from detr_fast.ops import pad_collate
from detr_fast.ops._dispatch import HAS_TRITON

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
    ids=str,
)
def test_pad_collate_opcheck(dtype, channels_last):
    images = _opcheck_images(dtype, "crop" if channels_last else "chw")
    torch.library.opcheck(torch.ops.detr_fast.pad_collate.default, (images, None, None, dtype, channels_last, 4))


@pytest.mark.parametrize(
    "dtype, layout",
    [(dtype, "hwc") for dtype in (torch.uint8, *FLOATS)] + [(torch.uint8, "chw"), (torch.float32, "chw")],
    ids=str,
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


@pytest.mark.skipif(not HAS_TRITON, reason="the launcher's module imports triton")
def test_pad_collate_table_of_a_captured_graph_holds_the_values_exactly():
    """There nothing is copied from the host; addresses need all of an int64's bits."""
    from detr_fast.kernels.pad_collate import _baked

    words = [2**62 + 1, 2**47 + 5, -3, 0]
    assert _baked(words, torch.int64, torch.device("cpu")).tolist() == words
    floats = _baked([0.1, -2.5, 1e-30], torch.float32, torch.device("cpu"))
    assert torch.equal(floats, torch.tensor([0.1, -2.5, 1e-30]))
    assert _baked([], torch.float64, torch.device("cpu")).shape == (0,)
