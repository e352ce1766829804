"""`folded_conv`: convolution, frozen batch norm, residual and ReLU as one step.

A frozen norm is y = scale * x + bias with constants, so it folds into the convolution before it: the weights are
multiplied by `scale`, and `bias` is the convolution's. On a GPU what is left is one kernel: `pointwise_conv` where the
convolution is a matrix product (1x1, stride 1, channels-last), else cuDNN's where it has one. Of the four
activations that autograd would keep only the last is kept: it tells where ReLU was active, and it is the next
convolution's input anyway.

    forward:   out = relu(conv(x, scale * W) + bias + residual)
    backward:  g = grad where out > 0;  dresidual = g;  dx = conv_backward(g, scale * W);
               dW = scale * conv_backward_weight(g, x)

In a ResNet's block x has two consumers, the first convolution and the shortcut, and comes from a ReLU. Autograd would
add the two gradients in one pass over the image and mask the sum in another. `forked_folded_conv` gets both: it adds
and masks while the data gradient is in registers where that is a product of ours (`pointwise_conv_input_grad`), else in
place. So the ReLU's mask is applied by who reads its output, `masks_input_grad`, and not once more by who made it,
`grad_is_masked`.

The weights are folded in float32 (float64 for float64) and rounded once to the activations' dtype. Where a CPU's result
is smaller than the weight, it is scaled in the weight's place. `folded_conv_reference` is unfolded, to test against.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from detr_fast.ops._dispatch import calls_plainly, refuse_transforms
from detr_fast.ops._onednn import convolution_gradients, convolve, convolves_slowly
from detr_fast.ops.pointwise_conv import pointwise_conv, pointwise_conv_input_grad, runs_kernel

Affine = tuple[Tensor, Tensor | None]

_cudnn_relu = torch.ops.aten.cudnn_convolution_relu
_cudnn_add_relu = torch.ops.aten.cudnn_convolution_add_relu


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
    masks_input_grad: bool = False,
    grad_is_masked: bool = False,
) -> Tensor:
    """relu(conv(x, scale * weight) + bias + residual), differentiable once in x, weight and residual.

    Under autocast x and residual are cast as a convolution's input would be.

    Args:
        x: [B, C, H, W], floating point.
        weight: [O, C / groups, kh, kw].
        scale, bias: [O], constants in float32 (float64); None adds no bias.
        residual: [B, O, h, w], like the result, or None.
        relu: False leaves the ReLU out.
        stride, padding, dilation, groups: of the convolution.
        masks_input_grad: the gradient in x becomes zero where x is 0 or less: for an x that a ReLU made which leaves
            that to this op.
        grad_is_masked: leaves the mask of this op's ReLU to the result's consumers, which must all apply it.

    Returns:
        [B, O, h, w] in x's dtype, or in autocast's; channels-last if x is, else contiguous.

    Raises:
        ValueError: scale or bias does not fit the weight.
        NotImplementedError: inside `torch.vmap` or `torch.func`'s transforms, or with forward-mode tangents.
        RuntimeError: when differentiated twice.
    """
    x, residual = _checked(x, weight, scale, bias, residual)
    geometry = (stride, padding, dilation, groups)
    function = _PlainFoldedConv.apply if calls_plainly(x) else _folded_conv
    return function(x, weight, scale, bias, residual, relu, *geometry, masks_input_grad, grad_is_masked)


def forked_folded_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    masks_input_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """`folded_conv` with a ReLU whose mask its consumers apply, and x again for a shortcut. Not for torch.compile.

    The gradient in x is the sum of the convolution's and the shortcut's, with `masks_input_grad` masked as there.
    Arguments and errors as `folded_conv`'s.
    """
    x, _ = _checked(x, weight, scale, bias, None)
    return _Fork.apply(x, weight, scale, bias, stride, padding, dilation, groups, masks_input_grad)


def _checked(x, weight, scale, bias, residual) -> tuple[Tensor, Tensor | None]:
    """x and residual in autocast's dtype."""
    if scale.shape != weight.shape[:1] or (bias is not None and bias.shape != scale.shape):
        shapes = f"scale is {list(scale.shape)}, bias {None if bias is None else list(bias.shape)}"
        raise ValueError(f"{shapes}; expected [{weight.shape[0]}] for a weight of {list(weight.shape)}")
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, residual = x.to(dtype), None if residual is None else residual.to(dtype)
    differentiable = (x, weight) if residual is None else (x, weight, residual)
    refuse_transforms("folded_conv", *differentiable)
    return x, residual


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


