"""DETR's transformer: torch.nn.Transformer with positions added inside every attention.

The public tensors are sequence first ([length, batch, features]), as in the original, and so are those of the layers'
attentions, so that the original's hooks and subclasses fit. Inside, everything is computed batch first on the
transposed view. `Transformer` holds its tokens in batch-first memory and hands out views of it, so
that nothing is copied on the way.

Letters in names: B batch, L memory length (h*w), Q queries, C features.

Source: facebookresearch/detr, models/transformer.py.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from detr_fast.layers import MultiheadAttention
from detr_fast.layers.linear import apply_linear
from detr_fast.nested_tensor import NestedTensor, is_unpadded
from detr_fast.ops.attention import remember_padding

# Layers of torch.nn that compute each token by itself, and the list that holds layers.
_TOKENWISE = (nn.Linear, NonDynamicallyQuantizableLinear, nn.LayerNorm, nn.Dropout, nn.ModuleList)


class Transformer(nn.Module):
    """Encoder over the pixels of a feature map, decoder over the object queries.

    Args:
        d_model: features of every token.
        nhead: attention heads.
        num_encoder_layers, num_decoder_layers: depth.
        dim_feedforward: hidden features of the feed-forward networks.
        dropout: probability, on attention weights and after attention, inside and after the feed-forward.
        activation: "relu", "gelu" (exact) or "glu", see `TransformerEncoderLayer`.
        normalize_before: pre-norm layers instead of post-norm, and then a norm after the encoder.
        return_intermediate_dec: return every decoder layer's output instead of the last one's.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        normalize_before: bool = False,
        return_intermediate_dec: bool = False,
    ):
        super().__init__()
        layer_args = (d_model, nhead, dim_feedforward, dropout, activation, normalize_before)
        encoder_layer = TransformerEncoderLayer(*layer_args)
        encoder_norm = nn.LayerNorm(d_model) if normalize_before else None
        self.encoder = TransformerEncoder(encoder_layer, num_encoder_layers, encoder_norm)
        decoder_layer = TransformerDecoderLayer(*layer_args)
        self.decoder = TransformerDecoder(
            decoder_layer, num_decoder_layers, nn.LayerNorm(d_model), return_intermediate=return_intermediate_dec
        )
        self._reset_parameters()
        self.d_model = d_model
        self.nhead = nhead

    def _reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self, src: Tensor, mask: Tensor | None, query_embed: Tensor, pos_embed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encodes a feature map and decodes the queries from it.

        A channels-last `src` and `pos_embed` are read in place; others are copied once. Pixels under the mask are
        never attended to, but computed like any other and returned in `memory`, unless the encoder's attentions skip
        them (`skip_padded_queries`): then `memory` is unspecified there. An image that is all padding gives attention
        outputs of zero.

        Args:
            src: [B, C, h, w], C = d_model.
            mask: [B, h, w] bool, True = padding; None for no padding.
            query_embed: [Q, C], one embedding per query; or [B, Q, C], each image's own.
            pos_embed: [B, C, h, w].

        Returns:
            hs [layers, B, Q, C] (one layer without `return_intermediate_dec`) and memory [B, C, h, w].

        Raises:
            ValueError: a shape that does not fit. TypeError: a mask that is not bool.
        """
        if src.dim() != 4 or src.shape[1] != self.d_model:
            raise ValueError(f"src is {list(src.shape)}; expected [B, {self.d_model}, h, w]")
        if pos_embed.shape != src.shape:
            raise ValueError(f"pos_embed is {list(pos_embed.shape)}; expected src's {list(src.shape)}")
        batch, _, height, width = src.shape
        if mask is not None:
            if mask.dtype != torch.bool:
                raise TypeError(f"mask is {mask.dtype}; expected torch.bool, True = padding")
            if mask.dim() != 3 or mask.shape != (batch, height, width):
                raise ValueError(f"mask is {list(mask.shape)}; expected [B, h, w] = {[batch, height, width]}")

        src_LBC = _tokens(src).transpose(0, 1)
        pos_LBC = _tokens(pos_embed).transpose(0, 1)
        key_padding_mask = None if mask is None else remember_padding(mask.flatten(1))
        query_pos_BQC = query_embed.expand(batch, *query_embed.shape[-2:])
        tgt_BQC = query_embed.new_zeros(query_pos_BQC.shape)

        memory_LBC = self.encoder(src_LBC, src_key_padding_mask=key_padding_mask, pos=pos_LBC)
        hs = self.decoder(
            tgt_BQC.transpose(0, 1),
            memory_LBC,
            memory_key_padding_mask=key_padding_mask,
            pos=pos_LBC,
            query_pos=query_pos_BQC.transpose(0, 1),
        )
        return hs.transpose(1, 2), memory_LBC.permute(1, 2, 0).unflatten(2, (height, width))


def set_skip_padded_queries(transformer: nn.Module, *readers: nn.Module) -> None:
    """Has the encoder's attentions leave out the pixels under the mask, if nobody reads the memory there.

    Nobody does where the detectors that call the transformer, and all of its parts that may mix tokens, are of this
    package. A subclass or another's part may read it: then all pixels are computed, also by the detectors that get the
    same transformer later. Attentions that were set to False stay so.

    Args:
        transformer: of any class.
        readers: the detectors.
    """
    skip = all(map(_is_own, [*readers, *_parts(transformer)]))
    for attention in [layer.self_attn for layer in transformer.encoder.layers] if skip else transformer.modules():
        if isinstance(attention, MultiheadAttention):
            attention.skip_padded_queries = skip and vars(attention).get("skip_padded_queries", True)


def mask_for(transformer: nn.Module, features: NestedTensor) -> Tensor | None:
    """The features' mask as a transformer takes it.

    Where there is known to be no padding, None if all parts are this package's; a subclass or another's may need the
    mask itself.
    """
    return None if is_unpadded(features) and all(map(_is_own, _parts(transformer))) else features.mask


def _parts(transformer: nn.Module) -> list[nn.Module]:
    """The transformer and what is in it, but for what computes each token by itself."""
    return [module for module in transformer.modules() if type(module) not in _TOKENWISE]


def _is_own(module: nn.Module) -> bool:
    return type(module).__module__.startswith("detr_fast.")


def _attend(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """What an attention, ours or another's, gives for tensors [B, L, C], which it gets in the order that it takes."""
    if getattr(attention, "batch_first", False):
        return attention(q, k, v, **options)[0]
    # What is one tensor stays one: our attention then projects it once.
    q_LBC = q.transpose(0, 1)
    k_LBC = q_LBC if k is q else k.transpose(0, 1)
    v_LBC = k_LBC if v is k else v.transpose(0, 1)
    return attention(q_LBC, k_LBC, v_LBC, **options)[0].transpose(0, 1)


