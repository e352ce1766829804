"""Attention and its gradients in plain PyTorch, a few rows at a time: what runs where there is no kernel.

The formulas are the kernels'. The matrix of all scores never exists; chunks of it that stay in a CPU's cache take a
third of its time. Without dropout a CPU has PyTorch's own fused attention. Where there is padding and an image has many
scores, a CPU computes one image at a time, from its valid queries and keys alone; otherwise, and on other devices, the
whole batch is computed, under masks.

Source: Rabe and Staats 2021 (attention in chunks).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from detr_fast.ops._dropout_bits import dropout_bytes

# Scores per chunk: as many as stay in a CPU's cache; on a GPU as many as keep it busy.
_CPU_CHUNK, _GPU_CHUNK = 2**20, 2**28
# Scores of an image, without and with dropout, from which a CPU computes images with padding one at a time. With fewer,
# starting on each image takes longer than computing its padding.
_ONE_IMAGE, _ONE_IMAGE_WITH_DROPOUT = 2**17, 2**16
# Elements of the widest vectors that PyTorch's fused attention computes with: 16 float32 in 512 bits.
_VECTOR = 16

_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def chunked_forward(
    query,
    key,
    value,
    key_padding_mask,
    query_padding_mask,
    seed,
    drop_threshold,
    drop_scale,
    scale,
    *,
    out,
    logsumexp,
    kept=None,
):
    """`attention` of checked arguments, written into `out` and `logsumexp`.

    Args:
        query, key, value, key_padding_mask, query_padding_mask, seed, scale: as `attention`'s; without a seed there is
            no dropout.
        drop_threshold: 0..256; an element whose byte is below is dropped.
        drop_scale: multiplies what is kept.
        out: [B, H, Lq, Dv], the inputs' dtype.
        logsumexp: [B, H, Lq], float32 or wider.
        kept: a list to which each chunk's probabilities and dropout mask are appended, for `chunked_backward`; None
            where they are not wanted, or too many.
    """
    heads = query.shape[1]
    for group in _groups(query, key, key_padding_mask, query_padding_mask, seed):
        q, k, v = group.inputs(query, key, value)
        if _has_fused(q, k, v, seed):
            bias = group.bias
            if bias is None and k.shape[2] < _VECTOR:
                # Without a mask its maximum over less than a vector of keys skips NaN, and it takes a row of NaN scores
                # for one without a key, which gives zeros. A mask of zeros changes nothing else.
                bias = q.new_zeros(1, 1, 1, k.shape[2])
            result, lse = _fused_forward(q, k, v, attn_mask=bias, scale=scale)
        else:
            result, lse = _zeros(q, v.shape[3]), q.new_full(q.shape[:3], torch.inf)
            flat_result, flat_lse = result.flatten(0, 1), lse.flatten(0, 1)
            q, k, v, bias = _flat(q * scale, k, v if seed is None else v * drop_scale, group.bias)
            for s, r in _chunks(q, k):
                scores = torch.baddbmm(bias[s], q[s, r], k[s].mT)
                probs = torch.softmax(scores, dim=-1)
                # The largest probability is 1 / Σ exp(score - largest score).
                flat_lse[s, r] = scores.amax(dim=-1) - probs.amax(dim=-1).log_()
                dropped = probs
                if seed is not None:
                    keep = group.keep(seed, heads, s, r, probs, drop_threshold)
                    if kept is not None:
                        kept += (probs, keep)
                    dropped = probs.mul_(keep) if kept is None else probs * keep
                torch.bmm(dropped, v[s], out=flat_result[s, r])
        group.put(out, group.queries, zero_rows(result, group.idle), 0)
        if group.idle is not None:
            lse = lse.masked_fill(group.idle[:, None], torch.inf)
        group.put(logsumexp, group.queries, lse, torch.inf)


def chunked_backward(
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    key_padding_mask,
    query_padding_mask,
    seed,
    drop_threshold,
    drop_scale,
    scale,
    *,
    grad_query,
    grad_key,
    grad_value,
    kept=(),
):
    """Gradients of query, key and value, written into `grad_query`, `grad_key` and `grad_value`.

    Args:
        grad_out: [B, H, Lq, Dv].
        out, logsumexp: what `attention` gave.
        grad_query, grad_key, grad_value: shaped as query, key and value, the inputs' dtype.
        kept: what `chunked_forward` put into its list; if empty, it is computed again.
        The others: as `chunked_forward`'s.
    """
    heads = query.shape[1]
    remaining = iter(kept)
    for group in _groups(query, key, key_padding_mask, query_padding_mask, seed):
        q, k, v = group.inputs(query, key, value)
        grad = zero_rows(group.take(grad_out, group.queries).to(q.dtype), group.idle)
        if _has_fused(q, k, v, seed) and out.dtype == q.dtype:  # not from an `out` that was rounded to 16 bits
            saved = (group.take(x, group.queries) for x in (out, logsumexp))
            grads = _fused_backward(grad, q, k, v, *saved, 0.0, False, attn_mask=group.bias, scale=scale)
        else:
            grads = [_zeros(x, x.shape[3]) for x in (q, k, v)]
            grad_q, grad_k, grad_v = (x.flatten(0, 1) for x in grads)
            q, k, v, bias = _flat(q * scale, k, v if seed is None else v * drop_scale, group.bias)
            grad = grad.flatten(0, 1)
            for s, r in _chunks(q, k):
                probs = next(remaining, None)
                if probs is None:
                    probs = torch.softmax(torch.baddbmm(bias[s], q[s, r], k[s].mT), dim=-1)
                grad_probs = torch.bmm(grad[s, r], v[s].mT)
                dropped = probs
                if seed is not None:
                    keep = next(remaining, None)
                    if keep is None:
                        keep = group.keep(seed, heads, s, r, probs, drop_threshold)
                    grad_probs.mul_(keep)
                    dropped = probs * keep
                grad_v[s].baddbmm_(dropped.mT, grad[s, r])
                # probs ∘ (grad_probs - Σ probs ∘ grad_probs)
                grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
                torch.bmm(grad_scores, k[s], out=grad_q[s, r])
                grad_k[s].baddbmm_(grad_scores.mT, q[s, r])
            grad_q.mul_(scale)
            if seed is not None:
                grad_v.mul_(drop_scale)
        # What is infinite elsewhere must not reach padded rows as 0 · NaN.
        group.put(grad_query, group.queries, zero_rows(grads[0], group.idle), 0)
        for target, x in ((grad_key, grads[1]), (grad_value, grads[2])):
            group.put(target, group.keys, zero_rows(x, group.key_padding), 0)


@dataclass(slots=True)
class _Group:
    """Images that are computed together.

    Attributes:
        image: the only one, or None for the whole batch.
        queries, keys: [n] int64, positions of the only image's valid queries and keys; None for all.
        idle: [B, Lq or 1] bool, True = a query that gives zeros and takes no gradient; None for none.
        key_padding: [B, Lk] bool, True = padding; None for none.
        bias: [B, 1, 1, Lk], added to the scores: -inf for padded keys, else 0; None where `key_padding` is.
    """

    image: int | None = None
    queries: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    idle: torch.Tensor | None = None
    key_padding: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    def inputs(self, query, key, value):
        """The group's part of query, key and value in float32 or wider, with zeros where padded."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        # 0 · NaN is NaN.
        return (
            zero_rows(self.take(query, self.queries).to(dtype), self.idle),
            zero_rows(self.take(key, self.keys).to(dtype), self.key_padding),
            zero_rows(self.take(value, self.keys).to(dtype), self.key_padding),
        )

    def take(self, tensor: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """The group's part of a tensor [B, H, L, ...]: its images, and of dimension 2 `positions`."""
        tensor = self._images(tensor)
        # Rows of all heads lie next to each other in what a projection gives.
        return tensor if positions is None else tensor.transpose(1, 2).index_select(1, positions).transpose(1, 2)

    def put(self, target: torch.Tensor, positions: torch.Tensor | None, source: torch.Tensor, rest: float) -> None:
        """Write `source` where `take` reads; the group's other positions become `rest`."""
        target = self._images(target)
        if positions is None:
            target.copy_(source)
        else:
            target.fill_(rest)
            target.transpose(1, 2)[:, positions] = source.transpose(1, 2).to(target.dtype)

    def _images(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.image is None else tensor[self.image : self.image + 1]

    def keep(self, seed, heads: int, s: slice, r: slice, probs: torch.Tensor, drop_threshold: int) -> torch.Tensor:
        """1 where dropout keeps, 0 where it drops, in the dtype of `probs`: rows r of slices s of the group."""
        if drop_threshold > 255:  # beyond a byte
            return torch.zeros_like(probs)
        first = (self.image or 0) * heads
        slices = torch.arange(first + s.start, first + s.stop, device=seed.device)
        rows = torch.arange(r.start, r.stop, device=seed.device) if self.queries is None else self.queries[r]
        drawn = dropout_bytes(seed, slices, rows, probs.shape[-1])
        if self.key_padding is not None:
            # A key's column is its place among its image's valid keys. A padded key's bytes do not matter: its
            # probability is 0.
            columns = (~self.key_padding).cumsum(dim=1).sub_(1).clamp_(min=0)
            drawn = drawn.gather(2, columns[slices // heads][:, None].expand(drawn.shape))
        # Comparing into floats is several times faster than into bools that are then multiplied.
        return torch.ge(drawn, drop_threshold, out=torch.empty_like(probs))


def keeps_chunks(query: torch.Tensor, key: torch.Tensor, seed: torch.Tensor | None) -> bool:
    """Whether the forward keeps its chunks for the backward: where together they are no more than one may have."""
    return seed is not None and query.shape[:3].numel() * key.shape[2] <= _CPU_CHUNK


def _groups(query, key, key_padding_mask, query_padding_mask, seed) -> list[_Group]:
    """What is computed together: on a CPU each image by itself if it has padding and many scores, else the batch."""
    batch, heads, q_len, _ = query.shape
    if _may_read_masks(query.device):
        masks = [mask if mask is not None and mask.any() else None for mask in (query_padding_mask, key_padding_mask)]
        many = _ONE_IMAGE if seed is None else _ONE_IMAGE_WITH_DROPOUT
        if any(mask is not None for mask in masks) and heads * q_len * key.shape[2] >= many:
            return [_Group(i, *(None if mask is None else _valid(mask[i]) for mask in masks)) for i in range(batch)]
        query_padding_mask, key_padding_mask = masks
    if key_padding_mask is None:
        return [_Group(idle=query_padding_mask)]
    # Without a key a softmax gives NaN: those rows are set to zero with the padded queries'.
    no_key = key_padding_mask.all(dim=1, keepdim=True)
    idle = no_key if query_padding_mask is None else query_padding_mask | no_key
    bias = torch.where(key_padding_mask, -torch.inf, 0.0).to(torch.promote_types(query.dtype, torch.float32))
    return [_Group(idle=idle, key_padding=key_padding_mask, bias=bias[:, None, None])]


def _may_read_masks(device: torch.device) -> bool:
    """On a GPU, reading one would wait for all that is queued before it."""
    return device.type == "cpu"


def _valid(mask: torch.Tensor) -> torch.Tensor | None:
    """Positions [n] int64 of a mask [L] that are not padding; None for all."""
    positions = (~mask).nonzero()[:, 0]
    return None if len(positions) == len(mask) else positions


def zero_rows(tensor: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """`tensor` [B, H, L, D] with zeros in rows of padding [B, L or 1]."""
    # On a CPU this takes half of masked_fill's time.
    return tensor if padding is None else torch.where(padding[:, None, :, None], 0.0, tensor)


def _has_fused(q, k, v, seed) -> bool:
    """Whether PyTorch's fused attention for CPUs takes these: one head dimension, with stride 1, and nothing empty."""
    return (
        seed is None
        and q.device.type == "cpu"
        and q.shape[3] == v.shape[3]
        and q.numel() * k.numel() > 0
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
    )


def _zeros(like: torch.Tensor, dim: int) -> torch.Tensor:
    """Contiguous zeros [B, H, L, dim]."""
    return like.new_zeros(*like.shape[:3], dim)


def _flat(q, k, v, bias):
    """[B · H, L, D] of the first three and [B · H, 1, Lk or 1] of `bias`, which may be None."""
    bias = q.new_zeros(1, 1, 1, 1) if bias is None else bias
    return *(x.flatten(0, 1) for x in (q, k, v)), bias.expand(*q.shape[:2], 1, -1).flatten(0, 1)


def _chunks(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices and rows of each chunk of the scores q kᵀ."""
    slices, q_len, k_len = *q.shape[:2], k.shape[1]
    if slices * q_len * k_len == 0:
        return
    limit = _CPU_CHUNK if q.device.type == "cpu" else _GPU_CHUNK
    rows = min(q_len, max(1, limit // k_len))
    together = max(1, limit // (q_len * k_len)) if rows == q_len else 1
    for first in range(0, slices, together):
        for row in range(0, q_len, rows):
            yield slice(first, min(first + together, slices)), slice(row, min(row + rows, q_len))
