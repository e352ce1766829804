"""Sine position embedding from a full-resolution padding mask, in one launch.

A cell of the feature map at (y, x) counts the valid (unpadded) cells up to and including itself,

    y_embed = sum_{j <= y} valid(j, x)        x_embed = sum_{j <= x} valid(y, j)

optionally normalised, e / (e_last + 1e-6) * scale, where e_last counts the whole column or row. Channel pair i of
F / 2 is sin(e / f_i), cos(e / f_i) with f_i = temperature ** (2 i / F): first all pairs of y, then all of x.

Fused: the nearest resize of the mask, both running counts, the normalisation, the division, sin and cos, the cast and
the layout. The output is written once and dominates the traffic; plain PyTorch makes about twenty passes over it.

Source: facebookresearch/detr `models/position_encoding.py` (PositionEmbeddingSine) and the `F.interpolate` of its
backbone.
"""

import torch
import triton
import triton.language as tl

from detr_fast.kernels import _configurations

# For arguments up to here `_sincos` is exact enough: k * pi / 2 is subtracted in three parts with exact products.
_LARGEST_REDUCED = 8192.0
# Programs to aim for: several per multiprocessor of the largest GPUs.
_PROGRAMS = 1024


@triton.jit
def _nearest(index, ratio, length):
    """Source index of F.interpolate(mode="nearest"): floor(index * (in / out)) in float32, clamped."""
    return tl.minimum(tl.floor(index.to(tl.float32) * ratio).to(tl.int32), length - 1)


@triton.jit
def _sincos(x):
    """sin(x), cos(x) to about 1e-7 for |x| <= 8192 (Cody-Waite reduction, minimax polynomials of Cephes' sinf)."""
    # r = x - turns * pi / 2, in -pi/4..pi/4; pi / 2 in three parts so that no bits cancel.
    turns = tl.floor(x * 0.6366197723675814 + 0.5)
    r = x - turns * 1.5703125
    r = r - turns * 4.837512969970703e-4
    r = r - turns * 7.549789948768648e-8
    r2 = r * r
    sin_r = ((-1.9515295891e-4 * r2 + 8.3321608736e-3) * r2 - 1.6666654611e-1) * r2 * r + r
    cos_r = ((2.443315711809948e-5 * r2 - 1.388731625493765e-3) * r2 + 4.166664568298827e-2) * r2 * r2 - 0.5 * r2 + 1.0
    # Each quarter turn swaps sine and cosine; two of them change the sign.
    quarter = turns.to(tl.int32)
    odd = (quarter & 1) != 0
    sin = tl.where(odd, cos_r, sin_r)
    cos = tl.where(odd, sin_r, cos_r)
    sin = tl.where((quarter & 2) != 0, -sin, sin)
    cos = tl.where(((quarter + 1) & 2) != 0, -cos, cos)
    return sin, cos


