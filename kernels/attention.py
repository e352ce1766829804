"""Multi-head attention with padded keys and dropout, forward; the backward is in `attention_backward.py`.

    out = dropout(softmax(q kᵀ · scale)) v        logsumexp = log Σ exp(q kᵀ · scale), over the keys without padding

A program takes one tile of queries of one head and walks over the keys in blocks, keeping the running maximum, the
running sum and the unnormalised output in registers, so that the [Lq, Lk] matrix never reaches memory. Blocks are made
of the keys without padding, wherever they lie, which a small kernel lists first, per image: padding lies at the end of
every row of the feature map, so that few blocks of consecutive keys would be padding throughout, and no score but those
of the last block needs a mask. Where queries are padding as well, tiles are made of the others in the same way.
Exponentials are powers of two of scores scaled by log2(e) · scale in the same multiply-add that subtracts the maximum.

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
def tile_offsets(offs_l, stride_l, BLOCK_D: tl.constexpr, stride_d):
    """Offsets [L, BLOCK_D] of rows `offs_l`."""
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    return offs_l.to(tl.int64)[:, None] * stride_l + offs_d[None, :] * stride_d


@triton.jit
def tile_mask(mask_l, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """[L, BLOCK_D], or [L, 1] where no column lies outside: the elements of rows `mask_l`."""
    mask = mask_l[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def owned_rows(list_ptr, length, start, GATHER: tl.constexpr, BLOCK: tl.constexpr):
    """Of the tile that begins at place `start`: rows [BLOCK], which of them exist, which are no padding; and how many
    of all rows are none."""
    places = start + tl.arange(0, BLOCK)
    exists = places < length
    if GATHER:
        count = tl.load(list_ptr)
        rows = tl.load(list_ptr + 1 + places, mask=exists, other=0)
    else:
        count = length
        rows = places
    return rows, exists, places < count, count


@triton.jit
def step_rows(list_ptr, count, start, GATHER: tl.constexpr, BOUNDARY: tl.constexpr, BLOCK: tl.constexpr):
    """Of one step of a loop over the rows without padding, at place `start`: rows [BLOCK], and which are among them.
    `BOUNDARY`: some may not be."""
    places = start + tl.arange(0, BLOCK)
    if BOUNDARY:
        valid = places < count
    else:
        valid = tl.full([BLOCK], 1, dtype=tl.int1)
    if GATHER:
        places = tl.load(list_ptr + 1 + places, mask=valid, other=0)
    return places, valid


@triton.jit
def step_pointers(ptr, tile, rows, start, stride_l, BLOCK_D: tl.constexpr, stride_d, GATHER: tl.constexpr):
    """Pointers [L, BLOCK_D] of rows `rows`, for which the first step's offsets `tile` do where none is left out."""
    if GATHER:
        return ptr + tile_offsets(rows, stride_l, BLOCK_D, stride_d)
    return ptr + tl.cast(start, tl.int64) * stride_l + tile


@triton.jit
def unknown_zero(threshold):
    """0.0, unknown to the compiler, which with a constant selects after the cast to 16 bits: more instructions."""
    return (threshold >> 8).to(tl.float32)


