"""The original's entry points for `torch.hub`, with its arguments.

    torch.hub.load("path/to/this/repository", "detr_resnet50", source="local", pretrained=False)

Source: facebookresearch/detr, hubconf.py.
"""

from detr_fast.models.hub import (
    detr_resnet50,
    detr_resnet50_dc5,
    detr_resnet50_dc5_panoptic,
    detr_resnet50_panoptic,
    detr_resnet101,
    detr_resnet101_dc5,
    detr_resnet101_panoptic,
)

__all__ = [
    "detr_resnet101",
    "detr_resnet101_dc5",
    "detr_resnet101_panoptic",
    "detr_resnet50",
    "detr_resnet50_dc5",
    "detr_resnet50_dc5_panoptic",
    "detr_resnet50_panoptic",
]

dependencies = ["torch", "torchvision"]