def _tokens(x: Tensor) -> Tensor:
    """[B, C, h, w] → [B, h*w, C]: a view if x is channels-last, also if all images share their memory."""
    x = x.flatten(2).transpose(1, 2)
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


class TransformerEncoder(nn.Module):
    """`num_layers` copies of an encoder layer, one after the other.

    Args:
        encoder_layer: a `TransformerEncoderLayer`.
        num_layers: number of copies.
        norm: applied to the last layer's output, or None.
    """

    def __init__(self, encoder_layer: nn.Module, num_layers: int, norm: nn.Module | None = None):
        super().__init__()
        self.layers = _get_clones(encoder_layer, num_layers)
        self.num_layers = num_layers
        self.norm = norm

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
    ) -> Tensor:
        """Arguments as `TransformerEncoderLayer.forward` (`mask` is its `src_mask`); returns [L, B, C]."""
        output = src
        for layer in self.layers:
            output = layer(output, src_mask=mask, src_key_padding_mask=src_key_padding_mask, pos=pos)
        if self.norm is not None:
            output = _batch_first(self.norm, output)
        return output


class TransformerDecoder(nn.Module):
    """`num_layers` copies of a decoder layer, one after the other.

    Args:
        decoder_layer: a `TransformerDecoderLayer`.
        num_layers: number of copies.
        norm: applied to each output that is returned, or None.
        return_intermediate: return every layer's output instead of the last one's.
    """

    def __init__(
        self,
        decoder_layer: nn.Module,
        num_layers: int,
        norm: nn.Module | None = None,
        return_intermediate: bool = False,
    ):
        super().__init__()
        self.layers = _get_clones(decoder_layer, num_layers)
        self.num_layers = num_layers
        self.norm = norm
        self.return_intermediate = return_intermediate

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """Arguments as `TransformerDecoderLayer.forward`; returns [layers, Q, B, C] or [1, Q, B, C]."""
        output = tgt
        outputs = []
        for layer in self.layers:
            output = layer(
                output,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
                pos=pos,
                query_pos=query_pos,
            )
            outputs.append(output)
        if not self.return_intermediate:
            outputs = [output]
        outputs_BQC = [x.transpose(0, 1) if self.norm is None else self.norm(x.transpose(0, 1)) for x in outputs]
        return torch.stack(outputs_BQC).transpose(1, 2)


class TransformerEncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with dropout, residual and layer norm.

    Args:
        d_model, nhead, dim_feedforward, dropout, normalize_before: see `Transformer`.
        activation: "relu", "gelu" (exact) or "glu". With "glu", `linear1` is twice as wide, since the gate halves its
            output; the original names this choice but fails on it.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        normalize_before: bool = False,
    ):
        super().__init__()
        self.self_attn = MultiheadAttention(d_model, nhead, dropout=dropout)
        self.linear1 = nn.Linear(d_model, _linear1_width(dim_feedforward, activation))
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.activation = _get_activation_fn(activation)
        self.normalize_before = normalize_before

    def with_pos_embed(self, tensor: Tensor, pos: Tensor | None) -> Tensor:
        return tensor if pos is None else tensor + pos

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            src: [L, B, C].
            src_mask: attention mask, as `MultiheadAttention`'s attn_mask (takes the reference path).
            src_key_padding_mask: [B, L] bool, True = padding.
            pos: [L, B, C], added to queries and keys, not to values.

        Returns:
            [L, B, C].
        """
        forward = self.forward_pre if self.normalize_before else self.forward_post
        return forward(src, src_mask, src_key_padding_mask, pos)

    def forward_post(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
    ) -> Tensor:
        """`forward` with the norms behind the residuals."""
        x, pos = src.transpose(0, 1), _transposed(pos)
        x = self.norm1(x + self.dropout1(self._self_attention(x, pos, src_mask, src_key_padding_mask)))
        x = self.norm2(x + self.dropout2(self._feed_forward(x)))
        return x.transpose(0, 1)

    def forward_pre(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
    ) -> Tensor:
        """`forward` with the norms before the attention and the feed-forward network."""
        x, pos = src.transpose(0, 1), _transposed(pos)
        x = x + self.dropout1(self._self_attention(self.norm1(x), pos, src_mask, src_key_padding_mask))
        x = x + self.dropout2(self._feed_forward(self.norm2(x)))
        return x.transpose(0, 1)

    def _self_attention(self, x, pos, attn_mask, key_padding_mask) -> Tensor:
        """x [B, L, C] → [B, L, C]."""
        q = k = self.with_pos_embed(x, pos)
        return _attend(self.self_attn, q, k, x, attn_mask=attn_mask, key_padding_mask=key_padding_mask)

    def _feed_forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.activation(apply_linear(self.linear1, x)))
        return apply_linear(self.linear2, x)


class TransformerDecoderLayer(nn.Module):
    """Self-attention of the queries, attention to the memory and a feed-forward network.

    Args: see `TransformerEncoderLayer`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        normalize_before: bool = False,
    ):
        super().__init__()
        self.self_attn = MultiheadAttention(d_model, nhead, dropout=dropout)
        self.multihead_attn = MultiheadAttention(d_model, nhead, dropout=dropout)
        self.linear1 = nn.Linear(d_model, _linear1_width(dim_feedforward, activation))
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)
        self.activation = _get_activation_fn(activation)
        self.normalize_before = normalize_before

    def with_pos_embed(self, tensor: Tensor, pos: Tensor | None) -> Tensor:
        return tensor if pos is None else tensor + pos

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            tgt: [Q, B, C].
            memory: [L, B, C], the encoder's output.
            tgt_mask, memory_mask: attention masks, as `MultiheadAttention`'s attn_mask (take the reference path).
            tgt_key_padding_mask: [B, Q] bool, True = padding.
            memory_key_padding_mask: [B, L] bool, True = padding.
            pos: [L, B, C], added to the memory's keys.
            query_pos: [Q, B, C], added to the queries, and to the keys of the self-attention.

        Returns:
            [Q, B, C].
        """
        forward = self.forward_pre if self.normalize_before else self.forward_post
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        return forward(tgt, memory, *masks, pos, query_pos)

    def forward_post(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """`forward` with the norms behind the residuals."""
        x, memory, pos, query_pos = (_transposed(tensor) for tensor in (tgt, memory, pos, query_pos))
        x = self.norm1(x + self.dropout1(self._self_attention(x, query_pos, tgt_mask, tgt_key_padding_mask)))
        found = self._cross_attention(x, memory, pos, query_pos, memory_mask, memory_key_padding_mask)
        x = self.norm2(x + self.dropout2(found))
        x = self.norm3(x + self.dropout3(self._feed_forward(x)))
        return x.transpose(0, 1)

    def forward_pre(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        pos: Tensor | None = None,
        query_pos: Tensor | None = None,
    ) -> Tensor:
        """`forward` with the norms before the attentions and the feed-forward network."""
        x, memory, pos, query_pos = (_transposed(tensor) for tensor in (tgt, memory, pos, query_pos))
        x = x + self.dropout1(self._self_attention(self.norm1(x), query_pos, tgt_mask, tgt_key_padding_mask))
        found = self._cross_attention(self.norm2(x), memory, pos, query_pos, memory_mask, memory_key_padding_mask)
        x = x + self.dropout2(found)
        x = x + self.dropout3(self._feed_forward(self.norm3(x)))
        return x.transpose(0, 1)

    def _self_attention(self, x, query_pos, attn_mask, key_padding_mask) -> Tensor:
        """x [B, Q, C] → [B, Q, C]."""
        q = k = self.with_pos_embed(x, query_pos)
        return _attend(self.self_attn, q, k, x, attn_mask=attn_mask, key_padding_mask=key_padding_mask)

    def _cross_attention(self, x, memory, pos, query_pos, attn_mask, key_padding_mask) -> Tensor:
        """x [B, Q, C], memory [B, L, C] → [B, Q, C]."""
        q, k = self.with_pos_embed(x, query_pos), self.with_pos_embed(memory, pos)
        return _attend(self.multihead_attn, q, k, memory, attn_mask=attn_mask, key_padding_mask=key_padding_mask)

    def _feed_forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.activation(apply_linear(self.linear1, x)))
        return apply_linear(self.linear2, x)


def _transposed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.transpose(0, 1)


def _batch_first(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.transpose(0, 1)).transpose(0, 1)


def _get_clones(module: nn.Module, n: int) -> nn.ModuleList:
    return nn.ModuleList([copy.deepcopy(module) for _ in range(n)])


_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "glu": F.glu}


def _get_activation_fn(activation: str) -> Callable[[Tensor], Tensor]:
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[activation]


def _linear1_width(dim_feedforward: int, activation: str) -> int:
    return 2 * dim_feedforward if activation == "glu" else dim_feedforward
