"""Boxes, bipartite matching, losses and post-processing."""

from detr_fast.criterion.losses import SetCriterion, accuracy, dice_loss, sigmoid_focal_loss
from detr_fast.criterion.matcher import HungarianMatcher
from detr_fast.criterion.postprocess import PostProcess
from detr_fast.criterion.segmentation import PostProcessPanoptic, PostProcessSegm
from detr_fast.geometry.boxes import (
    box_cxcywh_to_xyxy,
    box_iou,
    box_xyxy_to_cxcywh,
    generalized_box_iou,
    masks_to_boxes,
    paired_generalized_box_iou,
)
from detr_fast.geometry.segment_ids import id2rgb, rgb2id

__all__ = [
    "HungarianMatcher",
    "PostProcess",
    "PostProcessPanoptic",
    "PostProcessSegm",
    "SetCriterion",
    "accuracy",
    "box_cxcywh_to_xyxy",
    "box_iou",
    "box_xyxy_to_cxcywh",
    "dice_loss",
    "generalized_box_iou",
    "id2rgb",
    "masks_to_boxes",
    "paired_generalized_box_iou",
    "rgb2id",
    "sigmoid_focal_loss",
]
