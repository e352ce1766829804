"""Linear layers on an x86 CPU: F.linear's results and gradients, and whatever wants to see F.linear sees it."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad

from detr_fast.layers import linear as linear_module
from detr_fast.layers.linear import apply_linear, apply_projection, linear
from detr_fast.ops._onednn import HAS_ONEDNN

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs without the interpreter"),
    pytest.mark.skipif(not HAS_ONEDNN, reason="PyTorch without oneDNN"),
]


@pytest.fixture
def products(monkeypatch):
    """The products that oneDNN computes: a list that grows."""
    calls = []
    product = linear_module.product
    monkeypatch.setattr(linear_module, "product", lambda *args: calls.append(args) or product(*args))
    return calls


def _assert_near(value, expected):
    assert value.shape == expected.shape and value.dtype == expected.dtype
    assert (value - expected).abs().max() <= 1e-5 * expected.abs().max()


INPUTS = {
    "matrix": lambda: torch.randn(130, 256),
    "batch": lambda: torch.randn(2, 65, 256),
    "transposed": lambda: torch.randn(65, 2, 256).transpose(0, 1),
    "strided": lambda: torch.randn(130, 512)[:, ::2],
    "expanded": lambda: torch.randn(1, 256).expand(130, 256),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_equals_f_linear_with_gradients(kind, has_bias, products):
    torch.manual_seed(0)
    x = INPUTS[kind]().requires_grad_()
    whole = torch.randn(3 * 192, 256, requires_grad=True)
    weight = whole.split(192)[1]  # as in a packed projection
    bias = torch.randn(192, requires_grad=True) if has_bias else None
    inputs = [x, whole] + ([bias] if has_bias else [])
    out, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    _assert_near(out, expected)
    for cotangent in (torch.randn_like(out), torch.randn(192).expand_as(out)):
        grads = torch.autograd.grad(out, inputs, cotangent, retain_graph=True)
        for value, right in zip(
            grads, torch.autograd.grad(expected, inputs, cotangent, retain_graph=True), strict=True
        ):
            _assert_near(value, right)
    assert len(products) == 5  # the forward's, and two of each backward
    with torch.no_grad():
        _assert_near(linear(x, weight, bias), expected)
    assert len(products) == 6


def test_only_the_gradients_that_are_needed(products):
    x, weight = torch.randn(130, 256), torch.randn(192, 256, requires_grad=True)
    linear(x, weight).sum().backward()
    assert len(products) == 2 and weight.grad is not None
    linear(x.requires_grad_(), weight.detach()).sum().backward()
    assert len(products) == 4


def test_second_derivatives():
    x, weight = torch.randn(130, 256, requires_grad=True), torch.randn(192, 256, requires_grad=True)

    def twice(function):
        (grad,) = torch.autograd.grad(function(x, weight).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), weight)[0]

    _assert_near(twice(linear), twice(F.linear))


def test_nan_reaches_the_result():
    x, weight = torch.randn(130, 256), torch.randn(192, 256)
    x[3, 0], x[4, 0] = torch.nan, torch.inf
    assert torch.equal(linear(x, weight).isfinite(), F.linear(x, weight).isfinite())


def test_changed_weights_are_seen():
    x, weight = torch.randn(130, 256), torch.randn(192, 256)
    linear(x, weight)
    weight.numpy()[:] *= 2
    _assert_near(linear(x, weight), F.linear(x, weight))


def test_who_wants_to_see_f_linear_sees_it(products):
    x, weight = torch.randn(130, 256), torch.randn(192, 256)
    linear(x[:1], weight)  # few multiplications
    linear(x.double(), weight.double())
    linear(x[:0], weight)
    linear(torch.randn(2**15), torch.randn(128, 2**15))  # a vector
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    torch.func.vmap(linear, (0, None))(x[None], weight)
    torch.func.grad(lambda x: linear(x, weight).sum())(x)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(linear(forward_ad.make_dual(x, torch.ones_like(x)), weight)).tangent
    _assert_near(tangent, F.linear(torch.ones_like(x), weight))
    torch.jit.trace(linear, (x, weight), check_trace=False)
    torch.compile(linear, backend="eager")(x, weight)
    with torch.device("meta"):
        linear(torch.empty(130, 256), torch.empty(192, 256))
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, weight)
    assert products == []
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, torch.randn(256, 192))
    with pytest.raises(RuntimeError):
        linear(x, weight.double())


class _Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@torch.no_grad()
def test_modules_with_hooks_and_subclasses_are_called(products):
    x, module = torch.randn(130, 256), nn.Linear(256, 192)
    expected = module(x)
    _assert_near(apply_linear(module, x), expected)
    assert len(products) == 1
    handle = module.register_forward_hook(lambda module, args, out: out + 1)
    _assert_near(apply_linear(module, x), expected + 1)
    handle.remove()
    handle = module.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    _assert_near(apply_linear(module, x), module.bias.expand(130, 192))
    handle.remove()
    module.forward = lambda x: x
    assert apply_linear(module, x) is x
    other = _Twice(256, 192)
    assert torch.equal(apply_linear(other, x), other(x))
    assert len(products) == 1


@pytest.mark.parametrize("channels_last", [False, True])
def test_projection_equals_its_convolution(channels_last, products):
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 256, 8, 9).contiguous(memory_format=format).requires_grad_()
    module = nn.Conv2d(256, 128, 1)
    out, expected = apply_projection(module, x), module(x)
    _assert_near(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last) and len(products) == 1
    cotangent, inputs = torch.randn_like(out), [x, module.weight, module.bias]
    for value, right in zip(*(torch.autograd.grad(y, inputs, cotangent) for y in (out, expected)), strict=True):
        _assert_near(value, right)


@torch.no_grad()
def test_other_projections_are_called(products):
    x = torch.randn(2, 256, 8, 9)
    for options in ({"stride": 2}, {"padding": 1}, {"groups": 2}, {"kernel_size": 3}):
        module = nn.Conv2d(256, 128, **({"kernel_size": 1} | options))
        assert torch.equal(apply_projection(module, x), module(x))
    module = nn.Conv2d(256, 128, 1)
    assert torch.equal(apply_projection(module, x[0]), module(x[0]))
    module.register_forward_hook(lambda module, args, out: out + 1)
    assert torch.equal(apply_projection(module, x), module(x))
    assert products == []
