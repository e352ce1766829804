"""Boxes: what both the ops and the criterion compute. Nothing here waits for the GPU.

Source: facebookresearch/detr ``util/box_ops.py``; Rezatofighi et al. 2019, "Generalized Intersection over Union".
"""

import torch
from torch import Tensor


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Centre and size to corners.

    Args:
        boxes: [..., 4], cx, cy, w, h, in any unit.

    Returns:
        [..., 4], x0, y0, x1, y1, in the same unit and dtype.
    """
    cx, cy, w, h = boxes.unbind(-1)
    half_w, half_h = 0.5 * w, 0.5 * h
    return torch.stack((cx - half_w, cy - half_h, cx + half_w, cy + half_h), dim=-1)


def paired_generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised IoU of boxes that belong together, elementwise with broadcasting.

    Args:
        boxes1: [..., 4], x0, y0, x1, y1 with x1 >= x0 and y1 >= y0 (not checked), float.
        boxes2: [..., 4], broadcastable to ``boxes1``.

    Returns:
        [...], in -1..1: the diagonal of `generalized_box_iou` (`detr_fast.geometry`), without the rest of the matrix.
    """
    iou, union = iou_and_union(boxes1, boxes2)
    top_left = torch.minimum(boxes1[..., :2], boxes2[..., :2])
    bottom_right = torch.maximum(boxes1[..., 2:], boxes2[..., 2:])
    hull = _overlap(top_left, bottom_right)
    return iou - _divide(hull - union, hull)


def iou_and_union(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union and union of boxes x0, y0, x1, y1, elementwise with broadcasting."""
    top_left = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    bottom_right = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    intersection = _overlap(top_left, bottom_right)
    union = _area(boxes1) + _area(boxes2) - intersection
    return _divide(intersection, union), union


def _area(boxes: Tensor) -> Tensor:
    x0, y0, x1, y1 = boxes.unbind(-1)
    return (x1 - x0) * (y1 - y0)


def _overlap(top_left: Tensor, bottom_right: Tensor) -> Tensor:
    # Not Tensor.prod: its backward waits for the GPU.
    width, height = (bottom_right - top_left).clamp(min=0).unbind(-1)
    return width * height


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Quotient where 0 / 0 is 0, also in the gradient."""
    return numerator / torch.where(denominator == 0, 1, denominator)
