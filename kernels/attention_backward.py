"""Backward of `attention`: two passes, each of which owns what it writes, so that the result is the same every time.

    delta = Σ_d grad_out · out                  dq = scale · dS k
    P     = exp(q kᵀ · scale - logsumexp)       dk = scale · dSᵀ q
    dS    = P ∘ (drop(grad_out vᵀ) - delta)     dv = drop(P)ᵀ grad_out

With dropout both passes work on dS / drop_scale, from delta / drop_scale, and multiply once, at the end.

The first pass walks over the keys for each tile of queries: it makes delta, keeps it for the second, and gives dq.
The second walks over the queries for each block of keys. Its P and dS have the queries as rows, too, and pass
transposed through shared memory into the last two products: with keys as rows they would stay in registers, but then
sm_90 runs all matrix products one by one, and dropout's bytes, dealt out along the keys, change owners. P is computed
anew in both, from the forward's logsumexp: +inf there, for a row without keys, makes every gradient of that row zero
without a branch. Of queries that are padding neither pass reads anything: tiles and steps are made of the others.

Source: Dao 2023 (FlashAttention-2), algorithm 2.
"""

import torch
import triton
import triton.language as tl

from detr_fast.kernels import _configurations
from detr_fast.kernels.attention import (
    BLOCK_N,
    LOG2_E,
    dropout_keep,
    input_precision,
    key_blocks,
    needs_float32,
    padded_head_dim,
    query_rows,
    strides,
    tile_mask,
    tile_offsets,
    unknown_zero,
    valid_keys,
)


