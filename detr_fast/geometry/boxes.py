"""Box formats, IoU and generalised IoU.

Nothing here reads a value back to the host, so nothing waits for the GPU. In particular boxes are not checked for
x1 >= x0: an inverted box gives meaningless numbers, and ``HungarianMatcher`` refuses inverted targets.

Source: facebookresearch/detr ``util/box_ops.py``; Rezatofighi et al. 2019, "Generalized Intersection over Union".
"""

import torch
from torch import Tensor

from detr_fast.ops._boxes import box_cxcywh_to_xyxy, iou_and_union, paired_generalized_box_iou

__all__ = [
    "box_cxcywh_to_xyxy",
    "box_iou",
    "box_xyxy_to_cxcywh",
    "generalized_box_iou",
    "masks_to_boxes",
    "paired_generalized_box_iou",
]


def box_xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Corners to centre and size.

    Args:
        boxes: [..., 4], x0, y0, x1, y1, in any unit.

    Returns:
        [..., 4], cx, cy, w, h, in the same unit; floating point, also for integer corners.
    """
    x0, y0, x1, y1 = boxes.unbind(-1)
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    return torch.stack((cx, cy, (x1 - x0).to(cx.dtype), (y1 - y0).to(cx.dtype)), dim=-1)


def box_iou(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of every box of one set with every box of the other.

    Args:
        boxes1: [N, 4], x0, y0, x1, y1, float.
        boxes2: [M, 4], the same format, unit and dtype.

    Returns:
        (iou, union), both [N, M]. Two boxes without area have IoU 0, not NaN.
    """
    _check_pairwise(boxes1, boxes2)
    return iou_and_union(boxes1[:, None], boxes2[None])


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised IoU of every box of one set with every box of the other.

    Args:
        boxes1: [N, 4], x0, y0, x1, y1 with x1 >= x0 and y1 >= y0 (not checked), float.
        boxes2: [M, 4], the same format, unit and dtype.

    Returns:
        [N, M], in -1..1. Boxes without area give finite values and finite gradients: a quotient 0 / 0 counts as 0.
    """
    _check_pairwise(boxes1, boxes2)
    return paired_generalized_box_iou(boxes1[:, None], boxes2[None])


def masks_to_boxes(masks: Tensor) -> Tensor:
    """Smallest boxes around masks.

    Args:
        masks: [N, H, W], bool or 0/1 numbers.

    Returns:
        [N, 4] float32, x0, y0, x1, y1 in pixels: the first and last column and row that belong to the mask. An empty
        mask gives (1e8, 1e8, 0, 0), as in the original.
    """
    if masks.dim() != 3:
        raise ValueError(f"masks must be [N, H, W], got shape {tuple(masks.shape)}")
    if masks.numel() == 0:
        return torch.zeros((0, 4), device=masks.device)

    inside = masks.bool()
    corners = []
    for has_pixel in (inside.any(dim=1), inside.any(dim=2)):  # [N, W] columns, [N, H] rows
        position = torch.arange(has_pixel.shape[1], dtype=torch.float32, device=masks.device)
        first = position.expand_as(has_pixel).masked_fill(~has_pixel, 1e8).amin(dim=1)
        last = (position * has_pixel).amax(dim=1)
        corners.append((first, last))
    (x0, x1), (y0, y1) = corners
    return torch.stack((x0, y0, x1, y1), dim=1)


def _check_pairwise(boxes1: Tensor, boxes2: Tensor) -> None:
    for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{name} must be [N, 4], got shape {tuple(boxes.shape)}")
