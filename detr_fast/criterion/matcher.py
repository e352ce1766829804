"""Bipartite matching between predictions and targets.

Source: Carion et al. 2020, equation 1; facebookresearch/detr ``models/matcher.py``.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from detr_fast.criterion.packing import Indices, PackedTargets, Pairs, pack_targets, pairs_from_queries
from detr_fast.criterion.target_batch import TargetBatch
from detr_fast.ops._checks import check_numbers, check_tensor
from detr_fast.ops.matching_cost import matching_cost


class HungarianMatcher(nn.Module):
    """Assigns to every target the prediction that makes the total cost smallest, one prediction per target.

    The cost of a pair is ``cost_bbox * L1(cx, cy, w, h) - cost_class * probability(label) - cost_giou * GIoU``.

    Args:
        cost_class: weight of the (negative) softmax probability of the target's class.
        cost_bbox: weight of the L1 distance of the boxes in cx, cy, w, h.
        cost_giou: weight of the (negative) generalised IoU of the boxes.

    Raises:
        ValueError: if all three weights are 0.
        TypeError: if one is not a number.
    """

    geometry = "boxes"  # what is matched: the targets' key; the predictions' is "pred_boxes"

    def __init__(self, cost_class: float = 1, cost_bbox: float = 1, cost_giou: float = 1):
        super().__init__()
        check_numbers(cost_class=cost_class, cost_bbox=cost_bbox, cost_giou=cost_giou)
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
                be 0 and may exceed Q; all on the predictions' device or all on the CPU.

        Returns:
            For each image (prediction indices, target indices): int64 on the CPU, min(Q, n) long, sorted by prediction.

        Raises:
            ValueError: if a key is missing or a shape, batch size or device does not fit; if a label is out of range,
                a target's width or height negative, or a value not finite (says which).
            TypeError: if an argument is of another kind, predictions are not floating point or labels not integer.
        """
        from scipy.optimize import linear_sum_assignment  # half a second

        check_predictions(outputs, self.geometry)
        check_targets(outputs, targets, self.geometry)
        logits, boxes = outputs["pred_logits"], outputs[f"pred_{self.geometry}"]
        packed = pack_targets(targets, logits.device, self.geometry)
        costs = self._costs(logits[None], boxes[None], packed)[0].cpu()  # [targets, Q]
        if costs.isnan().any():
            raise ValueError(f"no matching: {explain_refusal(outputs, targets, self.geometry)}")

        indices = []
        for cost in costs.split(packed.sizes):
            prediction, matched = linear_sum_assignment(cost.T.numpy())
            indices.append((torch.as_tensor(prediction), torch.as_tensor(matched)))
        return indices

    @torch.no_grad()
    def match_layers(self, logits: Tensor, boxes: Tensor, packed: PackedTargets) -> tuple[Pairs, Tensor]:
        """Match all images of several layers at once, without waiting for the GPU.

        Values are not checked. A layer with an image that `forward` would refuse has failed: its pairs mean nothing.

        Args:
            logits: [L, B, Q, K], of which the first dimension is the decoder layer; floating point.
            boxes: [L, B, Q, 4], cx, cy, w, h in 0..1.
            packed: the targets of the B images, on the same device.

        Returns:
            The pairs of each layer, and [L] bool, True = failed.
        """
        costs = self._costs(logits, boxes, packed)
        # Not `detr_fast.ops.assign`, which raises on the CPU: who calls this can say more about what was wrong.
        query, status = torch.ops.detr_fast.assign(costs, packed.offsets, max(packed.sizes))
        return pairs_from_queries(query, packed, logits.shape[2]), (status != 0).any(dim=1)

    def _costs(self, logits: Tensor, boxes: Tensor, packed: PackedTargets) -> Tensor:
        """[L, T, Q]: each target against the predictions of its own image; NaN where they must not be matched."""
        with torch.autocast(logits.device.type, enabled=False):
            return matching_cost(
                logits,
                boxes,
                packed.labels,
                packed.boxes,
                packed.offsets,
                self.cost_class,
                self.cost_bbox,
                self.cost_giou,
            )


def as_float(tensor: Tensor) -> Tensor:
    """At least float32; float64 stays float64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_mapping(name: str, value) -> None:
    """Raise unless it is a dict of tensors, of which only the kind of the dict is looked at."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a dict of tensors")