@triton.jit
def _grad_query_block(
    dq,  # [BLOCK_M, BLOCK_D]
    q,  # [BLOCK_M, BLOCK_D]
    do,  # [BLOCK_M, BLOCK_DV]
    lse_log2,  # [BLOCK_M]
    delta,  # [BLOCK_M], over drop_scale
    k_ptr,
    v_ptr,
    k_tile,
    v_tile,
    caps_ptr,
    stride_k_length,
    stride_v_length,
    start_n,
    k_len,
    scale_log2,
    seed,
    drop_threshold,
    head,
    offs_m,
    HAS_MASK: tl.constexpr,
    BOUNDARY: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One block of keys; `BOUNDARY` as in the forward."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    if HAS_MASK or BOUNDARY:
        valid = valid_keys(caps_ptr, offs_n, k_len, HAS_MASK)
    else:
        valid = tl.full([BLOCK_N], 1, dtype=tl.int1)
    k_ptrs = k_ptr + tl.cast(start_n, tl.int64) * stride_k_length + k_tile
    v_ptrs = v_ptr + tl.cast(start_n, tl.int64) * stride_v_length + v_tile
    # Padded rows count as zeros: 0 · NaN would be NaN.
    k = tl.load(k_ptrs, mask=tile_mask(valid, HEAD_DIM, BLOCK_D), other=0.0)
    v = tl.load(v_ptrs, mask=tile_mask(valid, VALUE_DIM, BLOCK_DV), other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if HAS_MASK:
        scores = tl.minimum(scores, tl.load(caps_ptr + offs_n)[None, :])
    elif BOUNDARY:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    probs = tl.exp2(scores * scale_log2 - lse_log2[:, None])
    grad_probs = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if DROPOUT:
        keep = dropout_keep(seed, drop_threshold, head, offs_m, start_n, BLOCK_M, BLOCK_N)
        grad_probs = tl.where(keep, grad_probs, 0.0)
    grad_scores = probs * (grad_probs - delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_heads", "q_len", "k_len", "num_blocks", "drop_threshold"])
def _attention_grad_query_kernel(
    q_ptr,  # [B, H, Lq, HEAD_DIM]
    k_ptr,  # [B, H, Lk, HEAD_DIM]
    v_ptr,  # [B, H, Lk, VALUE_DIM]
    blocks_ptr,  # [B, 1 + num_blocks] int32, or None
    caps_ptr,  # [B, num_blocks * BLOCK_N] float32, or None
    rows_ptr,  # [B, 1 + Lq] int32, or None
    seed_ptr,  # [1] int64, or None
    out_ptr,  # [B, H, Lq, VALUE_DIM]
    do_ptr,  # [B, H, Lq, VALUE_DIM], gradient of out
    lse_ptr,  # [B, H, Lq] float32, contiguous
    delta_ptr,  # [B, H, Lq] float32, contiguous, written: delta over drop_scale
    lse_log2_ptr,  # [B, H, Lq] float32, contiguous, written: lse in units of log(2)
    dq_ptr,  # [B, H, Lq, HEAD_DIM], written
    stride_q_batch,
    stride_q_head,
    stride_q_length,
    stride_q_dim,
    stride_k_batch,
    stride_k_head,
    stride_k_length,
    stride_k_dim,
    stride_v_batch,
    stride_v_head,
    stride_v_length,
    stride_v_dim,
    stride_out_batch,
    stride_out_head,
    stride_out_length,
    stride_out_dim,
    stride_do_batch,
    stride_do_head,
    stride_do_length,
    stride_do_dim,
    stride_dq_batch,
    stride_dq_head,
    stride_dq_length,
    stride_dq_dim,
    num_heads,
    q_len,
    k_len,
    num_blocks,
    scale,
    drop_threshold,
    drop_scale,
    HAS_MASK: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Program (tile of queries of one head of one image)."""
    tiles = tl.cdiv(q_len, BLOCK_M)
    image_head = tl.program_id(0) // tiles
    batch = (image_head // num_heads).to(tl.int64)
    head = (image_head % num_heads).to(tl.int64)
    start_m = (tl.program_id(0) % tiles) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < q_len
    computed = mask_m
    if HAS_ROWS:
        rows_ptr += batch * (1 + q_len)
        num_rows = tl.load(rows_ptr)
        computed = offs_m < num_rows
        offs_m = tl.load(rows_ptr + 1 + offs_m, mask=mask_m, other=0)
    offs_n = tl.arange(0, BLOCK_N)
    q_ptr += batch * stride_q_batch + head * stride_q_head
    k_ptr += batch * stride_k_batch + head * stride_k_head
    v_ptr += batch * stride_v_batch + head * stride_v_head
    out_ptr += batch * stride_out_batch + head * stride_out_head
    do_ptr += batch * stride_do_batch + head * stride_do_head
    dq_ptr += batch * stride_dq_batch + head * stride_dq_head
    k_tile = tile_offsets(offs_n, stride_k_length, BLOCK_D, stride_k_dim)
    v_tile = tile_offsets(offs_n, stride_v_length, BLOCK_DV, stride_v_dim)
    mask_q = tile_mask(computed, HEAD_DIM, BLOCK_D)
    mask_out = tile_mask(computed, VALUE_DIM, BLOCK_DV)
    q = tl.load(q_ptr + tile_offsets(offs_m, stride_q_length, BLOCK_D, stride_q_dim), mask=mask_q, other=0.0)
    out = tl.load(out_ptr + tile_offsets(offs_m, stride_out_length, BLOCK_DV, stride_out_dim), mask=mask_out, other=0.0)
    do = tl.load(do_ptr + tile_offsets(offs_m, stride_do_length, BLOCK_DV, stride_do_dim), mask=mask_out, other=0.0)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), axis=1)  # [BLOCK_M]
    rows = image_head.to(tl.int64) * q_len + offs_m
    if DROPOUT:  # so that the loops need not multiply by drop_scale, which is 0 if everything is dropped
        delta /= tl.where(drop_scale == 0, 1.0, drop_scale)
    tl.store(delta_ptr + rows, delta, mask=computed)
    lse_log2 = tl.load(lse_ptr + rows, mask=computed, other=float("inf")) * LOG2_E
    tl.store(lse_log2_ptr + rows, lse_log2, mask=computed)

    seed = tl.load(seed_ptr) if DROPOUT else 0
    scale_log2 = scale * LOG2_E
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if HAS_MASK:
        blocks_ptr += batch * (1 + num_blocks)
        caps_ptr += batch * num_blocks * BLOCK_N
        used = tl.load(blocks_ptr)
        if HAS_ROWS:
            used = tl.where(start_m < num_rows, used, 0)
        for i in range(0, used):
            start_n = tl.load(blocks_ptr + 1 + i) * BLOCK_N
            dq = _grad_query_block(
                dq, q, do, lse_log2, delta, k_ptr, v_ptr, k_tile, v_tile, caps_ptr, stride_k_length, stride_v_length,
                start_n, k_len, scale_log2, seed, drop_threshold, image_head, offs_m, True,
                True, DROPOUT, PRECISION, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    else:
        if HAS_ROWS:
            k_len = tl.where(start_m < num_rows, k_len, 0)
        # In float32 two copies of the body cost more in spilled registers than looking after the boundary everywhere.
        ONE_BODY: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
        full = tl.cdiv(k_len, BLOCK_N) if ONE_BODY else k_len // BLOCK_N
        for i in range(0, full):
            dq = _grad_query_block(
                dq, q, do, lse_log2, delta, k_ptr, v_ptr, k_tile, v_tile, caps_ptr, stride_k_length, stride_v_length,
                i * BLOCK_N, k_len, scale_log2, seed, drop_threshold, image_head, offs_m,
                False, ONE_BODY, DROPOUT, PRECISION, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
        if not ONE_BODY and full * BLOCK_N < k_len:
            dq = _grad_query_block(
                dq, q, do, lse_log2, delta, k_ptr, v_ptr, k_tile, v_tile, caps_ptr, stride_k_length, stride_v_length,
                full * BLOCK_N, k_len, scale_log2, seed, drop_threshold, image_head,
                offs_m, False, True, DROPOUT, PRECISION, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
    dq_ptrs = dq_ptr + tile_offsets(offs_m, stride_dq_length, BLOCK_D, stride_dq_dim)
    if DROPOUT:
        dq *= drop_scale
    if HAS_ROWS:
        dq = tl.where(computed[:, None], dq, 0.0)
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=tile_mask(mask_m, HEAD_DIM, BLOCK_D))


@triton.jit(do_not_specialize=["num_heads", "q_len", "k_len", "num_blocks", "drop_threshold"])
def _attention_grad_key_value_kernel(
    q_ptr,  # [B, H, Lq, HEAD_DIM]
    k_ptr,  # [B, H, Lk, HEAD_DIM]
    v_ptr,  # [B, H, Lk, VALUE_DIM]
    caps_ptr,  # [B, num_blocks * BLOCK_N] float32, or None
    rows_ptr,  # [B, 1 + Lq] int32, or None
    seed_ptr,  # [1] int64, or None
    do_ptr,  # [B, H, Lq, VALUE_DIM], gradient of out
    lse_log2_ptr,  # [B, H, Lq] float32, contiguous, from the first pass
    delta_ptr,  # [B, H, Lq] float32, contiguous, from the first pass
    dk_ptr,  # [B, H, Lk, HEAD_DIM], written
    dv_ptr,  # [B, H, Lk, VALUE_DIM], written
    stride_q_batch,
    stride_q_head,
    stride_q_length,
    stride_q_dim,
    stride_k_batch,
    stride_k_head,
    stride_k_length,
    stride_k_dim,
    stride_v_batch,
    stride_v_head,
    stride_v_length,
    stride_v_dim,
    stride_do_batch,
    stride_do_head,
    stride_do_length,
    stride_do_dim,
    stride_dk_batch,
    stride_dk_head,
    stride_dk_length,
    stride_dk_dim,
    stride_dv_batch,
    stride_dv_head,
    stride_dv_length,
    stride_dv_dim,
    num_heads,
    q_len,
    k_len,
    num_blocks,
    scale,
    drop_threshold,
    drop_scale,
    HAS_MASK: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Program (block of keys of one head of one image)."""
    tiles = tl.cdiv(k_len, BLOCK_N)
    image_head = tl.program_id(0) // tiles
    batch = (image_head // num_heads).to(tl.int64)
    head = (image_head % num_heads).to(tl.int64)
    start_n = (tl.program_id(0) % tiles) * BLOCK_N
    offs_n = start_n + tl.arange(0, BLOCK_N)
    q_ptr += batch * stride_q_batch + head * stride_q_head
    k_ptr += batch * stride_k_batch + head * stride_k_head
    v_ptr += batch * stride_v_batch + head * stride_v_head
    do_ptr += batch * stride_do_batch + head * stride_do_head
    dk_ptr += batch * stride_dk_batch + head * stride_dk_head
    dv_ptr += batch * stride_dv_batch + head * stride_dv_head
    dk_ptrs = dk_ptr + tile_offsets(offs_n, stride_dk_length, BLOCK_D, stride_dk_dim)
    dv_ptrs = dv_ptr + tile_offsets(offs_n, stride_dv_length, BLOCK_DV, stride_dv_dim)
    dk_mask = tile_mask(offs_n < k_len, HEAD_DIM, BLOCK_D)
    dv_mask = tile_mask(offs_n < k_len, VALUE_DIM, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    if HAS_MASK:
        caps_ptr += batch * num_blocks * BLOCK_N
    valid = valid_keys(caps_ptr, offs_n, k_len, HAS_MASK)
    if tl.max(valid.to(tl.int32), axis=0) == 0:
        tl.store(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=dk_mask)
        tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=dv_mask)
        return

    k_ptrs = k_ptr + tile_offsets(offs_n, stride_k_length, BLOCK_D, stride_k_dim)
    v_ptrs = v_ptr + tile_offsets(offs_n, stride_v_length, BLOCK_DV, stride_v_dim)
    k = tl.load(k_ptrs, mask=tile_mask(valid, HEAD_DIM, BLOCK_D), other=0.0)  # [BLOCK_N, BLOCK_D]
    v = tl.load(v_ptrs, mask=tile_mask(valid, VALUE_DIM, BLOCK_DV), other=0.0)  # [BLOCK_N, BLOCK_DV]
    q_tile = tile_offsets(tl.arange(0, BLOCK_M), stride_q_length, BLOCK_D, stride_q_dim)
    do_tile = tile_offsets(tl.arange(0, BLOCK_M), stride_do_length, BLOCK_DV, stride_do_dim)
    lse_log2_ptr += image_head.to(tl.int64) * q_len
    delta_ptr += image_head.to(tl.int64) * q_len
    seed = tl.load(seed_ptr) if DROPOUT else 0
    scale_log2 = scale * LOG2_E
    num_rows = q_len
    if HAS_ROWS:
        rows_ptr += batch * (1 + q_len)
        num_rows = tl.load(rows_ptr)
    for start_m in range(0, num_rows, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < num_rows
        first = tl.cast(start_m, tl.int64)
        if HAS_ROWS:
            offs_m = tl.load(rows_ptr + 1 + offs_m, mask=mask_m, other=0)
            first = tl.cast(0, tl.int64)
            q_tile = tile_offsets(offs_m, stride_q_length, BLOCK_D, stride_q_dim)
            do_tile = tile_offsets(offs_m, stride_do_length, BLOCK_DV, stride_do_dim)
        q = tl.load(q_ptr + first * stride_q_length + q_tile, mask=tile_mask(mask_m, HEAD_DIM, BLOCK_D), other=0.0)
        do_ptrs = do_ptr + first * stride_do_length + do_tile
        do = tl.load(do_ptrs, mask=tile_mask(mask_m, VALUE_DIM, BLOCK_DV), other=0.0)
        lse_log2 = tl.load(lse_log2_ptr + offs_m, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + offs_m, mask=mask_m, other=0.0)
        # A padded key's own row may hold anything here: it is mixed with no other, and zeroed at the end.
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        probs = tl.exp2(scores * scale_log2 - lse_log2[:, None])
        grad_probs = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if DROPOUT:
            keep = dropout_keep(seed, drop_threshold, image_head, offs_m, start_n, BLOCK_M, BLOCK_N)
            dropped = tl.where(keep, probs, unknown_zero(drop_threshold))
            grad_scores = dropped * grad_probs - probs * delta[:, None]
        else:
            dropped = probs
            grad_scores = probs * (grad_probs - delta[:, None])
        dv = tl.dot(tl.trans(dropped.to(do.dtype)), do, dv, input_precision=PRECISION)
        dk = tl.dot(tl.trans(grad_scores.to(q.dtype)), q, dk, input_precision=PRECISION)
    if DROPOUT:
        dv *= drop_scale
        dk *= drop_scale
    dk = tl.where(valid[:, None], dk * scale, 0.0)
    dv = tl.where(valid[:, None], dv, 0.0)
    tl.store(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=dk_mask)
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=dv_mask)


def attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    drop_threshold: int,
    drop_scale: float,
    scale: float,
    query_padding_mask: torch.Tensor | None,
    *,
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
) -> None:
    """Launch both passes into the last three.

    Args:
        grad_out: [B, H, Lq, Dv], any strides, the inputs' dtype.
        query, key, value, key_padding_mask, seed, drop_threshold, drop_scale, scale, query_padding_mask: as the
            forward's.
        out, logsumexp: what the forward gave.
        grad_query, grad_key, grad_value: shaped as query, key and value, any strides, the inputs' dtype.
    """
    batch, heads, q_len, head_dim = query.shape
    value_dim, k_len = value.shape[3], key.shape[2]
    if batch * heads == 0:
        return
    if needs_float32(query):
        exact = [torch.empty_like(grad, dtype=torch.float32) for grad in (grad_query, grad_key, grad_value)]
        attention_backward(
            grad_out.float(), query.float(), key.float(), value.float(), out.float(), logsumexp, key_padding_mask, seed,
            drop_threshold, drop_scale, scale, query_padding_mask,
            grad_query=exact[0], grad_key=exact[1], grad_value=exact[2],
        )  # fmt: skip
        for grad, result in zip((grad_query, grad_key, grad_value), exact, strict=True):
            grad.copy_(result)
        return
    block_d, block_dv = padded_head_dim(head_dim), padded_head_dim(value_dim)
    delta, lse_log2 = torch.empty_like(logsumexp), torch.empty_like(logsumexp)
    blocks, caps = key_blocks(key_padding_mask)
    rows = query_rows(query_padding_mask)
    precision = input_precision(query.dtype)
    conditions = _configurations.attention_conditions(
        query, key, value, precision, max(block_d, block_dv), blocks is not None, seed is not None
    )
    shared = dict(
        q_ptr=query,
        k_ptr=key,
        v_ptr=value,
        caps_ptr=caps,
        rows_ptr=rows,
        seed_ptr=seed,
        do_ptr=grad_out,
        delta_ptr=delta,
        lse_log2_ptr=lse_log2,
        **strides(q=query, k=key, v=value, do=grad_out),
        num_heads=heads,
        q_len=q_len,
        k_len=k_len,
        num_blocks=0 if blocks is None else blocks.shape[1] - 1,
        scale=scale,
        drop_threshold=min(drop_threshold, 255),
        drop_scale=drop_scale,
        HAS_MASK=blocks is not None,
        HAS_ROWS=rows is not None,
        DROPOUT=seed is not None,
        PRECISION=precision,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_N=BLOCK_N,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
    )
    tile = _configurations.configuration("attention_grad_query", **conditions)
    if q_len:
        _attention_grad_query_kernel[(batch * heads * triton.cdiv(q_len, tile["BLOCK_M"]),)](
            out_ptr=out,
            dq_ptr=grad_query,
            lse_ptr=logsumexp,
            blocks_ptr=blocks,
            **strides(out=out, dq=grad_query),
            **shared,
            **tile,
        )
    if k_len:
        _attention_grad_key_value_kernel[(batch * heads * triton.cdiv(k_len, BLOCK_N),)](
            dk_ptr=grad_key,
            dv_ptr=grad_value,
            **strides(dk=grad_key, dv=grad_value),
            **shared,
            **_configurations.configuration("attention_grad_key_value", **conditions),
        )
