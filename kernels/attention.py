"""Multi-head attention with padded keys and dropout, forward; the backward is in `attention_backward.py`.

    out = dropout(softmax(q kᵀ · scale)) v        logsumexp = log Σ exp(q kᵀ · scale), over the valid keys

A program takes one tile of queries of one head and walks over the valid keys in blocks. The row maximum, the row sum
and the unnormalised output stay in registers (online softmax), so the [Lq, Lk] matrix never reaches memory.

Padding of a feature map lies at the end of each of its rows, so hardly any block of consecutive keys is padding
throughout. A small kernel therefore lists the valid keys of each image first, and blocks are made from that list: all
are full but the last, which alone needs a mask. Where queries are padded too, their tiles are made the same way.

Exponentials are powers of two: one multiply-add scales a score by log2(e) · scale and subtracts the row maximum.

Dropout: see `detr_fast.ops.attention` for the counter and the order of the bytes.

Source: Dao 2023 (FlashAttention-2), Milakov and Gimelshein 2018 (online softmax), Salmon et al. 2011 (Philox).
"""

import os

import torch
import triton
import triton.language as tl

from detr_fast.kernels import _configurations

_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def head_offset(batch, head, stride):
    """Offset of one head of one image; `stride` as everywhere here: (batch, head, length, dim)."""
    return batch * stride[0] + head * stride[1]


@triton.jit
def tile_offsets(rows, stride, BLOCK_D: tl.constexpr):
    """Offsets [L, BLOCK_D] of `rows` [L] within a head."""
    columns = tl.arange(0, BLOCK_D).to(tl.int64)
    return rows.to(tl.int64)[:, None] * stride[2] + columns[None, :] * stride[3]