def _format(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _empty(shape, dtype: torch.dtype, like: Tensor) -> Tensor:
    """Channels-last if `like` is, else contiguous."""
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=_format(like))


def _fold(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """scale * weight in x's dtype and memory format, in one pass."""
    return torch.mul(weight, scale[:, None, None, None], out=_empty(weight.shape, x.dtype, x))


def _forward(
    x, weight, scale, bias, residual, relu, stride, padding, dilation, groups,
    masks_input_grad=False, grad_is_masked=False,
) -> Tensor:  # fmt: skip
    with torch.no_grad():
        if x.dim() == 4 and _scales_result(x, weight, scale, _result_shape(x, weight, stride, padding, dilation)):
            return _convolve_then_scale(x, weight, scale, bias, residual, relu, stride, padding, dilation, groups)
        folded = _fold(x, weight, scale)
        return _convolve(x, folded, bias, residual, relu, stride, padding, dilation, groups)


def _result_shape(x, weight, stride, padding, dilation) -> tuple[int, ...]:
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return x.shape[0], weight.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes)


def _scales_result(x: Tensor, weight: Tensor, scale: Tensor, result_shape) -> bool:
    """Whether `scale` multiplies the convolution's result, not the weight: on a CPU, whichever is smaller."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == scale.dtype
        and math.prod(result_shape) < weight.numel()
        and not runs_kernel(x)
    )


def _convolve_then_scale(x, weight, scale, bias, residual, relu, stride, padding, dilation, groups) -> Tensor:
    out = _convolution(x, weight, None, stride, padding, dilation, groups)
    scale = scale[:, None, None]
    out = out.mul_(scale) if bias is None else torch.addcmul(bias.to(out.dtype)[:, None, None], out, scale)
    if residual is not None:
        out += residual
    return out.relu_() if relu else out


def _convolve(x, folded, bias, residual, relu, stride, padding, dilation, groups) -> Tensor:
    geometry = (stride, padding, dilation, groups)
    memory_format = _format(x)
    if _is_product(x, folded, stride, padding, groups):
        return pointwise_conv(x, folded, None if bias is None else bias.float(), residual, relu=relu)
    bias = None if bias is None else bias.to(x.dtype)
    if relu and _has_fused_kernel(x, folded, groups):
        if residual is None:
            return _cudnn_relu(x, folded, bias, *geometry)
        return _cudnn_add_relu(x, folded, residual.contiguous(memory_format=memory_format), 1.0, bias, *geometry)
    out = _convolution(x, folded, bias, *geometry)
    if residual is not None:
        out += residual
    return out.relu_() if relu else out


def _convolution(x, weight, bias, stride, padding, dilation, groups) -> Tensor:
    """In x's memory format."""
    if convolves_slowly(x, weight, stride, padding, groups):
        out = convolve(x, weight, bias)
    else:
        out = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return out.contiguous(memory_format=_format(x))


def _is_product(x: Tensor, folded: Tensor, stride, padding, groups: int) -> bool:
    """Whether `pointwise_conv` runs its kernel on these. In other layouts the pixels would be copied first."""
    is_1x1 = folded.shape[2:] == (1, 1) and (*stride, *padding, groups) == (1, 1, 0, 0, 1)
    return is_1x1 and _format(x) is torch.channels_last and runs_kernel(x)


