"""`attention`: softmax(q kᵀ · scale) v with padded keys and dropout, without the [Lq, Lk] matrix in memory.

Three implementations: the Triton kernels; chunks in plain PyTorch (`_attention_chunked`), which run where no kernel
does (CPU, float64, wide heads); and `attention_reference`, the formula as it reads, differentiable, to compare with.

Dropout draws one byte per element from Philox 4x32 with 7 rounds, keyed by the seed. One call gives 16 bytes; its
counter is (query row, column group, batch · heads + head, 0), where a key's column is its place among its image's valid
keys. So the same seed drops the same elements whatever the tiles, in the forward, in the backward and in
`attention_dropout_mask`, and a kernel that gathers the valid keys finds their bytes next to each other.
Within 64 columns, group g of four holds the columns 8 j + 2 g + b at byte 2 j + b (j < 8, b < 2): the elements of one
row that one GPU thread owns in a matrix product's result, so that a kernel can use all 16 bytes where they are made.
"""

import contextlib
import math
from collections.abc import Sequence

import torch
from torch.autograd.function import once_differentiable

from detr_fast.ops._attention_chunked import (
    chunked_backward,
    chunked_forward,
    fact,
    groups_of,
    keeps_chunks,
    remember_facts,
    zero_rows,
)
from detr_fast.ops._checks import is_number
from detr_fast.ops._dispatch import calls_plainly, refuse_transforms, use_kernel
from detr_fast.ops._dropout_bits import dropout_bytes

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST_KERNEL_HEAD_DIM = 128


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    seed: torch.Tensor | None = None,
    scale: float | None = None,
    query_padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-head attention: softmax(q kᵀ · scale), padded keys at -inf, dropout on the probabilities, times v.

    Differentiable once in query, key and value; memory linear in the lengths. A row without any key (all
    padding) gives zeros and zero gradients; what padded keys and values hold, NaN included, reaches nothing.
    Under autocast the three are cast to autocast's dtype, as `F.scaled_dot_product_attention` does. float64 and head
    dimensions above 128 are computed in plain PyTorch, in chunks, on every device. float32 matrix products on CUDA use
    TF32 where `torch.backends.cuda.matmul` says so.

    Args:
        query: [B, H, Lq, D], any strides; float16, bfloat16, float32 or float64.
        key: [B, H, Lk, D], like `query`.
        value: [B, H, Lk, Dv], like `query`; Dv may differ from D.
        key_padding_mask: [B, Lk] bool, any strides, True = padding; None for no padding.
        dropout_p: drop probability in 0..1. `applied_dropout(dropout_p)`, the nearest multiple of 1/256 (but neither 0
            nor 1 unless `dropout_p` is), is what is applied and what the kept elements are scaled up for.
        seed: [1] int64 on the same device, fixes the dropout mask; None draws one from torch's generator of that
            device, so that `torch.manual_seed`, checkpointing and CUDA graphs behave as with torch's own dropout.
        scale: multiplies q kᵀ, finite; None means D ** -0.5. The kernels take a positive one: zero and negative ones
            are multiplied into `query` beforehand, in its dtype.
        query_padding_mask: [B, Lq] bool, any strides, True = padding; None for no padding. The rows of padded queries
            are not computed, which saves their time: they give zeros and a log-sum-exp of +inf and take no gradient,
            and what they and their `grad_out` hold, NaN included, reaches nothing. The others are what they are
            without it, dropout included. The detectors here set it in the encoder, whose padded rows nobody reads.

    Returns:
        out [B, H, Lq, Dv] in the inputs' dtype, a view of [B, Lq, H, Dv]-contiguous memory; and the natural
        logarithm of the sum of exponentials [B, H, Lq], float32 (float64 for float64 inputs), +inf for a row without
        any key, not differentiable.

    Raises:
        TypeError: a dtype is not one of the four or the three differ; a mask is not a bool tensor; `seed` is not an
            int64 tensor.
        ValueError: shapes do not fit together, devices differ, `dropout_p` is outside 0..1, `scale` is not
            finite.
        NotImplementedError: inside `torch.vmap` or `torch.func`'s transforms, or with forward-mode tangents.
        RuntimeError: when differentiated twice.

    Source: Vaswani et al. 2017, section 3.2; Dao 2023 (FlashAttention-2); Salmon et al. 2011 (Philox).
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor [B, H, L, D]")
    query, key, value = _autocast(query, key, value)
    _check(query, key, value, key_padding_mask, query_padding_mask, dropout_p, seed)
    refuse_transforms("attention", query, key, value)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if not -math.inf < scale < math.inf:  # torch 2.11's compiler does not know math.isfinite
        raise ValueError(f"scale is {scale}; expected a finite number")
    if scale <= 0:
        query, scale = query * scale, 1.0
    seed = _seed(seed, dropout_p, query.device)
    if calls_plainly(query):
        projections = (x.transpose(1, 2).unsqueeze(2) for x in (query, key, value))
        return _PlainAttention.apply(
            key_padding_mask, float(dropout_p), seed, scale, query_padding_mask, True, *projections
        )
    lists = _lists_of(query, value, key_padding_mask, query_padding_mask)
    return _attention(query, key, value, key_padding_mask, float(dropout_p), seed, scale, query_padding_mask, *lists)


