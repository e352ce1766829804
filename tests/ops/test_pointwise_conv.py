"""`pointwise_conv` against a convolution and its steps, as reference on the CPU and as interpreted kernel."""

import os

import pytest
import torch
import torch.nn.functional as F

from detr_fast.ops import pointwise_conv, pointwise_conv_reference
from detr_fast.ops.pointwise_conv import pointwise_conv_input_grad

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
both = [pytest.param(None, id="reference", marks=pytest.mark.skipif(INTERPRET, reason="runs without the interpreter"))]
both += [pytest.param(None, id="interpreted", marks=pytest.mark.interpret)]
either = pytest.mark.parametrize("_implementation", both)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])

# (B, C, O, H, W): whole tiles, several ragged ones, single elements, nothing.
SHAPES = [(1, 64, 128, 8, 16), (2, 40, 72, 9, 11), (1, 129, 65, 5, 13), (1, 1, 1, 1, 1), (0, 4, 3, 5, 5)]
SHAPES += [(2, 4, 3, 0, 5), (2, 4, 0, 3, 3), (2, 0, 3, 3, 3)]
# Whether there are a bias, a residual and a ReLU.
OPTIONS = {"all": (True,) * 3, "relu": (True, False, True), "residual": (False, True, False), "plain": (False,) * 3}


def _case(shape, options="all", dtype=torch.float32, device="cpu"):
    batch, channels, filters, height, width = shape
    bias, residual, _ = OPTIONS[options]
    x = torch.randn(batch, height, width, channels, device=device).to(dtype).permute(0, 3, 1, 2)
    weight = (torch.randn(filters, channels, 1, 1, device=device) / max(channels, 1) ** 0.5).to(dtype)
    added = torch.randn(batch, height, width, filters, device=device).to(dtype).permute(0, 3, 1, 2)
    return x, weight, torch.randn(filters, device=device) if bias else None, added if residual else None


def _written_out(x, weight, bias, residual, relu):
    """The steps in float64, the convolution as a sum over the channels."""
    out = torch.einsum("bchw,oc->bohw", x.double(), weight.double()[:, :, 0, 0])
    out = out if bias is None else out + bias.double()[:, None, None]
    out = out if residual is None else out + residual.double()
    return out.clamp(min=0) if relu else out


def _check_errors(out, inputs, relu):
    """Elementwise: rounding once to the dtype, and a float32 sum over the channels."""
    x, weight, *_ = inputs
    exact = _written_out(*inputs, relu)
    terms = _written_out(x.abs(), weight.abs(), *(None if t is None else t.abs() for t in inputs[2:]), False)
    unit = torch.finfo(out.dtype).eps
    assert ((out.double() - exact).abs() <= 0.51 * unit * exact.abs() + 2**-20 * terms + 1e-7).all()


@either
@DTYPES
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pointwise_conv_matches_written_out(shape, options, dtype, _implementation):
    inputs, relu = _case(shape, options, dtype), OPTIONS[options][2]
    out = pointwise_conv(*inputs, relu=relu)
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)
    if not INTERPRET or dtype != torch.bfloat16:
        _check_errors(out, inputs, relu)
    else:  # the interpreter truncates where it casts to bfloat16
        torch.testing.assert_close(out.double(), _written_out(*inputs, relu), rtol=2**-7, atol=1e-3)


@DTYPES
def test_pointwise_conv_reference_is_the_convolution_and_its_steps(dtype):
    x, weight, bias, residual = (t.float() for t in _case((2, 40, 72, 9, 11), "all", dtype))
    expected = (F.conv2d(x, weight, bias) + residual).relu().to(dtype).contiguous(memory_format=torch.channels_last)
    out = pointwise_conv_reference(x.to(dtype), weight.to(dtype), bias, residual.to(dtype))
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=torch.finfo(dtype).eps, atol=1e-5)
    torch.testing.assert_close(out, expected, **tolerance)


