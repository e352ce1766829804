"""Layers under the original's names, on top of the fused ops."""

from detr_fast.layers.attention import MultiheadAttention
from detr_fast.layers.mlp import MLP
from detr_fast.layers.norm import BatchNorm2d, FrozenBatchNorm2d
from detr_fast.layers.position import PositionEmbeddingLearned, PositionEmbeddingSine

__all__ = [
    "MLP",
    "BatchNorm2d",
    "FrozenBatchNorm2d",
    "MultiheadAttention",
    "PositionEmbeddingLearned",
    "PositionEmbeddingSine",
]
