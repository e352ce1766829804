"""The training losses of DETR.

Source: Carion et al. 2020, section 3.1; facebookresearch/detr ``models/detr.py`` and ``models/segmentation.py``.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.criterion.boxes import box_cxcywh_to_xyxy, paired_generalized_box_iou
from detr_fast.criterion.matcher import Indices, as_float, check_predictions, check_targets
from detr_fast.nested_tensor import nested_tensor_from_tensor_list

Targets = Sequence[Mapping[str, Tensor]]


class SetCriterion(nn.Module):
    """Matches predictions and targets, then computes the losses of the matched pairs.

    Args:
        num_classes: number of classes without no-object; labels are 0..num_classes - 1 (COCO: 91).
        matcher: called as ``matcher(outputs, targets)``, returns for each image (prediction, target) indices.
        weight_dict: the weight of each loss in the sum to optimise. Only kept as an attribute for the training loop:
            the losses are returned unweighted.
        eos_coef: weight of the no-object class in the classification loss.
        losses: which losses to compute, any of "labels", "boxes", "cardinality", "masks".

    Raises:
        ValueError: if a loss is unknown.
    """

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        eos_coef: float,
        losses: Sequence[str],
    ):
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.eos_coef = eos_coef
        self.losses = losses
        for loss in losses:
            self._loss_function(loss)
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = eos_coef
        self.register_buffer("empty_weight", empty_weight)

    def forward(self, outputs: Mapping[str, Tensor | list], targets: Targets) -> dict[str, Tensor]:
        """All losses, in float32 (float64 for float64 predictions), inside autocast too.

        The matcher's copy to the host is the only wait for the GPU, once per layer.

        Args:
            outputs: "pred_logits" [B, Q, num_classes + 1], no-object last; "pred_boxes" [B, Q, 4], cx, cy, w, h in
                0..1; "pred_masks" [B, Q, h, w] logits, if masks are asked for; "aux_outputs", optional, a list of such
                dicts, one per decoder layer but the last, each of which is matched anew.
            targets: B dicts, each with "labels" [n] integer in 0..num_classes - 1 and "boxes" [n, 4], cx, cy, w, h
                in 0..1, and "masks" [n, H, W] bool, if masks are asked for; n may be 0.

        Returns:
            0-dimensional tensors: "loss_ce", "class_error" (percent), "loss_bbox", "loss_giou", "cardinality_error",
            "loss_mask", "loss_dice" as asked for, and the same names with ``_0``, ``_1``, … for the auxiliary layers,
            which have no class_error and no masks.

        Raises:
            ValueError: if a key is missing, a shape, class number, device or batch size does not fit, or the matcher
                finds a label out of range or a value not finite. A label equal to num_classes is refused for targets
                on the CPU; on a GPU, where asking would wait, it counts as no-object, as in the original.
            TypeError: if predictions are not floating point or labels not integer.
        """
        layers = [{k: v for k, v in outputs.items() if k != "aux_outputs"}, *outputs.get("aux_outputs", [])]
        for layer in layers:
            self._check(layer, targets)
        if "masks" in self.losses:
            self._check_masks(outputs, targets)
        device = layers[0]["pred_logits"].device
        num_boxes = _average_over_ranks(sum(len(t["labels"]) for t in targets), device)

        losses = {}
        with torch.autocast(device.type, enabled=False):
            for i, layer in enumerate(layers):
                is_last = i == 0
                layer = {k: as_float(v) if _is_float(v) else v for k, v in layer.items()}
                indices = _to_device(self.matcher(layer, targets), device)
                for loss in self.losses:
                    if loss == "masks" and not is_last:
                        continue
                    options = {"log": False} if loss == "labels" and not is_last else {}
                    values = self.get_loss(loss, layer, targets, indices, num_boxes, **options)
                    losses.update(values if is_last else {f"{k}_{i - 1}": v for k, v in values.items()})
        return losses

    def get_loss(
        self,
        loss: str,
        outputs: Mapping[str, Tensor],
        targets: Targets,
        indices: Indices,
        num_boxes: Tensor | float,
        **kwargs,
    ) -> dict[str, Tensor]:
        """One of the losses by its name, for one layer and a given matching.

        Raises:
            ValueError: if the loss is unknown.
        """
        return self._loss_function(loss)(outputs, targets, indices, num_boxes, **kwargs)

    def loss_labels(self, outputs, targets, indices, num_boxes, log: bool = True) -> dict[str, Tensor]:
        """Cross entropy over all queries, unmatched ones being no-object; the mean is weighted by the class weights.

        With ``log`` also "class_error": the percentage of matched queries with a wrong class, 100 without targets.
        """
        logits = outputs["pred_logits"]
        matched = self._get_src_permutation_idx(indices)
        matched_classes = torch.cat([t["labels"][j] for t, (_, j) in zip(targets, indices, strict=True)]).long()
        classes = torch.full(logits.shape[:2], self.num_classes, dtype=torch.int64, device=logits.device)
        classes[matched] = matched_classes

        # Flattened, because the spatial variant of the loss is not deterministic on CUDA.
        weight = self.empty_weight.to(logits.dtype)
        losses = {"loss_ce": F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weight)}
        if log:
            losses["class_error"] = 100 - accuracy(logits[matched], matched_classes)[0]
        return losses

    @torch.no_grad()
    def loss_cardinality(self, outputs, targets, indices, num_boxes) -> dict[str, Tensor]:
        """Mean absolute error of the number of objects found (arg-max not no-object). For the log: no gradient."""
        logits = outputs["pred_logits"]
        actual = torch.tensor([len(t["labels"]) for t in targets], dtype=torch.float32)
        found = (logits.argmax(dim=-1) != logits.shape[-1] - 1).sum(dim=1).float()
        return {"cardinality_error": F.l1_loss(found, actual.to(logits.device, non_blocking=True))}

    def loss_boxes(self, outputs, targets, indices, num_boxes) -> dict[str, Tensor]:
        """L1 of cx, cy, w, h and one minus generalised IoU of the matched pairs, summed and divided by num_boxes."""
        boxes = outputs["pred_boxes"][self._get_src_permutation_idx(indices)]
        target_boxes = torch.cat([t["boxes"][j] for t, (_, j) in zip(targets, indices, strict=True)]).to(boxes.dtype)
        giou = paired_generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(target_boxes))
        return {
            "loss_bbox": (boxes - target_boxes).abs().sum() / num_boxes,
            "loss_giou": (1 - giou).sum() / num_boxes,
        }

    def loss_masks(self, outputs, targets, indices, num_boxes) -> dict[str, Tensor]:
        """Focal and dice loss of the matched pairs' masks, at the resolution of the batch's padded target masks."""
        masks = outputs["pred_masks"][self._get_src_permutation_idx(indices)]
        padded, _ = nested_tensor_from_tensor_list([t["masks"] for t in targets]).decompose()
        target_masks = padded[self._get_tgt_permutation_idx(indices)].to(masks).flatten(1)

        masks = F.interpolate(masks[:, None], size=padded.shape[-2:], mode="bilinear", align_corners=False)
        masks = masks.flatten(1)
        return {
            "loss_mask": sigmoid_focal_loss(masks, target_masks, num_boxes),
            "loss_dice": dice_loss(masks, target_masks, num_boxes),
        }

    def _loss_function(self, loss: str) -> Callable[..., dict[str, Tensor]]:
        functions = {
            "labels": self.loss_labels,
            "boxes": self.loss_boxes,
            "cardinality": self.loss_cardinality,
            "masks": self.loss_masks,
        }
        if loss not in functions:
            raise ValueError(f"unknown loss {loss!r}, the losses are {', '.join(map(repr, functions))}")
        return functions[loss]

    def _check(self, outputs: Mapping[str, Tensor], targets: Targets) -> None:
        check_predictions(outputs)
        check_targets(outputs, targets)
        logits = outputs["pred_logits"]
        if logits.shape[-1] != self.num_classes + 1:
            raise ValueError(
                f"pred_logits must have num_classes + 1 = {self.num_classes + 1} columns, got {logits.shape[-1]}"
            )
        if logits.device.type == "cpu":
            for i, target in enumerate(targets):
                if (target["labels"] >= self.num_classes).any():
                    raise ValueError(
                        f"targets[{i}]['labels'] has {target['labels'].max().item()}, "
                        f"the classes are 0 to {self.num_classes - 1}"
                    )

    def _check_masks(self, outputs: Mapping[str, Tensor], targets: Targets) -> None:
        if "pred_masks" not in outputs:
            raise ValueError(f"outputs lack the key 'pred_masks', they have {sorted(outputs)}")
        for i, target in enumerate(targets):
            if "masks" not in target:
                raise ValueError(f"targets[{i}] lacks the key 'masks', it has {sorted(target)}")
            shape, count = tuple(target["masks"].shape), len(target["labels"])
            if len(shape) != 3 or shape[0] != count:
                raise ValueError(f"targets[{i}]['masks'] must be [{count}, H, W], got shape {shape}")

    @staticmethod
    def _get_src_permutation_idx(indices: Indices) -> tuple[Tensor, Tensor]:
        """(image, query) of each matched pair."""
        return _image_index([i for i, _ in indices]), torch.cat([i for i, _ in indices])

    @staticmethod
    def _get_tgt_permutation_idx(indices: Indices) -> tuple[Tensor, Tensor]:
        """(image, target) of each matched pair."""
        return _image_index([j for _, j in indices]), torch.cat([j for _, j in indices])


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, num_boxes: Tensor | float, alpha: float = 0.25, gamma: float = 2
) -> Tensor:
    """Focal loss for binary masks: mean over pixels, sum over masks, divided by the number of boxes.

    Args:
        inputs: [N, pixels], logits.
        targets: [N, pixels], 0 or 1 in the inputs' dtype.
        num_boxes: number of boxes to divide by.
        alpha: weight of the positive pixels, 1 - alpha that of the negative ones; negative switches weighting off.
        gamma: exponent of one minus the probability of the truth.

    Returns:
        0-dimensional.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", equation 5.
    """
    probability = inputs.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    truth = probability * targets + (1 - probability) * (1 - targets)
    loss = cross_entropy * (1 - truth) ** gamma
    if alpha >= 0:
        loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
    return loss.mean(dim=1).sum() / num_boxes


def dice_loss(inputs: Tensor, targets: Tensor, num_boxes: Tensor | float) -> Tensor:
    """One minus the dice coefficient with 1 added above and below, summed over masks, divided by the number of boxes.

    Args:
        inputs: [N, pixels], logits.
        targets: [N, pixels], 0 or 1 in the inputs' dtype.
        num_boxes: number of boxes to divide by.

    Returns:
        0-dimensional.
    """
    probability = inputs.sigmoid().flatten(1)
    overlap = 2 * (probability * targets).sum(dim=1)
    size = probability.sum(dim=1) + targets.sum(dim=1)
    return (1 - (overlap + 1) / (size + 1)).sum() / num_boxes


@torch.no_grad()
def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[Tensor]:
    """Percentage of rows whose class is among the k highest scores.

    Args:
        output: [N, K], scores.
        target: [N], integer classes.
        topk: the values of k.

    Returns:
        For each k a 0-dimensional tensor in 0..100; 0 where there are no rows.
    """
    if target.numel() == 0:
        return [torch.zeros([], device=output.device) for _ in topk]
    best = output.topk(max(topk), dim=1).indices  # [N, max(topk)]
    correct = best == target[:, None]
    return [correct[:, :k].float().sum() * (100.0 / len(target)) for k in topk]


def _average_over_ranks(count: int, device: torch.device) -> Tensor:
    """Mean of the ranks' counts, at least 1; 0-dimensional float32 on the device, made without waiting for it."""
    total = torch.full([], float(count), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
        total = total / dist.get_world_size()
    return total.clamp(min=1)


def _to_device(indices: Indices, device: torch.device) -> Indices:
    """All index pairs in one copy that does not wait."""
    sizes = [len(i) for i, _ in indices]
    pairs = torch.stack((torch.cat([i for i, _ in indices]), torch.cat([j for _, j in indices])))
    predictions, matched = pairs.to(device, non_blocking=True)
    return list(zip(predictions.split(sizes), matched.split(sizes), strict=True))


def _image_index(per_image: list[Tensor]) -> Tensor:
    return torch.cat([torch.full_like(index, i) for i, index in enumerate(per_image)])


def _is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