def attention_of_projections(
    projections: Sequence[torch.Tensor],
    key_padding_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    seed: torch.Tensor | None = None,
    query_padding_mask: torch.Tensor | None = None,
    need_logsumexp: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention` of queries, keys and values of which some come out of one matrix product.

    The gradient of each product is written in one piece, where those of its parts would have to be copied together.

    Args:
        projections: one to three tensors [B, L, n, H, D], any strides: n of query, key and value, in this order, three
            in all.
        key_padding_mask, dropout_p, seed, query_padding_mask: as `attention`.
        need_logsumexp: False: the second result is None.

    Returns, Raises:
        As `attention`.
    """
    projections = _autocast(*projections)
    masks = (key_padding_mask, query_padding_mask)
    refuse_transforms("attention", *projections)
    plainly = calls_plainly(projections[0])
    with torch.no_grad() if plainly else contextlib.nullcontext():  # they are split again within the function
        query, key, value = split_projections(projections)
    _check(query, key, value, *masks, dropout_p, seed)
    dropout_p, scale = float(dropout_p), query.shape[-1] ** -0.5
    seed = _seed(seed, dropout_p, query.device)
    if plainly:
        return _PlainAttention.apply(
            key_padding_mask, dropout_p, seed, scale, query_padding_mask, need_logsumexp, *projections
        )
    options = (key_padding_mask, dropout_p, seed, scale, query_padding_mask, *_lists_of(query, value, *masks))
    if len(projections) == 3 or not (torch.is_grad_enabled() and any(x.requires_grad for x in projections)):
        out, logsumexp = _attention(query, key, value, *options)
    else:
        out, logsumexp = _packed_attention(projections, *options)
    return out, logsumexp if need_logsumexp else None


def split_projections(projections: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Query, key and value [B, H, L, D], views of tensors [B, L, n, H, D]."""
    # `unbind`'s gradient is a copy, `squeeze`'s is not.
    return [part.transpose(1, 2) for x in projections for part in ([x.squeeze(2)] if x.shape[2] == 1 else x.unbind(2))]


def _autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device_type)
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def _seed(seed: torch.Tensor | None, dropout_p: float, device: torch.device) -> torch.Tensor | None:
    """The one given or else a new one; None without dropout."""
    if dropout_p == 0:
        return None
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device) if seed is None else seed


def _lists_of(query, value, key_padding_mask, query_padding_mask):
    """What the op takes beside the masks.

    Listed here, not in the op, so that the backward gets the same lists, and a compiled graph makes them once for all
    layers under one mask.
    """
    return _lists(key_padding_mask, query_padding_mask) if _on_kernel(query, value) else (None, None)


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    keep: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    query_padding_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` in plain, differentiable PyTorch, in `promote_types(dtype, float32)`.

    Args:
        query, key, value, key_padding_mask, dropout_p, scale, query_padding_mask: as `attention`.
        keep: [B, H, Lq, Lk] bool, True = kept: the dropout mask, for example from `attention_dropout_mask`; None
            means that nothing is dropped or scaled, whatever `dropout_p` is.

    Returns:
        As `attention`, with strides as they come.
    """
    dtype = query.dtype
    query = zero_rows(query, query_padding_mask)
    probs, value, logsumexp = _probabilities(query, key, value, key_padding_mask, scale)
    if keep is not None:
        probs = probs * keep * _dropout_scale(dropout_p)
    if query_padding_mask is not None:
        logsumexp = logsumexp.masked_fill(query_padding_mask[:, None], torch.inf)
    return zero_rows((probs @ value).to(dtype), query_padding_mask), logsumexp


def applied_dropout(dropout_p: float) -> float:
    """The drop rate that `attention` applies for `dropout_p`: the nearest multiple of 1/256.

    0 and 1 are exact; between them the rate is at least 1/256 and at most 255/256.

    Raises:
        ValueError: not a probability in 0..1.
    """
    _check_dropout(dropout_p)
    return _dropout_threshold(dropout_p) / 256


def attention_dropout_mask(
    seed: torch.Tensor,
    batch: int,
    heads: int,
    q_len: int,
    k_len: int,
    dropout_p: float,
    device: torch.device | str | None = None,
    *,
    key_padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The dropout mask that `attention` uses for `seed` and `key_padding_mask`, bit for bit, on every device.

    Args:
        seed: [1] int64.
        batch, heads, q_len, k_len: sizes of the attention.
        dropout_p: as `attention`'s.
        device: of the result; None means the seed's.
        key_padding_mask: [B, Lk] bool, as `attention`'s; None for no padding.

    Returns:
        [B, H, Lq, Lk] bool, True = kept. An element is kept if its byte is at least 256 · `applied_dropout(p)`; those
        of padded keys are never kept.

    Raises:
        ValueError: `dropout_p` is not a probability, or the mask has another shape.
    """
    _check_dropout(dropout_p)
    device = seed.device if device is None else torch.device(device)
    seed = seed.to(device)
    drawn = dropout_bytes(seed, range(batch * heads), range(q_len), k_len)
    keep = (drawn.to(torch.int16) >= _dropout_threshold(dropout_p)).unflatten(0, (batch, heads))
    if key_padding_mask is None:
        return keep
    if key_padding_mask.shape != (batch, k_len):
        raise ValueError(f"key_padding_mask has shape {list(key_padding_mask.shape)}; expected [{batch}, {k_len}]")
    valid = ~key_padding_mask.to(device)
    columns = (valid.cumsum(dim=1) - 1).clamp(min=0)
    return keep.gather(3, columns[:, None, None].expand(keep.shape)) & valid[:, None, None]


def _dropout_threshold(dropout_p: float) -> int:
    """Elements whose byte is below this are dropped: 0 for none to 256 for all."""
    if dropout_p in (0, 1):
        return int(256 * dropout_p)
    return min(max(round(256 * dropout_p), 1), 255)


def _dropout_scale(dropout_p: float) -> float:
    """What kept elements are multiplied by."""
    kept = 256 - _dropout_threshold(dropout_p)
    return 256 / kept if kept else 0.0


def _check_dropout(dropout_p: float) -> None:
    if not is_number(dropout_p) or not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is {dropout_p!r}; expected a probability in 0..1")


def _check(query, key, value, key_padding_mask, query_padding_mask, dropout_p, seed):
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected float16, bfloat16, float32 or float64")
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [B, H, L, D]")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}; expected one device")
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(f"query, key and value have dtypes {query.dtype}, {key.dtype}, {value.dtype}; expected one")
    if query.shape[:2] != key.shape[:2] or key.shape[:3] != value.shape[:3] or query.shape[3] != key.shape[3]:
        shapes = _shapes(query, key, value)
        raise ValueError(f"{shapes}; expected [B, H, Lq, D], [B, H, Lk, D] and [B, H, Lk, Dv]")
    if query.shape[3] == 0 or value.shape[3] == 0:
        raise ValueError(f"{_shapes(query, key, value)}; expected head dimensions of at least 1")
    _check_mask("key_padding_mask", key_padding_mask, "Lk", key)
    _check_mask("query_padding_mask", query_padding_mask, "Lq", query)
    _check_dropout(dropout_p)
    if seed is not None:
        if not isinstance(seed, torch.Tensor) or seed.dtype != torch.int64:
            raise TypeError(f"seed is {getattr(seed, 'dtype', type(seed).__name__)}; expected an int64 tensor [1]")
        if seed.shape != (1,) or seed.device != query.device:
            raise ValueError(f"seed is {list(seed.shape)} on {seed.device}; expected [1] on {query.device}")


