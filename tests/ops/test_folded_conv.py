"""Convolution with a folded frozen norm, residual and ReLU."""

import warnings

import pytest
import torch
from torch import nn

from detr_fast.layers import FrozenBatchNorm2d
from detr_fast.layers.norm import frozen_affines
from detr_fast.ops import folded_conv as folded_conv_module
from detr_fast.ops.folded_conv import folded_conv, folded_conv_reference

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


def test_only_what_is_needed_is_kept():
    tensors, options = _case("residual", torch.float32)
    x, weight, scale, bias, residual = tensors

    def kept(*inputs):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            out = folded_conv(*inputs, **options)
        return out, [t.data_ptr() for t in saved]

    out, saved = kept(x, weight, scale, bias, residual)
    assert len(saved) == 4 and {x.data_ptr(), scale.data_ptr(), out.data_ptr()} < set(saved)
    out, saved = kept(x.detach(), weight, scale, bias, residual)
    assert set(saved) == {x.data_ptr(), scale.data_ptr(), out.data_ptr()}  # no folded weights
    out, saved = kept(x, weight.detach(), scale, bias, residual)
    assert len(saved) == 2 and out.data_ptr() in saved and x.data_ptr() not in saved
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
    with pytest.raises(RuntimeError, match="once_differentiable"):
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


def test_refused_by_cudnn_is_told_once_and_computed_all_the_same(monkeypatch):
    """On the CPU cuDNN's operators refuse everything: what `_forward` does then on a GPU."""
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda x: True)
    monkeypatch.setattr(folded_conv_module, "_REFUSED", set())
    x, folded, geometry = torch.randn(1, 4, 3, 3), torch.randn(6, 4, 1, 1), ((1, 1), (0, 0), (1, 1), 1)
    for residual in (None, torch.randn(1, 6, 3, 3)):
        with pytest.warns(UserWarning, match="cuDNN has no fused convolution"):
            assert folded_conv_module._cudnn(x, folded, None, residual, geometry) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert folded_conv_module._cudnn(x, folded, None, residual, geometry) is None


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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_folded_conv_on_a_gpu(name, dtype):
    """cuDNN's fused kernels; they must be there for a block's convolutions in half precision."""
    with warnings.catch_warnings():
        warnings.simplefilter("error" if "groups" not in name and dtype != torch.float32 else "default")
        check_against_float64(name, dtype, "cuda")


@pytest.mark.parametrize("name", CASES)
def test_folded_conv_in_bfloat16(name):
    check_against_float64(name, torch.bfloat16, "cpu")


class _Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 1, 1))

    def forward(self, x):
        return folded_conv(x, self.weight, torch.ones(6), torch.zeros(6))


def test_folded_conv_compiles_dynamic():
    torch._dynamo.reset()
    net = _Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in ((2, 4, 6, 5), (3, 4, 7, 9)):
        x = torch.randn(size)
        out = compiled(x)
        torch.testing.assert_close(out, net(x))
        cotangent = torch.randn_like(out)
        torch.testing.assert_close(*(torch.autograd.grad(f(x), net.weight, cotangent) for f in (compiled, net)))
