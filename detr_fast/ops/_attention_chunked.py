"""Attention and its gradients in plain PyTorch, a few rows at a time: what runs where there is no kernel.

The formulas are the kernels'. Chunks of scores that stay in a CPU's cache cost a third of the whole matrix at once, and
the matrix of all of them never exists.

Source: Rabe and Staats 2021 (attention in chunks), Dao 2023 (backward from the log-sum-exp).
"""

from collections.abc import Iterator

import torch

from detr_fast.ops._dropout_bits import dropout_bytes

# Scores per chunk: what stays in a CPU's cache; on a GPU as many as fill it.
_CPU_CHUNK, _GPU_CHUNK = 2**20, 2**28


def chunked_forward(query, key, value, key_padding_mask, seed, drop_threshold, drop_scale, scale):
    """`attention` of checked arguments: out [B, H, Lq, Dv] and logsumexp [B, H, Lq], both promoted to float32 or wider.

    Args:
        query, key, value, key_padding_mask, seed, scale: as `attention`'s; no seed means no dropout.
        drop_threshold: 0..256; an element whose byte is below is dropped.
        drop_scale: multiplies what is kept.
    """
    q, k, v, bias, no_key = _flat(query, key, value, key_padding_mask, scale)
    out, logsumexp = q.new_zeros(*q.shape[:2], v.shape[2]), q.new_full(q.shape[:2], torch.inf)
    for s, r in _chunks(q, k):
        scores = _scores(q[s, r], k[s], bias, s)
        maximum = scores.amax(dim=-1, keepdim=True)
        probs = scores.sub_(maximum).exp_()
        total = probs.sum(dim=-1, keepdim=True)
        logsumexp[s, r] = (maximum + total.log()).squeeze(-1)
        if seed is not None:
            probs.mul_(_keep(seed, s, r, probs, drop_threshold))
            total /= drop_scale
        torch.div(torch.bmm(probs, v[s]), total, out=out[s, r])
    out, logsumexp = out.unflatten(0, query.shape[:2]), logsumexp.unflatten(0, query.shape[:2])
    if no_key is not None:
        out.masked_fill_(no_key[:, None, None, None], 0)
        logsumexp.masked_fill_(no_key[:, None, None], torch.inf)
    return out, logsumexp


def chunked_backward(grad_out, query, key, value, logsumexp, key_padding_mask, seed, drop_threshold, drop_scale, scale):
    """Gradients of query, key and value, promoted to float32 or wider.

    Args:
        grad_out: [B, H, Lq, Dv].
        logsumexp: what `attention` gave.
        The others: as `chunked_forward`'s.
    """
    q, k, v, bias, _ = _flat(query, key, value, key_padding_mask, scale)
    grad_out = grad_out.to(q.dtype).reshape(*q.shape[:2], v.shape[2])
    logsumexp = logsumexp.reshape(*q.shape[:2], 1)
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
    for s, r in _chunks(q, k):
        probs = _scores(q[s, r], k[s], bias, s).sub_(logsumexp[s, r]).exp_()
        grad_probs = torch.bmm(grad_out[s, r], v[s].transpose(1, 2))
        dropped = probs
        if seed is not None:
            keep = _keep(seed, s, r, probs, drop_threshold).mul_(drop_scale)
            dropped, grad_probs = probs * keep, grad_probs.mul_(keep)
        grad_v[s].baddbmm_(dropped.transpose(1, 2), grad_out[s, r])
        delta = (probs * grad_probs).sum(dim=-1, keepdim=True)  # not from `out`, which may be rounded to 16 bits
        grad_scores = grad_probs.sub_(delta).mul_(probs)
        torch.bmm(grad_scores, k[s], out=grad_q[s, r])
        grad_k[s].baddbmm_(grad_scores.transpose(1, 2), q[s, r])
    if key_padding_mask is not None:  # a padded key's own NaN must not come back as 0 · NaN
        padding = key_padding_mask.repeat_interleave(query.shape[1], dim=0)[:, :, None]
        grad_k.masked_fill_(padding, 0)
        grad_v.masked_fill_(padding, 0)
    return tuple(x.unflatten(0, query.shape[:2]) for x in (grad_q.mul_(scale), grad_k, grad_v))


def _flat(query, key, value, key_padding_mask, scale):
    """Promoted [B · H, L, D] of query · scale, key and value, zero where padded; what is added to the scores of each
    slice's keys [B · H, 1, Lk]; and which images have no key [B]. A mask of None gives None for both."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x.to(dtype).reshape(-1, *x.shape[2:]) for x in (query, key, value))
    q = q * scale
    if key_padding_mask is None:
        return q, k, v, None, None
    heads = query.shape[1]
    padding = key_padding_mask.repeat_interleave(heads, dim=0)[:, :, None]
    k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)  # 0 · NaN is NaN
    no_key = key_padding_mask.all(dim=-1)
    # Without any key the scores stay finite here; the caller looks after such rows.
    hidden = (key_padding_mask & ~no_key[:, None]).repeat_interleave(heads, dim=0)[:, None]
    bias = torch.zeros(hidden.shape, dtype=dtype, device=q.device).masked_fill_(hidden, -torch.inf)
    return q, k, v, bias, no_key


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


def _scores(q, k, bias, s):
    scores = torch.bmm(q, k.transpose(1, 2))
    return scores if bias is None else scores.add_(bias[s])


def _keep(seed, s, r, probs, drop_threshold):
    """1 where dropout keeps, 0 where it drops, in the dtype of `probs`."""
    if drop_threshold > 255:  # beyond a byte
        return torch.zeros_like(probs)
    slices, rows = (torch.arange(x.start, x.stop, device=seed.device) for x in (s, r))
    drawn = dropout_bytes(seed, slices, rows, probs.shape[-1])
    # Comparing into floats is several times faster than into bools that are then multiplied.
    return torch.ge(drawn, drop_threshold, out=torch.empty_like(probs))
