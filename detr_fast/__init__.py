"""DETR, the same model, weights and numbers as the original, on fused Triton ops.

The public names are loaded on first use, so that ``import detr_fast`` stays quick and a part can be used without the
others' dependencies.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "detr_fast.nested_tensor": ["NestedTensor", "nested_tensor_from_tensor_list", "collate_fn"],
    "detr_fast.ops": [
        "attention",
        "attention_dropout_mask",
        "joint_softmax",
        "pad_collate",
        "pad_collate_packed",
        "sine_position",
    ],
    "detr_fast.layers": [
        "MLP",
        "FrozenBatchNorm2d",
        "MultiheadAttention",
        "PositionEmbeddingLearned",
        "PositionEmbeddingSine",
    ],
    "detr_fast.models": [
        "Backbone",
        "Joiner",
        "Transformer",
        "TransformerEncoder",
        "TransformerEncoderLayer",
        "TransformerDecoder",
        "TransformerDecoderLayer",
        "DETR",
        "DETRsegm",
        "detr_resnet50",
        "detr_resnet50_dc5",
        "detr_resnet101",
        "detr_resnet101_dc5",
        "detr_resnet50_panoptic",
        "detr_resnet50_dc5_panoptic",
        "detr_resnet101_panoptic",
    ],
    "detr_fast.criterion": [
        "HungarianMatcher",
        "SetCriterion",
        "PostProcess",
        "PostProcessSegm",
        "PostProcessPanoptic",
    ],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'detr_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(set(globals()) | set(__all__))