@either
def test_pointwise_conv_takes_any_strides(_implementation):
    x, weight, bias, residual = _case((2, 10, 6, 7, 5))
    expected = pointwise_conv(x, weight, bias, residual)
    strided = [
        x.contiguous(),
        torch.stack((x, x + 1), dim=-1)[..., 0],
        x.transpose(2, 3).contiguous(memory_format=torch.channels_last).transpose(2, 3),
        torch.cat((x, x), dim=1)[:, :10],
    ]
    wide = torch.stack((weight, weight), dim=1)[:, 0]
    for other in strided:
        added = torch.cat((residual, residual), dim=3)[..., :5]
        out = pointwise_conv(other, wide, torch.stack((bias, bias), dim=1)[:, 0], added)
        assert out.stride() == expected.stride()
        torch.testing.assert_close(out, expected)


@either
def test_pointwise_conv_reads_nothing_outside_its_inputs(_implementation):
    """Ragged tiles inside of larger buffers of NaN."""
    inputs = _case((1, 40, 72, 9, 11))
    guarded = []
    for tensor in inputs:
        buffer = torch.full((tensor.numel() + 20000,), torch.nan)
        guarded.append(buffer[10000 : 10000 + tensor.numel()].as_strided(tensor.shape, tensor.stride(), 10000))
        guarded[-1].copy_(tensor)
    assert torch.equal(pointwise_conv(*guarded), pointwise_conv(*inputs))


@either
def test_pointwise_conv_keeps_nan(_implementation):
    x, weight, bias, residual = _case((1, 8, 3, 4, 4))
    x[0, 2, 1, 3] = torch.nan
    out = pointwise_conv(x, weight, bias, residual)
    assert out[0, :, 1, 3].isnan().all() and out.isnan().sum() == 3


@either
@DTYPES
@pytest.mark.parametrize("options", OPTIONS)
def test_pointwise_conv_grad_matches_written_out(options, dtype, _implementation):
    inputs, relu = _case((2, 24, 40, 5, 7), options, dtype), OPTIONS[options][2]
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    out = pointwise_conv(*leaves, relu=relu)
    # A gradient in other strides than the output's.
    cotangent = torch.randn(2, 40, 7, 5).to(dtype).transpose(2, 3)
    out.backward(cotangent)
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    # Gradients for our result's active elements: near zero, rounding decides which those are.
    masked = cotangent.double() * (out > 0) if relu else cotangent.double()
    _written_out(*exact, False).backward(masked)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for ours, right in zip(leaves, exact, strict=True):
        if ours is not None:
            assert ours.grad.dtype == ours.dtype
            assert ((ours.grad - right.grad).abs() <= tolerance * right.grad.abs().max()).all()


# Whether there are a shortcut and a gate.
INPUT_GRADS = pytest.mark.parametrize("options", [(True, True), (False, True), (True, False)], ids=str)


def _input_grad_case(shape, options, dtype=torch.float32, device="cpu"):
    """The gradient of the output, the weight, the shortcut's gradient and the gate, of which half is zero."""
    x, weight, _, grad = _case(shape, "residual", dtype, device)
    shortcut = torch.randn_like(x) if options[0] else None
    return grad, weight, shortcut, x.relu() if options[1] else None


def _check_input_grad(inputs):
    grad, weight, shortcut, gate = inputs
    out = pointwise_conv_input_grad(*inputs)
    assert out.dtype == grad.dtype and out.is_contiguous(memory_format=torch.channels_last)
    turned = weight.transpose(0, 1)
    exact = _written_out(grad, turned, None, shortcut, False)
    terms = _written_out(grad.abs(), turned.abs(), None, None if shortcut is None else shortcut.abs(), False)
    if gate is not None:
        assert (out[gate <= 0] == 0).all()
        exact = exact * (gate > 0)
    # The interpreter truncates where it casts to bfloat16.
    unit = torch.finfo(out.dtype).eps * (2 if INTERPRET and out.dtype == torch.bfloat16 else 1)
    assert ((out.double() - exact).abs() <= 0.51 * unit * exact.abs() + 2**-20 * terms + 1e-7).all()


