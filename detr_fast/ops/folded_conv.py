"""Convolution, frozen batch norm, residual and ReLU as one step.

A frozen norm is y = scale * x + bias with constants, so it folds into the convolution before it: the weights are
multiplied by scale, the bias is added by the convolution. What is left of conv → norm → (+ residual) → ReLU is one
convolution, on a GPU one cuDNN kernel (`aten.cudnn_convolution_relu`, `aten.cudnn_convolution_add_relu`), and of the
four activations that autograd would keep only the last one is: it tells where ReLU was active, and it is the next
convolution's input anyway.

    forward:   out = relu(conv(x, scale * W) + bias + residual)
    backward:  g = grad where out > 0;  dresidual = g;  dx = conv_backward(g, scale * W);
               dW = scale * conv_backward_weight(g, x)

The weights are folded in float32 (float64 for float64) and rounded once to the activations' dtype.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Affine = tuple[Tensor, Tensor | None]

# What cuDNN has no fused kernel for on this machine: then the steps are computed one by one.
_REFUSED: set[tuple] = set()


def folded_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """relu(conv(x, scale * weight) + bias + residual), differentiable once in x, weight and residual.

    Under autocast x and residual are cast as a convolution's would be. Where no input needs a gradient nothing is
    kept. A channels-last x gives a channels-last result.

    Args:
        x: [B, C, H, W], floating point.
        weight: [O, C / groups, kh, kw].
        scale, bias: [O], constants in float32 (float64); None adds no bias.
        residual: [B, O, h, w], like the result, or None.
        relu: False leaves the ReLU out.
        stride, padding, dilation, groups: of the convolution.

    Returns:
        [B, O, h, w] in x's dtype, or in autocast's.

    Raises:
        ValueError: scale or bias does not fit the weight.
    """
    if scale.shape != weight.shape[:1] or (bias is not None and bias.shape != scale.shape):
        shapes = f"scale is {list(scale.shape)}, bias {None if bias is None else list(bias.shape)}"
        raise ValueError(f"{shapes}; expected [{weight.shape[0]}] for a weight of {list(weight.shape)}")
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, residual = x.to(dtype), None if residual is None else residual.to(dtype)
    geometry = (stride, padding, dilation, groups)
    inputs = (x, weight, residual)
    if torch.compiler.is_compiling():
        # The compiler differentiates and fuses this itself; torch 2.11's gives wrong gradients for a function that
        # defines its own.
        folded = (weight * scale[:, None, None, None]).to(x.dtype)
        out = F.conv2d(x, folded, None if bias is None else bias.to(x.dtype), *geometry)
        out = out if residual is None else out + residual
        return out.relu() if relu else out
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _FoldedConv.apply(x, weight, scale, bias, residual, relu, geometry)
    with torch.no_grad():
        return _forward(x, _fold(x, weight, scale), bias, residual, relu, geometry)


def folded_conv_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    relu: bool = True,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """As `folded_conv`, step by step and unfolded: the convolution first, then scale and bias, residual and ReLU."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = F.conv2d(x, weight.to(x.dtype), None, stride, padding, dilation, groups).to(dtype)
    out = out * scale[:, None, None]
    if bias is not None:
        out = out + bias[:, None, None]
    if residual is not None:
        out = out + residual
    return (out.relu() if relu else out).to(x.dtype)


class _FoldedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale, bias, residual, relu, geometry):
        folded = _fold(x, weight, scale)
        out = _forward(x, folded, bias, residual, relu, geometry)
        x_needed, weight_needed = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            x if weight_needed else None,
            folded if x_needed else None,
            scale if weight_needed else None,
            out if relu else None,
        )
        ctx.geometry, ctx.x_shape, ctx.weight_shape, ctx.weight_dtype = geometry, x.shape, weight.shape, weight.dtype
        ctx.weight_format = _format(weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, folded, scale, out = ctx.saved_tensors
        x_needed, weight_needed, _, _, residual_needed = ctx.needs_input_grad[:5]
        if out is not None:
            grad = torch.ops.aten.threshold_backward(grad, out, 0)
        grad_x = grad_weight = None
        if x_needed or weight_needed:
            stride, padding, dilation, groups = ctx.geometry
            grad_x, grad_folded, _ = torch.ops.aten.convolution_backward(
                grad,
                # Where only the other gradient is wanted, its shape is enough (as in torch.nn.grad).
                grad.new_empty(1).expand(ctx.x_shape) if x is None else x,
                grad.new_empty(1).expand(ctx.weight_shape) if folded is None else folded,
                None, stride, padding, dilation, False, (0, 0), groups, (x_needed, weight_needed, False),
            )  # fmt: skip
        if weight_needed:
            grad_weight = torch.empty(
                ctx.weight_shape, dtype=ctx.weight_dtype, device=grad.device, memory_format=ctx.weight_format
            )
            torch.mul(grad_folded, scale[:, None, None, None], out=grad_weight)
        return grad_x, grad_weight, None, None, grad if residual_needed else None, None, None


def _format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _fold(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """scale * weight in x's dtype and memory format, in one pass."""
    folded = torch.empty(weight.shape, dtype=x.dtype, device=weight.device, memory_format=_format(x))
    return torch.mul(weight, scale[:, None, None, None], out=folded)


def _forward(x: Tensor, folded: Tensor, bias, residual, relu: bool, geometry) -> Tensor:
    bias = None if bias is None else bias.to(x.dtype)
    if relu and x.device.type == "cuda":
        out = _cudnn(x, folded, bias, residual, geometry)
        if out is not None:
            return out
    out = F.conv2d(x, folded, bias, *geometry)
    if residual is not None:
        out += residual
    return out.relu_() if relu else out


def _cudnn(x: Tensor, folded: Tensor, bias, residual, geometry) -> Tensor | None:
    """cuDNN's fused kernel, or None where it cannot be used."""
    stride, padding, dilation, groups = geometry
    kind = (x.device, x.dtype, residual is not None, tuple(folded.shape[1:]), geometry)
    if kind in _REFUSED or not x.numel() or not torch.backends.cudnn.is_acceptable(x):
        return None
    try:
        if residual is None:
            return torch.ops.aten.cudnn_convolution_relu(x, folded, bias, stride, padding, dilation, groups)
        residual = residual.contiguous(memory_format=_format(x))
        return torch.ops.aten.cudnn_convolution_add_relu(
            x, folded, residual, 1.0, bias, stride, padding, dilation, groups
        )
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        _REFUSED.add(kind)
        reason = str(error).strip().split("\n")[0]
        warnings.warn(
            f"cuDNN has no fused convolution for a {list(folded.shape)} kernel, {x.dtype}: bias, residual and ReLU are "
            f"computed one by one there ({reason})",
            stacklevel=2,
        )
        return None