@triton.jit(
    do_not_specialize=[
        "stride_mask_batch",
        "stride_mask_h",
        "stride_mask_w",
        "mask_h",
        "mask_w",
        "h",
        "w",
        "blocks_per_program",
    ],
    do_not_specialize_on_alignment=["mask_ptr"],
)
def _sine_position_forward_kernel(
    mask_ptr,  # [B, mask_h, mask_w] bool, any strides, True = padding
    frequencies_ptr,  # [2 * num_pairs] float32
    pos_ptr,  # [B, 4 * num_pairs, h, w] or [B, h * w, 4 * num_pairs], contiguous
    resized_ptr,  # [B, h, w] bool, contiguous
    stride_mask_batch,
    stride_mask_h,
    stride_mask_w,
    mask_h,
    mask_w,
    ratio_h,  # float32(mask_h / h)
    ratio_w,
    h,
    w,
    num_pairs,
    blocks_per_program,
    scale,
    NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Program (image and tile of cells, axis and part of the channel pairs).

    Every program counts for itself, from the mask, so that one launch does everything.
    """
    cells = h * w
    tiles = tl.cdiv(cells, BLOCK_T)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    offs_t = (tl.program_id(0) % tiles) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < cells
    y = offs_t // w
    x = offs_t % w
    is_x = tl.program_id(1) % 2
    part = tl.program_id(1) // 2

    # This program's axis: `along` is the cell's place on it, `length` the number of places. Selected with tl.where, not
    # with a branch, so that both axes are one code path.
    along = tl.where(is_x != 0, x, y)
    length = tl.where(is_x != 0, w, h)
    along_ratio = tl.where(is_x != 0, ratio_w, ratio_h)
    along_in = tl.where(is_x != 0, mask_w, mask_h)
    stride_along = tl.where(is_x != 0, stride_mask_w, stride_mask_h).to(tl.int64)
    source_y = _nearest(y, ratio_h, mask_h).to(tl.int64) * stride_mask_h
    source_x = _nearest(x, ratio_w, mask_w).to(tl.int64) * stride_mask_w
    mask_ptr += batch * stride_mask_batch
    across_ptrs = mask_ptr + tl.where(is_x != 0, source_y, source_x)
    # For each cell, walk its whole column (or row), BLOCK_N places at a time: `count` stops at the cell, `total` does
    # not.
    count = tl.zeros([BLOCK_T], dtype=tl.int32)
    total = tl.zeros([BLOCK_T], dtype=tl.int32)
    for start in range(0, length, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        inside = (offs_n < length)[:, None] & mask_t[None, :]
        # The resize happens here, in the addresses. Beyond the end the masked load reads padding, which counts 0.
        source_n = _nearest(offs_n, along_ratio, along_in).to(tl.int64) * stride_along
        padding = tl.load(across_ptrs[None, :] + source_n[:, None], mask=inside, other=1)  # [BLOCK_N, BLOCK_T]
        valid = (padding == 0).to(tl.int32)
        count += tl.sum(tl.where(offs_n[:, None] <= along[None, :], valid, 0), axis=0)
        total += tl.sum(valid, axis=0)

    # One program per tile also writes the resized mask.
    if tl.program_id(1) == 0:
        resized = tl.load(mask_ptr + source_y + source_x, mask=mask_t, other=1)
        tl.store(resized_ptr + batch * cells + offs_t, resized, mask=mask_t)

    embed = count.to(tl.float32)
    if NORMALIZE:
        # div_rn, here and below: `/` is 2 ulp off, which large arguments turn into a visible error of the sine.
        embed = tl.div_rn(embed, total.to(tl.float32) + 1e-6) * scale

    # The channel pairs of this program's part, BLOCK_F at a time.
    pos_ptr += batch * (4 * num_pairs) * cells
    first = part * blocks_per_program
    last = tl.minimum(first + blocks_per_program, tl.cdiv(num_pairs, BLOCK_F))
    for block in range(first, last):
        start = block * BLOCK_F
        offs_f = start + tl.arange(0, BLOCK_F)
        mask_f = offs_f < num_pairs
        frequency = tl.load(frequencies_ptr + 2 * offs_f, mask=mask_f, other=1.0)
        argument = tl.div_rn(embed[:, None], frequency[None, :])  # [BLOCK_T, BLOCK_F]
        if LARGE:
            sin = tl.sin(argument)
            cos = tl.cos(argument)
        else:
            sin, cos = _sincos(argument)
        sin = sin.to(pos_ptr.dtype.element_ty)
        cos = cos.to(pos_ptr.dtype.element_ty)
        if TOKENS:
            # Channels are contiguous: interleave sine and cosine in registers for one coalesced store.
            both = tl.reshape(tl.join(sin, cos), [BLOCK_T, 2 * BLOCK_F])
            offs_c = 2 * (is_x * num_pairs + start) + tl.arange(0, 2 * BLOCK_F)
            mask_c = tl.arange(0, 2 * BLOCK_F) < 2 * (num_pairs - start)
            ptrs = pos_ptr + offs_t.to(tl.int64)[:, None] * (4 * num_pairs) + offs_c[None, :]
            tl.store(ptrs, both, mask=mask_t[:, None] & mask_c[None, :])
        else:
            # Cells are contiguous: sine and cosine go to two neighbouring channel planes.
            channel = 2 * (is_x * num_pairs + offs_f)
            ptrs = pos_ptr + channel.to(tl.int64)[None, :] * cells + offs_t[:, None]
            mask = mask_t[:, None] & mask_f[None, :]
            tl.store(ptrs, sin, mask=mask)
            tl.store(ptrs + cells, cos, mask=mask)


def sine_position_forward(
    mask: torch.Tensor,
    frequencies: torch.Tensor,
    normalize: bool,
    scale: float,
    *,
    pos: torch.Tensor,
    resized: torch.Tensor,
) -> None:
    """Launch the kernel.

    Args:
        mask: [B, H, W] bool, any strides, True = padding.
        frequencies: [F] float32 contiguous, F even; the divisors of the counts, in equal pairs.
        normalize, scale: see `detr_fast.ops.sine_position`.
        pos: [B, 2F, h, w] or [B, h * w, 2F] contiguous; float32, bfloat16 or float16; written.
        resized: [B, h, w] bool, contiguous; written.
    """
    if pos.numel() == 0:
        return
    batch, mask_h, mask_w = mask.shape
    _, height, width = resized.shape
    tokens = pos.dim() == 3
    num_pairs = frequencies.shape[0] // 2
    tile = _configurations.configuration(
        "sine_position_forward", family=_configurations.family(mask.device), bytes=pos.dtype.itemsize, tokens=tokens
    )
    tiles = batch * triton.cdiv(height * width, tile["BLOCK_T"])
    blocks = triton.cdiv(num_pairs, tile["BLOCK_F"])
    blocks_per_program = triton.cdiv(blocks, min(triton.cdiv(_PROGRAMS, 2 * tiles), blocks))
    largest = abs(scale) if normalize else max(height, width)
    with torch.cuda.device_of(mask):
        _sine_position_forward_kernel[(tiles, 2 * triton.cdiv(blocks, blocks_per_program))](
            mask_ptr=mask,
            frequencies_ptr=frequencies,
            pos_ptr=pos,
            resized_ptr=resized,
            stride_mask_batch=mask.stride(0),
            stride_mask_h=mask.stride(1),
            stride_mask_w=mask.stride(2),
            mask_h=mask_h,
            mask_w=mask_w,
            ratio_h=mask_h / height,
            ratio_w=mask_w / width,
            h=height,
            w=width,
            num_pairs=num_pairs,
            blocks_per_program=blocks_per_program,
            scale=float(scale),
            NORMALIZE=normalize,
            TOKENS=tokens,
            LARGE=not largest <= _LARGEST_REDUCED,
            BLOCK_N=32,
            **tile,
        )