def check_predictions(outputs: Mapping[str, Tensor], geometry: str = "boxes") -> None:
    """Raise unless "pred_logits" is [B, Q, K] and "pred_boxes" [B, Q, 4], floating point. Reads no values."""
    check_mapping("outputs", outputs)
    name = f"pred_{geometry}"
    for key in ("pred_logits", name):
        if key not in outputs:
            raise ValueError(f"outputs lack the key {key!r}, they have {sorted(outputs)}")
        check_tensor(key, outputs[key])
        if not outputs[key].is_floating_point():
            raise TypeError(f"{key} must be floating point, got {outputs[key].dtype}")
    logits, boxes = outputs["pred_logits"], outputs[name]
    if logits.dim() != 3 or boxes.shape != (*logits.shape[:2], 4):
        raise ValueError(
            f"pred_logits must be [B, Q, K] and {name} [B, Q, 4], "
            f"got shapes {tuple(logits.shape)} and {tuple(boxes.shape)}"
        )
    if logits.device != boxes.device:
        raise ValueError(f"pred_logits and {name} must be on one device, got {logits.device} and {boxes.device}")


def check_targets(
    outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]], geometry: str = "boxes"
) -> None:
    """Raise unless there is one target per image with fitting "labels" [n] and "boxes" [n, 4]. Reads no values."""
    logits = outputs["pred_logits"]
    if isinstance(targets, Mapping | str) or not isinstance(targets, Sequence):
        raise TypeError(f"targets must be a list of dicts, one per image, got {type(targets).__name__}")
    if len(targets) != len(logits) or len(targets) == 0:
        raise ValueError(
            f"targets must hold one dict per image and at least one, got {len(targets)} for a batch of {len(logits)}"
        )
    if isinstance(targets, TargetBatch) and targets.has_objects(geometry):
        if targets.device in (logits.device, torch.device("cpu")):
            return
    for i, target in enumerate(targets):
        check_mapping(f"targets[{i}]", target)
        for key in ("labels", geometry):
            if key not in target:
                raise ValueError(f"targets[{i}] lacks the key {key!r}, it has {sorted(target)}")
            check_tensor(f"targets[{i}][{key!r}]", target[key])
            if target[key].device not in (logits.device, torch.device("cpu")):
                raise ValueError(
                    f"targets[{i}][{key!r}] is on {target[key].device}, the predictions are on {logits.device}"
                )
            if target[key].device != targets[0]["labels"].device:
                raise ValueError(
                    f"all targets must be on one device, got {target[key].device} for targets[{i}][{key!r}] "
                    f"and {targets[0]['labels'].device} for targets[0]['labels']"
                )
        labels, boxes = target["labels"], target[geometry]
        if labels.dim() != 1 or boxes.shape != (len(labels), 4):
            raise ValueError(
                f"targets[{i}] must have labels [n] and {geometry} [n, 4], "
                f"got shapes {tuple(labels.shape)} and {tuple(boxes.shape)}"
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"targets[{i}]['labels'] must be integer, got {labels.dtype}")
        if not boxes.is_floating_point():
            raise TypeError(f"targets[{i}][{geometry!r}] must be floating point, got {boxes.dtype}")


def explain_refusal(
    outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]], geometry: str = "boxes"
) -> str:
    """Why predictions and targets of one layer have costs that are not finite or pairs that must not be matched."""
    num_classes = outputs["pred_logits"].shape[-1]
    for i, target in enumerate(targets):
        wrong = target["labels"][(target["labels"] < 0) | (target["labels"] >= num_classes)]
        if len(wrong):
            return f"targets[{i}]['labels'] has {wrong[0].item()}, the model's classes are 0 to {num_classes - 1}"
        wrong = target[geometry][(target[geometry][:, 2:] < 0).any(dim=1)]
        if geometry == "boxes" and len(wrong):
            return f"targets[{i}]['boxes'] has a negative width or height: cx, cy, w, h = {wrong[0].tolist()}"

    values = {name: outputs[name] for name in ("pred_logits", f"pred_{geometry}")}
    values.update({f"targets[{i}][{geometry!r}]": target[geometry] for i, target in enumerate(targets)})
    counts = {name: int((~torch.isfinite(value)).sum()) for name, value in values.items()}
    found = [f"{name} ({n} of {values[name].numel()} values)" for name, n in counts.items() if n]
    if found:
        return f"NaN or infinity in {', '.join(found)}"
    return (
        "the cost overflows although predictions and targets are finite; their magnitudes or the weights are too large"
    )
