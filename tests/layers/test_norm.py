import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detr_fast.layers import BatchNorm2d, FrozenBatchNorm2d


def _filled(norm):
    state = norm.state_dict()
    for name, value in state.items():
        value.copy_(torch.rand_like(value) + 0.5 if name in ("weight", "running_var") else torch.randn_like(value))
    return norm


def test_frozen_norm_matches_formula_and_has_no_parameters():
    norm = _filled(FrozenBatchNorm2d(6))
    x = torch.randn(2, 6, 5, 7, requires_grad=True)
    scale = norm.weight / (norm.running_var + 1e-5).sqrt()
    expected = (x - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected)
    cotangent = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(norm(x), x, cotangent)
    torch.testing.assert_close(gradient, cotangent * scale[:, None, None])
    assert list(norm.parameters()) == []


def test_frozen_norm_uses_eps_inside_the_root():
    norm = FrozenBatchNorm2d(1)
    norm.running_var.zero_()
    torch.testing.assert_close(norm(torch.ones(1, 1, 1, 1)).item(), 1e-5**-0.5)


def test_frozen_norm_ignores_batch_statistics_in_train_mode():
    norm = _filled(FrozenBatchNorm2d(3)).train()
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(norm(x), norm.eval()(x))
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frozen_norm_keeps_low_precision(dtype, memory_format):
    norm = _filled(FrozenBatchNorm2d(6))
    x = torch.randn(2, 6, 5, 7).to(dtype).contiguous(memory_format=memory_format).requires_grad_()
    out = norm(x)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=memory_format)
    expected = norm(x.detach().double())
    # One rounding of the result, so not further from the truth than the nearest number of this dtype.
    torch.testing.assert_close(out.double(), expected.to(dtype).double(), rtol=torch.finfo(dtype).eps, atol=1e-6)
    cotangent = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(out, x, cotangent)
    scale = norm.weight * (norm.running_var + 1e-5).rsqrt()
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.float(), cotangent.float() * scale[:, None, None], rtol=0.01, atol=1e-3)


def test_frozen_norm_stays_low_under_autocast():
    convolution, norm = nn.Conv2d(3, 6, 1), _filled(FrozenBatchNorm2d(6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(convolution(torch.randn(1, 3, 4, 4))).dtype == torch.bfloat16


@pytest.mark.parametrize("norm_class", [FrozenBatchNorm2d, BatchNorm2d])
def test_norms_load_with_and_without_num_batches_tracked(norm_class):
    stock = nn.BatchNorm2d(4)
    for state in (stock.state_dict(), dict(stock.state_dict())):
        norm_class(4).load_state_dict(dict(state), strict=True)
        state.pop("num_batches_tracked")
        norm = norm_class(4)
        norm.load_state_dict(state, strict=True)
        assert list(norm.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    with pytest.raises(RuntimeError, match="running_var"):
        norm_class(4).load_state_dict({name: value for name, value in state.items() if name != "running_var"})


def test_batch_norm_trains_as_stock():
    ours, stock = BatchNorm2d(4), nn.BatchNorm2d(4)
    for _ in range(2):
        x = torch.randn(3, 4, 5, 5) + 1
        torch.testing.assert_close(ours(x), stock(x))
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, stock.state_dict()[name])
    x = torch.randn(3, 4, 5, 5)
    expected = F.batch_norm(x, stock.running_mean, stock.running_var, stock.weight, stock.bias)
    torch.testing.assert_close(ours.eval()(x), expected)
