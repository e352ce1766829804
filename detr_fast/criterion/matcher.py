"""Bipartite matching between predictions and targets.

Source: Carion et al. 2020, equation 1; facebookresearch/detr ``models/matcher.py``.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from detr_fast.criterion.boxes import box_cxcywh_to_xyxy, paired_generalized_box_iou

Indices = list[tuple[Tensor, Tensor]]


class HungarianMatcher(nn.Module):
    """Assigns to every target the prediction that makes the total cost smallest, one prediction per target.

    The cost of a pair is ``cost_bbox * L1(cx, cy, w, h) - cost_class * probability(label) - cost_giou * GIoU``.

    Args:
        cost_class: weight of the (negative) softmax probability of the target's class.
        cost_bbox: weight of the L1 distance of the boxes in cx, cy, w, h.
        cost_giou: weight of the (negative) generalised IoU of the boxes.

    Raises:
        ValueError: if all three weights are 0.
    """

    def __init__(self, cost_class: float = 1, cost_bbox: float = 1, cost_giou: float = 1):
        super().__init__()
        if cost_class == 0 and cost_bbox == 0 and cost_giou == 0:
            raise ValueError("at least one of cost_class, cost_bbox and cost_giou must not be 0, all three are")
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou

    def extra_repr(self) -> str:
        return f"cost_class={self.cost_class}, cost_bbox={self.cost_bbox}, cost_giou={self.cost_giou}"

    @torch.no_grad()
    def forward(self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]) -> Indices:
        """Match every image of a batch; costs are computed in float32 (float64 for float64 predictions).

        Only pairs of the same image are computed, and one copy brings all of them to the host.

        Args:
            outputs: "pred_logits" [B, Q, K] (K classes, no-object included) and "pred_boxes" [B, Q, 4],
                cx, cy, w, h in 0..1; floating point.
            targets: B dicts, each with "labels" [n] integer in 0..K-1 and "boxes" [n, 4], cx, cy, w, h in 0..1; n may
                be 0 and may exceed Q; on the predictions' device.

        Returns:
            For each image (prediction indices, target indices): int64 on the CPU, min(Q, n) long, sorted by prediction.

        Raises:
            ValueError: if a key is missing or a shape, batch size or device does not fit; if a label is out of range,
                a target's width or height negative, or a value not finite (says which).
            TypeError: if predictions are not floating point or labels not integer.
        """
        check_predictions(outputs)
        check_targets(outputs, targets)
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        with torch.autocast(logits.device.type, enabled=False):
            costs = self._costs(as_float(logits), as_float(boxes), targets).cpu().numpy()  # [targets, Q]
        if not np.isfinite(costs).all():
            raise ValueError(f"no matching: {_explain_non_finite(outputs, targets)}")

        indices = []
        start = 0
        for target in targets:
            stop = start + len(target["labels"])
            prediction, matched = linear_sum_assignment(costs[start:stop].T)
            indices.append((torch.as_tensor(prediction), torch.as_tensor(matched)))
            start = stop
        return indices

    def _costs(self, logits: Tensor, boxes: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """[all targets of the batch, Q]: each target against the predictions of its own image."""
        sizes = [len(t["labels"]) for t in targets]
        image = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        image = image.to(logits.device, non_blocking=True)
        labels = torch.cat([t["labels"] for t in targets]).long()
        target_boxes = torch.cat([t["boxes"] for t in targets]).to(boxes.dtype)[:, None]  # [T, 1, 4]
        boxes = boxes[image]  # [T, Q, 4]

        # What must not be matched becomes NaN here and an error on the host, after the only copy: an index out of
        # range would end the CUDA context, and asking the device first would wait for it.
        num_classes = logits.shape[-1]
        refused = (labels < 0) | (labels >= num_classes) | (target_boxes[:, 0, 2:] < 0).any(dim=-1)
        labels = labels.clamp(0, num_classes - 1)

        cost_class = -logits.softmax(dim=-1)[image, :, labels]
        cost_bbox = (boxes - target_boxes).abs().sum(dim=-1)
        cost_giou = -paired_generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes))
        cost = self.cost_bbox * cost_bbox + self.cost_class * cost_class + self.cost_giou * cost_giou
        return cost.masked_fill(refused[:, None], float("nan"))


def as_float(tensor: Tensor) -> Tensor:
    """At least float32; float64 stays float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_predictions(outputs: Mapping[str, Tensor]) -> None:
    """Raise unless "pred_logits" is [B, Q, K] and "pred_boxes" [B, Q, 4], floating point. Reads no values."""
    for key in ("pred_logits", "pred_boxes"):
        if key not in outputs:
            raise ValueError(f"outputs lack the key {key!r}, they have {sorted(outputs)}")
        if not outputs[key].is_floating_point():
            raise TypeError(f"{key} must be floating point, got {outputs[key].dtype}")
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    if logits.dim() != 3 or boxes.shape != (*logits.shape[:2], 4):
        raise ValueError(
            "pred_logits must be [B, Q, K] and pred_boxes [B, Q, 4], "
            f"got shapes {tuple(logits.shape)} and {tuple(boxes.shape)}"
        )
    if logits.device != boxes.device:
        raise ValueError(f"pred_logits and pred_boxes must be on one device, got {logits.device} and {boxes.device}")


