"""The model's parts from a configuration.

Source: facebookresearch/detr, `build_backbone`, `build_transformer` and `build_position_encoding`.
"""

from typing import Any

from torch import nn

from detr_fast.config import Config
from detr_fast.layers import PositionEmbeddingLearned, PositionEmbeddingSine
from detr_fast.models.backbone import Backbone, Joiner
from detr_fast.models.transformer import Transformer


def build_position_encoding(args: Config | Any) -> nn.Module:
    """The embedding `args.position_embedding` ("sine" or "learned") of `args.hidden_dim` features.

    Args:
        args: a `Config`, or an object with some of its attributes (see `Config.of`).
    """
    config = Config.of(args)
    if config.position_embedding == "sine":
        return PositionEmbeddingSine(config.hidden_dim // 2, normalize=True)
    return PositionEmbeddingLearned(config.hidden_dim // 2)


def build_backbone(args: Config | Any, return_interm_layers: bool | None = None) -> Joiner:
    """Backbone and position embedding.

    Args:
        args: a `Config`, or an object with some of its attributes. `lr_backbone` 0 freezes pretrained weights.
        return_interm_layers: return all levels; None: where `args.masks` says so, for the mask head.
    """
    config = Config.of(args)
    backbone = Backbone(
        config.backbone,
        config.lr_backbone > 0,
        config.masks if return_interm_layers is None else return_interm_layers,
        config.dilation,
        weights=None if config.backbone_weights == "none" else config.backbone_weights,
        norm=config.backbone_norm,
        level=config.backbone_level,
    )
    return Joiner(backbone, build_position_encoding(config))


def build_transformer(args: Config | Any, kind: type[Transformer] = Transformer) -> Transformer:
    """The transformer, of the class `kind`.

    Args:
        args: a `Config`, or an object with some of its attributes.
        kind: the class to build.
    """
    config = Config.of(args)
    return kind(
        d_model=config.hidden_dim,
        dropout=config.dropout,
        nhead=config.nheads,
        dim_feedforward=config.dim_feedforward,
        num_encoder_layers=config.enc_layers,
        num_decoder_layers=config.dec_layers,
        normalize_before=config.pre_norm,
        return_intermediate_dec=True,
    )


def with_auxiliary_layers(weights: dict[str, float], num_layers: int) -> dict[str, float]:
    """The losses' weights, and the same for each of the decoder's earlier layers under the names ``loss_…_0``, ….

    Args:
        weights: loss → weight.
        num_layers: of the decoder.
    """
    return weights | {f"{name}_{i}": weight for i in range(num_layers - 1) for name, weight in weights.items()}


def criterion_device(config: Config) -> str:
    """Where the criterion's buffers go; a device that is not chosen yet is the CPU."""
    return "cpu" if config.device == "auto" else config.device
