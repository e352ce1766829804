"""Segmentation: a mask for each of the detector's queries.

Each query's attention over the feature map (one map per head) goes with the features through a small convolutional
network that is upsampled along the backbone's levels. The features are the same for all queries of an image; they are
never copied per query. Where the network meets them (its first convolution, and the three levels it adds), their part
is computed once per image and added to all of the image's queries.

Letters in names: B batch, Q queries, N heads, C features.

Source: facebookresearch/detr, models/segmentation.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.layers.linear import apply_projection
from detr_fast.models.backbone import Joiner
from detr_fast.models.detr import DETR, as_nested
from detr_fast.models.transformer import mask_for, set_skip_padded_queries
from detr_fast.nested_tensor import NestedTensor
from detr_fast.ops import joint_softmax

_QUERIES_AT_ONCE = 25


class DETRsegm(nn.Module):
    """A detector with masks.

    Args:
        detr: a `DETR` whose backbone returns all levels (``return_interm_layers=True``), four or at least two. The mask
            head fits their channels: those of the backbone's `num_channels_per_level`, or, where it has none, 256, 512
            and 1024. Where there are fewer than three besides the last, the finest is added several times.
        freeze_detr: train the mask head alone. The detector gets no gradients, and its batch norms, if they are
            trainable ones, keep their statistics.

    Raises:
        ValueError: the backbone returns a single level, or the features do not suit the mask head.
    """

    def __init__(self, detr: DETR, freeze_detr: bool = False):
        super().__init__()
        self.detr = detr
        self.freeze_detr = freeze_detr
        if freeze_detr:
            self.detr.requires_grad_(False)
        hidden_dim, nheads = detr.transformer.d_model, detr.transformer.nhead
        self.bbox_attention = MHAttentionMap(hidden_dim, hidden_dim, nheads, dropout=0.0)
        self.mask_head = MaskHeadSmallConv(hidden_dim + nheads, _fpn_dims(detr.backbone), hidden_dim)
        # The attention map masks the memory as every attention does, and the convolutions read the features.
        set_skip_padded_queries(detr.transformer, self, detr)

    def train(self, mode: bool = True) -> "DETRsegm":
        """Training or evaluation mode; a frozen detector's batch norms stay in evaluation mode."""
        super().train(mode)
        if self.freeze_detr:
            keep_batch_norm_statistics(self.detr)
        return self

    def forward(self, samples: NestedTensor | Tensor | Sequence[Tensor]) -> dict:
        """Detections and masks of a batch.

        Args:
            samples: as `DETR.forward`.

        Returns:
            What `DETR.forward` returns, and "pred_masks": [B, num_queries, h, w], logits at the size of the backbone's
            first level (stride 4), over the padded batch.

        Raises:
            TypeError, ValueError: samples of another kind, shape or dtype; the message says what came.
        """
        samples = as_nested(samples)
        backbone = self.detr.backbone
        # The mask head reads no positions: those of the first three levels need not exist.
        options = {"last_only": True} if isinstance(backbone, Joiner) else {}
        features, positions = backbone(samples, **options)
        mask = mask_for(self.detr.transformer, features[-1])
        src = apply_projection(self.detr.input_proj, features[-1].tensors)
        query_embed = self.detr.query_embed.weight
        hs, memory = self.detr.transformer(src, mask, query_embed, positions[-1])
        out = self.detr.outputs(hs)
        bbox_mask = self.bbox_attention(hs[-1], memory, mask=mask)
        levels = [feature.tensors for feature in _three(features)]
        masks = self.mask_head(src, bbox_mask, levels)
        # Not `view` to all four sizes: with sizes that are not known yet (torch.export) it guards against h = 1.
        out["pred_masks"] = masks.squeeze(1).unflatten(0, bbox_mask.shape[:2])
        return out