def check_targets(outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise unless there is one target per image with fitting "labels" [n] and "boxes" [n, 4]. Reads no values."""
    logits = outputs["pred_logits"]
    if isinstance(targets, Mapping) or not isinstance(targets, Sequence):
        raise TypeError(f"targets must be a list of dicts, one per image, got {type(targets).__name__}")
    if len(targets) != len(logits) or len(targets) == 0:
        raise ValueError(
            f"targets must hold one dict per image and at least one, got {len(targets)} for a batch of {len(logits)}"
        )
    for i, target in enumerate(targets):
        for key in ("labels", "boxes"):
            if key not in target:
                raise ValueError(f"targets[{i}] lacks the key {key!r}, it has {sorted(target)}")
            if target[key].device != logits.device:
                raise ValueError(
                    f"targets[{i}][{key!r}] is on {target[key].device}, the predictions are on {logits.device}"
                )
        labels, boxes = target["labels"], target["boxes"]
        if labels.dim() != 1 or boxes.shape != (len(labels), 4):
            raise ValueError(
                f"targets[{i}] must have labels [n] and boxes [n, 4], "
                f"got shapes {tuple(labels.shape)} and {tuple(boxes.shape)}"
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"targets[{i}]['labels'] must be integer, got {labels.dtype}")
        if not boxes.is_floating_point():
            raise TypeError(f"targets[{i}]['boxes'] must be floating point, got {boxes.dtype}")


def _explain_non_finite(outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]) -> str:
    num_classes = outputs["pred_logits"].shape[-1]
    for i, target in enumerate(targets):
        wrong = target["labels"][(target["labels"] < 0) | (target["labels"] >= num_classes)]
        if len(wrong):
            return f"targets[{i}]['labels'] has {wrong[0].item()}, the model's classes are 0 to {num_classes - 1}"
        wrong = target["boxes"][(target["boxes"][:, 2:] < 0).any(dim=1)]
        if len(wrong):
            return f"targets[{i}]['boxes'] has a negative width or height: cx, cy, w, h = {wrong[0].tolist()}"

    values = {"pred_logits": outputs["pred_logits"], "pred_boxes": outputs["pred_boxes"]}
    values.update({f"targets[{i}]['boxes']": target["boxes"] for i, target in enumerate(targets)})
    counts = {name: int((~torch.isfinite(value)).sum()) for name, value in values.items()}
    found = [f"{name} ({n} of {values[name].numel()} values)" for name, n in counts.items() if n]
    if found:
        return f"NaN or infinity in {', '.join(found)}"
    return (
        "the cost overflows although predictions and targets are finite; their magnitudes or the weights are too large"
    )