@triton.jit
def tile_mask(mask_l, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Mask [L, BLOCK_D] of the rows in `mask_l` and the columns below HEAD_DIM; [L, 1] where every column is."""
    mask = mask_l[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def owned_rows(list_ptr, length, start, GATHER: tl.constexpr, BLOCK: tl.constexpr):
    """The rows of the tile whose outputs this program writes, padding included.

    Returns: rows [BLOCK]; mask [BLOCK] of those within `length`; mask [BLOCK] of the valid ones; how many valid rows
    the image has.
    """
    places = start + tl.arange(0, BLOCK)
    exists = places < length
    if GATHER:
        # The list names every row once, valid ones first, so that between them the tiles also fill the padding.
        count = tl.load(list_ptr)
        rows = tl.load(list_ptr + 1 + places, mask=exists, other=0)
    else:
        count = length
        rows = places
    return rows, exists, places < count, count


@triton.jit
def step_rows(list_ptr, count, start, GATHER: tl.constexpr, BOUNDARY: tl.constexpr, BLOCK: tl.constexpr):
    """The valid rows [BLOCK] from place `start` on that one step of a loop reads, and the mask of those below `count`.

    `BOUNDARY`: the step may reach beyond `count`.
    """
    places = start + tl.arange(0, BLOCK)
    if BOUNDARY:
        valid = places < count
    else:
        valid = tl.full([BLOCK], 1, dtype=tl.int1)
    if GATHER:
        places = tl.load(list_ptr + 1 + places, mask=valid, other=0)
    return places, valid


@triton.jit
def step_pointers(ptr, tile, rows, start, stride, BLOCK_D: tl.constexpr, GATHER: tl.constexpr):
    """Pointers [L, BLOCK_D] to `rows`. Without a list rows are consecutive: the first step's offsets `tile`, moved."""
    if GATHER:
        return ptr + tile_offsets(rows, stride, BLOCK_D)
    return ptr + tl.cast(start, tl.int64) * stride[2] + tile


@triton.jit
def unknown_zero(threshold):
    """0.0, computed from the dropout threshold (at most 255), so that the compiler does not see a constant.

    A select with a constant it moves behind the cast to 16 bits that follows, where it takes more instructions.
    """
    return (threshold >> 8).to(tl.float32)


@triton.jit
def dropout_keep(seed, threshold, head, rows_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N]: elements that dropout keeps, for queries `rows_m` and keys from place `start_n` of `head`."""
    # One call draws 16 bytes for 16 neighbouring keys. Its counter is the absolute row and place, so that forward and
    # backward draw the same whatever their tiles.
    groups = start_n // 16 + tl.arange(0, BLOCK_N // 16)
    w0, w1, w2, w3 = tl.philox(seed, rows_m[:, None], groups[None, :], head, 0, 7)  # [BLOCK_M, BLOCK_N / 16]
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(words, [BLOCK_M, BLOCK_N // 16, 4, 1])
    # Each byte is shifted to the top of its word and compared there: the bytes below cannot change the answer, so
    # none need be masked off.
    shifts = ((3 - tl.arange(0, 4)) * 8).to(tl.uint32)
    drawn = words << shifts[None, None, None, :]  # [BLOCK_M, BLOCK_N / 16, 4, 4]
    # Deal the bytes out as the threads own the elements of a matrix product's result: no byte changes its thread.
    drawn = tl.reshape(drawn, [BLOCK_M, BLOCK_N // 64, 4, 8, 2])
    drawn = tl.reshape(tl.permute(drawn, (0, 1, 3, 2, 4)), [BLOCK_M, BLOCK_N])
    return drawn >= (threshold.to(tl.uint32) << 24)


@triton.jit(do_not_specialize=["stride_mask_batch", "stride_mask_length", "length"])
def _valid_rows_kernel(
    mask_ptr,  # [B, L] bool, True = padding
    list_ptr,  # [B, 1 + L] int32, written: the number of valid rows; these, in order; then the others, from the last
    stride_mask_batch,
    stride_mask_length,
    length,
    BLOCK: tl.constexpr,
):
    """Program (image)."""
    batch = tl.program_id(0).to(tl.int64)
    mask_ptr += batch * stride_mask_batch
    list_ptr += batch * (1 + length)
    count = 0
    for first in range(0, length, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        padding = tl.load(mask_ptr + offs.to(tl.int64) * stride_mask_length, mask=offs < length, other=1)
        valid = (padding == 0).to(tl.int32)
        before = count + tl.cumsum(valid, axis=0) - valid  # valid rows before each row
        # The others fill the list from its end, as one walk does not know yet how many valid rows there are.
        place = tl.where(valid != 0, before, length - 1 - (offs - before))
        tl.store(list_ptr + 1 + place, offs, mask=offs < length)
        count += tl.sum(valid, axis=0)
    tl.store(list_ptr, count)


@triton.jit
def _forward_block(
    acc,  # [BLOCK_M, BLOCK_DV]
    row_max,  # [BLOCK_M], of the scores before scaling
    row_sum,  # [BLOCK_M]
    q,  # [BLOCK_M, BLOCK_D]
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
    """One block of valid keys. `BOUNDARY`: it may reach beyond the last of them."""
    rows_n, valid = step_rows(keys_ptr, num_keys, start_n, GATHER_KEYS, BOUNDARY, BLOCK_N)
    k_ptrs = step_pointers(k_ptr, k_tile, rows_n, start_n, stride_k, BLOCK_D, GATHER_KEYS)
    v_ptrs = step_pointers(v_ptr, v_tile, rows_n, start_n, stride_v, BLOCK_DV, GATHER_KEYS)
    k = tl.load(k_ptrs, mask=tile_mask(valid, HEAD_DIM, BLOCK_D), other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if BOUNDARY:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    # The maximum may have risen: what is summed so far is brought to the new one. Every block holds a valid key, so
    # the new maximum is finite, and the first block's rescale is exp2(-inf) = 0.
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    rescale = tl.exp2((row_max - new_max) * scale_log2)
    probs = tl.exp2(scores * scale_log2 - (new_max * scale_log2)[:, None])
    # The sum is of all probabilities: dropout comes after the softmax.
    row_sum = row_sum * rescale + tl.sum(probs, axis=1)
    if DROPOUT:
        keep = dropout_keep(seed, drop_threshold, head, rows_m, start_n, BLOCK_M, BLOCK_N)
        probs = tl.where(keep, probs, unknown_zero(drop_threshold))
    # Loaded here, not beside k: the load is in flight while the softmax is computed.
    v = tl.load(v_ptrs, mask=tile_mask(valid, VALUE_DIM, BLOCK_DV), other=0.0)
    acc = tl.dot(probs.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=["num_heads", "q_len", "k_len", "drop_threshold"])
def _attention_forward_kernel(
    q_ptr,  # [B, H, Lq, HEAD_DIM]
    k_ptr,  # [B, H, Lk, HEAD_DIM]
    v_ptr,  # [B, H, Lk, VALUE_DIM]
    keys_ptr,  # [B, 1 + Lk] int32 from _valid_rows_kernel, or None
    queries_ptr,  # [B, 1 + Lq] int32 from _valid_rows_kernel, or None
    seed_ptr,  # [1] int64, or None
    out_ptr,  # [B, H, Lq, VALUE_DIM], written
    lse_ptr,  # [B, H, Lq] float32, contiguous, written
    stride_q,  # these four: (batch, head, length, dim)
    stride_k,
    stride_v,
    stride_out,
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
    if GATHER_QUERIES:  # a tile of padding reads no key: its rows are only filled
        num_keys = tl.where(start_m < num_queries, num_keys, 0)
    q_ptr += head_offset(batch, head, stride_q)
    k_ptr += head_offset(batch, head, stride_k)
    v_ptr += head_offset(batch, head, stride_v)
    out_ptr += head_offset(batch, head, stride_out)
    k_tile = tile_offsets(tl.arange(0, BLOCK_N), stride_k, BLOCK_D)
    v_tile = tile_offsets(tl.arange(0, BLOCK_N), stride_v, BLOCK_DV)
    q_ptrs = q_ptr + tile_offsets(rows_m, stride_q, BLOCK_D)
    q = tl.load(q_ptrs, mask=tile_mask(computed, HEAD_DIM, BLOCK_D), other=0.0)  # [BLOCK_M, BLOCK_D]

    seed = tl.load(seed_ptr) if DROPOUT else 0
    scale_log2 = scale * LOG2_E
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    # The loop takes full blocks without masks, one more copy of its body the rest. No branch stands inside the loop:
    # one that skipped blocks of padding would keep the compiler from loading the next block during this one, which
    # reading rows from a list does not.
    # Without tensor cores two copies of the body cost more in spilled registers than a mask in every block.
    ONE_BODY: tl.constexpr = PRECISION == "ieee"
    full = tl.cdiv(num_keys, BLOCK_N) if ONE_BODY else num_keys // BLOCK_N
    for i in range(0, full):
        acc, row_max, row_sum = _forward_block(
            acc, row_max, row_sum, q, k_ptr, v_ptr, k_tile, v_tile, keys_ptr, stride_k, stride_v, i * BLOCK_N,
            num_keys, scale_log2, seed, drop_threshold, image_head, rows_m, ONE_BODY, GATHER_KEYS, DROPOUT, PRECISION,
            HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    if not ONE_BODY and full * BLOCK_N < num_keys:
        acc, row_max, row_sum = _forward_block(
            acc, row_max, row_sum, q, k_ptr, v_ptr, k_tile, v_tile, keys_ptr, stride_k, stride_v, full * BLOCK_N,
            num_keys, scale_log2, seed, drop_threshold, image_head, rows_m, True, GATHER_KEYS, DROPOUT, PRECISION,
            HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    if GATHER_QUERIES:  # rows of padding leave as rows without a key do
        row_sum = tl.where(computed, row_sum, 0.0)
        acc = tl.where(computed[:, None], acc, 0.0)
    # A row without a key gives zeros, not 0 / 0, and a logsumexp of +inf: exp(score - inf) = 0, so that the backward
    # needs no case of its own for it.
    no_key = row_sum == 0.0
    factor = tl.where(no_key, 0.0, 1.0 / tl.where(no_key, 1.0, row_sum))
    if DROPOUT:
        factor *= drop_scale
    out_ptrs = out_ptr + tile_offsets(rows_m, stride_out, BLOCK_DV)
    out = (acc * factor[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=tile_mask(exists, VALUE_DIM, BLOCK_DV))
    lse = tl.where(no_key, float("inf"), row_max * scale + tl.log(tl.where(no_key, 1.0, row_sum)))
    tl.store(lse_ptr + image_head.to(tl.int64) * q_len + rows_m, lse, mask=exists)


def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid_keys: torch.Tensor | None,
    valid_queries: torch.Tensor | None,
    seed: torch.Tensor | None,
    drop_threshold: int,
    drop_scale: float,
    scale: float,
    *,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
) -> None:
    """Launch the forward, which writes `out` and `logsumexp`.

    Args:
        query, key, value: [B, H, Lq, D], [B, H, Lk, D], [B, H, Lk, Dv], any strides, one 16- or 32-bit float dtype.
        valid_keys, valid_queries: [B, 1 + Lk] and [B, 1 + Lq] int32 from `valid_rows`, or None for no padding.
        seed: [1] int64, or None for no dropout.
        drop_threshold: 0..256; an element is dropped if its byte is below. 256 drops all, by a `drop_scale` of 0.
        drop_scale: multiplies what is kept.
        scale: positive.
        out: [B, H, Lq, Dv], any strides, the inputs' dtype.
        logsumexp: [B, H, Lq] float32, contiguous.
    """
    if out.numel() == 0:
        return
    if needs_float32(query):
        exact = torch.empty_like(out, dtype=torch.float32)
        attention_forward(
            query.float(), key.float(), value.float(), valid_keys, valid_queries, seed, drop_threshold, drop_scale,
            scale, out=exact, logsumexp=logsumexp,
        )  # fmt: skip
        out.copy_(exact)
        return
    batch, heads, q_len, _ = query.shape
    shared, conditions = launch_arguments(
        query, key, value, valid_keys, valid_queries, seed, drop_threshold, drop_scale, scale
    )
    tile = _configurations.configuration("attention_forward", **conditions)
    _attention_forward_kernel[(batch * heads * triton.cdiv(q_len, tile["BLOCK_M"]),)](
        out_ptr=out,
        lse_ptr=logsumexp,
        stride_out=out.stride(),
        **shared,
        **tile,
    )


def valid_rows(mask: torch.Tensor, *, out: torch.Tensor) -> None:
    """Launch the kernel that lists, for each image, the rows that the other kernels read.

    Args:
        mask: [B, L] bool, True = padding, any strides.
        out: [B, 1 + L] int32, contiguous: the number of valid rows, these in order, then the others.
    """
    batch, length = mask.shape
    if batch == 0:
        return
    _valid_rows_kernel[(batch,)](
        mask_ptr=mask,
        list_ptr=out,
        stride_mask_batch=mask.stride(0),
        stride_mask_length=mask.stride(1),
        length=length,
        BLOCK=1024,
        num_warps=4,
    )


def launch_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid_keys: torch.Tensor | None,
    valid_queries: torch.Tensor | None,
    seed: torch.Tensor | None,
    drop_threshold: int,
    drop_scale: float,
    scale: float,
) -> tuple[dict, dict]:
    """Arguments that the forward's and the backward's kernels share, and the conditions of their configurations."""
    head_dim, value_dim = query.shape[3], value.shape[3]
    block_d, block_dv = (max(16, triton.next_power_of_2(dim)) for dim in (head_dim, value_dim))
    precision = input_precision(query.dtype)
    conditions = _configurations.attention_conditions(
        query, key, value, precision, max(block_d, block_dv), valid_keys is not None, seed is not None
    )
    arguments = dict(
        q_ptr=query,
        k_ptr=key,
        v_ptr=value,
        keys_ptr=valid_keys,
        queries_ptr=valid_queries,
        seed_ptr=seed,
        stride_q=query.stride(),
        stride_k=key.stride(),
        stride_v=value.stride(),
        num_heads=query.shape[1],
        q_len=query.shape[2],
        k_len=key.shape[2],
        scale=scale,
        drop_threshold=min(drop_threshold, 255),
        drop_scale=drop_scale,
        GATHER_KEYS=valid_keys is not None,
        GATHER_QUERIES=valid_queries is not None,
        DROPOUT=seed is not None,
        PRECISION=precision,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
    )
    return arguments, conditions


def input_precision(dtype: torch.dtype) -> str:
    """How float32 matrix products are to be computed, by `torch.backends.cuda.matmul`; 16-bit ones are exact."""
    precision = torch.backends.cuda.matmul.fp32_precision
    if precision == "none":
        precision = torch.backends.fp32_precision
    return "ieee" if dtype == torch.float32 and precision != "tf32" else "tf32"


def needs_float32(tensor: torch.Tensor) -> bool:
    """Triton's interpreter computes bfloat16 wrongly; there, and only there, the kernels get float32."""
    return _INTERPRET and tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"
