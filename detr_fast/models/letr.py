"""LETR: a DETR that detects line segments, coarse and, in a second stage, fine.

The first stage is a DETR whose queries become lines: two end points. It reads one of the backbone's four levels. The
second stage reads a finer level with a transformer of its own, whose queries are the first one's decoded ones.

Letters in names: B batch, Q queries, C features, L memory length (h*w).

Source: Xu et al. 2021, "Line Segment Detection Using Transformers without Edges"; mlpc-ucsd/LETR, src/models/letr.py
and letr_stack.py.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast import _moved
from detr_fast.layers import MLP
from detr_fast.layers.linear import apply_projection
from detr_fast.models import transformer as detr_transformer
from detr_fast.models.backbone import Joiner
from detr_fast.models.detr import as_nested, aux_outputs, head_outputs
from detr_fast.models.segmentation import keep_batch_norm_statistics
from detr_fast.models.transformer import mask_for, set_skip_padded_queries
from detr_fast.nested_tensor import NestedTensor

# LETR has these names beside the model; here they live in rooms above it.
__getattr__ = _moved.lookup(
    __name__,
    {
        "HungarianMatcher_Line": "detr_fast.criterion.lines",
        "PostProcess_Line": "detr_fast.criterion.lines",
        "SetCriterion": "detr_fast.criterion.lines",
        "build": "detr_fast.tasks.lines",
    },
)

# Channels of a ResNet-50's levels, for a backbone that does not tell its own.
_CHANNELS = (256, 512, 1024, 2048)


class Transformer(detr_transformer.Transformer):
    """DETR's transformer, returning the memory as LETR does: [L, B, C]."""

    def forward(
        self, src: Tensor, mask: Tensor | None, query_embed: Tensor, pos_embed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `detr_fast.models.Transformer.forward`; returns hs [layers, B, Q, C] and memory [h*w, B, C]."""
        hs, memory = super().forward(src, mask, query_embed, pos_embed)
        return hs, memory.flatten(2).permute(2, 0, 1)


class StackTransformer(Transformer):
    """The second stage's transformer, whose queries differ from image to image."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None,
        query_embed: Tensor,
        pos_embed: Tensor,
        *,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor, list[Tensor] | None]:
        """As `Transformer.forward`, and attention weights.

        Args:
            src, mask, pos_embed: as there.
            query_embed: [B, Q, C], one embedding for each query of each image.
            need_weights: return the decoder's attention to the memory, which takes the slower reference path.

        Returns:
            hs [layers, B, Q, C], memory [h*w, B, C], and of each decoder layer the weights [B, Q, h*w], mean over
            heads; None without `need_weights`.
        """
        if not need_weights:
            return *super().forward(src, mask, query_embed, pos_embed), None
        weights, handles = [], []
        for layer in self.decoder.layers:
            attention = layer.multihead_attn
            handles.append(attention.register_forward_pre_hook(_with_weights, with_kwargs=True))
            handles.append(attention.register_forward_hook(lambda module, args, out: weights.append(out[1])))
        try:
            hs, memory = super().forward(src, mask, query_embed, pos_embed)
        finally:
            for handle in handles:
                handle.remove()
        return hs, memory, weights