@either
@DTYPES
@INPUT_GRADS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pointwise_conv_input_grad_matches_written_out(shape, options, dtype, _implementation):
    _check_input_grad(_input_grad_case(shape, options, dtype))


@either
def test_pointwise_conv_input_grad_is_autograds(_implementation):
    """Of relu, then the convolution beside a shortcut; in any strides."""
    x, weight, *_ = _case((2, 24, 40, 5, 7))
    x.requires_grad_()
    gate = x.relu()
    out = F.conv2d(gate, weight)
    grad, shortcut = torch.randn_like(out), torch.randn_like(x)
    torch.autograd.backward([out, gate], [grad, shortcut])
    strided = [torch.stack((t, t), dim=-1)[..., 0] for t in (grad, weight, shortcut, gate.detach())]
    torch.testing.assert_close(pointwise_conv_input_grad(*strided), x.grad)


@either
def test_pointwise_conv_input_grad_where_the_gate_is_nan(_implementation):
    grad, weight, shortcut, gate = _input_grad_case((1, 8, 3, 4, 4), (True, True))
    gate[0, 2, 1, 3], gate[0, 3, 1, 3], grad[0, 0, 2, 2] = torch.nan, 0, torch.nan
    out = pointwise_conv_input_grad(grad, weight, shortcut, gate)
    plain = pointwise_conv_input_grad(grad, weight, shortcut)
    expected = torch.ops.aten.threshold_backward(plain, gate, 0)
    assert out[0, 2, 1, 3] == plain[0, 2, 1, 3] and out[0, 3, 1, 3] == 0
    torch.testing.assert_close(out, expected, equal_nan=True)


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_pointwise_conv_input_grad_opcheck(dtype, _implementation):
    for options in ((True, True), (False, False)):
        inputs = _input_grad_case((2, 5, 6, 3, 4), options, dtype)
        torch.library.opcheck(torch.ops.detr_fast.pointwise_conv_input_grad.default, inputs)


def test_pointwise_conv_input_grad_rejects():
    grad, weight, shortcut, gate = _input_grad_case((1, 4, 6, 2, 2), (True, True))
    with pytest.raises(ValueError, match=r"weight is \[4, 4, 1, 1\]; expected \[O, 6, 1, 1\] for grad of"):
        pointwise_conv_input_grad(grad, weight[:4].transpose(0, 1))
    with pytest.raises(ValueError, match=r"weight is \[6, 4, 3, 3\]; expected \[O, C, 1, 1\]"):
        pointwise_conv_input_grad(grad, torch.zeros(6, 4, 3, 3))
    with pytest.raises(ValueError, match=r"gate is \[1, 4, 2, 1\]; expected \[1, 4, 2, 2\]"):
        pointwise_conv_input_grad(grad, weight, shortcut, gate[..., :1])
    with pytest.raises(TypeError, match="shortcut is torch.float64; expected torch.float32"):
        pointwise_conv_input_grad(grad, weight, shortcut.double())


@pytest.mark.parametrize("options", OPTIONS)
def test_pointwise_conv_gradcheck(options):
    inputs = [None if t is None else t.double().requires_grad_() for t in _case((2, 3, 4, 2, 3), options)]
    assert torch.autograd.gradcheck(lambda *t: pointwise_conv(*t, relu=OPTIONS[options][2]), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: pointwise_conv(*t, relu=OPTIONS[options][2]), inputs)


def test_only_what_is_needed_is_kept():
    x, weight, bias, residual = _case((2, 3, 4, 2, 3))

    def kept(*needed):
        tensors = [t.detach().requires_grad_(n) for t, n in zip((x, weight, bias, residual), needed, strict=True)]
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
            out = pointwise_conv(*tensors)
        return saved, out.data_ptr()

    saved, out = kept(True, True, True, True)
    assert sorted(saved) == sorted([x.data_ptr(), weight.data_ptr(), out])
    saved, out = kept(True, False, False, False)
    assert sorted(saved) == sorted([weight.data_ptr(), out])
    saved, out = kept(False, False, False, True)
    assert saved == [out]
    assert kept(False, False, False, False)[0] == []


