"""`MultiheadAttention`: nn.MultiheadAttention's parameters around the fused `attention`."""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.layers.linear import apply_linear, linear
from detr_fast.ops._attention_chunked import zero_rows
from detr_fast.ops.attention import attention_of_projections, split_projections


class MultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention with `nn.MultiheadAttention`'s constructor, parameters, initial values and state-dict.

    Without weights, the default, the fused `attention` runs. `need_weights`, an `attn_mask` or a float
    `key_padding_mask` compute the [Lq, Lk] matrix in plain PyTorch. A module with a forward hook gives weights unless
    told not to: code written for `nn.MultiheadAttention` reads them there. A row without a valid key gives zeros before
    the output projection, where `nn.MultiheadAttention` gives NaN. The fused dropout rate is the multiple of 1/256
    nearest to `dropout` (`detr_fast.ops.applied_dropout`).

    Args:
        embed_dim: E, width of the queries and of the output; a multiple of `num_heads`.
        num_heads: H.
        dropout: drop probability of the attention's probabilities, in training.
        bias: biases in the four projections.
        add_bias_kv: append a learned key and value.
        add_zero_attn: append a key and value of zeros.
        kdim, vdim: widths of keys and values; None means `embed_dim`.
        batch_first: inputs and output are [B, L, E], otherwise [L, B, E].
        device, dtype: of the parameters.

    Attributes:
        skip_padded_queries: in self-attention, leave out the queries that a bool `key_padding_mask` says are padding,
            which saves their time: they are zeros before the output projection, and their weights are zeros. For
            tokens that nobody reads; False unless set.

    Raises:
        ValueError: `embed_dim` is not a positive multiple of `num_heads`; `dropout` is outside 0..1.

    Source: Vaswani et al. 2017, section 3.2.2; `torch.nn.MultiheadAttention`.
    """

    # Of the class, so that modules pickled before there was one have it.
    skip_padded_queries = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
    ):
        if embed_dim <= 0 or num_heads <= 0 or embed_dim % num_heads:
            raise ValueError(f"embed_dim is {embed_dim}, num_heads {num_heads}; expected a positive multiple")
        if isinstance(dropout, str | None) or not 0 <= dropout <= 1:
            raise ValueError(f"dropout is {dropout!r}; expected a probability in 0..1")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        The projections of inputs that are one and the same tensor are computed in one matrix product.

        Args:
            query: [B, Lq, E] with `batch_first`, otherwise [Lq, B, E]; or [Lq, E] without a batch.
            key, value: like `query`, of lengths Lk and widths `kdim` and `vdim`.
            key_padding_mask: [B, Lk], or [Lk] without a batch; bool, True = padding, or float, added to the scores.
            need_weights: also return the weights; None means where a forward hook of this module can see them.
            attn_mask: [Lq, Lk] or [B * H, Lq, Lk]; bool, True = may not attend, or float, added to the scores.
            average_attn_weights: return the weights' mean over the heads.
            is_causal: a hint that `attn_mask` is causal; changes nothing, and is an error without an `attn_mask`.

        Returns:
            The output, shaped as `query`; and the weights after dropout, [B, Lq, Lk] or [B, H, Lq, Lk], without B
            where the inputs have none; None without `need_weights`.

        Raises:
            TypeError: an input or a mask is not a tensor; a mask is neither bool nor floating point.
            ValueError: shapes do not fit together; `is_causal` without `attn_mask`; with `skip_padded_queries`, a
                number of queries other than that of the keys.
        """
        if need_weights is None:
            need_weights = bool(self._forward_hooks)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True without attn_mask; expected the causal mask in attn_mask")
        batched = self._check_inputs(query, key, value)
        projections = self._project(query, key, value, batched)
        batch, q_len = projections[0].shape[:2]
        k_len = projections[-1].shape[1]
        key_padding_mask = _check_padding(key_padding_mask, batch, k_len, batched)
        query_padding_mask = self._query_padding(key_padding_mask, q_len)
        attn_mask = _check_attn_mask(attn_mask, batch, self.num_heads, q_len, k_len)
        if self.bias_k is not None or self.add_zero_attn:
            q, k, v = split_projections(projections)  # each [B, H, L, D]
            k, v, key_padding_mask, attn_mask = self._append_keys(k, v, key_padding_mask, attn_mask)
            projections = [x.transpose(1, 2).unsqueeze(2) for x in (q, k, v)]

        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if (
            need_weights
            or attn_mask is not None
            or (key_padding_mask is not None and key_padding_mask.dtype != torch.bool)
        ):
            out, weights = _attention_with_weights(
                *split_projections(projections), key_padding_mask, attn_mask, dropout_p, query_padding_mask
            )
        else:
            out, _ = attention_of_projections(
                projections, key_padding_mask, dropout_p, query_padding_mask=query_padding_mask, need_logsumexp=False
            )
        out = apply_linear(self.out_proj, out.transpose(1, 2).flatten(2))  # [B, Lq, E]

        if not need_weights:
            weights = None
        elif average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether the inputs have a batch dimension."""
        _check_tensors(query=query, key=key, value=value)
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not tensor.is_floating_point():
                raise TypeError(f"{name} has dtype {tensor.dtype}; expected floating point")
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ValueError(
                f"{_shapes(query, key, value)}; expected three 3-D tensors, or three 2-D ones without a batch"
            )
        if (query.shape[-1], key.shape[-1], value.shape[-1]) != (self.embed_dim, self.kdim, self.vdim):
            widths = f"{self.embed_dim}, {self.kdim} and {self.vdim}"
            raise ValueError(f"{_shapes(query, key, value)}; expected widths of {widths}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(f"{_shapes(query, key, value)}; expected one length and batch size of keys and values")
        batched = query.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if batched and query.shape[batch_dim] != key.shape[batch_dim]:
            raise ValueError(f"{_shapes(query, key, value)}; expected one batch size (dimension {batch_dim})")
        return batched

    def _project(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> list[Tensor]:
        """The outputs [B, L, n, H, D] of one product for each different input: n of queries, keys and values."""
        width = self.embed_dim
        bias = self.in_proj_bias
        if not self._qkv_same_embed_dim:
            sizes = [1, 1, 1]
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        else:
            if query is key:
                sizes = [3] if key is value else [2, 1]
            else:
                sizes = [1, 2] if key is value else [1, 1, 1]
            weights = self.in_proj_weight.split_with_sizes([size * width for size in sizes])
        biases = [None] * len(sizes) if bias is None else bias.split_with_sizes([size * width for size in sizes])

        inputs = (query, key, value)
        projections = []
        index = 0  # of the part's input
        for size, weight, part in zip(sizes, weights, biases, strict=True):
            x = inputs[index]
            index += size
            is_length_first = batched and not self.batch_first
            if is_length_first and x.stride(0) < x.stride(1):
                # A view of batch-first memory: in that order the product copies nothing.
                x, is_length_first = x.transpose(0, 1), False
            x = linear(x, weight, part)
            x = x.unflatten(-1, (size, self.num_heads, self.head_dim))
            if not batched:
                x = x.unsqueeze(0)
            elif is_length_first:
                x = x.transpose(0, 1)
            projections.append(x)
        return projections

    def _query_padding(self, key_padding_mask: Tensor | None, q_len: int) -> Tensor | None:
        """The queries [B, Lq] that are left out."""
        if not self.skip_padded_queries or key_padding_mask is None or key_padding_mask.dtype != torch.bool:
            return None
        if key_padding_mask.shape[1] != q_len:
            raise ValueError(
                f"skip_padded_queries is set, with {q_len} queries and {key_padding_mask.shape[1]} keys; expected "
                "self-attention"
            )
        return key_padding_mask

    def _append_keys(self, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None):
        """Append the learned key and value and those of zeros, which every query may attend to."""
        extra = []
        if self.bias_k is not None:
            extra.append([b.view(1, self.num_heads, 1, self.head_dim).to(k.dtype) for b in (self.bias_k, self.bias_v)])
        if self.add_zero_attn:
            extra.append([k.new_zeros(1, self.num_heads, 1, self.head_dim)] * 2)
        for extra_k, extra_v in extra:
            k = torch.cat([k, extra_k.expand(k.shape[0], -1, -1, -1)], dim=2)
            v = torch.cat([v, extra_v.expand(v.shape[0], -1, -1, -1)], dim=2)
        if key_padding_mask is not None:
            key_padding_mask = F.pad(key_padding_mask, (0, len(extra)))
        if attn_mask is not None:
            attn_mask = F.pad(attn_mask, (0, len(extra)))
        return k, v, key_padding_mask, attn_mask


def _check_tensors(**tensors) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"


def _check_padding(mask: Tensor | None, batch: int, length: int, batched: bool) -> Tensor | None:
    """The key padding mask as [B, L]."""
    if mask is None:
        return None
    _check_tensors(key_padding_mask=mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"key_padding_mask has dtype {mask.dtype}; expected bool (True = padding) or floating point")
    expected = (batch, length) if batched else (length,)
    if mask.shape != expected:
        raise ValueError(f"key_padding_mask has shape {list(mask.shape)}; expected {list(expected)}")
    return mask if batched else mask.unsqueeze(0)


def _check_attn_mask(mask: Tensor | None, batch: int, heads: int, q_len: int, k_len: int) -> Tensor | None:
    """The attention mask as [1, 1, Lq, Lk] or [B, H, Lq, Lk]."""
    if mask is None:
        return None
    _check_tensors(attn_mask=mask)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attn_mask has dtype {mask.dtype}; expected bool (True = may not attend) or floating point")
    if mask.shape == (q_len, k_len):
        return mask[None, None]
    if mask.shape == (batch * heads, q_len, k_len):
        return mask.view(batch, heads, q_len, k_len)
    raise ValueError(
        f"attn_mask has shape {list(mask.shape)}; expected {[q_len, k_len]} or {[batch * heads, q_len, k_len]}"
    )


def _attention_with_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    dropout_p: float,
    query_padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Attention with its weights: out [B, H, Lq, D] and weights [B, H, Lq, Lk] after dropout."""
    masks = []
    if key_padding_mask is not None:
        # What padded keys and values hold, NaN included, reaches nothing.
        padding = _forbidden(key_padding_mask)
        k, v = zero_rows(k, padding), zero_rows(v, padding)
        masks.append(key_padding_mask[:, None, None, :])
    if attn_mask is not None:
        masks.append(attn_mask)
    q = zero_rows(q, query_padding_mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    for mask in masks:
        scores = scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
    if masks:
        # Asked of the masks, not of the scores, where NaN and infinity are to be seen.
        no_key = reduce(torch.logical_or, map(_forbidden, masks)).all(dim=-1, keepdim=True)
        scores = scores.masked_fill(no_key, 0)
    weights = torch.softmax(scores, dim=-1)
    if masks:
        weights = weights.masked_fill(no_key, 0)
    weights = F.dropout(zero_rows(weights, query_padding_mask), dropout_p)
    return zero_rows(weights.to(v.dtype) @ v, query_padding_mask), weights


def _forbidden(mask: Tensor) -> Tensor:
    """Where a mask, bool or added to the scores, leaves no weight."""
    return mask if mask.dtype == torch.bool else mask == -torch.inf
