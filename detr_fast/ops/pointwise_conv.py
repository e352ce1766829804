"""`pointwise_conv`: a 1x1 convolution of channels-last images with bias, residual and ReLU as one matrix product.

    forward:   out = relu(x · Wᵀ + bias + residual), a pixel per row of x
    backward:  g = grad where out > 0;  dresidual = g;  dx = g · W;  dW = gᵀ · x;  dbias = sum of g over the pixels

Of the activations only x and out are kept. The mask is applied in one pass, whose result is the residual's gradient.
`pointwise_conv_input_grad` is dx alone, fused with what a residual block does to it next.
"""

import torch
from torch import Tensor

from detr_fast.ops._checks import check_tensor
from detr_fast.ops._dispatch import refuse_transforms, use_kernel

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def pointwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, relu: bool = True
) -> Tensor:
    """relu(conv(x, weight) + bias + residual) for a 1x1 convolution of stride 1.

    Differentiable in x, weight, bias and residual. 16-bit inputs are accumulated in float32 and rounded once. On a GPU
    float32 is multiplied in TF32 where `torch.backends.cudnn.conv` says so, in the backward where
    `torch.backends.cuda.matmul` does. float64 runs in plain PyTorch on every device.

    Args:
        x: [B, C, H, W], any strides; channels-last is read without a copy.
        weight: [O, C, 1, 1] in x's dtype.
        bias: [O], x's dtype or float32, or None.
        residual: [B, O, H, W] in x's dtype, or None.
        relu: False leaves the ReLU out.

    Returns:
        [B, O, H, W] in x's dtype, channels-last.

    Raises:
        TypeError: x is not floating point, or another input's dtype does not fit.
        ValueError: a shape does not fit, or the inputs are on different devices.
        NotImplementedError: inside `torch.vmap` or `torch.func`'s transforms, or with forward-mode tangents.
    """
    _check(x, weight, bias, residual)
    refuse_transforms("pointwise_conv", *(t for t in (x, weight, bias, residual) if t is not None))
    return _pointwise_conv(x, weight, bias, residual, relu)


def pointwise_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, relu: bool = True
) -> Tensor:
    """`pointwise_conv` step by step in plain PyTorch: same arguments, result and errors."""
    _check(x, weight, bias, residual)
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        out = (x.to(dtype).permute(0, 2, 3, 1) @ weight.to(dtype).flatten(1).t()).permute(0, 3, 1, 2)
    if bias is not None:
        out = out + bias[:, None, None]
    if residual is not None:
        out = out + residual
    return (out.relu() if relu else out).to(x.dtype).contiguous(memory_format=torch.channels_last)