@either
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", ["all", "plain"])
def test_pointwise_conv_opcheck(options, dtype, _implementation):
    x, weight, bias, residual = _case((2, 5, 6, 3, 4), options, dtype)
    bias = bias if bias is None or dtype != torch.float64 else bias.double()
    inputs = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    torch.library.opcheck(torch.ops.detr_fast.pointwise_conv.default, (*inputs, OPTIONS[options][2]))


def test_pointwise_conv_compiles_dynamic():
    compiled = torch.compile(pointwise_conv, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 5, 6, 3, 4), (1, 5, 6, 7, 2)):
        inputs = [t.detach().requires_grad_() for t in _case(shape)]
        again = [t.detach().requires_grad_() for t in inputs]
        out, expected = compiled(*inputs), pointwise_conv(*again)
        cotangent = torch.randn_like(out)
        torch.autograd.backward([out, expected], [cotangent, cotangent])
        torch.testing.assert_close(out, expected)
        for ours, right in zip(inputs, again, strict=True):
            torch.testing.assert_close(ours.grad, right.grad)


REJECTED = {
    "x is torch.int64": (TypeError, dict(x=torch.zeros(1, 4, 2, 2, dtype=torch.int64))),
    r"x is \[4, 2, 2\]": (ValueError, dict(x=torch.zeros(4, 2, 2))),
    r"weight is \[6, 4, 3, 3\]; expected \[O, 4, 1, 1\]": (ValueError, dict(weight=torch.zeros(6, 4, 3, 3))),
    "weight is torch.float64; expected torch.float32": (TypeError, dict(weight=torch.zeros(6, 4, 1, 1).double())),
    r"bias is \[5\]; expected \[6\]": (ValueError, dict(bias=torch.zeros(5))),
    r"residual is \[1, 6, 2, 1\]; expected \[1, 6, 2, 2\]": (ValueError, dict(residual=torch.zeros(1, 6, 2, 1))),
    "residual is on meta, x on cpu": (ValueError, dict(residual=torch.zeros(1, 6, 2, 2, device="meta"))),
}


@pytest.mark.parametrize("message", REJECTED)
def test_pointwise_conv_rejects(message):
    error, changed = REJECTED[message]
    arguments = dict(x=torch.zeros(1, 4, 2, 2), weight=torch.zeros(6, 4, 1, 1)) | changed
    with pytest.raises(error, match=message):
        pointwise_conv(**arguments)


@pytest.mark.gpu
@DTYPES
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 256, 512, 50, 38)], ids=str)
def test_pointwise_conv_on_a_gpu(shape, options, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    inputs, relu = _case(shape, options, dtype, "cuda"), OPTIONS[options][2]
    _check_errors(pointwise_conv(*inputs, relu=relu), inputs, relu)


@pytest.mark.gpu
@DTYPES
@INPUT_GRADS
@pytest.mark.parametrize("shape", [*SHAPES, (2, 512, 256, 50, 38)], ids=str)
def test_pointwise_conv_input_grad_on_a_gpu(shape, options, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    _check_input_grad(_input_grad_case(shape, options, dtype, "cuda"))


def test_plain_pytorch_rounds_once_under_autocast():
    """Its product is float32's whatever autocast says: a bias that cancels the product shows it."""
    x, weight = torch.randn(1, 512, 3, 3).bfloat16(), torch.randn(8, 512, 1, 1).bfloat16()
    exact = torch.nn.functional.conv2d(x.double(), weight.double())
    bias = -exact[0, :, 0, 0].float()
    with torch.autocast("cpu", torch.bfloat16):
        out = pointwise_conv_reference(x, weight, bias, relu=False)
    expected = exact + bias.double()[:, None, None]
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-4)