def _shapes(query, key, value) -> str:
    # Written out: torch.compile breaks the graph at a join over a generator.
    return f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"


def _check_mask(name, mask, length, tensor):
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{name} is a {type(mask).__name__}; expected a bool tensor [B, {length}]")
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} has dtype {mask.dtype}; expected bool, True = padding")
    if mask.dim() != 2 or mask.shape != (tensor.shape[0], tensor.shape[2]):
        raise ValueError(
            f"{name} has shape {list(mask.shape)}; expected [B, {length}], here [{tensor.shape[0]}, {tensor.shape[2]}]"
        )
    if mask.device != tensor.device:
        raise ValueError(f"{name} is on {mask.device}, query on {tensor.device}")


def _on_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    head_dim = max(query.shape[-1], value.shape[-1])
    return (
        use_kernel(query.device, "attention") and query.dtype != torch.float64 and head_dim <= _LARGEST_KERNEL_HEAD_DIM
    )


def _probabilities(query, key, value, key_padding_mask, scale):
    """softmax(q kᵀ · scale) [B, H, Lq, Lk], the values that may be read, and the log-sum-exp, all promoted."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if key_padding_mask is None:
        scores = (query * scale) @ key.transpose(-2, -1)
        return torch.softmax(scores, dim=-1), value, _no_keys_at_inf(torch.logsumexp(scores.detach(), dim=-1))
    padding = key_padding_mask[:, None, :, None]
    key, value = key.masked_fill(padding, 0), value.masked_fill(padding, 0)  # 0 · NaN is NaN
    scores = ((query * scale) @ key.transpose(-2, -1)).masked_fill(padding.transpose(-2, -1), -torch.inf)
    no_key = key_padding_mask.all(dim=-1)[:, None, None, None]
    probs = torch.softmax(scores.masked_fill(no_key, 0), dim=-1).masked_fill(no_key, 0)
    return probs, value, _no_keys_at_inf(torch.logsumexp(scores.detach(), dim=-1))


def _no_keys_at_inf(logsumexp: torch.Tensor) -> torch.Tensor:
    return logsumexp.masked_fill(logsumexp == -torch.inf, torch.inf)


def _empty_blhd(batch, heads, length, head_dim, like: torch.Tensor) -> torch.Tensor:
    """[B, H, L, D] in [B, L, H, D] memory: what a projection on either side reads as [B, L, H · D]."""
    strides = (length * heads * head_dim, head_dim, heads * head_dim, 1)
    return like.new_empty_strided((batch, heads, length, head_dim), strides)  # no view: it may be changed in place


def _empty_outputs(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` and `logsumexp`, to be written."""
    batch, heads, q_len, _ = query.shape
    out = _empty_blhd(batch, heads, q_len, value.shape[3], query)
    return out, query.new_empty((batch, heads, q_len), dtype=torch.promote_types(query.dtype, torch.float32))


