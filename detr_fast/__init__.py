"""DETR, the same model, weights and numbers as the original, on fused Triton ops.

The public names are loaded on first use, so that ``import detr_fast`` stays quick and a part can be used without the
others' dependencies. Type checkers read the imports under ``TYPE_CHECKING`` instead; a test keeps the two lists equal.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:  # `import x as x` is what re-exports
    # isort: off
    from detr_fast.criterion import (
        HungarianMatcher as HungarianMatcher,
        PostProcess as PostProcess,
        PostProcessPanoptic as PostProcessPanoptic,
        PostProcessSegm as PostProcessSegm,
        SetCriterion as SetCriterion,
    )
    from detr_fast.inference import (
        Detections as Detections,
        Detector as Detector,
        load as load,
    )
    from detr_fast.integrations.patch import (
        PatchError as PatchError,
        PatchReport as PatchReport,
        patch as patch,
        unpatch as unpatch,
    )
    from detr_fast.layers import (
        MLP as MLP,
        FrozenBatchNorm2d as FrozenBatchNorm2d,
        MultiheadAttention as MultiheadAttention,
        PositionEmbeddingLearned as PositionEmbeddingLearned,
        PositionEmbeddingSine as PositionEmbeddingSine,
    )
    from detr_fast.models import (
        DETR as DETR,
        Backbone as Backbone,
        DETRsegm as DETRsegm,
        Joiner as Joiner,
        Transformer as Transformer,
        TransformerDecoder as TransformerDecoder,
        TransformerDecoderLayer as TransformerDecoderLayer,
        TransformerEncoder as TransformerEncoder,
        TransformerEncoderLayer as TransformerEncoderLayer,
        capture_attention as capture_attention,
        detr_resnet50 as detr_resnet50,
        detr_resnet50_dc5 as detr_resnet50_dc5,
        detr_resnet50_dc5_panoptic as detr_resnet50_dc5_panoptic,
        detr_resnet50_panoptic as detr_resnet50_panoptic,
        detr_resnet101 as detr_resnet101,
        detr_resnet101_dc5 as detr_resnet101_dc5,
        detr_resnet101_panoptic as detr_resnet101_panoptic,
    )
    from detr_fast.nested_tensor import (
        NestedTensor as NestedTensor,
        collate_fn as collate_fn,
        nested_tensor_from_tensor_list as nested_tensor_from_tensor_list,
    )
    from detr_fast.ops import (
        attention as attention,
        attention_dropout_mask as attention_dropout_mask,
        joint_softmax as joint_softmax,
        pad_collate as pad_collate,
        pad_collate_packed as pad_collate_packed,
        sine_position as sine_position,
    )
    # isort: on

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
        "capture_attention",
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
    "detr_fast.inference": ["Detections", "Detector", "load"],
    "detr_fast.integrations.patch": ["PatchError", "PatchReport", "patch", "unpatch"],
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

if not TYPE_CHECKING:
    __all__ = ["__version__", *sorted(_MODULE_OF)]

    def __getattr__(name: str):
        if name not in _MODULE_OF:
            raise AttributeError(f"module 'detr_fast' has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value

    def __dir__():
        return sorted(set(globals()) | set(__all__))
