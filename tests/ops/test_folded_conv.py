"""Convolution with a folded frozen norm, residual and ReLU."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from detr_fast.layers import FrozenBatchNorm2d
from detr_fast.layers.norm import frozen_affines
from detr_fast.ops import folded_conv as folded_conv_module
from detr_fast.ops.folded_conv import folded_conv, folded_conv_reference, forked_folded_conv
from detr_fast.ops.pointwise_conv import pointwise_conv

CASES = {
    "1x1": dict(kernel=1),
    "3x3-stride2": dict(kernel=3, stride=(2, 2), padding=(1, 1)),
    "3x3-dilated": dict(kernel=3, padding=(2, 2), dilation=(2, 2)),
    "3x3-groups": dict(kernel=3, padding=(1, 1), groups=2),
    "no-relu": dict(kernel=1, relu=False),
    "residual": dict(kernel=3, padding=(1, 1), residual=True),
    "residual-no-relu": dict(kernel=1, residual=True, relu=False),
    "no-bias": dict(kernel=1, bias=False),
}


def _case(name, dtype=torch.float64, device="cpu"):
    options = dict(CASES[name])
    kernel, residual, bias = options.pop("kernel"), options.pop("residual", False), options.pop("bias", True)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    weight = torch.randn(6, 4 // options.get("groups", 1), kernel, kernel, dtype=torch.float64)
    scale, shift = torch.rand(6, dtype=torch.float64) + 0.5, torch.randn(6, dtype=torch.float64)
    tensors = [x, weight, scale, shift if bias else None]
    tensors.append(torch.randn(2, 6, 6, 5, dtype=torch.float64) if residual else None)
    wide = torch.promote_types(dtype, torch.float32)
    dtypes = [dtype, dtype, wide, wide, dtype]
    tensors = [None if t is None else t.to(device, d) for t, d in zip(tensors, dtypes, strict=True)]
    for i in (0, 1, 4):
        if tensors[i] is not None:
            tensors[i].requires_grad_()
    return tensors, options


def _gradients(function, tensors, options, active=None):
    """The result and its gradients for a cotangent that is zero where `active` is false."""
    out = function(*tensors, **options)
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    cotangent = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    if active is not None:
        cotangent = cotangent * active
    return out, torch.autograd.grad(out, leaves, cotangent.to(out))


@pytest.mark.parametrize("name", CASES)
def test_folded_conv_gradcheck(name):
    tensors, options = _case(name)
    assert torch.autograd.gradcheck(lambda *t: folded_conv(*t, **options), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_folded_conv_matches_reference(name, channels_last, dtype):
    tensors, options = _case(name, dtype)
    if channels_last:
        tensors[0] = tensors[0].detach().to(memory_format=torch.channels_last).requires_grad_()
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    out, gradients = _gradients(folded_conv, tensors, options)
    expected, expected_gradients = _gradients(folded_conv_reference, exact, options)
    assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    for value, right in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert value.dtype == dtype
        assert (value - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_scale_is_applied_to_whichever_is_smaller(name, channels_last, monkeypatch):
    """A CPU multiplies a large image's weight, or a small image's result."""
    folded = []
    fold = folded_conv_module._fold
    monkeypatch.setattr(folded_conv_module, "_fold", lambda *args: folded.append(args) or fold(*args))
    tensors, options = _case(name)
    for size in ((6, 5), (40, 33)):
        x, residual = torch.randn(1, 4, *size).double(), torch.randn(1, 6, *size).double()
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        stride = options.get("stride", (1, 1))
        sized = [x.requires_grad_(), *tensors[1:4], None if tensors[4] is None else residual.requires_grad_()]
        folded.clear()
        out, gradients = _gradients(folded_conv, sized, options)
        small = out.numel() < tensors[1].numel()
        assert (size, stride) != ((40, 33), (1, 1)) or not small
        assert len(folded) == (0 if small else 2)
        assert out.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        expected, expected_gradients = _gradients(folded_conv_reference, sized, options)
        for value, right in zip((out, *gradients), (expected, *expected_gradients), strict=True):
            torch.testing.assert_close(value, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(4, 4), (40, 40)])
def test_the_result_has_xs_dtype_whatever_the_biass(size):
    x, weight = torch.randn(1, 4, *size, dtype=torch.bfloat16), torch.randn(64, 4, 1, 1, dtype=torch.bfloat16)
    assert folded_conv(x, weight, torch.ones(64, dtype=torch.bfloat16), torch.ones(64)).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(4, 4), (40, 40)])
def test_many_gradients_at_a_time_are_those_one_by_one(size):
    x, weight = torch.randn(1, 4, *size, requires_grad=True), torch.randn(64, 4, 1, 1, requires_grad=True)
    out = folded_conv(x, weight, torch.ones(64), torch.ones(64))
    cotangents = torch.randn(3, *out.shape)
    together = torch.autograd.grad(out, (x, weight), cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        single = torch.autograd.grad(out, (x, weight), cotangent, retain_graph=True)
        for batched, expected in zip(together, single, strict=True):
            torch.testing.assert_close(batched[i], expected)


def test_eager_calls_on_a_cpu_are_the_ops_without_the_library():
    """Bit for bit."""
    tensors, options = _case("residual", torch.float32)
    out, gradients = _gradients(folded_conv, tensors, options)
    assert type(out.grad_fn).__name__ == "_PlainFoldedConvBackward"
    arguments = _op_arguments("residual", torch.float32)[5:]
    want, expected = _gradients(lambda *t: torch.ops.detr_fast.folded_conv(*t, *arguments), tensors, {})
    for value, right in zip((out, *gradients), (want, *expected), strict=True):
        assert torch.equal(value, right)


FORKS = {name: CASES[name] for name in ("1x1", "3x3-stride2", "3x3-groups", "no-bias")}


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("name", FORKS)
def test_a_fork_is_two_readers_of_one_input(name, rectified):
    (x, weight, scale, bias, _), options = _case(name)
    options.pop("relu", None)

    def two_readers(x, weight):
        x = x.relu() if rectified else x * 1
        return folded_conv(x, weight, scale, bias, **options), x.sin()

    def forked(x, weight):
        # The ReLU leaves its mask to the fork, and the fork's to who multiplies by `active`.
        x = torch.where(x > 0, x.detach(), 0) + (x - x.detach()) if rectified else x * 1
        out, shortcut = forked_folded_conv(x, weight, scale, bias, masks_input_grad=rectified, **options)
        return out * (out.detach() > 0), shortcut.sin()

    results = []
    for function in (two_readers, forked):
        out = function(x, weight)
        cotangents = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).double() for o in out]
        results.append((*out, *torch.autograd.grad(out, (x, weight), cotangents)))
    torch.testing.assert_close(*results)


def test_a_fork_without_gradients_gives_the_input():
    (x, weight, scale, bias, _), options = _case("1x1", torch.float32)
    with torch.no_grad():
        out, shortcut = forked_folded_conv(x, weight, scale, bias, **options)
    assert torch.equal(out, folded_conv(x, weight, scale, bias)) and shortcut.data_ptr() == x.data_ptr()
    out, shortcut = forked_folded_conv(x.detach(), weight, scale, bias, **options)
    out.sum().backward()
    assert weight.grad is not None and x.grad is None


def test_only_what_is_needed_is_kept():
    tensors, options = _case("residual", torch.float32)
    x, weight, scale, bias, residual = tensors

    def kept(*inputs):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            out = folded_conv(*inputs, **options)
        # The model holds the weight and its scale anyway.
        return out, [t.data_ptr() for t in saved if t.data_ptr() not in (weight.data_ptr(), scale.data_ptr())]

    out, saved = kept(x, weight, scale, bias, residual)
    assert set(saved) == {x.data_ptr(), out.data_ptr()}  # the weights are folded again
    out, saved = kept(x.detach(), weight, scale, bias, residual)
    assert len(saved) == 2 and set(saved) == {x.data_ptr(), out.data_ptr()}
    out, saved = kept(x, weight.detach(), scale, bias, residual)
    assert saved == [out.data_ptr()]
    out, saved = kept(x.detach(), weight.detach(), scale, bias, residual)
    assert saved == [out.data_ptr()]
    out, saved = kept(x.detach(), weight.detach(), scale, bias, residual.detach())
    assert saved == [] and not out.requires_grad


@pytest.mark.parametrize("needed", ["x", "weight"])
def test_one_gradient_alone(needed):
    tensors, options = _case("3x3-stride2")
    _, both = _gradients(folded_conv, tensors, options)
    i = ["x", "weight"].index(needed)
    tensors[1 - i] = tensors[1 - i].detach()
    _, (alone,) = _gradients(folded_conv, tensors, options)
    torch.testing.assert_close(alone, both[i])


def test_autocast_folds_in_float32_then_casts():
    tensors, options = _case("residual", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = folded_conv(*tensors, **options)
    x, weight, scale, bias, residual = tensors
    folded = (weight * scale[:, None, None, None]).bfloat16()
    expected = folded_conv(x.bfloat16(), folded, torch.ones(6), bias, residual.bfloat16(), **options)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    out.backward(torch.randn_like(out))
    assert [t.grad.dtype for t in (x, weight, residual)] == [torch.float32] * 3


def test_gradient_has_the_weights_memory_format():
    tensors, options = _case("3x3-stride2", torch.float32)
    tensors[1] = tensors[1].detach().to(memory_format=torch.channels_last).requires_grad_()
    _, (_, gradient) = _gradients(folded_conv, tensors, options)
    assert gradient.stride() == tensors[1].stride()


def test_double_backward_is_an_error():
    tensors, options = _case("1x1")
    out = folded_conv(*tensors, **options)
    (gradient,) = torch.autograd.grad(out.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula|differentiate twice"):
        gradient.sum().backward()


def test_rejects_a_scale_that_does_not_fit():
    with pytest.raises(ValueError, match=r"scale is \[3\], bias \[6\]; expected \[6\]"):
        folded_conv(torch.zeros(1, 4, 2, 2), torch.zeros(6, 4, 1, 1), torch.ones(3), torch.zeros(6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_frozen_affines_are_the_norms(dtype):
    norms = [FrozenBatchNorm2d(n).to(dtype) for n in (3, 5)]
    for norm in norms:
        for buffer in norm.buffers():
            buffer.copy_(torch.rand(buffer.shape) + 0.5)
    for norm, (scale, bias) in zip(norms, frozen_affines(norms), strict=True):
        assert scale.dtype == bias.dtype == torch.promote_types(dtype, torch.float32)
        x = torch.randn(2, len(scale), 2, 2, dtype=scale.dtype)
        torch.testing.assert_close(x * scale[:, None, None] + bias[:, None, None], norm.to(scale.dtype)(x))


def _op_arguments(name, dtype, channels_last=False):
    (x, weight, scale, bias, residual), options = _case(name, dtype)
    if channels_last:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    geometry = [options.get(key, (1, 1)) for key in ("stride", "padding", "dilation")]
    geometry[1] = options.get("padding", (0, 0))
    return (
        x,
        weight,
        scale,
        bias,
        residual,
        options.get("relu", True),
        *geometry,
        options.get("groups", 1),
        False,
        False,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["3x3-stride2", "residual", "no-bias"])
def test_folded_conv_opcheck(name, dtype):
    arguments = _op_arguments(name, dtype, channels_last=dtype == torch.bfloat16)
    torch.library.opcheck(torch.ops.detr_fast.folded_conv.default, arguments)
    x, weight, scale, *_ = (t.detach() if isinstance(t, torch.Tensor) else t for t in arguments)
    grad = torch.randn_like(torch.ops.detr_fast.folded_conv(*arguments))
    for needed in ((True, True), (True, False), (False, True)):
        for shortcut in (None, torch.randn_like(x)):
            backward = (grad, x, weight, scale, shortcut, *arguments[6:10], *needed, shortcut is not None)
            torch.library.opcheck(torch.ops.detr_fast.folded_conv_backward.default, backward)


@pytest.mark.parametrize("name", CASES)
def test_folded_conv_op_gradcheck(name):
    """The op itself, past the short cut of plain eager mode."""
    arguments = _op_arguments(name, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: torch.ops.detr_fast.folded_conv(*t, *arguments[5:]), arguments[:5])


FUSED_DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def _fused_calls(x, weight, capability=(9, 0), residual=None, layout=torch.contiguous_format, **options):
    """Names of the fused operators that a convolution of fake CUDA tensors calls, as on a GPU with cuDNN and Triton."""
    calls = []

    def product(x, weight, bias, residual, *, relu):
        calls.append("product")
        return pointwise_conv(x, weight, bias, residual, relu=relu)

    def stub(name):
        def call(x, folded, *rest):
            calls.append(name)
            bias, *geometry = rest if name == "relu" else rest[2:]
            return torch.nn.functional.conv2d(x, folded, bias, *geometry)

        return call

    with (
        mock.patch.object(folded_conv_module, "_cudnn_relu", stub("relu")),
        mock.patch.object(folded_conv_module, "_cudnn_add_relu", stub("add_relu")),
        mock.patch.object(folded_conv_module, "pointwise_conv", product),
        mock.patch.object(torch.backends.cudnn, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device: capability),
        FakeTensorMode(),
    ):
        x, weight = (torch.empty(shape, dtype=dtype, device="cuda") for shape, dtype in (x, weight))
        x = x.contiguous(memory_format=layout)
        residual = None if residual is None else torch.empty(residual, dtype=x.dtype, device="cuda")
        scale = torch.empty(weight.shape[0], device="cuda")
        geometry = (options.get("stride", (1, 1)), (0, 0), (1, 1), options.get("groups", 1))
        folded_conv_module._forward(x, weight, scale, scale, residual, options.get("relu", True), *geometry)
    return calls


@FUSED_DTYPES
def test_cudnns_fused_operators_are_called(dtype):
    x, weight = ((2, 64, 6, 5), dtype), ((128, 64, 1, 1), torch.float32)
    assert _fused_calls(x, weight) == ["relu"]
    assert _fused_calls(x, weight, residual=(2, 128, 6, 5)) == ["add_relu"]
    assert _fused_calls(x, weight, stride=(2, 2)) == ["relu"]


def test_cudnns_fused_operators_are_not_called_by_rule():
    weight = ((128, 64, 1, 1), torch.float32)
    half = ((2, 64, 6, 5), torch.bfloat16)
    assert _fused_calls(half, weight) == ["relu"]
    assert _fused_calls(half, weight, capability=(7, 5)) == []
    assert _fused_calls(half, weight, relu=False) == []
    assert _fused_calls(half, ((128, 32, 1, 1), torch.float32), groups=2) == []
    assert _fused_calls(((2, 3, 6, 5), torch.float16), ((64, 3, 1, 1), torch.float32)) == []
    assert _fused_calls(((2, 64, 6, 5), torch.float16), ((36, 64, 1, 1), torch.float32)) == []
    assert _fused_calls(((2, 64, 6, 5), torch.float64), weight) == []
    assert _fused_calls(((0, 64, 6, 5), torch.float16), weight) == []
    assert _fused_calls(((1, 64, 2**14, 2**11), torch.float16), weight) == []  # 2^32 elements
    with mock.patch.object(torch.version, "hip", "6.4"):
        assert _fused_calls(half, weight) == []
    with torch.backends.cudnn.flags(enabled=False):
        assert _fused_calls(half, weight) == []


@FUSED_DTYPES
def test_1x1_convolutions_in_channels_last_are_products(dtype):
    x, weight, last = ((2, 64, 6, 5), dtype), ((128, 64, 1, 1), torch.float32), torch.channels_last
    assert _fused_calls(x, weight, layout=last) == ["product"]
    assert _fused_calls(x, weight, layout=last, relu=False) == ["product"]
    assert _fused_calls(x, weight, layout=last, residual=(2, 128, 6, 5)) == ["product"]
    # Channels that cuDNN's fused kernel does not take.
    assert _fused_calls(((2, 3, 6, 5), dtype), ((5, 3, 1, 1), torch.float32), layout=last) == ["product"]


def test_other_convolutions_are_no_products(monkeypatch):
    x, weight, last = ((2, 64, 6, 5), torch.float16), ((128, 64, 1, 1), torch.float32), torch.channels_last
    assert _fused_calls(x, weight) == ["relu"]
    assert _fused_calls(x, weight, layout=last, stride=(2, 2)) == ["relu"]
    assert _fused_calls(x, ((128, 64, 3, 3), torch.float32), layout=last) == ["relu"]
    assert _fused_calls(x, weight, layout=last, capability=(7, 5)) == ["relu"]
    assert _fused_calls(x, ((128, 32, 1, 1), torch.float32), layout=last, groups=2) == []
    assert _fused_calls(((2, 64, 6, 5), torch.float64), weight, layout=last) == []
    monkeypatch.setenv("DETR_FAST_KERNELS", "torch")
    assert _fused_calls(x, weight, layout=last) == ["relu"]


def test_an_error_of_the_fused_operator_is_not_swallowed():
    """It may be an earlier kernel's, which a GPU reports late."""
    with (
        mock.patch.object(folded_conv_module, "_has_fused_kernel", lambda *args: True),
        mock.patch.object(folded_conv_module, "_cudnn_relu", side_effect=RuntimeError("an illegal memory access")),
        pytest.raises(RuntimeError, match="illegal memory access"),
    ):
        folded_conv(torch.zeros(1, 4, 2, 2), torch.zeros(6, 4, 1, 1), torch.ones(6), torch.zeros(6))


