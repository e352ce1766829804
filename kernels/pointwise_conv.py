"""A 1x1 convolution of a channels-last image as one matrix product, with bias, residual and ReLU in its epilogue.

With the image as X [M, C], a pixel per row, and the weight as W [N, C],

    out[m, n] = relu(sum over c of X[m, c] * W[n, c] + bias[n] + residual[m, n])

Fused: bias, residual and ReLU are applied in float32 while the product is in registers, and the result is rounded once.
As steps of their own the residual and the ReLU read and write the output once more each.

The gradient in X is the same product, of the output's gradient and Wᵀ. There the residual is the gradient that comes by
the shortcut around a block, and the mask of the ReLU that X comes from takes the place of the ReLU:

    out[m, n] = gate[m, n] <= 0 ? 0 : sum over c of X[m, c] * W[n, c] + residual[m, n]

The gradient in W is left to cuBLAS.
"""

import torch
import triton
import triton.language as tl

from detr_fast.kernels import _configurations


# The number of pixels changes with every batch; the numbers of channels are the model's.
@triton.jit(do_not_specialize=["num_pixels"])
def _pointwise_conv_forward_kernel(
    x_ptr,  # [M, C] contiguous
    weight_ptr,  # [N, C] contiguous
    bias_ptr,  # [N], or None without HAS_BIAS
    residual_ptr,  # [M, N] contiguous, or None without HAS_RESIDUAL
    gate_ptr,  # [M, N] contiguous, or None without HAS_GATE
    out_ptr,  # [M, N] contiguous
    num_pixels,  # M
    in_channels,  # C
    out_channels,  # N
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GATE: tl.constexpr,
    RELU: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,  # BLOCK_K divides C
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of the output per program."""
    # The tiles of the same pixels run one after the other, so that these pixels come from the L2 but once.
    tiles_n = tl.cdiv(out_channels, BLOCK_N)
    program = tl.program_id(0)
    start_m = (program // tiles_n).to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = (program % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < num_pixels - start_m
    mask_n = offs_n < out_channels
    # An image may have more than 2^31 values: the tile's start is an int64, offsets within the tile fit 32 bits.
    x_ptrs = x_ptr + start_m * in_channels + offs_m[:, None] * in_channels + offs_k[None, :]
    weight_ptrs = weight_ptr + offs_n[None, :] * in_channels + offs_k[:, None]

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start_k in range(0, in_channels, BLOCK_K):
        if WHOLE_STEPS:
            x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)  # [BLOCK_M, BLOCK_K]
            weight = tl.load(weight_ptrs, mask=mask_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        else:
            mask_k = offs_k < in_channels - start_k
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        x_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K

    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out_offs = start_m * out_channels + offs_m[:, None] * out_channels + offs_n[None, :]
    mask = mask_m[:, None] & mask_n[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + out_offs, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        # Not `tl.maximum`, which turns NaN into 0.
        acc = tl.where(acc < 0, 0.0, acc)
    if HAS_GATE:
        # As PyTorch's threshold_backward: where the gate is NaN the gradient passes.
        gate = tl.load(gate_ptr + out_offs, mask=mask, other=0.0).to(tl.float32)
        acc = tl.where(gate <= 0, 0.0, acc)
    tl.store(out_ptr + out_offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


def pointwise_conv_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    *,
    relu: bool,
    out: torch.Tensor,
    gate: torch.Tensor | None = None,
) -> None:
    """Launch the kernel.

    Args:
        x: [M, C] contiguous; float32, bfloat16 or float16, as are weight, residual and out.
        weight: [N, C] contiguous.
        bias: [N] contiguous, of any floating point dtype but float64, or None.
        residual: [M, N] contiguous, or None.
        out: [M, N] contiguous, written.
        gate: [M, N] contiguous, or None; where it is 0 or less the result is 0.
    """
    if out.numel() == 0:
        return
    (pixels, in_channels), out_channels = x.shape, weight.shape[0]
    precision = _input_precision(x.dtype)
    chosen = _configurations.configuration(
        "pointwise_conv_forward",
        family=_configurations.family(x.device),
        precision=precision if x.dtype == torch.float32 else "16-bit",
        ragged=in_channels % 64 != 0,
        narrow=out_channels <= 64,
    )
    tiles = triton.cdiv(pixels, chosen["BLOCK_M"]) * triton.cdiv(out_channels, chosen["BLOCK_N"])
    with torch.cuda.device_of(x):
        _pointwise_conv_forward_kernel[(tiles,)](
            x_ptr=x,
            weight_ptr=weight,
            bias_ptr=bias,
            residual_ptr=residual,
            gate_ptr=gate,
            out_ptr=out,
            num_pixels=pixels,
            in_channels=in_channels,
            out_channels=out_channels,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_GATE=gate is not None,
            RELU=relu,
            WHOLE_STEPS=in_channels % chosen["BLOCK_K"] == 0,
            PRECISION=precision,
            **chosen,
        )


def _input_precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied, by what holds for convolutions; 16-bit products are exact."""
    is_tf32 = dtype != torch.float32 or torch.backends.cudnn.conv.fp32_precision == "tf32"
    return "tf32" if is_tf32 else "ieee"