def _empty_gradients(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key and value, to be written."""
    return tuple(_empty_blhd(*x.shape, x) for x in inputs)


def _empty_rows(mask: torch.Tensor) -> torch.Tensor:
    """A mask's list of valid rows, to be written."""
    return mask.new_empty((mask.shape[0], 1 + mask.shape[1]), dtype=torch.int32)


def _list_valid_rows(mask):
    """[B, 1 + L] int32 of mask [B, L]: the number of valid rows; these, in order; then the others, from the last."""
    rows = _empty_rows(mask)
    if use_kernel(mask.device, "attention"):
        from detr_fast.kernels.attention import valid_rows

        with torch.cuda.device_of(mask):
            valid_rows(mask, out=rows)
        return rows
    valid, numbers = ~mask, torch.arange(mask.shape[1], dtype=torch.int32, device=mask.device)
    before = valid.cumsum(dim=1) - valid.int()
    rows[:, 0] = valid.sum(dim=1)
    rows[:, 1:].scatter_(1, torch.where(mask, mask.shape[1] - 1 - numbers + before, before), numbers.expand(mask.shape))
    return rows


_valid_rows = torch.library.custom_op(
    "detr_fast::valid_rows", _list_valid_rows, mutates_args=(), schema="(Tensor mask) -> Tensor"
)
_valid_rows.register_fake(_empty_rows)


def _lists(key_padding_mask, query_padding_mask, valid_keys=None, valid_queries=None):
    """What the kernels read in place of the masks: the lists given, or else made here; one list for one mask."""
    if valid_keys is None and key_padding_mask is not None:
        valid_keys = _remembered_rows(key_padding_mask)
    if valid_queries is None and query_padding_mask is not None:
        valid_queries = valid_keys if query_padding_mask is key_padding_mask else _remembered_rows(query_padding_mask)
    return valid_keys, valid_queries


def remember_padding(mask: torch.Tensor) -> torch.Tensor:
    """The mask [B, L] itself, now with its list of valid rows, which all attentions under it share.

    For a mask that was made just now: a list from before the capture of a CUDA graph would be read in every replay.
    Without effect while compiling, and in inference mode, which does not tell whether a tensor was written to. On a CPU
    without kernels what is computed from the mask is kept instead, once it is needed.
    """
    if torch.compiler.is_compiling() or mask.is_inference():
        return mask
    is_kernel = use_kernel(mask.device, "attention")
    if is_kernel or mask.device.type == "cpu":
        remember_facts(mask)
    if is_kernel:
        _remembered_rows(mask)
    return mask


def _remembered_rows(mask: torch.Tensor) -> torch.Tensor:
    return _valid_rows(mask) if torch.compiler.is_compiling() else fact(mask, "valid rows", _valid_rows)


def _forward(
    query, key, value, key_padding_mask, dropout_p, seed, scale, query_padding_mask=None, valid_keys=None,
    valid_queries=None,
):  # fmt: skip
    out, logsumexp = _empty_outputs(query, value)
    dropout = (seed, _dropout_threshold(dropout_p), _dropout_scale(dropout_p))
    if _on_kernel(query, value):
        from detr_fast.kernels.attention import attention_forward

        lists = _lists(key_padding_mask, query_padding_mask, valid_keys, valid_queries)
        with torch.cuda.device_of(query):
            attention_forward(query, key, value, *lists, *dropout, scale, out=out, logsumexp=logsumexp)
    else:
        masks = (key_padding_mask, query_padding_mask)
        with _without_autocast(query):
            chunked_forward(query, key, value, *masks, *dropout, scale, out=out, logsumexp=logsumexp)
    return out, logsumexp


def _without_autocast(tensor: torch.Tensor):
    """A context; torch's own takes longer to enter than a small product."""
    device_type = tensor.device.type
    if not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _forward_fake(query, key, value, *_, **__):
    return _empty_outputs(query, value)


def _backward(
    grad_out, query, key, value, out, logsumexp, key_padding_mask, dropout_p, seed, scale, query_padding_mask=None,
    valid_keys=None, valid_queries=None,
):  # fmt: skip
    grads = _empty_gradients(query, key, value)
    lists = (valid_keys, valid_queries)
    options = (key_padding_mask, dropout_p, seed, scale, query_padding_mask, *lists)
    _write_gradients(grads, grad_out, query, key, value, out, logsumexp, *options)
    return grads


def _write_gradients(
    grads, grad_out, query, key, value, out, logsumexp, key_padding_mask, dropout_p, seed, scale, query_padding_mask,
    valid_keys=None, valid_queries=None,
):  # fmt: skip
    """Into `grads`, those of query, key and value, of any strides."""
    inputs = (grad_out, query, key, value, out, logsumexp)
    dropout = (seed, _dropout_threshold(dropout_p), _dropout_scale(dropout_p))
    outputs = dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=True))
    if _on_kernel(query, value):
        from detr_fast.kernels.attention_backward import attention_backward

        lists = _lists(key_padding_mask, query_padding_mask, valid_keys, valid_queries)
        with torch.cuda.device_of(query):
            attention_backward(*inputs, *lists, *dropout, scale, **outputs)
    else:
        masks = (key_padding_mask, query_padding_mask)
        with _without_autocast(query):
            chunked_backward(*inputs, *masks, *dropout, scale, **outputs)