def pointwise_conv_input_grad(
    grad: Tensor, weight: Tensor, shortcut: Tensor | None = None, gate: Tensor | None = None
) -> Tensor:
    """The gradient of a 1x1 convolution in its input, plus `shortcut`; zero where `gate` is 0 or less. For a backward.

    In one matrix product: the sum and the mask would read and write the gradient again each. Not differentiable.

    Args:
        grad: [B, O, H, W], the gradient of the convolution's output; channels-last is read without a copy.
        weight: [O, C, 1, 1] in grad's dtype.
        shortcut: [B, C, H, W] in grad's dtype, another gradient of the same input, or None.
        gate: [B, C, H, W] in grad's dtype, the input where it comes from a ReLU whose mask is to be applied, or None.

    Returns:
        [B, C, H, W] in grad's dtype, channels-last.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 4 or weight.shape[2:] != (1, 1):
        got = list(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"weight is {got}; expected [O, C, 1, 1]")
    _check(grad, weight.transpose(0, 1), None, shortcut, "grad", "shortcut")
    _check(grad, weight.transpose(0, 1), None, gate, "grad", "gate")
    return _pointwise_conv_input_grad(grad, weight, shortcut, gate)


def _check(x, weight, bias, residual, x_name: str = "x", residual_name: str = "residual") -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{x_name} is {getattr(x, 'dtype', type(x).__name__)}; expected floating point")
    others = {"weight": weight, "bias": bias, residual_name: residual}
    for name, tensor in others.items():
        if tensor is not None or name == "weight":
            check_tensor(name, tensor)
    if x.dim() != 4:
        raise ValueError(f"{x_name} is {list(x.shape)}; expected [B, C, H, W]")
    if weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 1, 1):
        raise ValueError(
            f"weight is {list(weight.shape)}; expected [O, {x.shape[1]}, 1, 1] for {x_name} of {list(x.shape)}"
        )
    filters = weight.shape[0]
    if bias is not None and bias.shape != (filters,):
        raise ValueError(f"bias is {list(bias.shape)}; expected [{filters}]")
    expected = [x.shape[0], filters, *x.shape[2:]]
    if residual is not None and list(residual.shape) != expected:
        raise ValueError(f"{residual_name} is {list(residual.shape)}; expected {expected}")
    for name, tensor in others.items():
        if tensor is None:
            continue
        allowed = {x.dtype, torch.float32} if name == "bias" else {x.dtype}
        if tensor.dtype not in allowed:
            raise TypeError(f"{name} is {tensor.dtype}; expected {' or '.join(sorted(map(str, allowed)))}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, {x_name} on {x.device}")


def runs_kernel(x: Tensor) -> bool:
    """Not on GPUs below compute capability 8.0: they have no bfloat16, and Triton does not use their tensor cores."""
    if x.dtype not in _KERNEL_DTYPES:
        return False
    is_new_enough = x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (8, 0)
    return is_new_enough and use_kernel(x.device, "pointwise_conv")


def _pixels(image: Tensor) -> Tensor:
    """[B, C, H, W] as a contiguous [B·H·W, C]: a view of a channels-last image."""
    return image.permute(0, 2, 3, 1).contiguous().flatten(0, 2)


def _image(pixels: Tensor, shape) -> Tensor:
    """The inverse of `_pixels`, for images [B, any, H, W] of `shape`; channels-last."""
    return pixels.view(shape[0], *shape[2:], pixels.shape[1]).permute(0, 3, 1, 2)


def _empty(x: Tensor, channels: int) -> Tensor:
    size = (x.shape[0], channels, *x.shape[2:])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@torch.library.custom_op("detr_fast::pointwise_conv", mutates_args=())
def _pointwise_conv(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    if not runs_kernel(x):
        return pointwise_conv_reference(x, weight, bias, residual, relu=relu)
    return _launched(x, weight.flatten(1), bias, residual, None, relu)


def _launched(x, weight, bias, residual, gate, relu: bool) -> Tensor:
    """The kernel on images; weight is [N, C]."""
    from detr_fast.kernels.attention import needs_float32
    from detr_fast.kernels.pointwise_conv import pointwise_conv_forward

    dtype = torch.float32 if needs_float32(x) else x.dtype
    out = _empty(x, weight.shape[0])
    rows = _pixels(out).to(dtype)
    pointwise_conv_forward(
        _pixels(x.to(dtype)),
        weight.to(dtype).contiguous(),
        bias if bias is None else bias.to(torch.promote_types(bias.dtype, dtype)).contiguous(),
        None if residual is None else _pixels(residual.to(dtype)),
        relu=relu,
        out=rows,
        gate=None if gate is None else _pixels(gate.to(dtype)),
    )
    return out if dtype == x.dtype else out.copy_(_image(rows, x.shape))


@_pointwise_conv.register_fake
def _pointwise_conv_fake(x, weight, bias, residual, relu):
    return _empty(x, weight.shape[0])


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, relu = inputs
    ctx.save_for_backward(
        x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None, output if relu else None
    )
    ctx.x_shape, ctx.weight_shape, ctx.bias_dtype = x.shape, weight.shape, None if bias is None else bias.dtype


def _backward(ctx, grad):
    x, weight, out = ctx.saved_tensors
    x_needed, weight_needed, bias_needed, residual_needed, _ = ctx.needs_input_grad
    if out is not None:
        grad = torch.ops.aten.threshold_backward(grad.contiguous(memory_format=torch.channels_last), out, 0)
    pixels = _pixels(grad)
    return (
        _image(pixels @ weight.flatten(1), ctx.x_shape) if x_needed else None,
        (pixels.t() @ _pixels(x)).view(ctx.weight_shape) if weight_needed else None,
        pixels.sum(0, dtype=ctx.bias_dtype) if bias_needed else None,
        grad if residual_needed else None,
        None,
    )


_pointwise_conv.register_autograd(_backward, setup_context=_setup_context)


@_pointwise_conv.register_vmap
def _pointwise_conv_vmap(info, in_dims, *args):
    raise NotImplementedError("pointwise_conv has no vmap rule; fold the mapped dimension into the batch")


@torch.library.custom_op("detr_fast::pointwise_conv_input_grad", mutates_args=())
def _pointwise_conv_input_grad(grad: Tensor, weight: Tensor, shortcut: Tensor | None, gate: Tensor | None) -> Tensor:
    turned = weight.flatten(1).t()
    if runs_kernel(grad):
        return _launched(grad, turned, None, shortcut, gate, False)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    out = pointwise_conv_reference(grad.to(dtype), turned[:, :, None, None].to(dtype), relu=False)
    out = out if shortcut is None else out + shortcut
    out = out if gate is None else torch.where(gate <= 0, 0.0, out)
    return out.to(grad.dtype).contiguous(memory_format=torch.channels_last)


@_pointwise_conv_input_grad.register_fake
def _pointwise_conv_input_grad_fake(grad, weight, shortcut, gate):
    return _empty(grad, weight.shape[1])
