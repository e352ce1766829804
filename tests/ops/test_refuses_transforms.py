"""Tests that the differentiable ops refuse `torch.func`'s transforms and forward-mode derivatives."""

import pytest
import torch
from torch.autograd import forward_ad

from detr_fast.ops import attention, joint_softmax, pad_collate, pointwise_conv
from detr_fast.ops.folded_conv import folded_conv

OPS = {
    "attention": lambda x: attention(x, x, x)[0],
    "folded_conv": lambda x: folded_conv(x, torch.ones(2, 3, 1, 1), torch.ones(2), None),
    "joint_softmax": joint_softmax,
    "pad_collate": lambda x: pad_collate([x[0]])[0],
    "pointwise_conv": lambda x: pointwise_conv(x, torch.ones(2, 3, 1, 1)),
}


@pytest.mark.parametrize("name", OPS)
def test_ops_refuse_transforms(name):
    op, x = OPS[name], torch.rand(2, 3, 4, 5)
    with pytest.raises(NotImplementedError, match=f"{name} does not support"):
        torch.func.grad(lambda y: op(y).sum())(x)
    with pytest.raises(NotImplementedError, match=f"{name} does not support"):
        torch.func.jvp(op, (x,), (x,))
    with pytest.raises(NotImplementedError, match=f"{name} does not support"):
        torch.vmap(op)(x[None])


@pytest.mark.parametrize("name", OPS)
def test_ops_refuse_tangents(name):
    op, x = OPS[name], torch.rand(2, 3, 4, 5)
    with forward_ad.dual_level():
        op(x)  # what carries no tangent is taken
        with pytest.raises(NotImplementedError, match=f"{name} does not support"):
            op(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("size_divisor", [2.5, "2"])
def test_pad_collate_size_divisor_is_an_integer(size_divisor):
    with pytest.raises(TypeError, match="size_divisor"):
        pad_collate([torch.rand(3, 4, 5)], size_divisor=size_divisor)