def _backward_fake(grad_out, query, key, value, *_, **__):
    return _empty_gradients(query, key, value)


def _save_for_backward(ctx, inputs, output):
    query, key, value, key_padding_mask, ctx.dropout_p, seed, ctx.scale, *rows = inputs
    out, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.save_for_backward(query, key, value, out, logsumexp, key_padding_mask, seed, *rows)


@once_differentiable
def _differentiate(ctx, grad_out, _):
    *tensors, key_padding_mask, seed, query_padding_mask, valid_keys, valid_queries = ctx.saved_tensors
    rows = (query_padding_mask, valid_keys, valid_queries)
    grads = _attention_backward(grad_out, *tensors, key_padding_mask, ctx.dropout_p, seed, ctx.scale, *rows)
    return *grads, *[None] * 7


_attention = torch.library.custom_op(
    "detr_fast::attention",
    _forward,
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor value, Tensor? key_padding_mask, float dropout_p, Tensor? seed, "
    "float scale, Tensor? query_padding_mask=None, Tensor? valid_keys=None, Tensor? valid_queries=None) -> "
    "(Tensor, Tensor)",
)
_attention.register_fake(_forward_fake)
_attention_backward = torch.library.custom_op(
    "detr_fast::attention_backward",
    _backward,
    mutates_args=(),
    schema="(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
    "Tensor? key_padding_mask, float dropout_p, Tensor? seed, float scale, Tensor? query_padding_mask=None, "
    "Tensor? valid_keys=None, Tensor? valid_queries=None) -> (Tensor, Tensor, Tensor)",
)
_attention_backward.register_fake(_backward_fake)
_attention.register_autograd(_differentiate, setup_context=_save_for_backward)