def keep_batch_norm_statistics(model: nn.Module) -> None:
    """Puts the trainable batch norms of a model that is not trained into evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _fpn_dims(backbone: nn.Module) -> list[int]:
    """Channels of the levels that the mask head adds, the coarsest first."""
    levels = getattr(backbone[0] if isinstance(backbone, Joiner) else backbone, "num_channels_per_level", None)
    if levels is None:
        return [1024, 512, 256]
    if len(levels) < 2:
        raise ValueError(
            "the mask head needs the backbone's finer levels, this one returns the last alone; build it with "
            "return_interm_layers=True"
        )
    return _three(levels)


def _three(levels: list) -> list:
    """The three levels before the last, the coarsest first; the finest again for those that are not there."""
    finer = levels[-2::-1]
    return finer[:3] + finer[-1:] * (3 - len(finer))


class MaskHeadSmallConv(nn.Module):
    """Convolutions with group norm, upsampled along three levels of the backbone.

    The parameters are the original's. Of the first convolution the channels that read the features and those that read
    the attention maps are applied apart, since a convolution is linear: 256 of DETR's 264 channels once per image.
    Without gradients the queries are computed 25 at a time.

    Args:
        dim: channels of features and attention maps together; a multiple of 8, as the group norms need.
        fpn_dims: channels of the three levels, the coarsest first.
        context_dim: width of the network, a multiple of 128: it narrows to a sixteenth, which group norm divides in 8.

    Raises:
        ValueError: a number of channels that group norm cannot divide, or not three levels.
    """

    def __init__(self, dim: int, fpn_dims: Sequence[int], context_dim: int):
        super().__init__()
        inter_dims = [dim, *(context_dim // 2**i for i in range(1, 5))]
        if any(width == 0 or width % 8 for width in inter_dims) or len(fpn_dims) != 3:
            raise ValueError(
                "the mask head needs features and heads that add up to a multiple of 8 (group norm), a width that is a "
                f"multiple of 128 (likewise, a sixteenth of it) and three levels; got {dim}, {context_dim} and "
                f"{len(fpn_dims)}"
            )
        self.lay1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.gn1 = nn.GroupNorm(8, dim)
        self.lay2 = nn.Conv2d(dim, inter_dims[1], 3, padding=1)
        self.gn2 = nn.GroupNorm(8, inter_dims[1])
        self.lay3 = nn.Conv2d(inter_dims[1], inter_dims[2], 3, padding=1)
        self.gn3 = nn.GroupNorm(8, inter_dims[2])
        self.lay4 = nn.Conv2d(inter_dims[2], inter_dims[3], 3, padding=1)
        self.gn4 = nn.GroupNorm(8, inter_dims[3])
        self.lay5 = nn.Conv2d(inter_dims[3], inter_dims[4], 3, padding=1)
        self.gn5 = nn.GroupNorm(8, inter_dims[4])
        self.out_lay = nn.Conv2d(inter_dims[4], 1, 3, padding=1)
        self.dim = dim
        self.adapter1 = nn.Conv2d(fpn_dims[0], inter_dims[1], 1)
        self.adapter2 = nn.Conv2d(fpn_dims[1], inter_dims[2], 1)
        self.adapter3 = nn.Conv2d(fpn_dims[2], inter_dims[3], 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, bbox_mask: Tensor, fpns: Sequence[Tensor]) -> Tensor:
        """Masks of all queries.

        Args:
            x: [B, C, h, w], the projected features.
            bbox_mask: [B, Q, N, h, w], the queries' attention maps.
            fpns: three levels of the backbone, [B, C_i, h_i, w_i], the coarsest first.

        Returns:
            [B * Q, 1, h_3, w_3] logits.
        """
        shared = F.conv2d(x, self.lay1.weight[:, : x.shape[1]], self.lay1.bias, padding=1)
        adapters = (self.adapter1, self.adapter2, self.adapter3)
        levels = [adapter(fpn) for adapter, fpn in zip(adapters, fpns, strict=True)]
        # Without a backward pass that needs them, nobody holds all queries' intermediate results at once.
        parts = (bbox_mask,) if torch.is_grad_enabled() else bbox_mask.split(_QUERIES_AT_ONCE, dim=1)
        masks = [self._masks(part, shared, levels).unflatten(0, part.shape[:2]) for part in parts]
        return torch.cat(masks, dim=1).flatten(0, 1)

    def _masks(self, bbox_mask: Tensor, shared: Tensor, levels: Sequence[Tensor]) -> Tensor:
        """[B * Q, 1, h, w] of some queries, from what the images' queries have in common."""
        maps = bbox_mask.shape[2]
        queries = bbox_mask.shape[1]
        y = F.conv2d(bbox_mask.flatten(0, 1), self.lay1.weight[:, -maps:], padding=1)  # [B * Q, dim, h, w]
        y = _norm_relu(self.gn1, _add_to_queries(y, shared, queries))
        y = _norm_relu(self.gn2, self.lay2(y))
        layers = ((self.lay3, self.gn3), (self.lay4, self.gn4), (self.lay5, self.gn5))
        for level, (layer, norm) in zip(levels, layers, strict=True):
            y = F.interpolate(y, size=level.shape[-2:], mode="nearest")
            y = _norm_relu(norm, layer(_add_to_queries(y, level, queries)))
        return self.out_lay(y)


