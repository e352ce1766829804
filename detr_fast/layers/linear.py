"""Linear layers that on an x86 CPU are computed by oneDNN; elsewhere they are PyTorch's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from detr_fast.ops._onednn import product, takes_product

_LINEAR = (nn.Linear, NonDynamicallyQuantizableLinear)
_PLAIN = (Tensor, nn.Parameter)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, with the same results up to rounding: x [..., K], weight [N, K], bias [N] → [..., N]."""
    if not _takes(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _Linear.apply(x, weight, bias)
    return product(x, weight, bias)


def apply_linear(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, by `linear` where that goes unnoticed: for an `nn.Linear` without hooks."""
    if type(module) not in _LINEAR or is_altered(module):
        return module(x)
    return linear(x, module.weight, module.bias)


def apply_projection(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, x [B, C, h, w]; a 1x1 convolution without hooks by `linear` where that is oneDNN's.

    Then the result is channels-last.
    """
    if type(module) is nn.Conv2d and not is_altered(module) and x.dim() == 4 and module.kernel_size == (1, 1):
        pixels, weight = x.permute(0, 2, 3, 1), module.weight.flatten(1)
        is_product = (*module.stride, *module.padding, module.groups) == (1, 1, 0, 0, 1)
        if is_product and _takes(pixels, weight, module.bias):
            return linear(pixels, weight, module.bias).permute(0, 3, 1, 2)
    return module(x)


def is_altered(module: nn.Module) -> bool:
    """Whether a call of the module does more than its class says."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN computes this: no subclass, transform, tangent or tracer that wants to see `F.linear`."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or torch.jit.is_tracing():
        return False
    return (
        type(x) is Tensor
        and x.dim() > 1
        and type(weight) in _PLAIN
        and (bias is None or (type(bias) in _PLAIN and bias.dtype == torch.float32))
        and x.shape[-1:] == weight.shape[1:]
        and weight.is_contiguous()
        and takes_product(x.numel() // max(x.shape[-1], 1), x, weight)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        # Differentiated twice, the gradients are computed by what can be differentiated.
        multiply = _matmul if torch.is_grad_enabled() else product
        x_needed, weight_needed, bias_needed = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # [M, N]
        grad_x = multiply(grad, weight.t()) if x_needed else None
        grad_weight = multiply(rows.t(), x.reshape(-1, x.shape[-1]).t()) if weight_needed else None
        return grad_x, grad_weight, rows.sum(0) if bias_needed else None


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.t()