@triton.jit
def dropout_keep(seed, threshold, head, rows_m, start_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N]: elements that dropout keeps, for queries `rows_m` and keys from place `start_n` of `head`."""
    groups = start_n // 16 + tl.arange(0, BLOCK_N // 16)
    w0, w1, w2, w3 = tl.philox(seed, rows_m[:, None], groups[None, :], head, 0, 7)  # [BLOCK_M, BLOCK_N / 16]
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(words, [BLOCK_M, BLOCK_N // 16, 4, 1])
    # A word's byte is compared where it lies highest: those below it cannot change the answer.
    shifts = ((3 - tl.arange(0, 4)) * 8).to(tl.uint32)
    drawn = words << shifts[None, None, None, :]  # [BLOCK_M, BLOCK_N / 16, 4, 4]
    drawn = tl.reshape(drawn, [BLOCK_M, BLOCK_N // 64, 4, 8, 2])
    drawn = tl.reshape(tl.permute(drawn, (0, 1, 3, 2, 4)), [BLOCK_M, BLOCK_N])
    return drawn >= (threshold.to(tl.uint32) << 24)


@triton.jit(do_not_specialize=["stride_mask_batch", "stride_mask_length", "length"])
def _valid_rows_kernel(
    mask_ptr,  # [B, L] bool
    list_ptr,  # [B, 1 + L] int32: how many rows are no padding; those, in order; then the padding, from the last
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
        used = (padding == 0).to(tl.int32)
        before = count + tl.cumsum(used, axis=0) - used
        place = tl.where(used != 0, before, length - 1 - (offs - before))
        tl.store(list_ptr + 1 + place, offs, mask=offs < length)
        count += tl.sum(used, axis=0)
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
    stride_k_length,
    stride_k_dim,
    stride_v_length,
    stride_v_dim,
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
    """One block of keys without padding. `BOUNDARY`: it may reach beyond their last one."""
    rows_n, valid = step_rows(keys_ptr, num_keys, start_n, GATHER_KEYS, BOUNDARY, BLOCK_N)
    k_ptrs = step_pointers(k_ptr, k_tile, rows_n, start_n, stride_k_length, BLOCK_D, stride_k_dim, GATHER_KEYS)
    v_ptrs = step_pointers(v_ptr, v_tile, rows_n, start_n, stride_v_length, BLOCK_DV, stride_v_dim, GATHER_KEYS)
    k = tl.load(k_ptrs, mask=tile_mask(valid, HEAD_DIM, BLOCK_D), other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if BOUNDARY:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    rescale = tl.exp2((row_max - new_max) * scale_log2)
    probs = tl.exp2(scores * scale_log2 - (new_max * scale_log2)[:, None])
    row_sum = row_sum * rescale + tl.sum(probs, axis=1)
    if DROPOUT:
        keep = dropout_keep(seed, drop_threshold, head, rows_m, start_n, BLOCK_M, BLOCK_N)
        probs = tl.where(keep, probs, unknown_zero(drop_threshold))
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
    out_ptr,  # [B, H, Lq, VALUE_DIM]
    lse_ptr,  # [B, H, Lq] float32, contiguous
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
    if GATHER_QUERIES:  # no key for a tile of padding, whose rows are only filled
        num_keys = tl.where(start_m < num_queries, num_keys, 0)
    q_ptr += batch * stride_q_batch + head * stride_q_head
    k_ptr += batch * stride_k_batch + head * stride_k_head
    v_ptr += batch * stride_v_batch + head * stride_v_head
    out_ptr += batch * stride_out_batch + head * stride_out_head
    k_tile = tile_offsets(tl.arange(0, BLOCK_N), stride_k_length, BLOCK_D, stride_k_dim)
    v_tile = tile_offsets(tl.arange(0, BLOCK_N), stride_v_length, BLOCK_DV, stride_v_dim)
    q_ptrs = q_ptr + tile_offsets(rows_m, stride_q_length, BLOCK_D, stride_q_dim)
    q = tl.load(q_ptrs, mask=tile_mask(computed, HEAD_DIM, BLOCK_D), other=0.0)  # [BLOCK_M, BLOCK_D]

    seed = tl.load(seed_ptr) if DROPOUT else 0
    scale_log2 = scale * LOG2_E
    acc = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    # Without tensor cores two copies of the body cost more in spilled registers than a boundary in every block.
    ONE_BODY: tl.constexpr = PRECISION == "ieee"
    full = tl.cdiv(num_keys, BLOCK_N) if ONE_BODY else num_keys // BLOCK_N
    for i in range(0, full):
        acc, row_max, row_sum = _forward_block(
            acc, row_max, row_sum, q, k_ptr, v_ptr, k_tile, v_tile, keys_ptr, stride_k_length, stride_k_dim,
            stride_v_length, stride_v_dim, i * BLOCK_N, num_keys, scale_log2, seed, drop_threshold, image_head, rows_m,
            ONE_BODY, GATHER_KEYS, DROPOUT, PRECISION, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip
    if not ONE_BODY and full * BLOCK_N < num_keys:
        acc, row_max, row_sum = _forward_block(
            acc, row_max, row_sum, q, k_ptr, v_ptr, k_tile, v_tile, keys_ptr, stride_k_length, stride_k_dim,
            stride_v_length, stride_v_dim, full * BLOCK_N, num_keys, scale_log2, seed, drop_threshold, image_head,
            rows_m, True, GATHER_KEYS, DROPOUT, PRECISION, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        )  # fmt: skip

    if GATHER_QUERIES:
        row_sum = tl.where(computed, row_sum, 0.0)
        acc = tl.where(computed[:, None], acc, 0.0)
    no_key = row_sum == 0.0
    factor = tl.where(no_key, 0.0, 1.0 / tl.where(no_key, 1.0, row_sum))
    if DROPOUT:
        factor *= drop_scale
    out_ptrs = out_ptr + tile_offsets(rows_m, stride_out_length, BLOCK_DV, stride_out_dim)
    out = (acc * factor[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=tile_mask(exists, VALUE_DIM, BLOCK_DV))
    lse = tl.where(no_key, float("inf"), row_max * scale + tl.log(tl.where(no_key, 1.0, row_sum)))
    tl.store(lse_ptr + image_head.to(tl.int64) * q_len + rows_m, lse, mask=exists)


def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    seed: torch.Tensor | None,
    drop_threshold: int,
    drop_scale: float,
    scale: float,
    query_padding_mask: torch.Tensor | None,
    *,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
) -> None:
    """Launch the forward into `out` and `logsumexp`.

    Args:
        query, key, value: [B, H, Lq, D], [B, H, Lk, D], [B, H, Lk, Dv], any strides, one 16- or 32-bit float dtype.
        key_padding_mask: [B, Lk] bool, any strides, or None.
        seed: [1] int64, or None for no dropout.
        drop_threshold: 0..256; an element is dropped if its byte is below. 256 means all, which `drop_scale` sees to.
        drop_scale: multiplies what is kept; 0 if nothing is.
        scale: positive.
        query_padding_mask: [B, Lq] bool, any strides, or None.
        out: [B, H, Lq, Dv], any strides, the inputs' dtype.
        logsumexp: [B, H, Lq] float32, contiguous.
    """
    if out.numel() == 0:
        return
    if needs_float32(query):
        exact = torch.empty_like(out, dtype=torch.float32)
        attention_forward(
            query.float(), key.float(), value.float(), key_padding_mask, seed, drop_threshold, drop_scale, scale,
            query_padding_mask, out=exact, logsumexp=logsumexp,
        )  # fmt: skip
        out.copy_(exact)
        return
    batch, heads, q_len, head_dim = query.shape
    value_dim, k_len = value.shape[3], key.shape[2]
    block_d, block_dv = padded_head_dim(head_dim), padded_head_dim(value_dim)
    keys, queries = valid_rows(key_padding_mask, query_padding_mask)
    precision = input_precision(query.dtype)
    conditions = _configurations.attention_conditions(
        query, key, value, precision, max(block_d, block_dv), keys is not None, seed is not None
    )
    tile = _configurations.configuration("attention_forward", **conditions)
    _attention_forward_kernel[(batch * heads * triton.cdiv(q_len, tile["BLOCK_M"]),)](
        q_ptr=query,
        k_ptr=key,
        v_ptr=value,
        keys_ptr=keys,
        queries_ptr=queries,
        seed_ptr=seed,
        out_ptr=out,
        lse_ptr=logsumexp,
        **strides(q=query, k=key, v=value, out=out),
        num_heads=heads,
        q_len=q_len,
        k_len=k_len,
        scale=scale,
        drop_threshold=min(drop_threshold, 255),
        drop_scale=drop_scale,
        GATHER_KEYS=keys is not None,
        GATHER_QUERIES=queries is not None,
        DROPOUT=seed is not None,
        PRECISION=precision,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        **tile,
    )


def valid_rows(
    key_padding_mask: torch.Tensor | None, query_padding_mask: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What the kernels read in place of the masks [B, Lk] and [B, Lq].

    Returns:
        For each a list [B, 1 + L] int32: how many rows are no padding, then which, in order, then the others, which get
        zeros. None for None; one list for one mask.
    """
    keys = _valid_rows(key_padding_mask)
    return keys, keys if query_padding_mask is key_padding_mask else _valid_rows(query_padding_mask)


