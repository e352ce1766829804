"""Attention and its gradients in plain PyTorch, a few rows at a time: what runs where there is no kernel.

The formulas are the kernels'. The matrix of all scores never exists; chunks of it that stay in a CPU's cache take a
third of its time. Without dropout a CPU has PyTorch's own fused attention. Where there is padding and an image has many
scores, a CPU computes one image at a time, from its valid queries and keys alone; otherwise, and on other devices, the
whole batch is computed, under masks.

Source: Rabe and Staats 2021 (attention in chunks).
"""

import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from detr_fast.ops._dropout_bits import dropout_bytes

# Scores per chunk: as many as stay in a CPU's cache; on a GPU as many as keep it busy.
_CPU_CHUNK, _GPU_CHUNK = 2**20, 2**28
# Scores of an image from which a CPU computes images with padding one at a time. With fewer, starting on each image
# takes longer than computing its padding.
_ONE_IMAGE = 2**17
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
    groups=None,
):
    """`attention` of checked arguments, written into `out` and `logsumexp`.

    Args:
        query, key, value, key_padding_mask, query_padding_mask, seed, scale: as `attention`'s; without a seed there is
            no dropout.
        drop_threshold: 0..256; an element whose byte is below is dropped.
        drop_scale: multiplies what is kept.
        out: [B, H, Lq, Dv], the inputs' dtype.
        logsumexp: [B, H, Lq], float32 or wider; None where it is not wanted.
        kept: a list to which each group's inputs and each chunk's probabilities and dropout mask are appended, for
            `chunked_backward`; None where they are not wanted, or too many.
        groups: `groups_of` these inputs; None: made here.
    """
    heads = query.shape[1]
    for group in groups or groups_of(query, key, key_padding_mask, query_padding_mask, seed):
        q, k, v = group.inputs(query, key, value)
        lse, factor = None, 1.0
        if _has_fused(q, k, v, seed):
            bias = group.bias
            if bias is None and k.shape[2] < _VECTOR:
                # Without a mask its maximum over less than a vector of keys skips NaN, and it takes a row of NaN scores
                # for one without a key, which gives zeros. A mask of zeros changes nothing else.
                bias = q.new_zeros(1, 1, 1, k.shape[2])
            result, lse = _fused_forward(q, k, v, attn_mask=bias, scale=scale)
        else:
            result, factor = _zeros(q, v.shape[3]), drop_scale
            if kept is not None:
                q, k, v = (x.contiguous() for x in (q, k, v))
                kept += (q, k, v)
            if logsumexp is not None:
                lse = q.new_full(q.shape[:3], torch.inf)
            by_row = (q, result) if lse is None else (q, result, lse)
            for s, r, (queries, chunk, *chunk_lse), (keys, values, bias) in _chunks(by_row, (k, v, group.bias)):
                scores = _scores(queries, keys, bias, scale)
                probs = torch.softmax(scores, dim=-1)
                for x in chunk_lse:
                    # The largest probability is 1 / Σ exp(score - largest score).
                    torch.sub(scores.amax(dim=-1), probs.amax(dim=-1).log_(), out=x)
                dropped = probs
                if seed is not None:
                    keep = group.keep(seed, heads, s, r, probs, drop_threshold)
                    if kept is not None:
                        kept += (probs, keep)
                    dropped = probs.mul_(keep) if kept is None else probs * keep
                torch.bmm(dropped, values, out=chunk)
        group.put(out, group.queries, result, 0, factor, group.idle)
        if logsumexp is not None:
            group.put(logsumexp, group.queries, lse, torch.inf, 1.0, group.idle)


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
    groups=None,
):
    """Gradients of query, key and value, written into `grad_query`, `grad_key` and `grad_value`.

    Args:
        grad_out: [B, H, Lq, Dv].
        out, logsumexp: what `attention` gave; not read where there is a seed.
        grad_query, grad_key, grad_value: shaped as query, key and value, the inputs' dtype.
        kept: what `chunked_forward` put into its list; if empty, it is computed again.
        The others: as `chunked_forward`'s.
    """
    heads = query.shape[1]
    remaining = iter(kept)
    for group in groups or groups_of(query, key, key_padding_mask, query_padding_mask, seed):
        q, k, v = (next(remaining) for _ in range(3)) if kept else group.inputs(query, key, value)
        grad = group.input(grad_out, group.queries, group.idle, q.dtype)
        factor = 1.0
        if _has_fused(q, k, v, seed) and out.dtype == q.dtype:  # not from an `out` that was rounded to 16 bits
            saved = (group.take(x, group.queries) for x in (out, logsumexp))
            grads = _fused_backward(grad, q, k, v, *saved, 0.0, False, attn_mask=group.bias, scale=scale)
        else:
            factor = scale
            make = torch.empty_like if q.shape[2] * k.shape[2] else torch.zeros_like  # where there is nothing to add
            grads = [make(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
            if seed is not None:
                grad = torch.mul(grad, drop_scale, out=grad.new_empty(grad.shape))
            by_row, by_slice = (q, grad, grads[0]), (k, v, group.bias, grads[1], grads[2])
            for s, r, (q, grad, grad_q), (k, v, bias, grad_k, grad_v) in _chunks(by_row, by_slice):
                probs = next(remaining) if kept else torch.softmax(_scores(q, k, bias, scale), dim=-1)
                grad_probs = torch.bmm(grad, v.mT)
                dropped = probs
                if seed is not None:
                    keep = next(remaining) if kept else group.keep(seed, heads, s, r, probs, drop_threshold)
                    grad_probs.mul_(keep)
                    dropped = probs * keep
                beta = int(r.start > 0)  # the first rows overwrite
                grad_v.baddbmm_(dropped.mT, grad, beta=beta)
                # probs ∘ (grad_probs - Σ probs ∘ grad_probs)
                grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
                torch.bmm(grad_scores, k, out=grad_q)
                grad_k.baddbmm_(grad_scores.mT, q, beta=beta)
        # What is infinite elsewhere must not reach padded rows as 0 · NaN.
        group.put(grad_query, group.queries, grads[0], 0, factor, group.idle)
        group.put(grad_key, group.keys, grads[1], 0, factor, group.key_padding)
        group.put(grad_value, group.keys, grads[2], 0, 1.0, group.key_padding)


@dataclass(slots=True)
class _Group:
    """Images that are computed together.

    Attributes:
        image: the only one, or None for the whole batch.
        queries, keys: [n] int64, positions of the only image's valid queries and keys; None for all.
        idle: `_rows` of the queries that give zeros and take no gradient; None for none.
        key_padding: `_rows` of the padded keys; None for none.
        bias: [B, 1, 1, Lk], added to the scores: -inf for padded keys, else 0; None where `key_padding` is.
        columns: [B, Lk] int64, each key's place among its image's valid keys; None where `key_padding` is, and without
            dropout.
    """

    image: int | None = None
    queries: torch.Tensor | None = None
    keys: torch.Tensor | None = None
    idle: torch.Tensor | None = None
    key_padding: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    columns: torch.Tensor | None = None

    def inputs(self, query, key, value):
        """The group's part of query, key and value in float32 or wider, with zeros where padded."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        query = self.input(query, self.queries, self.idle, dtype)
        return query, *(self.input(x, self.keys, self.key_padding, dtype) for x in (key, value))

    def input(self, tensor, positions, padding, dtype) -> torch.Tensor:
        """`take` in `dtype`, with zeros where padded: 0 · NaN is NaN."""
        tensor = self.take(tensor, positions)
        if padding is None:
            return tensor.to(dtype)
        return _fill(tensor.new_empty(tensor.shape, dtype=dtype).copy_(tensor), padding, 0)

    def take(self, tensor: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """The group's part of a tensor [B, H, L, ...]: its images, and of dimension 2 `positions`."""
        tensor = self._images(tensor)
        # Rows of all heads lie next to each other in what a projection gives.
        return tensor if positions is None else tensor.transpose(1, 2).index_select(1, positions).transpose(1, 2)

    def put(
        self,
        target: torch.Tensor,
        positions: torch.Tensor | None,
        source: torch.Tensor,
        rest: float,
        factor: float,
        padding: torch.Tensor | None,
    ) -> None:
        """Write `source` times `factor` where `take` reads.

        The rows of `padding`, and the group's positions other than `positions`, become `rest`.
        """
        target = self._images(target)
        if positions is not None:
            target.fill_(rest)
            source = source if factor == 1 else source * factor
            target.transpose(1, 2)[:, positions] = source.transpose(1, 2).to(target.dtype)
            return
        if padding is not None:
            source = _fill(source.contiguous(), padding, rest)
        if factor != 1 and target.dtype == source.dtype:
            torch.mul(source, factor, out=target)
        else:
            target.copy_(source if factor == 1 else source * factor)

    def _images(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.image is None else tensor[self.image : self.image + 1]

    def keep(self, seed, heads: int, s: slice, r: slice, probs: torch.Tensor, drop_threshold: int) -> torch.Tensor:
        """1 where dropout keeps, 0 where it drops, in the dtype of `probs`: rows r of slices s of the group."""
        if drop_threshold > 255:  # beyond a byte
            return torch.zeros_like(probs)
        first = (self.image or 0) * heads
        rows = range(r.start, r.stop) if self.queries is None else self.queries[r]
        drawn = dropout_bytes(seed, range(first + s.start, first + s.stop), rows, probs.shape[-1])
        if self.columns is not None:
            columns = self.columns[:, None].expand(-1, heads, -1).flatten(0, 1)[s, None]
            drawn = drawn.gather(2, columns.expand(drawn.shape))
        # Comparing into floats is several times faster than into bools that are then multiplied.
        return torch.ge(drawn, drop_threshold, out=torch.empty_like(probs))


def keeps_chunks(query: torch.Tensor, key: torch.Tensor, seed: torch.Tensor | None) -> bool:
    """Whether the forward keeps its chunks for the backward: where together they are no more than one may have."""
    return seed is not None and query.shape[:3].numel() * key.shape[2] <= _CPU_CHUNK


def groups_of(query, key, key_padding_mask, query_padding_mask, seed) -> list[_Group]:
    """What is computed together: on a CPU each image by itself if it has padding and many scores, else the batch."""
    batch, heads, q_len, _ = query.shape
    if _may_read_masks(query.device):
        masks = [
            mask if mask is not None and fact(mask, "any", torch.any) else None
            for mask in (query_padding_mask, key_padding_mask)
        ]
        if any(mask is not None for mask in masks) and heads * q_len * key.shape[2] >= _ONE_IMAGE:
            positions = [[None] * batch if mask is None else fact(mask, "valid", _valid) for mask in masks]
            return [_Group(i, *images) for i, images in enumerate(zip(*positions, strict=True))]
        query_padding_mask, key_padding_mask = masks
    if key_padding_mask is None:
        return [_Group(idle=_rows(query_padding_mask, heads))]
    idle = query_padding_mask
    # Without a key a softmax gives NaN: those rows are set to zero with the padded queries'.
    no_key = fact(key_padding_mask, "no key", _without_key)
    if no_key is not None:
        idle = no_key.expand(batch, q_len) if idle is None else idle | no_key
    bias = fact(key_padding_mask, "bias", _bias).to(torch.promote_types(query.dtype, torch.float32))
    columns = None if seed is None else fact(key_padding_mask, "columns", _columns)
    return [_Group(idle=_rows(idle, heads), key_padding=_rows(key_padding_mask, heads), bias=bias, columns=columns)]


class _Facts:
    """What was computed from a mask at one version of it.

    A copy of the mask gets its attributes, but counts its versions anew: what it gets of this is never used.
    """

    __slots__ = ("owner", "values", "version")

    def __init__(self, mask: torch.Tensor):
        self.owner, self.version, self.values = weakref.ref(mask), mask._version, {}

    def __reduce__(self):
        return OrderedDict, ()  # empty, and of a class that torch.load takes


def remember_facts(mask: torch.Tensor) -> None:
    """Has what is computed from the mask alone kept with it, for as long as nobody writes to it."""
    mask._facts = _Facts(mask)


def fact(mask: torch.Tensor, name: str, make: Callable[[torch.Tensor], Any]) -> Any:
    """`make(mask)`, which a remembered mask has kept."""
    facts = getattr(mask, "_facts", None)
    if type(facts) is not _Facts or facts.owner() is not mask or facts.version != mask._version:
        return make(mask)
    if name not in facts.values:
        facts.values[name] = make(mask)
    return facts.values[name]


def _valid(mask: torch.Tensor) -> list[torch.Tensor | None]:
    """For each image of a mask [B, L], positions [n] int64 that are not padding; None for all."""
    positions = [(~row).nonzero()[:, 0] for row in mask]
    return [None if len(x) == mask.shape[1] else x for x in positions]


def _without_key(mask: torch.Tensor) -> torch.Tensor | None:
    """[B, 1], True = an image without any key; None where it is known that there is none."""
    no_key = mask.all(dim=1, keepdim=True)
    return None if _may_read_masks(mask.device) and not no_key.any() else no_key


def _bias(mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, -torch.inf, 0.0)[:, None, None]


def _columns(mask: torch.Tensor) -> torch.Tensor:
    """Those of padded keys do not matter: their probability is 0."""
    return (~mask).cumsum(dim=1).sub_(1).clamp_(min=0)


def _may_read_masks(device: torch.device) -> bool:
    """On a GPU, reading one would wait for all that is queued before it."""
    return device.type == "cpu"


def _rows(mask: torch.Tensor | None, heads: int) -> torch.Tensor | None:
    """What `_fill` takes for a mask [B, L]: on a CPU which of the B · H · L rows are padding, [n] int64."""
    if mask is None or not _may_read_masks(mask.device):
        return mask
    return fact(mask, f"rows of {heads} heads", partial(_padded_rows, heads))


def _padded_rows(heads: int, mask: torch.Tensor) -> torch.Tensor:
    return mask[:, None].expand(-1, heads, -1).flatten().nonzero()[:, 0]


def _fill(tensor: torch.Tensor, padding: torch.Tensor, value: float) -> torch.Tensor:
    """The contiguous tensor [B, H, L, ...] itself, with `value` in the rows of padding, which are `_rows`."""
    if padding.dtype == torch.bool:
        return tensor.masked_fill_(padding[:, None].unflatten(2, (-1, *[1] * (tensor.dim() - 3))), value)
    # On a CPU this takes a third of the time.
    tensor.view(tensor.shape[:3].numel(), math.prod(tensor.shape[3:])).index_fill_(0, padding, value)
    return tensor


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


def _scores(q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
    """q kᵀ · scale + bias."""
    if bias is None:
        return torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=scale)
    return torch.baddbmm(bias, q, k.mT, alpha=scale)


def _chunks(by_row: Sequence[torch.Tensor], by_slice: Sequence[torch.Tensor | None]) -> Iterator[tuple]:
    """Chunks of the scores of B · H slices: slice and rows of each, and these parts of the tensors.

    Args:
        by_row: [B, H, Lq, ...], of which a chunk has some slices and rows; the first are the queries.
        by_slice: [B, 1 or H, ...], of which it has some slices, or None; the first are the keys.
    """
    (batch, heads, q_len), k_len = by_row[0].shape[:3], by_slice[0].shape[2]
    slices = batch * heads
    if slices * q_len * k_len == 0:
        return
    by_row = [x.flatten(0, 1) for x in by_row]
    by_slice = [None if x is None else x.expand(-1, heads, -1, -1).flatten(0, 1) for x in by_slice]
    limit = _CPU_CHUNK if by_row[0].device.type == "cpu" else _GPU_CHUNK
    rows = min(q_len, max(1, limit // k_len))
    together = max(1, limit // (q_len * k_len)) if rows == q_len else 1
    if rows == q_len and together >= slices:
        yield slice(0, slices), slice(0, q_len), by_row, by_slice
        return
    for first in range(0, slices, together):
        s = slice(first, min(first + together, slices))
        parts = [None if x is None else x[s] for x in by_slice]
        for row in range(0, q_len, rows):
            r = slice(row, min(row + rows, q_len))
            yield s, r, [x[s, r] for x in by_row], parts