def _add_to_queries(y: Tensor, shared: Tensor, queries: int) -> Tensor:
    """Adds what an image's queries have in common [B, C, h, w] to all of them, y [B * Q, C, h, w], in place."""
    y.unflatten(0, (shared.shape[0], queries)).add_(shared[:, None])
    return y


def _norm_relu(norm: nn.GroupNorm, y: Tensor) -> Tensor:
    # In place: the norm's backward reads its input, not its output.
    return F.relu_(norm(y))


class MHAttentionMap(nn.Module):
    """Attention weights of queries over a feature map, one map per head, without values.

    A query's weights sum to 1 over all heads and cells together, as in the original.

    Args:
        query_dim: features of queries and feature map.
        hidden_dim: features after the projections, a multiple of `num_heads`.
        num_heads: maps per query.
        dropout: probability, on the weights.
        bias: whether the projections have one.

    Raises:
        ValueError: `hidden_dim` is not a multiple of `num_heads`.
    """

    def __init__(self, query_dim: int, hidden_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True):
        super().__init__()
        if hidden_dim % num_heads:
            raise ValueError(f"hidden_dim is {hidden_dim}; expected a multiple of num_heads = {num_heads}")
        self.num_heads = num_heads
        self.hidden_dim = hidden_dim
        self.dropout = nn.Dropout(dropout)
        self.q_linear = nn.Linear(query_dim, hidden_dim, bias=bias)
        self.k_linear = nn.Linear(query_dim, hidden_dim, bias=bias)
        for linear in (self.k_linear, self.q_linear):
            if bias:
                nn.init.zeros_(linear.bias)
            nn.init.xavier_uniform_(linear.weight)
        self.normalize_fact = float(hidden_dim / num_heads) ** -0.5

    def forward(self, q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weights of all queries.

        Args:
            q: [B, Q, query_dim].
            k: [B, query_dim, h, w].
            mask: [B, h, w] bool, True = padding, which gets no weight. An image that is all padding gives zeros.

        Returns:
            [B, Q, N, h, w].
        """
        size = k.shape[-2:]
        q = self.q_linear(q).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, N, Q, C / N]
        k = F.conv2d(k, self.k_linear.weight[:, :, None, None], self.k_linear.bias)
        k = k.flatten(2).unflatten(1, (self.num_heads, -1))  # [B, N, C / N, h * w]
        scores = (q * self.normalize_fact) @ k  # [B, N, Q, h * w]
        weights = joint_softmax(scores.transpose(1, 2), None if mask is None else mask.flatten(1))
        return self.dropout(weights.unflatten(-1, size))
