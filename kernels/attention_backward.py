"""Backward of `attention`: two passes, each of which owns what it writes, so that the result is the same every time.

    delta = Σ_d grad_out · out                  dq = scale · dS k
    P     = exp(q kᵀ · scale - logsumexp)       dk = scale · dSᵀ q
    dS    = P ∘ (drop(grad_out vᵀ) - delta)     dv = drop(P)ᵀ grad_out

One pass could give all three, but only by adding to dq from every block of keys: atomically, in an order that changes
from run to run. Two passes compute P twice and add in registers, in a fixed order:

1. A program owns a tile of queries and walks over the keys. It makes delta, keeps it for the second pass, and gives dq.
2. A program owns a block of keys and walks over the queries. It gives dk and dv.

P comes from the forward's logsumexp; +inf there, for a row without a key, makes the row's gradients zero without a
branch. Neither pass reads padding: tiles and steps are made of the valid rows, as in the forward. With dropout both
passes work on dS / drop_scale, from delta / drop_scale, and multiply once, at the end.

In the second pass P and dS have the queries as rows, too, and go transposed through shared memory into the last two
products. With keys as rows they would stay in registers, but then sm_90 runs all matrix products one after another,
and dropout's bytes, dealt out along the keys, change threads.

Source: Dao 2023 (FlashAttention-2), algorithm 2.
"""

import torch
import triton
import triton.language as tl