def check_against_float64(name, dtype, device):
    """Elementwise, for inputs that are exact in `dtype`."""
    options = dict(CASES[name])
    kernel, residual, bias = options.pop("kernel"), options.pop("residual", False), options.pop("bias", True)

    def draw(*size, scale=1.0):
        return (scale * torch.randn(size)).to(dtype).double()

    weight = draw(128, 64 // options.get("groups", 1), kernel, kernel, scale=1 / 8)
    scale, shift = torch.rand(128).double() + 0.5, torch.randn(128).double() if bias else None
    exact = [draw(2, 64, 24, 20).requires_grad_(), weight.requires_grad_(), scale, shift]
    exact.append(draw(2, 128, 24, 20).requires_grad_() if residual else None)
    kinds = (dtype, dtype, torch.float32, torch.float32, dtype)
    ours = [
        None if t is None else t.detach().to(device, d).requires_grad_(t.requires_grad)
        for t, d in zip(exact, kinds, strict=True)
    ]
    ours[0] = ours[0].detach().to(memory_format=torch.channels_last).requires_grad_()
    # The result's memory holds NaN before; cuDNN's convolution without a residual is handed it as one, with weight 0.
    for _ in [torch.full((2, 128, 24, 20), torch.nan, dtype=dtype, device=device) for _ in range(8)]:
        pass
    out, gradients = _gradients(folded_conv, ours, options)
    # Gradients for our result's active elements: near zero, rounding decides which those are.
    active = out.cpu() > 0 if options.get("relu", True) else None
    linear, expected_gradients = _gradients(folded_conv_reference, exact, options | {"relu": False}, active)
    expected = linear if active is None else linear.relu()
    for value, right in zip((out, *gradients), (expected, *expected_gradients), strict=True):
        assert ((value.cpu().double() - right).abs() <= 0.01 * right.abs().max()).all()


@pytest.mark.gpu
@FUSED_DTYPES
@pytest.mark.parametrize("name", CASES)
def test_folded_conv_on_a_gpu(name, dtype):
    check_against_float64(name, dtype, "cuda")


@pytest.mark.gpu
@FUSED_DTYPES
def test_cudnns_fused_operators_run_on_a_gpu(dtype):
    x, weight = torch.randn(2, 64, 24, 20), torch.randn(128, 64, 3, 3)
    x, weight = x.to("cuda", dtype, memory_format=torch.channels_last), weight.to("cuda")
    scale = torch.ones(128, device="cuda")
    for residual, name in ((None, "convolution_relu"), (x.new_zeros(2, 128, 24, 20), "convolution_add_relu")):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            folded_conv(x, weight, scale, scale, residual, padding=(1, 1))
        assert f"aten::cudnn_{name}" in {event.key for event in profiler.key_averages()}


@pytest.mark.parametrize("name", CASES)
def test_folded_conv_in_bfloat16(name):
    check_against_float64(name, torch.bfloat16, "cpu")


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))

    def forward(self, x, residual):
        return folded_conv(x, self.weight, torch.full((6,), 0.5), torch.ones(6), residual, padding=(1, 1))


def test_folded_conv_compiles_dynamic():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    net = _Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 4, 8, 5), (3, 4, 7, 9), (5, 4, 12, 10)):
        x, residual = torch.randn(size, requires_grad=True), torch.randn(size[0], 6, *size[2:], requires_grad=True)
        out = compiled(x, residual)
        torch.testing.assert_close(out, net(x, residual))
        cotangent, inputs = torch.randn_like(out), (net.weight, x, residual)
        for value, right in zip(
            *(torch.autograd.grad(f(x, residual), inputs, cotangent) for f in (compiled, net)), strict=True
        ):
            torch.testing.assert_close(value, right)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
