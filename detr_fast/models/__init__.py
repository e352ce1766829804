"""DETR and its parts under the original's names."""

from detr_fast import _moved
from detr_fast.models.attention_maps import AttentionMaps, capture_attention
from detr_fast.models.backbone import Backbone, BackboneBase, Joiner
from detr_fast.models.detr import DETR
from detr_fast.models.hub import (
    detr_resnet50,
    detr_resnet50_dc5,
    detr_resnet50_dc5_panoptic,
    detr_resnet50_panoptic,
    detr_resnet101,
    detr_resnet101_dc5,
    detr_resnet101_panoptic,
)
from detr_fast.models.segmentation import DETRsegm, MaskHeadSmallConv, MHAttentionMap
from detr_fast.models.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "AttentionMaps",
    "DETR",
    "DETRsegm",
    "MHAttentionMap",
    "MaskHeadSmallConv",
    "Backbone",
    "BackboneBase",
    "Joiner",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "capture_attention",
    "detr_resnet101",
    "detr_resnet101_dc5",
    "detr_resnet101_panoptic",
    "detr_resnet50",
    "detr_resnet50_dc5",
    "detr_resnet50_dc5_panoptic",
    "detr_resnet50_panoptic",
]

# The original's builders take its argparse namespace.
__getattr__ = _moved.lookup(
    __name__,
    dict.fromkeys(
        ("build_backbone", "build_model", "build_position_encoding", "build_transformer"),
        "detr_fast.integrations.original",
    ),
)
