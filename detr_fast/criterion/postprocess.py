"""From the model's outputs to boxes in pixels.

Source: facebookresearch/detr ``models/detr.py``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from detr_fast.criterion.matcher import as_float, check_predictions
from detr_fast.geometry.boxes import box_cxcywh_to_xyxy


class PostProcess(nn.Module):
    """Scores, labels and boxes in pixels, in the form that the COCO evaluation takes."""

    @torch.no_grad()
    def forward(self, outputs: Mapping[str, Tensor], target_sizes: Tensor) -> list[dict[str, Tensor]]:
        """Take each query's best class other than no-object and scale its box to the image.

        Args:
            outputs: "pred_logits" [B, Q, K], no-object last, and "pred_boxes" [B, Q, 4], cx, cy, w, h in 0..1.
            target_sizes: [B, 2], height and width in pixels: for evaluation those of the original images, for pictures
                of the batch those after augmentation and before padding.

        Returns:
            For each image "scores" [Q] (softmax over all K classes), "labels" [Q] int64 and "boxes" [Q, 4],
            x0, y0, x1, y1 in pixels; float32 (float64 for float64 predictions).

        Raises:
            ValueError: if a key is missing or a shape does not fit, or there is no class besides no-object.
            TypeError: if predictions are not floating point, or the sizes not a tensor.
        """
        check_predictions(outputs)
        scores, labels, scale = best_classes(outputs["pred_logits"], target_sizes)
        boxes = box_cxcywh_to_xyxy(as_float(outputs["pred_boxes"])) * scale[:, None]
        return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes, strict=True)]


def best_classes(logits: Tensor, target_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each query's best class other than no-object, and what scales coordinates in 0..1 to pixels.

    Args:
        logits: [B, Q, K], no-object last.
        target_sizes: [B, 2], height and width in pixels.

    Returns:
        Scores [B, Q] (softmax over all K classes), labels [B, Q] int64, and [B, 4] width, height, width, height.

    Raises:
        ValueError: sizes that are not [B, 2], or no class besides no-object. TypeError: sizes that are not a tensor.
    """
    if not isinstance(target_sizes, Tensor):
        raise TypeError(f"target_sizes must be a tensor [B, 2], got {type(target_sizes).__name__}")
    if target_sizes.shape != (len(logits), 2):
        raise ValueError(f"target_sizes must be [B, 2] = [{len(logits)}, 2], got shape {tuple(target_sizes.shape)}")
    if logits.shape[-1] < 2:
        raise ValueError(f"pred_logits needs a class besides no-object, got {logits.shape[-1]} columns")

    with torch.autocast(logits.device.type, enabled=False):
        scores, labels = as_float(logits).softmax(dim=-1)[..., :-1].max(dim=-1)
    height, width = target_sizes.to(logits.device, non_blocking=True).unbind(dim=1)
    return scores, labels, torch.stack((width, height, width, height), dim=1)
