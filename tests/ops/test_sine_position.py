"""`sine_position` against the original's formula, as reference on the CPU and as kernel through the interpreter."""

import math
import os
import random
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from detr_fast.ops import sine_position, sine_position_reference
from detr_fast.ops.sine_position import _remembered_frequencies

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRET:
    import triton
    import triton.language as tl

    from detr_fast.kernels.sine_position import _nearest

    @triton.jit
    def _nearest_kernel(out_ptr, ratio, length, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        tl.store(out_ptr + offs, _nearest(offs, ratio, length))


# Which implementation `sine_position` runs on a CPU tensor depends on the process; both must pass.
both = [pytest.param(None, id="reference", marks=pytest.mark.skipif(INTERPRET, reason="runs without the interpreter"))]
both += [pytest.param(None, id="interpreted", marks=pytest.mark.interpret)]
either = pytest.mark.parametrize("_implementation", both)


def original(mask, size, features, temperature=10000, normalize=False, scale=None, dtype=torch.float32):
    """The original's formula: ([B, 2F, h, w] computed in `dtype`, resized mask), written for itself alone."""
    if size is not None:
        mask = F.interpolate(mask[None].float(), size=size)[0].bool()
    present = (~mask).to(dtype)
    y, x = present.cumsum(1), present.cumsum(2)
    if normalize:
        full = 2 * math.pi if scale is None else scale
        y = y / (y[:, -1:, :] + 1e-6) * full
        x = x / (x[:, :, -1:] + 1e-6) * full
    # Raised as one tensor, as the original does: a scalar power may differ in the last bit, which large arguments show.
    divisors = float(temperature) ** (2 * (torch.arange(features, device=mask.device) // 2).to(dtype) / features)
    channels = []
    for embed in (y, x):
        for channel in range(features):
            argument = embed / divisors[channel]
            channels.append(argument.sin() if channel % 2 == 0 else argument.cos())
    return torch.stack(channels, dim=1), mask


def padded(batch, height, width, generator, holes=0.0):
    """Masks as a padded batch has them, some cells flipped."""
    mask = torch.ones(batch, height, width, dtype=torch.bool)
    for image in mask:
        h = int(torch.randint(1, height + 1, (), generator=generator))
        w = int(torch.randint(1, width + 1, (), generator=generator))
        image[:h, :w] = False
    return mask ^ (torch.rand(mask.shape, generator=generator) < holes)


def check(mask, size, features, atol=1e-6, layout="nchw", dtype=torch.float32, **options):
    pos, resized = sine_position(mask, size, features, dtype=dtype, layout=layout, **options)
    compute = torch.promote_types(dtype, torch.float32)
    want, want_mask = original(mask, size, features, dtype=compute, **options)
    if layout == "tokens":
        want = want.flatten(2).transpose(1, 2)
    assert pos.dtype == dtype and pos.is_contiguous() and resized.is_contiguous()
    assert pos.shape == want.shape and torch.equal(resized, want_mask)
    torch.testing.assert_close(pos.to(compute), want, rtol=0, atol=atol)
    return pos, resized


CASES = {
    "detr": ((2, 96, 128), (3, 4), 128, dict(normalize=True)),
    "unnormalised": ((2, 30, 41), (13, 17), 8, dict()),
    "scale": ((2, 30, 41), (13, 17), 8, dict(normalize=True, scale=math.pi)),
    "negative-scale": ((2, 9, 11), None, 8, dict(normalize=True, scale=-20.0)),
    "reduced-arguments": ((1, 20, 20), None, 6, dict(normalize=True, scale=8000.0)),
    "large-arguments": ((1, 20, 20), None, 6, dict(normalize=True, scale=3e5)),
    "temperature": ((2, 30, 41), (13, 17), 8, dict(normalize=True, temperature=20)),
    "enlarged": ((2, 7, 5), (19, 23), 4, dict(normalize=True)),
    "one-cell": ((3, 1, 1), None, 2, dict(normalize=True)),
    "row": ((1, 1, 201), None, 4, dict()),
    "column": ((1, 201, 1), None, 4, dict()),
    "one-row-of-many": ((1, 50, 60), (1, 60), 4, dict(normalize=True)),
}


@either
@pytest.mark.parametrize("layout", ["nchw", "tokens"])
@pytest.mark.parametrize("name", CASES)
def test_sine_position_matches_original(name, layout, _implementation):
    shape, size, features, options = CASES[name]
    mask = padded(*shape, torch.Generator().manual_seed(1), holes=0.1)
    # Both round the argument to float32 first, and then agree on its sine, however large it is.
    check(mask, size, features, layout=layout, **options)


@either
def test_sine_position_masked_rows_columns_and_images(_implementation):
    mask = torch.zeros(4, 12, 14, dtype=torch.bool)
    mask[0, 3] = True
    mask[0, -1] = True
    mask[1, :, 0] = True
    mask[1, :, 5:] = True
    mask[2] = True
    pos, _ = check(mask, None, 8, normalize=True)
    sin, cos = pos[2, 0::2], pos[2, 1::2]
    assert (sin == 0).all() and (cos == 1).all()
    assert torch.isfinite(pos).all()


@either
def test_sine_position_takes_any_strides(_implementation):
    base = padded(4, 24, 36, torch.Generator().manual_seed(3), holes=0.2)
    for mask in (base.transpose(1, 2), base[::2, 1::2, ::3], base[:1].expand(3, -1, -1), base[:, :, 1:]):
        check(mask, (7, 9), 4, normalize=True)


@either
def test_sine_position_resizes_exactly_as_interpolate(_implementation):
    """The bits of every source index go through as images of a batch, so that one wrong pixel shows."""
    pairs = [(1333, 42), (97, 3), (3, 50), *integer_rounding_fails()[:2]]
    for size_in, size_out in pairs:
        mask = ((torch.arange(size_in) >> torch.arange(11)[:, None]) & 1).bool()
        want = F.interpolate(mask[None].float(), size=size_out)[0].bool()
        _, rows = sine_position(mask[:, :, None], (size_out, 1), 2)
        _, columns = sine_position(mask[:, None, :], (1, size_out), 2)
        assert torch.equal(rows[:, :, 0], want) and torch.equal(columns[:, 0, :], want), (size_in, size_out)


def integer_rounding_fails():
    """(in, out) for which index * in // out is not what F.interpolate picks."""
    pairs = []
    for size_in in range(1, 420):
        for size_out in range(1, 60):
            index = np.arange(size_out)
            picked = np.floor(index.astype(np.float32) * np.float32(size_in / size_out)).astype(int)
            if (picked != index * size_in // size_out).any():
                pairs.append((size_in, size_out))
    return pairs


@pytest.mark.interpret
def test_sine_position_nearest_index_of_many_pairs():
    generator = random.Random(0)
    pairs = integer_rounding_fails()[:200]
    pairs += [(generator.randrange(1, 1400), generator.randrange(1, 420)) for _ in range(300)]
    assert len(pairs) == 500
    for size_in, size_out in pairs:
        out = torch.empty(512, dtype=torch.int32)
        _nearest_kernel[(1,)](out, size_in / size_out, size_in, BLOCK=512)
        source = torch.arange(size_in, dtype=torch.float32)[None, None]
        want = F.interpolate(source, size=size_out)[0, 0].int()
        assert torch.equal(out[:size_out], want), (size_in, size_out)


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "tokens"])
def test_sine_position_dtypes(dtype, layout, _implementation):
    mask = padded(2, 20, 30, torch.Generator().manual_seed(4))
    # Half a unit in the last place below 1; the interpreter truncates to bfloat16 instead of rounding.
    atol = {torch.float32: 1e-6, torch.float16: 2.5e-4, torch.bfloat16: 4e-3, torch.float64: 1e-13}[dtype]
    check(mask, (10, 15), 8, normalize=True, dtype=dtype, layout=layout, atol=atol)


def test_sine_position_low_precision_is_the_rounded_float32():
    mask = padded(2, 20, 30, torch.Generator().manual_seed(4))
    exact, _ = sine_position_reference(mask, (10, 15), 8, normalize=True)
    for dtype in (torch.float16, torch.bfloat16):
        pos, _ = sine_position_reference(mask, (10, 15), 8, normalize=True, dtype=dtype)
        assert torch.equal(pos, exact.to(dtype))


@either
def test_sine_position_empty(_implementation):
    for layout in ("nchw", "tokens"):
        for shape, size in (((0, 8, 9), (2, 3)), ((0, 8, 9), None), ((2, 0, 5), None), ((2, 5, 0), None)):
            pos, resized = sine_position(torch.zeros(shape, dtype=torch.bool), size, 4, normalize=True, layout=layout)
            b, h, w = shape if size is None else (shape[0], *size)
            assert pos.shape == ((b, h * w, 8) if layout == "tokens" else (b, 8, h, w))
            assert resized.shape == (b, h, w) and resized.dtype == torch.bool


@either
def test_sine_position_outputs_are_new_and_without_grad(_implementation):
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    pos, resized = sine_position(mask, None, 4)
    assert not pos.requires_grad and not resized.requires_grad
    assert resized.data_ptr() != mask.data_ptr()
    resized.fill_(True)
    assert not mask.any()


def test_sine_position_reference_is_the_cpu_implementation():
    if INTERPRET:
        pytest.skip("the CPU implementation is the kernel here")
    mask = padded(2, 20, 30, torch.Generator().manual_seed(4))
    for got, want in zip(
        sine_position(mask, (7, 9), 6, normalize=True, layout="tokens"),
        sine_position_reference(mask, (7, 9), 6, normalize=True, layout="tokens"),
        strict=True,
    ):
        assert torch.equal(got, want)


MASK = torch.zeros(2, 8, 9, dtype=torch.bool)


@pytest.mark.parametrize("function", [sine_position, sine_position_reference])
@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "mask must be a bool tensor", dict(mask=MASK.float())),
        (TypeError, "mask must be a bool tensor", dict(mask=MASK.tolist())),
        (ValueError, r"\[batch, height, width\]", dict(mask=MASK[0])),
        (ValueError, "two positive integers", dict(size=(0, 3))),
        (ValueError, "two positive integers", dict(size=(3, -1))),
        (ValueError, "two positive integers", dict(size=(3.0, 2))),
        (ValueError, r"\(height, width\)", dict(size=5)),
        (ValueError, r"\(height, width\)", dict(size=(1, 2, 3))),
        (ValueError, "cannot be resized", dict(mask=MASK[:, :0], size=(2, 2))),
        (ValueError, "even and positive", dict(num_pos_feats=5)),
        (ValueError, "even and positive", dict(num_pos_feats=0)),
        (ValueError, "temperature must be positive", dict(temperature=0)),
        (ValueError, "temperature must be positive", dict(temperature=float("nan"))),
        (ValueError, "without normalize=True", dict(scale=3.0)),
        (TypeError, "dtype must be one of", dict(dtype=torch.int32)),
        (ValueError, "'nchw' or 'tokens'", dict(layout="nhwc")),
    ],
)
def test_sine_position_rejects(function, error, message, arguments):
    with pytest.raises(error, match=message):
        function(**{"mask": MASK, **arguments})


