"""The training losses of DETR.

Source: Carion et al. 2020, section 3.1; facebookresearch/detr ``models/detr.py`` and ``models/segmentation.py``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.criterion.matcher import (
    HungarianMatcher,
    as_float,
    check_mapping,
    check_predictions,
    check_targets,
    explain_refusal,
)
from detr_fast.criterion.packing import (
    Indices,
    PackedTargets,
    Pairs,
    Targets,
    pack_targets,
    pairs_from_indices,
    sizes_of,
)
from detr_fast.criterion.target_batch import TargetBatch
from detr_fast.distributed import get_world_size
from detr_fast.geometry.boxes import box_cxcywh_to_xyxy, paired_generalized_box_iou
from detr_fast.nested_tensor import nested_tensor_from_tensor_list
from detr_fast.ops._checks import check_numbers, check_tensor, is_integer


class _Layers(NamedTuple):
    """Predictions of L layers, what is matched in them, and what the losses divide by; the last layer comes first.

    A loss takes the layers and returns its values by name: [L], or [1] if only the last layer has them.
    """

    outputs: Mapping[str, Tensor]  # "pred_logits" [L, B, Q, K], "pred_boxes" [L, B, Q, 4], "pred_masks" [1, B, Q, h, w]
    targets: Targets
    packed: PackedTargets
    pairs: Pairs
    failed: Tensor  # [L] bool: layers that could not be matched, whose losses and gradients are to be NaN
    num_boxes: Tensor  # [L] in the predictions' dtype, NaN where failed


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
        ValueError: if a loss is unknown or `num_classes` negative.
        TypeError: if an argument is of another kind.
    """

    # For a criterion of something else than boxes: what is matched, by what, and which methods a subclass may override.
    _geometry = "boxes"
    _own_matcher = HungarianMatcher
    _public_losses = ("get_loss", "loss_labels", "loss_boxes", "loss_cardinality", "loss_masks")

    def __init__(
        self,
        num_classes: int,
        matcher: nn.Module,
        weight_dict: dict[str, float],
        eos_coef: float,
        losses: Sequence[str],
    ):
        super().__init__()
        if not is_integer(num_classes):
            raise TypeError(f"num_classes is {num_classes!r}; expected an integer")
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; expected at least 0")
        if not callable(matcher):
            raise TypeError(f"matcher is a {type(matcher).__name__}; expected a HungarianMatcher or alike")
        if isinstance(losses, str) or not isinstance(losses, Iterable):
            raise TypeError(f"losses is {losses!r}; expected a list of names")
        check_numbers(eos_coef=eos_coef)
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_dict = weight_dict
        self.eos_coef = eos_coef
        self.losses = list(losses)
        for loss in self.losses:
            self._loss_function(loss)
        empty_weight = torch.ones(num_classes + 1)
        empty_weight[-1] = eos_coef
        self.register_buffer("empty_weight", empty_weight)

    def forward(self, outputs: Mapping[str, Tensor | list], targets: Targets) -> dict[str, Tensor]:
        """All losses, in float32 (float64 for float64 predictions), inside autocast too.

        All layers are matched and judged in one pass that never waits for the GPU. What a `HungarianMatcher` refuses
        raises on the CPU; on a GPU that layer's losses are NaN, and calling the matcher itself says why. With another
        matcher, or where a subclass overrides `get_loss` or one of the losses, layers come one by one, and the wait is
        the matcher's.

        Args:
            outputs: "pred_logits" [B, Q, num_classes + 1], no-object last; "pred_boxes" [B, Q, 4], cx, cy, w, h in
                0..1; "pred_masks" [B, Q, h, w] logits, if masks are asked for; "aux_outputs", optional, a list of such
                dicts, one per decoder layer but the last, each of which is matched anew.
            targets: B dicts, each with "labels" [n] integer in 0..num_classes - 1 and "boxes" [n, 4], cx, cy, w, h
                in 0..1, and "masks" [n, H, W] bool, if masks are asked for; n may be 0. Labels and boxes all on the
                predictions' device or all on the CPU, from where they are brought in one copy.

        Returns:
            0-dimensional tensors: "loss_ce", "class_error" (percent), "loss_bbox", "loss_giou", "cardinality_error",
            "loss_mask", "loss_dice" as asked for, and the same names with ``_0``, ``_1``, … for the auxiliary layers,
            which have no class_error and no masks.

        Raises:
            ValueError: if a key is missing, a shape, class number, device or batch size does not fit, or the matcher
                finds a label out of range or a value not finite. A label equal to num_classes is refused for targets
                on the CPU; on a GPU, where asking would wait, it counts as no-object, as in the original.
            TypeError: if an argument is of another kind, predictions are not floating point or labels not integer.
        """
        check_mapping("outputs", outputs)
        earlier = outputs.get("aux_outputs", [])
        if not isinstance(earlier, Sequence):
            raise TypeError(f"outputs['aux_outputs'] is a {type(earlier).__name__}; expected a list of dicts")
        for i, layer in enumerate(earlier):
            check_mapping(f"outputs['aux_outputs'][{i}]", layer)
        layers = [{k: v for k, v in outputs.items() if k != "aux_outputs"}, *earlier]
        for layer in layers:
            self._check(layer, targets)
        if "masks" in self.losses:
            self._check_masks(outputs, targets)
        device = layers[0]["pred_logits"].device
        num_boxes = _average_over_ranks(sum(sizes_of(targets)), device)
        compute = self._all_layers if self._is_all_ours(layers) else self._one_by_one
        with torch.autocast(device.type, enabled=False):
            by_layer = compute(layers, targets, num_boxes)
        losses = dict(by_layer[0])
        for i, values in enumerate(by_layer[1:]):
            losses.update({f"{name}_{i}": value for name, value in values.items()})
        return losses

    def _all_layers(self, layers: list, targets: Targets, num_boxes: Tensor) -> list[dict[str, Tensor]]:
        """The losses of each layer, all layers together."""
        keys = ("pred_logits", f"pred_{self._geometry}")
        outputs = {key: as_float(torch.stack([layer[key] for layer in layers])) for key in keys}
        if "masks" in self.losses:
            outputs["pred_masks"] = as_float(layers[0]["pred_masks"])[None]
        packed = pack_targets(targets, outputs["pred_logits"].device, self._geometry)
        pairs, failed = self.matcher.match_layers(*(outputs[key] for key in keys), packed)
        if failed.device.type == "cpu" and not torch.compiler.is_compiling() and failed.any():
            first = layers[int(failed.nonzero()[0])]
            raise ValueError(f"no matching: {explain_refusal(first, targets, self._geometry)}")

        num_boxes = num_boxes.to(outputs["pred_logits"].dtype).expand(len(layers)).masked_fill(failed, torch.nan)
        everything = _Layers(outputs, targets, packed, pairs, failed, num_boxes)
        functions = self._layer_functions()
        by_layer = [{} for _ in layers]
        for loss in self.losses:
            for name, values in functions[loss](everything).items():
                for i, value in enumerate(values.unbind()):
                    by_layer[i][name] = value
        return by_layer

    def _one_by_one(self, layers: list, targets: Targets, num_boxes: Tensor) -> list[dict[str, Tensor]]:
        """The losses of each layer, from whatever the matcher and `get_loss` are."""
        by_layer = []
        for i, layer in enumerate(layers):
            layer = {key: as_float(value) if _is_float(value) else value for key, value in layer.items()}
            indices = _to_device(self.matcher(layer, targets), layer["pred_logits"].device)
            losses = {}
            for loss in self.losses:
                if loss == "masks" and i > 0:
                    continue
                losses.update(self._judge(loss, layer, targets, indices, num_boxes, is_last=i == 0))
            by_layer.append(losses)
        return by_layer

    def _judge(self, loss, layer, targets, indices, num_boxes, *, is_last: bool) -> dict[str, Tensor]:
        """`get_loss` for one of the layers."""
        options = {"log": False} if loss == "labels" and not is_last else {}
        return self.get_loss(loss, layer, targets, indices, num_boxes, **options)

    def _is_all_ours(self, layers: list) -> bool:
        """True if neither the matcher nor a loss is somebody else's, and all layers are of one shape."""
        ours = next(kind for kind in type(self).__mro__ if "_public_losses" in vars(kind))
        own = all(getattr(type(self), name) is getattr(ours, name) for name in self._public_losses)
        name = f"pred_{self._geometry}"
        shapes = {(layer["pred_logits"].shape, layer["pred_logits"].dtype, layer[name].dtype) for layer in layers}
        return own and type(self.matcher) is self._own_matcher and len(shapes) == 1

    def _layer_functions(self) -> dict[str, Callable[[_Layers], dict[str, Tensor]]]:
        """By the name of a loss what computes it for all layers."""
        return {"labels": self._labels, "boxes": self._boxes, "cardinality": self._cardinality, "masks": self._masks}

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
        losses = self._one_layer(self._labels, outputs, targets, indices, num_boxes)
        return losses if log else {"loss_ce": losses["loss_ce"]}

    @torch.no_grad()
    def loss_cardinality(self, outputs, targets, indices, num_boxes) -> dict[str, Tensor]:
        """Mean absolute error of the number of objects found (arg-max not no-object). For the log: no gradient."""
        return self._one_layer(self._cardinality, outputs, targets, indices, num_boxes)

    def loss_boxes(self, outputs, targets, indices, num_boxes) -> dict[str, Tensor]:
        """L1 of cx, cy, w, h and one minus generalised IoU of the matched pairs, summed and divided by num_boxes."""
        return self._one_layer(self._boxes, outputs, targets, indices, num_boxes)

    def loss_masks(self, outputs, targets, indices, num_boxes) -> dict[str, Tensor]:
        """Focal and dice loss of the matched pairs' masks, at the resolution of the batch's padded target masks."""
        return self._one_layer(self._masks, outputs, targets, indices, num_boxes)

    def _one_layer(self, function, outputs, targets, indices, num_boxes) -> dict[str, Tensor]:
        keys = ("pred_logits", f"pred_{self._geometry}", "pred_masks")
        outputs = {key: outputs[key][None] for key in keys if key in outputs}
        some = next(iter(outputs.values()))  # whichever there is: [1, B, Q, ...]
        packed = pack_targets(targets, some.device, self._geometry)
        pairs = pairs_from_indices(indices, packed, some.shape[2])
        failed = torch.zeros(1, dtype=torch.bool, device=some.device)
        num_boxes = num_boxes.view(1).to(some) if isinstance(num_boxes, Tensor) else some.new_full((1,), num_boxes)
        losses = function(_Layers(outputs, targets, packed, pairs, failed, num_boxes))
        return {name: value[0] for name, value in losses.items()}

    def _labels(self, layers: _Layers) -> dict[str, Tensor]:
        logits = layers.outputs["pred_logits"]
        classes = self._classes(layers)
        weight = self.empty_weight.to(logits.dtype)
        loss = F.cross_entropy(logits.flatten(0, 2), classes.flatten(), weight, reduction="none")
        loss = loss.view_as(classes).sum(dim=1) / weight[classes].sum(dim=1).masked_fill(layers.failed, torch.nan)
        matched = logits[0].flatten(0, 1)[layers.pairs.query[0]]
        return {"loss_ce": loss, "class_error": 100 - accuracy(matched, classes[0][layers.pairs.query[0]])[0][None]}

    def _classes(self, layers: _Layers) -> Tensor:
        """[L, B * Q] int64: the class that each query should have, no-object where it is not matched."""
        logits = layers.outputs["pred_logits"]
        # Not above no-object nor below 0, which would end the CUDA context: the matcher has refused such targets.
        labels = layers.packed.labels.clamp(0, self.num_classes)[layers.pairs.target]  # [L, P]
        classes = logits.new_full((len(logits), logits[0, ..., 0].numel()), self.num_classes, dtype=torch.int64)
        return classes.scatter_(1, layers.pairs.query, labels)

    @torch.no_grad()
    def _cardinality(self, layers: _Layers) -> dict[str, Tensor]:
        logits = layers.outputs["pred_logits"]
        found = (logits.argmax(dim=-1) != logits.shape[-1] - 1).sum(dim=2)  # [L, B]
        return {"cardinality_error": (found - layers.packed.offsets.diff()).abs().float().mean(dim=1)}

    def _boxes(self, layers: _Layers) -> dict[str, Tensor]:
        boxes, targets = self._matched_pairs(layers)
        giou = paired_generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(targets))
        return {
            "loss_bbox": (boxes - targets).abs().sum(dim=(1, 2)) / layers.num_boxes,
            "loss_giou": (1 - giou).sum(dim=1) / layers.num_boxes,
        }

    def _matched_pairs(self, layers: _Layers) -> tuple[Tensor, Tensor]:
        """The four numbers of each pair's prediction and target, [L, P, 4]."""
        predicted = layers.outputs[f"pred_{self._geometry}"].flatten(1, 2)  # [L, B * Q, 4]
        predicted = predicted.gather(1, layers.pairs.query[..., None].expand(-1, -1, 4))
        return predicted, layers.packed.boxes.to(predicted.dtype)[layers.pairs.target]

    def _masks(self, layers: _Layers) -> dict[str, Tensor]:
        packed, query, target = layers.packed, layers.pairs.query[0], layers.pairs.target[0]
        masks = layers.outputs["pred_masks"][0].flatten(0, 1)[query]  # [P, h, w]
        padded, _ = nested_tensor_from_tensor_list([t["masks"] for t in layers.targets]).decompose()
        image = packed.image[target]
        target_masks = padded.to(masks.device, non_blocking=True)[image, target - packed.offsets[image]]
        target_masks = target_masks.to(masks.dtype).flatten(1)

        masks = F.interpolate(masks[:, None], size=padded.shape[-2:], mode="bilinear", align_corners=False)
        masks = masks.flatten(1)
        return {
            "loss_mask": sigmoid_focal_loss(masks, target_masks, layers.num_boxes[:1]),
            "loss_dice": dice_loss(masks, target_masks, layers.num_boxes[:1]),
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
        check_predictions(outputs, self._geometry)
        check_targets(outputs, targets, self._geometry)
        logits = outputs["pred_logits"]
        if logits.shape[-1] != self.num_classes + 1:
            raise ValueError(
                f"pred_logits must have num_classes + 1 = {self.num_classes + 1} columns, got {logits.shape[-1]}"
            )
        if torch.compiler.is_compiling():
            return
        if isinstance(targets, TargetBatch) and targets.has_objects(self._geometry):
            if targets.device.type != "cpu" or not (targets.labels() >= self.num_classes).any():
                return
        if targets[0]["labels"].device.type == "cpu":
            for i, target in enumerate(targets):
                if (target["labels"] >= self.num_classes).any():
                    raise ValueError(
                        f"targets[{i}]['labels'] has {target['labels'].max().item()}, "
                        f"the classes are 0 to {self.num_classes - 1}"
                    )

    def _check_masks(self, outputs: Mapping[str, Tensor], targets: Targets) -> None:
        if "pred_masks" not in outputs:
            raise ValueError(f"outputs lack the key 'pred_masks', they have {sorted(outputs)}")
        check_tensor("pred_masks", outputs["pred_masks"])
        for i, target in enumerate(targets):
            if "masks" not in target:
                raise ValueError(f"targets[{i}] lacks the key 'masks', it has {sorted(target)}")
            check_tensor(f"targets[{i}]['masks']", target["masks"])
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
    if get_world_size() > 1:
        dist.all_reduce(total)
        total = total / get_world_size()
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