def _valid_rows(mask: torch.Tensor | None) -> torch.Tensor | None:
    if mask is None:
        return None
    batch, length = mask.shape
    rows = torch.empty((batch, 1 + length), dtype=torch.int32, device=mask.device)
    _valid_rows_kernel[(batch,)](
        mask_ptr=mask,
        list_ptr=rows,
        stride_mask_batch=mask.stride(0),
        stride_mask_length=mask.stride(1),
        length=length,
        BLOCK=1024,
        num_warps=4,
    )
    return rows


def padded_head_dim(head_dim: int) -> int:
    """The tile's width: a power of two that matrix products take."""
    return max(16, triton.next_power_of_2(head_dim))


def strides(**tensors: torch.Tensor) -> dict[str, int]:
    """stride_<name>_batch, _head, _length and _dim of each tensor [B, H, L, D]."""
    axes = ("batch", "head", "length", "dim")
    return {
        f"stride_{name}_{axis}": tensor.stride(i) for name, tensor in tensors.items() for i, axis in enumerate(axes)
    }


def input_precision(dtype: torch.dtype) -> str:
    """How float32 matrix products are to be computed, by `torch.backends.cuda.matmul`; 16-bit ones are exact."""
    precision = torch.backends.cuda.matmul.fp32_precision
    if precision == "none":
        precision = torch.backends.fp32_precision
    return "ieee" if dtype == torch.float32 and precision != "tf32" else "tf32"


def needs_float32(tensor: torch.Tensor) -> bool:
    """Triton's interpreter computes bfloat16 wrongly; there, and only there, the kernels get float32."""
    return _INTERPRET and tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"