@_attention.register_vmap
def _attention_vmap(info, in_dims, *args):
    raise NotImplementedError("attention has no vmap rule; fold the mapped dimension into the batch")


# The same with the gradients of queries, keys and values that came out of one product in one tensor.


def _packed_forward(projections, *options):
    return _forward(*split_projections(projections), *options)


def _packed_forward_fake(projections, *_):
    query, _, value = split_projections(projections)
    return _empty_outputs(query, value)


def _packed_backward(grad_out, projections, out, logsumexp, *options):
    grads = [torch.empty_like(x) for x in projections]
    tensors = (grad_out, *split_projections(projections), out, logsumexp)
    _write_gradients(split_projections(grads), *tensors, *options)
    return grads


def _packed_backward_fake(grad_out, projections, *_):
    return [torch.empty_like(x) for x in projections]


def _packed_save_for_backward(ctx, inputs, output):
    projections, key_padding_mask, ctx.dropout_p, seed, ctx.scale, *rows = inputs
    out, logsumexp = output
    ctx.mark_non_differentiable(logsumexp)
    ctx.save_for_backward(*projections, out, logsumexp, key_padding_mask, seed, *rows)


@once_differentiable
def _packed_differentiate(ctx, grad_out, _):
    *projections, out, logsumexp, key_padding_mask, seed, query_padding_mask, keys, queries = ctx.saved_tensors
    options = (key_padding_mask, ctx.dropout_p, seed, ctx.scale, query_padding_mask, keys, queries)
    is_batched = not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(grad_out)
    backward = _gradients_one_by_one if is_batched else _packed_attention_backward
    return backward(grad_out, projections, out, logsumexp, *options), *[None] * 7


