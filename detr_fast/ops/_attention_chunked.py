"""Attention and its gradients in plain PyTorch, a few rows at a time: what runs where there is no kernel.

The formulas are the kernels'. Chunks of scores that stay in a CPU's cache cost a third of the whole matrix at once, and
the matrix of all of them never exists. Without dropout a CPU has PyTorch's own fused attention.

Source: Rabe and Staats 2021 (attention in chunks).
"""

from collections.abc import Iterator, Sequence

import torch

from detr_fast.ops._dropout_bits import dropout_bytes

# Scores per chunk: what stays in a CPU's cache; on a GPU as many as fill it.
_CPU_CHUNK, _GPU_CHUNK = 2**20, 2**28
# Scores up to which the backward takes over the forward's two matrices: 2 MiB in float32, whatever the lengths.
_REMEMBERED = 2**18

_fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def chunked_forward(
    query, key, value, key_padding_mask, seed, drop_threshold, drop_scale, scale, remember: list | None = None
):
    """`attention` of checked arguments: out [B, H, Lq, Dv] and logsumexp [B, H, Lq], both promoted to float32 or wider.

    Args:
        query, key, value, key_padding_mask, seed, scale: as `attention`'s; no seed means no dropout.
        drop_threshold: 0..256; an element whose byte is below is dropped.
        drop_scale: multiplies what is kept.
        remember: takes what the backward need not compute again, if there is dropout and it is little.
    """
    q, k, v, bias, no_key = _promoted(query, key, value, key_padding_mask)
    if _has_fused(q, k, v, seed):
        out, logsumexp = _fused_forward(q, k, v, attn_mask=bias, scale=scale)
    else:
        out, logsumexp = _zeros(q, v.shape[3]), q.new_full(q.shape[:3], torch.inf)
        flat_out, flat_logsumexp = out.flatten(0, 1), logsumexp.flatten(0, 1)
        q, k, v, bias = _flat(q * scale, k, v if seed is None else v * drop_scale, bias)
        for s, r in _chunks(q, k):
            scores = torch.baddbmm(bias[s], q[s, r], k[s].mT)
            probs = torch.softmax(scores, dim=-1)
            # The largest probability is 1 / Σ exp(score - largest score).
            flat_logsumexp[s, r] = scores.amax(dim=-1) - probs.amax(dim=-1).log_()
            if seed is not None:
                keep = _keep(seed, s, r, probs, drop_threshold)
                if remember is not None and logsumexp.numel() * k.shape[1] <= min(_REMEMBERED, probs.numel()):
                    remember += probs, keep
                    probs = probs * keep
                else:
                    probs.mul_(keep)
            torch.bmm(probs, v[s], out=flat_out[s, r])
    if no_key is not None:
        out = out.masked_fill(no_key[:, None, None, None], 0)
        logsumexp = logsumexp.masked_fill(no_key[:, None, None], torch.inf)
    return out, logsumexp


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
    remembered: Sequence[torch.Tensor] = (),
):
    """Gradients of query, key and value, promoted to float32 or wider.

    Args:
        grad_out: [B, H, Lq, Dv].
        out, logsumexp: what `attention` gave.
        remembered: what `chunked_forward` remembered.
        The others: as `chunked_forward`'s.
    """
    q, k, v, bias, _ = _promoted(query, key, value, key_padding_mask)
    grad_out = grad_out.to(q.dtype)
    if _has_fused(q, k, v, seed) and out.dtype == q.dtype:  # not from an `out` that was rounded to 16 bits
        grads = _fused_backward(grad_out, q, k, v, out, logsumexp, 0.0, False, attn_mask=bias, scale=scale)
    else:
        grads = [_zeros(x, x.shape[3]) for x in (q, k, v)]
        grad_q, grad_k, grad_v = (x.flatten(0, 1) for x in grads)
        q, k, v, bias = _flat(q * scale, k, v if seed is None else v * drop_scale, bias)
        grad_out = grad_out.flatten(0, 1)
        for s, r in _chunks(q, k):
            if remembered:
                probs, keep = remembered
            else:
                probs = torch.softmax(torch.baddbmm(bias[s], q[s, r], k[s].mT), dim=-1)
                keep = None if seed is None else _keep(seed, s, r, probs, drop_threshold)
            grad_probs = torch.bmm(grad_out[s, r], v[s].mT)
            dropped = probs
            if keep is not None:
                grad_probs.mul_(keep)
                dropped = probs * keep
            grad_v[s].baddbmm_(dropped.mT, grad_out[s, r])
            # probs ∘ (grad_probs - Σ probs ∘ grad_probs)
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            torch.bmm(grad_scores, k[s], out=grad_q[s, r])
            grad_k[s].baddbmm_(grad_scores.mT, q[s, r])
        grad_q.mul_(scale)
        if seed is not None:
            grad_v.mul_(drop_scale)
    if key_padding_mask is None:
        return grads
    # A padded key's own NaN must not come back as 0 · NaN.
    padding = key_padding_mask[:, None, :, None]
    return grads[0], *(torch.where(padding, 0.0, grad) for grad in grads[1:])


def _promoted(query, key, value, key_padding_mask):
    """Promoted query, key and value, the latter two zero where padded; what is added to the scores [B, 1, 1, Lk]; and
    which images have no key [B]. A mask of None gives None for both."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if key_padding_mask is None:
        return query, key, value, None, None
    padding = key_padding_mask[:, None, :, None]
    # 0 · NaN is NaN. On a CPU this takes half of masked_fill's time.
    key, value = torch.where(padding, 0.0, key), torch.where(padding, 0.0, value)
    no_key = key_padding_mask.all(dim=-1)
    # Without any key the scores stay finite here; the caller looks after such rows.
    hidden = key_padding_mask & ~no_key[:, None]
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
    return query, key, value, bias[:, None, None], no_key


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


def _keep(seed, s, r, probs, drop_threshold):
    """1 where dropout keeps, 0 where it drops, in the dtype of `probs`."""
    if drop_threshold > 255:  # beyond a byte
        return torch.zeros_like(probs)
    slices, rows = (torch.arange(x.start, x.stop, device=seed.device) for x in (s, r))
    drawn = dropout_bytes(seed, slices, rows, probs.shape[-1])
    # Comparing into floats is several times faster than into bools that are then multiplied.
    return torch.ge(drawn, drop_threshold, out=torch.empty_like(probs))