def test_sine_position_refuses_vmap():
    with pytest.raises(NotImplementedError, match="does not support vmap"):
        torch.vmap(lambda mask: sine_position(mask, None, 4)[0])(MASK[None])


@pytest.mark.skipif(INTERPRET, reason="exported as it is without the interpreter")
def test_sine_position_keeps_nothing_that_a_tracer_made():
    """The first call with these options is the tracer's; it traces twice and compares the graphs."""
    mask = torch.zeros(2, 5, 7, dtype=torch.bool)
    _remembered_frequencies.cache_clear()
    traced = torch.jit.trace(lambda mask: sine_position(mask, None, 12), (mask,))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(sine_position(mask, None, 14)[0], FakeTensor)
    assert type(sine_position(mask, None, 14)[0]) is torch.Tensor
    for result, want in zip(traced(mask), sine_position(mask, None, 12), strict=True):
        assert torch.equal(result, want)


def test_sine_position_exports():
    class Module(torch.nn.Module):
        def forward(self, mask):
            return sine_position(mask, (3, 5), 6, normalize=True)

    mask = padded(2, 12, 14, torch.Generator().manual_seed(5))
    batch, height, width = (torch.export.Dim(name, min=2, max=2000) for name in ("batch", "height", "width"))
    program = torch.export.export(Module(), (mask,), dynamic_shapes=({0: batch, 1: height, 2: width},))
    other = padded(3, 40, 31, torch.Generator().manual_seed(6))
    for got, want in zip(program.module()(other), Module()(other), strict=True):
        assert torch.equal(got, want)