from detr_fast.kernels import _configurations
from detr_fast.kernels.attention import (
    LOG2_E,
    dropout_keep,
    head_offset,
    launch_arguments,
    needs_float32,
    owned_rows,
    step_pointers,
    step_rows,
    tile_mask,
    tile_offsets,
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
    keys_ptr,
    stride_k,
    stride_v,
    start_n,
    num_keys,
    scale_log2,
    seed,
    drop_threshold,
    head,
    rows_m,
    BOUNDARY: tl.constexpr,
    GATHER_KEYS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One block of valid keys; `BOUNDARY` as in the forward."""
    rows_n, valid = step_rows(keys_ptr, num_keys, start_n, GATHER_KEYS, BOUNDARY, BLOCK_N)
    k_ptrs = step_pointers(k_ptr, k_tile, rows_n, start_n, stride_k, BLOCK_D, GATHER_KEYS)
    v_ptrs = step_pointers(v_ptr, v_tile, rows_n, start_n, stride_v, BLOCK_DV, GATHER_KEYS)
    k = tl.load(k_ptrs, mask=tile_mask(valid, HEAD_DIM, BLOCK_D), other=0.0)
    v = tl.load(v_ptrs, mask=tile_mask(valid, VALUE_DIM, BLOCK_DV), other=0.0)
    # The probabilities again. The forward's logsumexp stands for its maximum and sum, so no running statistics.
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if BOUNDARY:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    probs = tl.exp2(scores * scale_log2 - lse_log2[:, None])
    grad_probs = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if DROPOUT:
        # A dropped probability has no gradient of its own, but still shares the row's softmax: only this term is 0.
        keep = dropout_keep(seed, drop_threshold, head, rows_m, start_n, BLOCK_M, BLOCK_N)
        grad_probs = tl.where(keep, grad_probs, 0.0)
    grad_scores = probs * (grad_probs - delta[:, None])
    return tl.dot(grad_scores.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_heads", "q_len", "k_len", "drop_threshold"])
def _attention_grad_query_kernel(
    q_ptr,  # [B, H, Lq, HEAD_DIM]
    k_ptr,  # [B, H, Lk, HEAD_DIM]
    v_ptr,  # [B, H, Lk, VALUE_DIM]
    keys_ptr,  # [B, 1 + Lk] int32, or None
    queries_ptr,  # [B, 1 + Lq] int32, or None
    seed_ptr,  # [1] int64, or None
    out_ptr,  # [B, H, Lq, VALUE_DIM]
    do_ptr,  # [B, H, Lq, VALUE_DIM], gradient of out
    lse_ptr,  # [B, H, Lq] float32, contiguous
    delta_ptr,  # [B, H, Lq] float32, contiguous, written: delta over drop_scale
    lse_log2_ptr,  # [B, H, Lq] float32, contiguous, written: lse in units of log(2)
    dq_ptr,  # [B, H, Lq, HEAD_DIM], written
    stride_q,  # these six: (batch, head, length, dim)
    stride_k,
    stride_v,
    stride_out,
    stride_do,
    stride_dq,
    num_heads,
    q_len,
    k_len,
    scale,
    drop_threshold,
    drop_scale,
    GATHER_KEYS: tl.constexpr,
    GATHER_QUERIES: tl.constexpr,
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
    num_keys = k_len
    if GATHER_KEYS:
        keys_ptr += batch * (1 + k_len)
        num_keys = tl.load(keys_ptr)
    if GATHER_QUERIES:
        queries_ptr += batch * (1 + q_len)
    rows_m, exists, computed, num_queries = owned_rows(queries_ptr, q_len, start_m, GATHER_QUERIES, BLOCK_M)
    if GATHER_QUERIES:  # a tile of padding reads no key: its dq is only filled
        num_keys = tl.where(start_m < num_queries, num_keys, 0)
    q_ptr += head_offset(batch, head, stride_q)
    k_ptr += head_offset(batch, head, stride_k)
    v_ptr += head_offset(batch, head, stride_v)
    out_ptr += head_offset(batch, head, stride_out)
    do_ptr += head_offset(batch, head, stride_do)
    dq_ptr += head_offset(batch, head, stride_dq)
    k_tile = tile_offsets(tl.arange(0, BLOCK_N), stride_k, BLOCK_D)
    v_tile = tile_offsets(tl.arange(0, BLOCK_N), stride_v, BLOCK_DV)
    mask_q = tile_mask(computed, HEAD_DIM, BLOCK_D)
    mask_out = tile_mask(computed, VALUE_DIM, BLOCK_DV)
    q = tl.load(q_ptr + tile_offsets(rows_m, stride_q, BLOCK_D), mask=mask_q, other=0.0)
    out = tl.load(out_ptr + tile_offsets(rows_m, stride_out, BLOCK_DV), mask=mask_out, other=0.0)
    do = tl.load(do_ptr + tile_offsets(rows_m, stride_do, BLOCK_DV), mask=mask_out, other=0.0)
    # Equals Σ_n P · drop(grad_out vᵀ), what a softmax's gradient subtracts, without a walk over the keys.
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), axis=1)  # [BLOCK_M]
    offs_m = image_head.to(tl.int64) * q_len + rows_m
    if DROPOUT:  # so that the loops need not multiply by drop_scale, which is 0 if everything is dropped
        delta /= tl.where(drop_scale == 0, 1.0, drop_scale)
    tl.store(delta_ptr + offs_m, delta, mask=computed)
    lse_log2 = tl.load(lse_ptr + offs_m, mask=computed, other=float("inf")) * LOG2_E
    tl.store(lse_log2_ptr + offs_m, lse_log2, mask=computed)

    seed = tl.load(seed_ptr) if DROPOUT else 0
    scale_log2 = scale * LOG2_E
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    ONE_BODY: tl.constexpr = PRECISION == "ieee"  # the loop is the forward's
    full = tl.cdiv(num_keys, BLOCK_N) if ONE_BODY else num_keys // BLOCK_N
    for i in range(0, full):
        dq = _grad_query_block(
            dq, q, do, lse_log2, delta, k_ptr, v_ptr, k_tile, v_tile, keys_ptr, stride_k, stride_v, i * BLOCK_N,
            num_keys, scale_log2, seed, drop_threshold, image_head, rows_m, ONE_BODY, GATHER_KEYS, DROPOUT, PRECISION,
            HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    if not ONE_BODY and full * BLOCK_N < num_keys:
        dq = _grad_query_block(
            dq, q, do, lse_log2, delta, k_ptr, v_ptr, k_tile, v_tile, keys_ptr, stride_k, stride_v, full * BLOCK_N,
            num_keys, scale_log2, seed, drop_threshold, image_head, rows_m, True, GATHER_KEYS, DROPOUT, PRECISION,
            HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    dq_ptrs = dq_ptr + tile_offsets(rows_m, stride_dq, BLOCK_D)
    if DROPOUT:
        dq *= drop_scale
    if GATHER_QUERIES:
        dq = tl.where(computed[:, None], dq, 0.0)
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=tile_mask(exists, HEAD_DIM, BLOCK_D))


@triton.jit(do_not_specialize=["num_heads", "q_len", "k_len", "drop_threshold"])
def _attention_grad_key_value_kernel(
    q_ptr,  # [B, H, Lq, HEAD_DIM]
    k_ptr,  # [B, H, Lk, HEAD_DIM]
    v_ptr,  # [B, H, Lk, VALUE_DIM]
    keys_ptr,  # [B, 1 + Lk] int32, or None
    queries_ptr,  # [B, 1 + Lq] int32, or None
    seed_ptr,  # [1] int64, or None
    do_ptr,  # [B, H, Lq, VALUE_DIM], gradient of out
    lse_log2_ptr,  # [B, H, Lq] float32, contiguous, from the first pass
    delta_ptr,  # [B, H, Lq] float32, contiguous, from the first pass
    dk_ptr,  # [B, H, Lk, HEAD_DIM], written
    dv_ptr,  # [B, H, Lk, VALUE_DIM], written
    stride_q,  # these six: (batch, head, length, dim)
    stride_k,
    stride_v,
    stride_do,
    stride_dk,
    stride_dv,
    num_heads,
    q_len,
    k_len,
    scale,
    drop_threshold,
    drop_scale,
    GATHER_KEYS: tl.constexpr,
    GATHER_QUERIES: tl.constexpr,
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
    if GATHER_KEYS:
        keys_ptr += batch * (1 + k_len)
    rows_n, exists, valid, num_keys = owned_rows(keys_ptr, k_len, start_n, GATHER_KEYS, BLOCK_N)
    q_ptr += head_offset(batch, head, stride_q)
    k_ptr += head_offset(batch, head, stride_k)
    v_ptr += head_offset(batch, head, stride_v)
    do_ptr += head_offset(batch, head, stride_do)
    dk_ptr += head_offset(batch, head, stride_dk)
    dv_ptr += head_offset(batch, head, stride_dv)
    dk_ptrs = dk_ptr + tile_offsets(rows_n, stride_dk, BLOCK_D)
    dv_ptrs = dv_ptr + tile_offsets(rows_n, stride_dv, BLOCK_DV)
    dk_mask = tile_mask(exists, HEAD_DIM, BLOCK_D)
    dv_mask = tile_mask(exists, VALUE_DIM, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], dtype=tl.float32)
    if start_n >= num_keys:  # a block of padding: fill it and leave
        tl.store(dk_ptrs, dk.to(dk_ptr.dtype.element_ty), mask=dk_mask)
        tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=dv_mask)
        return

    k_ptrs = k_ptr + tile_offsets(rows_n, stride_k, BLOCK_D)
    v_ptrs = v_ptr + tile_offsets(rows_n, stride_v, BLOCK_DV)
    k = tl.load(k_ptrs, mask=tile_mask(valid, HEAD_DIM, BLOCK_D), other=0.0)  # [BLOCK_N, BLOCK_D]
    v = tl.load(v_ptrs, mask=tile_mask(valid, VALUE_DIM, BLOCK_DV), other=0.0)  # [BLOCK_N, BLOCK_DV]
    q_tile = tile_offsets(tl.arange(0, BLOCK_M), stride_q, BLOCK_D)
    do_tile = tile_offsets(tl.arange(0, BLOCK_M), stride_do, BLOCK_DV)
    lse_log2_ptr += image_head.to(tl.int64) * q_len
    delta_ptr += image_head.to(tl.int64) * q_len
    seed = tl.load(seed_ptr) if DROPOUT else 0
    scale_log2 = scale * LOG2_E
    num_queries = q_len
    if GATHER_QUERIES:
        queries_ptr += batch * (1 + q_len)
        num_queries = tl.load(queries_ptr)
    for start_m in range(0, num_queries, BLOCK_M):
        # One body, with masks: in rows beyond the last query q, do and delta are 0 and lse is +inf, so P and dS are 0.
        rows_m, mask_m = step_rows(queries_ptr, num_queries, start_m, GATHER_QUERIES, True, BLOCK_M)
        q_ptrs = step_pointers(q_ptr, q_tile, rows_m, start_m, stride_q, BLOCK_D, GATHER_QUERIES)
        q = tl.load(q_ptrs, mask=tile_mask(mask_m, HEAD_DIM, BLOCK_D), other=0.0)
        do_ptrs = step_pointers(do_ptr, do_tile, rows_m, start_m, stride_do, BLOCK_DV, GATHER_QUERIES)
        do = tl.load(do_ptrs, mask=tile_mask(mask_m, VALUE_DIM, BLOCK_DV), other=0.0)
        lse_log2 = tl.load(lse_log2_ptr + rows_m, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + rows_m, mask=mask_m, other=0.0)
        # No mask of keys: a padded key's column of P and dS may hold anything, as it reaches only that key's row of dk
        # and dv, which is zeroed at the end.
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        probs = tl.exp2(scores * scale_log2 - lse_log2[:, None])
        grad_probs = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if DROPOUT:
            # drop(P) is needed for dv anyway: drop(P) · grad_P is P · drop(grad_P) without a second select.
            keep = dropout_keep(seed, drop_threshold, image_head, rows_m, start_n, BLOCK_M, BLOCK_N)
            # A row of NaN stays one where it is dropped. The compiler sees no constant here, see `unknown_zero`.
            zero = tl.where(lse_log2 == lse_log2, 0.0, float("nan"))  # [BLOCK_M]
            dropped = tl.where(keep, probs, zero[:, None])
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
    valid_keys: torch.Tensor | None,
    valid_queries: torch.Tensor | None,
    seed: torch.Tensor | None,
    drop_threshold: int,
    drop_scale: float,
    scale: float,
    *,
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
) -> None:
    """Launch both passes, which write `grad_query`, `grad_key` and `grad_value`.

    Args:
        grad_out: [B, H, Lq, Dv], any strides, the inputs' dtype.
        query, key, value, valid_keys, valid_queries, seed, drop_threshold, drop_scale, scale: as the forward's.
        out, logsumexp: what the forward wrote.
        grad_query, grad_key, grad_value: shaped as query, key and value, any strides, the inputs' dtype.
    """
    batch, heads, q_len, _ = query.shape
    k_len = key.shape[2]
    if batch * heads == 0:
        return
    if needs_float32(query):
        exact = [torch.empty_like(grad, dtype=torch.float32) for grad in (grad_query, grad_key, grad_value)]
        attention_backward(
            grad_out.float(), query.float(), key.float(), value.float(), out.float(), logsumexp, valid_keys,
            valid_queries, seed, drop_threshold, drop_scale, scale,
            grad_query=exact[0], grad_key=exact[1], grad_value=exact[2],
        )  # fmt: skip
        for grad, result in zip((grad_query, grad_key, grad_value), exact, strict=True):
            grad.copy_(result)
        return
    arguments, conditions = launch_arguments(
        query, key, value, valid_keys, valid_queries, seed, drop_threshold, drop_scale, scale
    )
    shared = arguments | dict(
        do_ptr=grad_out,
        stride_do=grad_out.stride(),
        delta_ptr=torch.empty_like(logsumexp),
        lse_log2_ptr=torch.empty_like(logsumexp),
    )
    tile = _configurations.configuration("attention_grad_query", **conditions)
    if q_len:
        _attention_grad_query_kernel[(batch * heads * triton.cdiv(q_len, tile["BLOCK_M"]),)](
            out_ptr=out,
            lse_ptr=logsumexp,
            dq_ptr=grad_query,
            stride_out=out.stride(),
            stride_dq=grad_query.stride(),
            **shared,
            **tile,
        )
    tile = _configurations.configuration("attention_grad_key_value", **conditions)
    if k_len:
        _attention_grad_key_value_kernel[(batch * heads * triton.cdiv(k_len, tile["BLOCK_N"]),)](
            dk_ptr=grad_key,
            dv_ptr=grad_value,
            stride_dk=grad_key.stride(),
            stride_dv=grad_value.stride(),
            **shared,
            **tile,
        )
