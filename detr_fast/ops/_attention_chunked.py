"""Attention and its gradients in plain PyTorch, a few rows at a time: what runs where there is no kernel.

The formulas are the kernels'. Chunks of scores that stay in a CPU's cache cost a third of the whole matrix at once, and
the matrix of all of them never exists. Without dropout a CPU has PyTorch's own fused attention. And on a CPU only the
queries and keys without padding are read where that is less work.

Source: Rabe and Staats 2021 (attention in chunks).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from detr_fast.ops._dropout_bits import dropout_bytes

# Scores per chunk: what stays in a CPU's cache; on a GPU as many as fill it.
_CPU_CHUNK, _GPU_CHUNK = 2**20, 2**28
# Scores up to which the backward takes over the forward's two matrices: 2 MiB in float32, whatever the lengths.
_REMEMBERED = 2**18
# Scores of an image from which a CPU computes a padded image by itself: fewer take less time than starting that.
_ONE_IMAGE = 2**18

_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def chunked_forward(
    query,
    key,
    value,
    key_padding_mask,
    seed,
    drop_threshold,
    drop_scale,
    scale,
    query_padding_mask=None,
    remember: list | None = None,
    *,
    out,
    logsumexp,
):
    """`attention` of checked arguments, written into out [B, H, Lq, Dv] and logsumexp [B, H, Lq].

    Args:
        query, key, value, key_padding_mask, seed, scale, query_padding_mask: as `attention`'s; without a seed there is
            no dropout.
        drop_threshold: 0..256; an element whose byte is below is dropped.
        drop_scale: multiplies what is kept.
        remember: takes what the backward need not compute again, if there is dropout and it is little.
    """
    heads = query.shape[1]
    groups = _groups(query, key, key_padding_mask, query_padding_mask, seed)
    if seed is None or sum(group.scores(query, key) for group in groups) > _REMEMBERED:
        remember = None
    for group in groups:
        q, k, v, bias = group.inputs(query, key, value)
        if _has_fused(q, k, v, seed):
            result, lse = _fused_forward(q, k, v, attn_mask=bias, scale=scale)
        else:
            result, lse = _zeros(q, v.shape[3]), q.new_full(q.shape[:3], torch.inf)
            flat_result, flat_lse = result.flatten(0, 1), lse.flatten(0, 1)
            q, k, v, bias = _flat(q * scale, k, v if seed is None else v * drop_scale, bias)
            for s, r in _chunks(q, k):
                scores = torch.baddbmm(bias[s], q[s, r], k[s].mT)
                probs = torch.softmax(scores, dim=-1)
                # The largest probability is 1 / Σ exp(score - largest score).
                flat_lse[s, r] = scores.amax(dim=-1) - probs.amax(dim=-1).log_()
                if seed is not None:
                    keep = group.keep(seed, heads, s, r, probs, drop_threshold)
                    if remember is None:
                        probs.mul_(keep)
                    else:
                        remember += probs, keep
                        probs = probs * keep
                torch.bmm(probs, v[s], out=flat_result[s, r])
        group.put(out, group.queries, _zero_where(group.idle, result), 0)
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
    seed,
    drop_threshold,
    drop_scale,
    scale,
    query_padding_mask=None,
    remembered: Sequence[torch.Tensor] = (),
    *,
    grad_query,
    grad_key,
    grad_value,
):
    """Gradients of query, key and value, written into the last three.

    Args:
        grad_out: [B, H, Lq, Dv].
        out, logsumexp: what `attention` gave.
        remembered: what `chunked_forward` remembered.
        The others: as `chunked_forward`'s.
    """
    heads, known = query.shape[1], iter(remembered)
    for group in _groups(query, key, key_padding_mask, query_padding_mask, seed):
        q, k, v, bias = group.inputs(query, key, value)
        grad = _zero_where(group.idle, group.take(grad_out, group.queries).to(q.dtype))
        if _has_fused(q, k, v, seed) and out.dtype == q.dtype:  # not from an `out` that was rounded to 16 bits
            saved = (group.take(x, group.queries) for x in (out, logsumexp))
            grads = _fused_backward(grad, q, k, v, *saved, 0.0, False, attn_mask=bias, scale=scale)
        else:
            grads = [_zeros(x, x.shape[3]) for x in (q, k, v)]
            grad_q, grad_k, grad_v = (x.flatten(0, 1) for x in grads)
            q, k, v, bias = _flat(q * scale, k, v if seed is None else v * drop_scale, bias)
            grad = grad.flatten(0, 1)
            for s, r in _chunks(q, k):
                if remembered:
                    probs, keep = next(known), next(known)
                else:
                    probs = torch.softmax(torch.baddbmm(bias[s], q[s, r], k[s].mT), dim=-1)
                    keep = None if seed is None else group.keep(seed, heads, s, r, probs, drop_threshold)
                grad_probs = torch.bmm(grad[s, r], v[s].mT)
                dropped = probs
                if keep is not None:
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
        # A padded row's own NaN must not come back as 0 · NaN.
        group.put(grad_query, group.queries, _zero_where(group.idle, grads[0]), 0)
        for target, x in ((grad_key, grads[1]), (grad_value, grads[2])):
            group.put(target, group.keys, _zero_where(group.key_padding, x), 0)


@dataclass(frozen=True)
class _Group:
    """Images that are computed together, the queries and keys of theirs that take part, and which of those are padding.

    Attributes:
        image: the only one, or None for the whole batch.
        queries: [n] int64, positions of the only image's queries that take part; None for all.
        keys: [n] int64 for one image, [B, n] for the batch, positions of the keys that take part; None for all.
        idle: [B, Lq or 1] bool, True = a query that gives zeros and takes no gradient; None for none.
        key_padding: [B, n] bool, True = padding among `keys`; None for none.
    """

    image: int | None = None
    queries: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    idle: torch.Tensor | None = None
    key_padding: torch.Tensor | None = None

    def scores(self, query: torch.Tensor, key: torch.Tensor) -> int:
        """How many there are."""
        batch, heads, q_len, _ = query.shape
        q_len = q_len if self.queries is None else len(self.queries)
        k_len = key.shape[2] if self.keys is None else self.keys.shape[-1]
        return (batch if self.image is None else 1) * heads * q_len * k_len

    def inputs(self, query, key, value):
        """Query, key and value that take part, promoted, zero where padded; and what is added to the scores
        [B, 1, 1, n] or None."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        q, k, v = (
            _zero_where(padding, self.take(x, positions).to(dtype))  # 0 · NaN is NaN
            for x, positions, padding in (
                (query, self.queries, self.idle),
                (key, self.keys, self.key_padding),
                (value, self.keys, self.key_padding),
            )
        )
        if self.key_padding is None:
            return q, k, v, None
        # Without any key the scores stay finite here; the rows of such an image are idle.
        hidden = self.key_padding & ~self.key_padding.all(dim=-1, keepdim=True)
        bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
        return q, k, v, bias[:, None, None]

    def take(self, tensor: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """What stands at `positions` of the group's images in a tensor [B, H, L, ...]."""
        tensor = self._of_images(tensor)
        if positions is None:
            return tensor
        rows = tensor.transpose(1, 2)
        taken = rows.index_select(1, positions) if positions.dim() == 1 else rows[_images(positions), positions]
        return taken.transpose(1, 2)

    def put(self, target: torch.Tensor, positions: torch.Tensor | None, source: torch.Tensor, rest: float) -> None:
        """The opposite of `take`; what is not at `positions` becomes `rest`."""
        target = self._of_images(target)
        if positions is None:
            target.copy_(source)
        else:
            target.fill_(rest)
            target.transpose(1, 2)[_images(positions), positions] = source.transpose(1, 2).to(target.dtype)

    def _of_images(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.image is None else tensor[self.image : self.image + 1]

    def keep(self, seed, heads: int, s: slice, r: slice, probs: torch.Tensor, drop_threshold: int) -> torch.Tensor:
        """1 where dropout keeps, 0 where it drops, in the dtype of `probs`: rows r of slices s of the group."""
        if drop_threshold > 255:  # beyond a byte
            return torch.zeros_like(probs)
        first = (self.image or 0) * heads
        slices = torch.arange(first + s.start, first + s.stop, device=seed.device)
        rows = torch.arange(r.start, r.stop, device=seed.device) if self.queries is None else self.queries[r]
        drawn = dropout_bytes(seed, slices, rows, probs.shape[-1])
        # Comparing into floats is several times faster than into bools that are then multiplied.
        return torch.ge(drawn, drop_threshold, out=torch.empty_like(probs))


def _groups(query, key, key_padding_mask, query_padding_mask, seed) -> list[_Group]:
    """What is computed together: on a CPU every padded image by itself if it is much, else the batch."""
    batch, heads, q_len, _ = query.shape
    on_cpu = query.device.type == "cpu"  # elsewhere reading a mask would wait
    if on_cpu:
        key_padding_mask = None if key_padding_mask is None or not key_padding_mask.any() else key_padding_mask
        query_padding_mask = None if query_padding_mask is None or not query_padding_mask.any() else query_padding_mask
    if key_padding_mask is None and query_padding_mask is None:
        return [_Group()]
    if on_cpu and heads * q_len * key.shape[2] >= _ONE_IMAGE:
        masks = (query_padding_mask, key_padding_mask)
        return [_Group(i, *(None if mask is None else _valid(mask[i]) for mask in masks)) for i in range(batch)]
    if key_padding_mask is None:
        return [_Group(idle=query_padding_mask)]
    idle, keys = query_padding_mask, None
    no_key = key_padding_mask.all(dim=1, keepdim=True)
    if not on_cpu or no_key.any():
        idle = no_key if idle is None else idle | no_key
    if seed is not None:
        # A key's column in the dropout is its place among those without padding.
        keys = key_padding_mask.to(torch.uint8).argsort(dim=1, stable=True)
        if on_cpu:
            keys = keys[:, : int((~key_padding_mask).sum(dim=1).max())]
        key_padding_mask = key_padding_mask.gather(1, keys)
    return [_Group(keys=keys, idle=idle, key_padding=key_padding_mask)]


def _valid(mask: torch.Tensor) -> torch.Tensor | None:
    """Positions without padding [n] int64; None for all."""
    positions = (~mask).nonzero()[:, 0]
    return None if len(positions) == len(mask) else positions


def _images(positions: torch.Tensor) -> torch.Tensor:
    """Indices of the images beside which `positions` are indices."""
    return torch.arange(len(positions), device=positions.device)[:, None] if positions.dim() == 2 else slice(None)


def _zero_where(padding: torch.Tensor | None, tensor: torch.Tensor) -> torch.Tensor:
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