@pytest.mark.skipif(INTERPRET, reason="the interpreter is no part of the op's contract")
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_sine_position_opcheck(dtype, tokens):
    mask = padded(2, 12, 14, torch.Generator().manual_seed(5))
    table = torch.tensor([1.0, 1.0, 100.0, 100.0], dtype=torch.promote_types(dtype, torch.float32))
    for masks in (mask, mask.transpose(1, 2), mask[:0]):
        for size in ((12, 14), (3, 5)):
            arguments = (masks, table, *size, True, 2 * math.pi, dtype, tokens)
            torch.library.opcheck(torch.ops.detr_fast.sine_position.default, arguments)


@pytest.mark.skipif(INTERPRET, reason="TorchInductor needs Triton's compiler")
@pytest.mark.parametrize("layout", ["nchw", "tokens"])
def test_sine_position_compiles_dynamic(layout):
    compilations = []

    def backend(module, _):
        compilations.append(module)
        return module.forward

    def function(mask, features):
        return sine_position(mask, features.shape[-2:], 6, normalize=True, layout=layout)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for batch, (height, width), (h, w) in ((2, (20, 31), (5, 7)), (3, (48, 33), (6, 9)), (5, (64, 96), (16, 24))):
        mask = padded(batch, height, width, torch.Generator().manual_seed(batch))
        features = torch.empty(batch, 1, h, w)
        for got, want in zip(compiled(mask, features), function(mask, features), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert len(compilations) == 1


@pytest.mark.skipif(INTERPRET, reason="TorchInductor needs Triton's compiler")
@pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs a C++ compiler for the CPU")
def test_sine_position_compiles_with_inductor():
    torch._dynamo.reset()
    compiled = torch.compile(lambda mask: sine_position(mask, (5, 6), 6, normalize=True), fullgraph=True, dynamic=True)
    mask = padded(2, 20, 30, torch.Generator().manual_seed(6))
    for got, want in zip(compiled(mask), sine_position(mask, (5, 6), 6, normalize=True), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.interpret
@pytest.mark.parametrize("seed", range(5))
def test_sine_position_kernel_generated_cases(seed):
    """40 cases of sizes, strides, masks, options, dtypes and layouts."""
    choose = random.Random(seed)
    for case in range(8):
        generator = torch.Generator().manual_seed(100 * seed + case)
        batch, features = choose.randint(1, 2), 2 * choose.choice([1, 2, 3, 5, 8, 33])
        h, w = choose.choice([(1, 1), (5, 7), (12, 11), (2, 36), (40, 3)])
        size = (h, w) if choose.random() < 0.7 else None
        if size is not None:
            h, w = choose.randint(1, 200), choose.randint(1, 200)
        mask = padded(batch, h, w, generator, holes=choose.choice([0.0, 0.1, 0.5, 1.0]))
        if choose.random() < 0.3:
            mask = padded(batch, w, h, generator).transpose(1, 2)
        if choose.random() < 0.2:
            mask = mask.clone()
            mask[choose.randrange(batch)] = True
        options = dict(normalize=choose.random() < 0.7, temperature=choose.choice([10000, 20, 1.5]))
        if options["normalize"]:
            options["scale"] = choose.choice([None, 1.0, 100.0, 2e4])
        dtype = choose.choice([torch.float32, torch.float32, torch.float16])
        atol = 1e-6 if dtype == torch.float32 else 2.5e-4
        check(mask, size, features, atol, choose.choice(["nchw", "tokens"]), dtype, **options)


@pytest.mark.gpu
class TestGpu:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
    @pytest.mark.parametrize("layout", ["nchw", "tokens"])
    @pytest.mark.parametrize("size", [(25, 38), (50, 76), (400, 400)], ids=str)
    def test_matches_original(self, size, layout, dtype):
        mask = padded(2, 800, 1216, torch.Generator().manual_seed(7), holes=0.05).cuda()
        atol = {torch.float32: 1e-6, torch.float16: 2.5e-4, torch.bfloat16: 2e-3, torch.float64: 1e-13}[dtype]
        check(mask, size, 128, atol, layout, dtype, normalize=True)
        check(mask, size, 128, atol, layout, dtype)

    def test_large_arguments(self):
        mask = padded(2, 60, 70, torch.Generator().manual_seed(7)).cuda()
        for scale in (100.0, 8000.0, 3e5):
            check(mask, None, 16, atol=2e-6, normalize=True, scale=scale)

    def test_offsets_beyond_int32(self):
        mask = padded(140, 250, 250, torch.Generator().manual_seed(8)).cuda()
        pos, _ = sine_position(mask, None, 128, normalize=True, dtype=torch.bfloat16)
        assert pos.numel() > 2**31
        last, _ = sine_position(mask[-1:], None, 128, normalize=True, dtype=torch.bfloat16)
        assert torch.equal(pos[-1:], last)

    def test_cuda_graph(self):
        mask = padded(2, 80, 120, torch.Generator().manual_seed(9)).cuda()
        other = padded(2, 80, 120, torch.Generator().manual_seed(10)).cuda()
        sine_position(mask, (10, 15), 128, normalize=True)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            pos, resized = sine_position(mask, (10, 15), 128, normalize=True)
        mask.copy_(other)
        graph.replay()
        want, want_mask = sine_position(other, (10, 15), 128, normalize=True)
        assert torch.equal(pos, want) and torch.equal(resized, want_mask)

    def test_streams_and_determinism(self):
        mask = padded(4, 400, 500, torch.Generator().manual_seed(11)).cuda()
        want, _ = sine_position(mask, (50, 63), 34, normalize=True)
        streams = [torch.cuda.Stream() for _ in range(4)]
        torch.cuda.synchronize()
        for repeat in range(100):
            with torch.cuda.stream(streams[repeat % 4]):
                pos, _ = sine_position(mask, (50, 63), 34, normalize=True)
                assert torch.equal(pos, want)

    def test_does_not_synchronise(self):
        mask = padded(2, 80, 120, torch.Generator().manual_seed(9)).cuda()
        sine_position(mask, (10, 15), 64)
        torch.cuda.set_sync_debug_mode("error")
        try:
            sine_position(mask, (10, 15), 64)
            sine_position(mask, (11, 15), 62)  # a table not made before
        finally:
            torch.cuda.set_sync_debug_mode("default")