def _has_fused_kernel(x: Tensor, folded: Tensor, groups: int) -> bool:
    """Whether cuDNN's convolution with bias, residual and ReLU in one kernel takes these.

    Its kernels want one group, whole 16-byte vectors of channels (with an RGB image's three it is far slower than the
    steps: pytorch #68506) and 32-bit offsets. bfloat16 needs compute capability 8.0.
    `torch.backends.cudnn.is_acceptable` is not asked: it knows no bfloat16.
    """
    if x.device.type != "cuda" or torch.version.hip is not None:
        return False
    if not (torch.backends.cudnn.enabled and torch.backends.cudnn.is_available()):
        return False
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    if x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    in_channels, out_channels = x.shape[1], folded.shape[0]
    vector = 16 // x.dtype.itemsize
    if groups != 1 or in_channels % vector or out_channels % vector:
        return False
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return 0 < pixels * max(in_channels, out_channels) < 2**31


def _backward(
    grad, x, weight, scale, shortcut, stride, padding, dilation, groups, x_needed, weight_needed, masked
) -> tuple[Tensor, Tensor]:
    """Gradients of conv(x, scale * weight) in x and weight, each like its input; one that is not needed is empty.

    Args:
        shortcut: added to the gradient in x, or None.
        masked: then set the gradient in x to zero where x is 0 or less.
    """
    in_product = x_needed and (masked or shortcut is not None) and _is_product(x, weight, stride, padding, groups)
    scales_result = _scales_result(x, weight, scale, grad.shape)
    if scales_result:
        grad = grad * scale[:, None, None]
    grad_x = grad_folded = None
    if weight_needed or not in_product:
        convolved = x_needed and not in_product
        if scales_result:
            folded = weight
        else:
            folded = _fold(x, weight, scale) if convolved else _shape_alone(x, weight.shape)
        if convolves_slowly(x, folded, stride, padding, groups):
            grad_x, grad_folded = convolution_gradients(grad, x, folded, convolved, weight_needed)
        else:
            grad_x, grad_folded, _ = torch.ops.aten.convolution_backward(
                grad, x, folded, None, stride, padding, dilation, False, (0, 0), groups,
                (convolved, weight_needed, False),
            )  # fmt: skip
    if in_product:
        # Folded into the transposed order, in which the product reads it.
        folded = x.new_empty(weight.shape[1], weight.shape[0], 1, 1).transpose(0, 1)
        torch.mul(weight, scale[:, None, None, None], out=folded)
        grad_x = pointwise_conv_input_grad(grad, folded, shortcut, x if masked else None)
    elif x_needed:
        grad_x = grad_x.contiguous(memory_format=_format(x))
        if shortcut is not None:
            grad_x += shortcut
        if masked:
            torch.ops.aten.threshold_backward.grad_input(grad_x, x, 0, grad_input=grad_x)
    else:
        grad_x = _empty_gradient(x, False)
    if scales_result and weight_needed:
        return grad_x, grad_folded.contiguous(memory_format=_format(weight))
    grad_weight = _empty_gradient(weight, weight_needed)
    if weight_needed:
        torch.mul(grad_folded, scale[:, None, None, None], out=grad_weight)
    return grad_x, grad_weight


def _empty_gradient(like: Tensor, needed: bool) -> Tensor:
    return _empty(like.shape, like.dtype, like) if needed else like.new_empty(0)


def _shape_alone(like: Tensor, shape) -> Tensor:
    """Stands for an input of which only the shape is read: that of the one gradient wanted (as in `torch.nn.grad`)."""
    return like.new_empty(1).expand(shape)


def _save_for_backward(ctx, inputs, output):
    x, weight, scale, _, _, relu, *ctx.geometry, ctx.masks_input_grad, grad_is_masked = inputs
    _save(ctx, x, weight, scale, output if relu and not grad_is_masked else None)


