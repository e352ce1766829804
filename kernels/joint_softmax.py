"""Softmax over all heads and keys of a query at once, with padded keys left out: forward and backward.

For scores s [B, Q, H, L] and a padding mask [B, L],

    w[b, q, h, l] = exp(s[b, q, h, l] - m) / sum over h', l' of exp(s[b, q, h', l'] - m)

where m is the query's largest score, and padded keys count as s = -inf. Backward: ds = w * (dw - sum(w * dw)).

Fused: reading the scores in the strides that the matrix product left, masking, the softmax, the zeros for a query
without valid keys, the cast. Scores are read twice (the second time mostly from the L2) and the weights written once;
plain PyTorch writes a masked copy, a contiguous copy and the weights.

Source: facebookresearch/detr `models/segmentation.py` (MHAttentionMap).
"""

import torch
import triton
import triton.language as tl

# Elements of one tile, all heads by some keys.
_TILE = 2048

_STRIDES = ["stride_batch", "stride_query", "stride_head", "stride_key"]


@triton.jit(
    do_not_specialize=["num_queries", "num_keys", "stride_mask_batch", *_STRIDES[:3]],
    do_not_specialize_on_alignment=["scores_ptr", "mask_ptr", "weights_ptr"],
)
def _joint_softmax_forward_kernel(
    scores_ptr,  # [B, Q, H, L], any strides
    mask_ptr,  # [B, L] bool, keys contiguous, True = padding; None without HAS_MASK
    weights_ptr,  # [B, Q, H, L] contiguous
    num_queries,
    num_keys,
    stride_mask_batch,
    stride_batch,
    stride_query,
    stride_head,
    stride_key,
    NUM_HEADS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One query of one image per program."""
    row = tl.program_id(0).to(tl.int64)
    batch = row // num_queries
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < NUM_HEADS
    scores_ptr += batch * stride_batch + (row % num_queries) * stride_query
    head_ptrs = scores_ptr + offs_h.to(tl.int64)[:, None] * stride_head
    weights_ptrs = weights_ptr + (row * NUM_HEADS + offs_h)[:, None] * num_keys
    if HAS_MASK:
        mask_ptr += batch * stride_mask_batch

    # First pass: maximum and sum of exponentials over all heads and valid keys (online softmax).
    largest = tl.full([], float("-inf"), dtype=tl.float32)
    total = tl.zeros([], dtype=tl.float32)
    shift = tl.zeros([], dtype=tl.float32)
    for start in range(0, num_keys, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        mask_l = offs_l < num_keys
        if HAS_MASK:
            mask_l = mask_l & (tl.load(mask_ptr + offs_l, mask=mask_l, other=1) == 0)
        ptrs = head_ptrs + offs_l.to(tl.int64)[None, :] * stride_key
        scores = tl.load(ptrs, mask=mask_h[:, None] & mask_l[None, :], other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(tl.max(scores, axis=1), axis=0))
        # Before the first valid key there is no maximum to subtract: -inf - -inf would be NaN.
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        # Rescale the old sum to the new maximum.
        total = total * tl.exp(largest - shift) + tl.sum(tl.sum(tl.exp(scores - shift), axis=1), axis=0)
        largest = new_largest

    # Second pass: write the weights. A query without valid keys has a sum of 0 and gets zeros; a NaN stays NaN.
    divisor = tl.where(total == 0, 1.0, total)
    for start in range(0, num_keys, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        inside = mask_h[:, None] & (offs_l < num_keys)[None, :]
        mask_l = offs_l < num_keys
        if HAS_MASK:
            mask_l = mask_l & (tl.load(mask_ptr + offs_l, mask=mask_l, other=1) == 0)
        # Padded keys read as -inf, so that their weight is exp(-inf) = 0; they are stored too, under `inside`.
        ptrs = head_ptrs + offs_l.to(tl.int64)[None, :] * stride_key
        scores = tl.load(ptrs, mask=mask_h[:, None] & mask_l[None, :], other=float("-inf")).to(tl.float32)
        weights = tl.exp(scores - shift) / divisor  # [BLOCK_H, BLOCK_L]
        tl.store(weights_ptrs + offs_l[None, :], weights.to(weights_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["num_queries", "num_keys", *_STRIDES[:3]],
    do_not_specialize_on_alignment=["grad_ptr", "weights_ptr", "grad_scores_ptr"],
)
def _joint_softmax_backward_kernel(
    grad_ptr,  # [B, Q, H, L], any strides
    weights_ptr,  # [B, Q, H, L] contiguous
    grad_scores_ptr,  # [B, Q, H, L] contiguous
    num_queries,
    num_keys,
    stride_batch,
    stride_query,
    stride_head,
    stride_key,
    NUM_HEADS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """One query of one image per program."""
    row = tl.program_id(0).to(tl.int64)
    offs_h = tl.arange(0, BLOCK_H)
    mask_h = offs_h < NUM_HEADS
    grad_ptr += (row // num_queries) * stride_batch + (row % num_queries) * stride_query
    head_ptrs = grad_ptr + offs_h.to(tl.int64)[:, None] * stride_head
    flat = (row * NUM_HEADS + offs_h)[:, None] * num_keys

    # First pass: the one sum that couples all heads and keys. Padded keys have weight 0 and add nothing.
    dot = tl.zeros([], dtype=tl.float32)
    for start in range(0, num_keys, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        inside = mask_h[:, None] & (offs_l < num_keys)[None, :]
        grad = tl.load(head_ptrs + offs_l.to(tl.int64)[None, :] * stride_key, mask=inside, other=0.0).to(tl.float32)
        weights = tl.load(weights_ptr + flat + offs_l[None, :], mask=inside, other=0.0).to(tl.float32)
        dot += tl.sum(tl.sum(grad * weights, axis=1), axis=0)

    # Second pass: the gradient, elementwise.
    for start in range(0, num_keys, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        inside = mask_h[:, None] & (offs_l < num_keys)[None, :]
        grad = tl.load(head_ptrs + offs_l.to(tl.int64)[None, :] * stride_key, mask=inside, other=0.0).to(tl.float32)
        weights = tl.load(weights_ptr + flat + offs_l[None, :], mask=inside, other=0.0).to(tl.float32)
        grad_scores = weights * (grad - dot)  # [BLOCK_H, BLOCK_L]
        tl.store(
            grad_scores_ptr + flat + offs_l[None, :], grad_scores.to(grad_scores_ptr.dtype.element_ty), mask=inside
        )


def joint_softmax_forward(scores: torch.Tensor, mask: torch.Tensor | None, *, weights: torch.Tensor) -> None:
    """Launch the forward kernel.

    Args:
        scores: [B, Q, H, L] float32, bfloat16 or float16, any strides.
        mask: [B, L] bool with contiguous keys, True = padding, or None.
        weights: [B, Q, H, L] contiguous, written.
    """
    if weights.numel() == 0:
        return
    batch, queries, heads, keys = scores.shape
    with torch.cuda.device_of(scores):
        _joint_softmax_forward_kernel[(batch * queries,)](
            scores_ptr=scores,
            mask_ptr=mask,
            weights_ptr=weights,
            num_queries=queries,
            num_keys=keys,
            stride_mask_batch=0 if mask is None else mask.stride(0),
            stride_batch=scores.stride(0),
            stride_query=scores.stride(1),
            stride_head=scores.stride(2),
            stride_key=scores.stride(3),
            NUM_HEADS=heads,
            HAS_MASK=mask is not None,
            **_blocks(heads),
        )


def joint_softmax_backward(grad: torch.Tensor, weights: torch.Tensor, *, grad_scores: torch.Tensor) -> None:
    """Launch the backward kernel.

    Args:
        grad: [B, Q, H, L], gradient of the weights, any strides.
        weights: [B, Q, H, L] contiguous, what the forward kernel wrote.
        grad_scores: [B, Q, H, L] contiguous, written.
    """
    if weights.numel() == 0:
        return
    batch, queries, heads, keys = weights.shape
    with torch.cuda.device_of(weights):
        _joint_softmax_backward_kernel[(batch * queries,)](
            grad_ptr=grad,
            weights_ptr=weights,
            grad_scores_ptr=grad_scores,
            num_queries=queries,
            num_keys=keys,
            stride_batch=grad.stride(0),
            stride_query=grad.stride(1),
            stride_head=grad.stride(2),
            stride_key=grad.stride(3),
            NUM_HEADS=heads,
            **_blocks(heads),
        )


def _blocks(heads: int) -> dict[str, int]:
    block_h = triton.next_power_of_2(heads)
    return {"BLOCK_H": block_h, "BLOCK_L": max(16, _TILE // block_h), "num_warps": 4}