def _gradients_one_by_one(grad_out, projections, out, logsumexp, *options):
    """Those of the projections under `is_grads_batched`, for which torch can repeat no op that returns a list."""
    grads = _attention_backward(grad_out, *split_projections(projections), out, logsumexp, *options)
    parts = iter(x.transpose(1, 2) for x in grads)
    return [torch.stack([next(parts) for _ in range(x.shape[2])], dim=2) for x in projections]


_OPTIONS = (
    "Tensor? key_padding_mask, float dropout_p, Tensor? seed, float scale, Tensor? query_padding_mask, "
    "Tensor? valid_keys, Tensor? valid_queries"
)
_packed_attention = torch.library.custom_op(
    "detr_fast::packed_attention",
    _packed_forward,
    mutates_args=(),
    schema=f"(Tensor[] projections, {_OPTIONS}) -> (Tensor, Tensor)",
)
_packed_attention.register_fake(_packed_forward_fake)
_packed_attention_backward = torch.library.custom_op(
    "detr_fast::packed_attention_backward",
    _packed_backward,
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor[] projections, Tensor out, Tensor logsumexp, {_OPTIONS}) -> Tensor[]",
)
_packed_attention_backward.register_fake(_packed_backward_fake)
_packed_attention.register_autograd(_packed_differentiate, setup_context=_packed_save_for_backward)
_packed_attention.register_vmap(_attention_vmap)


class _PlainAttention(torch.autograd.Function):
    """`packed_attention` where no kernel runs, without the library's layers of Python; `setup_context` has its own.

    Between the passes it keeps what the ops compute twice: which images are computed together, and of small attentions
    the probabilities.
    """

    @staticmethod
    def forward(ctx, key_padding_mask, dropout_p, seed, scale, query_padding_mask, need_logsumexp, *projections):
        query, key, value = split_projections(projections)
        masks = (key_padding_mask, query_padding_mask)
        out, logsumexp = _empty_outputs(query, value)
        if not (need_logsumexp or seed is None):  # then the backward does not read it either
            logsumexp = None
        dropout = (seed, _dropout_threshold(dropout_p), _dropout_scale(dropout_p))
        groups = groups_of(query, key, *masks, seed)
        kept = [] if any(ctx.needs_input_grad) and keeps_chunks(query, key, seed) else None
        with _without_autocast(query):
            chunked_forward(
                query, key, value, *masks, *dropout, scale, out=out, logsumexp=logsumexp, kept=kept, groups=groups
            )
        ctx.dropout_p, ctx.scale, ctx.groups, ctx.projections = dropout_p, scale, groups, len(projections)
        ctx.set_materialize_grads(False)
        if logsumexp is not None:
            ctx.mark_non_differentiable(logsumexp)
        ctx.save_for_backward(out, logsumexp, *masks, seed, *projections, *kept or ())
        return out, logsumexp if need_logsumexp else None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):
        if grad_out is None:
            return (None,) * (6 + ctx.projections)
        out, logsumexp, key_padding_mask, query_padding_mask, seed, *rest = ctx.saved_tensors
        projections, kept = rest[: ctx.projections], rest[ctx.projections :]
        inputs = split_projections(projections)
        if calls_plainly(grad_out):
            # Laid out as the products, or as `attention` has it.
            is_packed = len(projections) < 3
            grads = [torch.empty_like(x) if is_packed else x.new_empty(x.shape) for x in projections]
            outputs = dict(zip(("grad_query", "grad_key", "grad_value"), split_projections(grads), strict=True))
            options = (seed, _dropout_threshold(ctx.dropout_p), _dropout_scale(ctx.dropout_p), ctx.scale)
            with _without_autocast(grad_out):
                chunked_backward(
                    grad_out, *inputs, out, logsumexp, key_padding_mask, query_padding_mask, *options, **outputs,
                    kept=kept, groups=ctx.groups,
                )  # fmt: skip
        else:
            options = (key_padding_mask, ctx.dropout_p, seed, ctx.scale, query_padding_mask, None, None)
            if logsumexp is None:
                logsumexp = _attention(*inputs, *options)[1]
            grads = _gradients_one_by_one(grad_out, projections, out, logsumexp, *options)
        return *[None] * 6, *grads