def _save(ctx, x, weight, scale, out) -> None:
    x_needed, weight_needed = ctx.needs_input_grad[:2]
    if not (x_needed or weight_needed):
        weight = scale = None
    x_read = weight_needed or (x_needed and ctx.masks_input_grad)
    ctx.save_for_backward(x if x_read else None, weight, scale, out)
    ctx.x_shape = x.shape


def _gradients(ctx, x, weight, scale, grad, shortcut) -> tuple[Tensor | None, Tensor | None]:
    """In x and weight, from the masked gradient of the result and another one of x, or None.

    The saved tensors come as arguments: under non-reentrant checkpointing they may be asked for once only.
    """
    x_needed, weight_needed = ctx.needs_input_grad[:2]
    if not (x_needed or weight_needed):
        return None, None
    x = _shape_alone(grad, ctx.x_shape) if x is None else x
    backward = _backward if calls_plainly(grad) else _folded_conv_backward
    grad_x, grad_weight = backward(
        grad, x, weight, scale, shortcut, *ctx.geometry, x_needed, weight_needed, ctx.masks_input_grad
    )
    return grad_x if x_needed else None, grad_weight if weight_needed else None


def _differentiate(ctx, grad):
    x, weight, scale, out = ctx.saved_tensors
    if out is not None:
        grad = torch.ops.aten.threshold_backward(grad, out, 0)
    residual_needed = ctx.needs_input_grad[4]
    return *_gradients(ctx, x, weight, scale, grad, None), None, None, grad if residual_needed else None, *[None] * 7


class _PlainFoldedConv(torch.autograd.Function):
    """`folded_conv` on a CPU, without the library's layers of Python; `setup_context` has its own."""

    @staticmethod
    def forward(ctx, *inputs):
        out = _forward(*inputs)
        _save_for_backward(ctx, inputs, out)
        return out

    backward = staticmethod(torch.autograd.function.once_differentiable(_differentiate))


class _Fork(torch.autograd.Function):
    """`forked_folded_conv`. No op of the library: those may not return an input."""

    @staticmethod
    def forward(ctx, x, weight, scale, bias, stride, padding, dilation, groups, masks_input_grad):
        ctx.geometry, ctx.masks_input_grad = (stride, padding, dilation, groups), masks_input_grad
        _save(ctx, x, weight, scale, None)
        function = _forward if calls_plainly(x) else _folded_conv
        out = function(x, weight, scale, bias, None, True, stride, padding, dilation, groups, False, True)
        return out, x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, shortcut):
        x, weight, scale, _ = ctx.saved_tensors
        return *_gradients(ctx, x, weight, scale, grad, shortcut), *[None] * 7


_folded_conv = torch.library.custom_op(
    "detr_fast::folded_conv",
    _forward,
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor scale, Tensor? bias, Tensor? residual, bool relu, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool masks_input_grad, bool grad_is_masked) -> Tensor",
)


@_folded_conv.register_fake
def _folded_conv_fake(
    x, weight, scale, bias, residual, relu, stride, padding, dilation, groups, masks_input_grad, grad_is_masked
):
    shape = F.conv2d(x, weight.to(x.dtype), None, stride, padding, dilation, groups).shape
    return _empty(shape, x.dtype, x)


_folded_conv_backward = torch.library.custom_op(
    "detr_fast::folded_conv_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor scale, Tensor? shortcut, SymInt[2] stride, "
    "SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool x_needed, bool weight_needed, bool masked) "
    "-> (Tensor, Tensor)",
)


@_folded_conv_backward.register_fake
def _folded_conv_backward_fake(
    grad, x, weight, scale, shortcut, stride, padding, dilation, groups, x_needed, weight_needed, masked
):
    return _empty_gradient(x, x_needed), _empty_gradient(weight, weight_needed)


_folded_conv.register_autograd(_differentiate, setup_context=_save_for_backward)


@_folded_conv.register_vmap
def _folded_conv_vmap(info, in_dims, *args):
    raise NotImplementedError("folded_conv has no vmap rule; fold the mapped dimension into the batch")