def _with_weights(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    return args, {**kwargs, "need_weights": True}


class LETR(nn.Module):
    """Detects lines: one class distribution and two end points for each of `num_queries` queries.

    Args:
        backbone: NestedTensor → (features, positions) of all levels, as `Joiner` of a `Backbone` with
            ``return_interm_layers=True``. A level's channels are those of the backbone's `num_channels_per_level`, or,
            where it has none, 256, 512, 1024 and 2048.
        transformer: as `Transformer`, with attributes `d_model` and `nhead`. Its memory is not read; see `DETR`.
        num_classes: number of classes without no-object; LETR's is 1.
        num_queries: the most lines that can be found in one image.
        args: an object with `layer1_num`, the level to read, 0..3.
        aux_loss: return the outputs of the earlier decoder layers too.

    Raises:
        ValueError: the backbone has no such level.
    """

    def __init__(
        self,
        backbone: nn.Module,
        transformer: nn.Module,
        num_classes: int,
        num_queries: int,
        args: Any,
        aux_loss: bool = False,
    ):
        super().__init__()
        self.num_queries = num_queries
        self.transformer = transformer
        hidden_dim = transformer.d_model
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.lines_embed = MLP(hidden_dim, hidden_dim, 4, 3)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.input_proj = nn.Conv2d(_channels(backbone, "layer1_num", args.layer1_num), hidden_dim, kernel_size=1)
        self.backbone = backbone
        self.aux_loss = aux_loss
        self.args = args
        set_skip_padded_queries(transformer, self)

    def forward(
        self,
        samples: NestedTensor | Tensor | Sequence[Tensor],
        postprocessors: Mapping | None = None,
        targets: Sequence[Mapping] | None = None,
        criterion: nn.Module | None = None,
    ) -> dict:
        """Lines of a batch.

        Args:
            samples: as `DETR.forward`.
            postprocessors, targets, criterion: there for the original's signature; not used, as there.

        Returns:
            A dict with
            "pred_logits": [B, num_queries, num_classes + 1], no-object last;
            "pred_lines": [B, num_queries, 4], x1, y1, x2, y2 in 0..1 of each image's own width and height;
            "aux_outputs", with `aux_loss`: a list of dicts with the same two keys, of all decoder layers but the last.

        Raises:
            TypeError, ValueError: samples of another kind, shape or dtype; the message says what came.
        """
        hs = self.decode(*self.backbone(as_nested(samples)))
        return _line_outputs(self, hs)

    def decode(self, features: Sequence[NestedTensor], positions: Sequence[Tensor]) -> Tensor:
        """The decoder's outputs [layers, B, Q, C] from the backbone's levels."""
        level = features[self.args.layer1_num]
        src, mask = level.tensors, mask_for(self.transformer, level)
        position = positions[self.args.layer1_num]
        query_embed = self.query_embed.weight
        return self.transformer(apply_projection(self.input_proj, src), mask, query_embed, position)[0]


class LETRstack(nn.Module):
    """The fine stage on top of a LETR.

    Args:
        letr: the coarse stage. It is run for its decoded queries; its heads are not.
        args: an object with `layer2_num`, the level to read; `second_hidden_dim`, `second_dropout`, `second_nheads`,
            `second_dim_feedforward`, `second_enc_layers`, `second_dec_layers`, `second_pre_norm` of the second
            transformer; `aux_loss`; and `layer1_frozen`: the coarse stage, backbone included, gets no gradients, and
            its batch norms, if they are trainable ones, keep their statistics.

    Raises:
        ValueError: `second_hidden_dim` is not the coarse stage's, or the backbone has no such level.
    """

    def __init__(self, letr: LETR, args: Any):
        super().__init__()
        hidden_dim = letr.transformer.d_model
        if args.second_hidden_dim != hidden_dim:
            raise ValueError(
                f"second_hidden_dim is {args.second_hidden_dim}; expected the coarse stage's {hidden_dim}, whose "
                "queries it reads"
            )
        self.letr = letr
        self.backbone = letr.backbone
        if args.layer1_frozen:
            self.letr.requires_grad_(False)
        channels = _channels(letr.backbone, "layer2_num", args.layer2_num)
        self.input_proj = nn.Conv2d(channels, hidden_dim, kernel_size=1)
        self.transformer = StackTransformer(
            d_model=args.second_hidden_dim,
            dropout=args.second_dropout,
            nhead=args.second_nheads,
            dim_feedforward=args.second_dim_feedforward,
            num_encoder_layers=args.second_enc_layers,
            num_decoder_layers=args.second_dec_layers,
            normalize_before=args.second_pre_norm,
            return_intermediate_dec=True,
        )
        self.class_embed = nn.Linear(hidden_dim, letr.class_embed.out_features)
        self.lines_embed = MLP(hidden_dim, hidden_dim, 4, 3)
        self.aux_loss = args.aux_loss
        self.args = args
        set_skip_padded_queries(self.transformer, self)
        set_skip_padded_queries(letr.transformer, self, letr)
        # They would get no gradients, for which DistributedDataParallel waits.
        letr.class_embed.requires_grad_(False)
        letr.lines_embed.requires_grad_(False)

    def train(self, mode: bool = True) -> "LETRstack":
        """Training or evaluation mode; a frozen coarse stage's batch norms stay in evaluation mode."""
        super().train(mode)
        if self.args.layer1_frozen:
            keep_batch_norm_statistics(self.letr)
        return self

    def forward(
        self,
        samples: NestedTensor | Tensor | Sequence[Tensor],
        postprocessors: Mapping | None = None,
        targets: Sequence[Mapping] | None = None,
        criterion: nn.Module | None = None,
    ) -> tuple[dict, None]:
        """Lines of a batch.

        Args: as `LETR.forward`.

        Returns:
            What `LETR.forward` returns, from the second transformer; and None, the place of the original's indices.
        """
        features, positions = self.backbone(as_nested(samples))
        query_embed = self.letr.decode(features, positions)[-1]
        level = features[self.args.layer2_num]
        src, mask = level.tensors, mask_for(self.transformer, level)
        position = positions[self.args.layer2_num]
        hs = self.transformer(apply_projection(self.input_proj, src), mask, query_embed, position)[0]
        return _line_outputs(self, hs), None


def _line_outputs(model: LETR | LETRstack, hs: Tensor) -> dict:
    """What `LETR.forward` returns, from the decoder's outputs [layers, B, Q, C]."""
    earlier = partial(aux_outputs, name="pred_lines") if model.aux_loss else None
    return head_outputs(hs, model.class_embed, model.lines_embed, "pred_lines", earlier)


def _channels(backbone: nn.Module, name: str, level: int) -> int:
    """Channels of one of a backbone's levels; `name` is what the level is called in an error."""
    channels = getattr(backbone[0] if isinstance(backbone, Joiner) else backbone, "num_channels_per_level", _CHANNELS)
    if level not in range(len(channels)):
        raise ValueError(f"{name} is {level}; the backbone returns the levels 0 to {len(channels) - 1}")
    return channels[level]


@torch.no_grad()
def load_first_stage(model: LETRstack, state: Mapping[str, Tensor]) -> None:
    """Starts a fine stage from a trained coarse one: LETR's ``--frozen_weights``.

    The coarse stage gets all of `state`; the second transformer and heads begin as copies of the first ones.

    Args:
        model: whose second stage has the first one's depth and widths.
        state: the state dict of a `LETR`. LETR's early checkpoints call the lines' head bbox_embed.

    Raises:
        ValueError: it does not fit, or the two stages do not fit each other.
    """
    state = {name.replace("bbox_embed.", "lines_embed."): value for name, value in state.items()}
    try:
        model.letr.load_state_dict(state)
        for part in ("transformer", "class_embed", "lines_embed"):
            getattr(model, part).load_state_dict(getattr(model.letr, part).state_dict())
    except RuntimeError as error:
        raise ValueError(f"the first stage's weights do not fit: {error}") from error
