"""Matching, losses and post-processing of line segments.

A line is its two end points, x1, y1, x2, y2. Costs and losses are L1 distances of the four numbers: a line whose ends
are swapped is another line. (The data sets put the left end first, of a vertical line the upper one.)

Source: Xu et al. 2021, "Line Segment Detection Using Transformers without Edges"; mlpc-ucsd/LETR, src/models/letr.py
and matcher.py.
"""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.criterion import losses
from detr_fast.criterion.losses import _Layers
from detr_fast.criterion.matcher import HungarianMatcher, as_float, check_predictions
from detr_fast.criterion.packing import Indices, PackedTargets, Targets
from detr_fast.criterion.postprocess import best_classes
from detr_fast.ops._checks import check_numbers

LABEL_LOSSES = ("cross_entropy", "focal_loss")


class HungarianMatcher_Line(HungarianMatcher):
    """Assigns to every line the prediction that makes the total cost smallest, one prediction per line.

    The cost of a pair is ``cost_line * L1(x1, y1, x2, y2) - cost_class * probability(label)``. It is called as
    `HungarianMatcher`, with "pred_lines" [B, Q, 4] and targets' "lines" [n, 4] in the place of boxes.

    Args:
        cost_class: weight of the (negative) softmax probability of the target's class.
        cost_line: weight of the L1 distance of the end points.

    Raises:
        ValueError: if both weights are 0.
        TypeError: if one is not a number.
    """

    geometry = "lines"

    def __init__(self, cost_class: float = 1, cost_line: float = 1):
        nn.Module.__init__(self)
        check_numbers(cost_class=cost_class, cost_line=cost_line)
        if cost_class == 0 and cost_line == 0:
            raise ValueError("cost_class or cost_line must not be 0, both are")
        self.cost_class = cost_class
        self.cost_line = cost_line

    def extra_repr(self) -> str:
        return f"cost_class={self.cost_class}, cost_line={self.cost_line}"

    def _costs(self, logits: Tensor, lines: Tensor, packed: PackedTargets) -> Tensor:
        logits, lines = as_float(logits), as_float(lines)
        num_classes = logits.shape[-1]
        is_known = (packed.labels >= 0) & (packed.labels < num_classes)
        labels = packed.labels.clamp(0, num_classes - 1)
        with torch.autocast(logits.device.type, enabled=False):
            probability = logits.softmax(dim=-1).permute(1, 3, 0, 2)[packed.image, labels].transpose(0, 1)  # [L, T, Q]
        coordinates = lines.movedim(-1, 0)[:, :, packed.image]  # [4, L, T, Q]
        distance = (coordinates - packed.boxes.to(lines.dtype).T[:, None, :, None]).abs().sum(dim=0)
        cost = self.cost_line * distance - self.cost_class * probability
        return torch.where(is_known[:, None] & (cost.abs() < torch.inf), cost, torch.nan)


class SetCriterion(losses.SetCriterion):
    """Matches predicted and annotated lines, then computes the losses of the matched pairs.

    Args:
        num_classes: number of classes without no-object; LETR's is 1, whose label is 0.
        weight_dict: the weight of each loss in the sum to optimise; kept for the training loop.
        eos_coef: weight of the no-object class in the classification loss.
        losses: any of "lines_labels", "lines", "cardinality", and, as LETR's second stage calls the first two,
            "POST_lines_labels", "POST_lines".
        args: optional attributes `label_loss_func`, "cross_entropy" (default) or "focal_loss"; and
            `label_loss_params`, a dict of the focal loss's arguments or its text, such as '{"gamma": 2.0}'.
        matcher: called as ``matcher(outputs, targets)``; see `HungarianMatcher_Line`, which is the default.

    Raises:
        ValueError: an unknown loss, label loss or parameter of it.
    """

    _geometry = "lines"
    _own_matcher = HungarianMatcher_Line
    _public_losses = ("get_loss", "loss_lines_labels", "loss_lines", "loss_cardinality", "label_focal_loss")

    def __init__(
        self,
        num_classes: int,
        weight_dict: dict[str, float],
        eos_coef: float,
        losses: Sequence[str],
        args: Any,
        matcher: nn.Module | None = None,
    ):
        matcher = HungarianMatcher_Line() if matcher is None else matcher
        super().__init__(num_classes, matcher, weight_dict, eos_coef, losses)
        self.args = args
        options = {"label_loss_func": "cross_entropy", "label_loss_params": "{}", **vars(args)}
        self.label_loss_func = options["label_loss_func"]
        if self.label_loss_func not in LABEL_LOSSES:
            raise ValueError(f"label_loss_func is {self.label_loss_func!r}; expected one of {', '.join(LABEL_LOSSES)}")
        self.label_loss_params = parse_label_loss_params(options["label_loss_params"])

    def forward(
        self, outputs: Mapping[str, Tensor | list], targets: Targets, origin_indices: None = None
    ) -> dict[str, Tensor]:
        """All losses, in float32 (float64 for float64 predictions), inside autocast too.

        All layers are matched and judged in one pass that never waits for the GPU; see
        `detr_fast.criterion.SetCriterion.forward` for what is refused and when.

        Args:
            outputs: "pred_logits" [B, Q, num_classes + 1], no-object last; "pred_lines" [B, Q, 4], x1, y1, x2, y2 in
                0..1; "aux_outputs", optional, a list of such dicts, each of which is matched anew.
            targets: B dicts, each with "labels" [n] integer and "lines" [n, 4], x1, y1, x2, y2 in 0..1; n may be 0.
            origin_indices: not used, as in the original, where the matching is always computed here.

        Returns:
            0-dimensional tensors: "loss_ce", "loss_line", "cardinality_error" as asked for, and the same names with
            ``_0``, ``_1``, … for the auxiliary layers.
        """
        return super().forward(outputs, targets)

    def get_loss(
        self, loss: str, outputs: Mapping[str, Tensor], targets: Targets, num_items: Tensor | float, **kwargs
    ) -> dict[str, Tensor]:
        """One of the losses by its name, for one layer and a given matching (``origin_indices``).

        Raises:
            ValueError: if the loss is unknown.
        """
        return self._loss_function(loss)(outputs, targets, num_items, **kwargs)

    def loss_lines_labels(
        self, outputs, targets, num_items, log: bool = False, origin_indices: Indices | None = None
    ) -> dict[str, Tensor]:
        """Cross entropy or focal loss over all queries, unmatched ones being no-object."""
        return self._one_layer(self._line_labels, outputs, targets, self._matched(outputs, targets, origin_indices), 1)

    @torch.no_grad()
    def loss_cardinality(self, outputs, targets, num_items, origin_indices: Indices | None = None) -> dict[str, Tensor]:
        """Mean absolute error of the number of lines found (arg-max not no-object). For the log: no gradient."""
        nothing = torch.empty(0, dtype=torch.int64)
        return self._one_layer(self._cardinality, outputs, targets, [(nothing, nothing)] * len(targets), 1)

    def loss_lines(self, outputs, targets, num_items, origin_indices: Indices | None = None) -> dict[str, Tensor]:
        """L1 distance of the matched pairs' end points, summed and divided by num_items."""
        indices = self._matched(outputs, targets, origin_indices)
        return self._one_layer(self._lines, outputs, targets, indices, num_items)

    def loss_lines_POST(self, outputs, targets, num_items, origin_indices: Indices) -> dict[str, Tensor]:
        """As `loss_lines`, of "POST_pred_lines": [B, Q, 4], or [1, P, 4], the lines of the P matched queries alone."""
        if "POST_pred_lines" not in outputs:
            raise ValueError(f"outputs lack the key 'POST_pred_lines', they have {sorted(outputs)}")
        predicted = outputs["POST_pred_lines"]
        annotated = torch.cat([t["lines"][j] for t, (_, j) in zip(targets, origin_indices, strict=True)])
        # Matched lines are in the order of the queries: if all of one image are matched, the two cases are the same.
        if predicted.shape[:2] == (1, len(annotated)):
            predicted = predicted[0]
        else:
            predicted = torch.cat([lines[i] for lines, (i, _) in zip(predicted, origin_indices, strict=True)])
        return {"loss_line": F.l1_loss(predicted, annotated.to(predicted), reduction="sum") / num_items}

    def label_focal_loss(self, input: Tensor, target: Tensor, weight: Tensor, gamma: float = 2.0) -> Tensor:
        """Focal loss of the classes: the mean of ``weight * -log(p) * (1 - p)**gamma``, p the true class's probability.

        Args:
            input: [B, K, Q], logits.
            target: [B, Q] int64 in 0..K-1.
            weight: [K], of the classes.
            gamma: exponent.

        Returns:
            0-dimensional.
        """
        cross_entropy = F.cross_entropy(input, target, weight, reduction="none")
        truth = input.softmax(dim=1).gather(1, target[:, None])[:, 0]
        return (cross_entropy * (1 - truth) ** gamma).mean()

    def _matched(self, outputs, targets, indices: Indices | None) -> Indices:
        return self.matcher(outputs, targets) if indices is None else indices

    def _judge(self, loss, layer, targets, indices, num_items, *, is_last: bool) -> dict[str, Tensor]:
        return self.get_loss(loss, layer, targets, num_items, origin_indices=indices)

    def _layer_functions(self):
        functions = {"lines_labels": self._line_labels, "lines": self._lines, "cardinality": self._cardinality}
        return {**functions, **{f"POST_{name}": functions[name] for name in ("lines_labels", "lines")}}

    def _loss_function(self, loss: str):
        functions = {
            "POST_lines_labels": self.loss_lines_labels,
            "POST_lines": self.loss_lines,
            "lines_labels": self.loss_lines_labels,
            "cardinality": self.loss_cardinality,
            "lines": self.loss_lines,
        }
        if loss not in functions:
            raise ValueError(f"unknown loss {loss!r}, the losses are {', '.join(map(repr, functions))}")
        return functions[loss]

    def _line_labels(self, layers: _Layers) -> dict[str, Tensor]:
        if self.label_loss_func == "cross_entropy":
            return {"loss_ce": self._labels(layers)["loss_ce"]}
        classes = self._classes(layers)  # [L, B * Q]
        logits = layers.outputs["pred_logits"].flatten(1, 2).transpose(1, 2)  # [L, K, B * Q]
        weight = self.empty_weight.to(logits.dtype)
        values = [
            self.label_focal_loss(x[None], y[None], weight, **self.label_loss_params)
            for x, y in zip(logits, classes, strict=True)
        ]
        # A failed layer's loss and gradients are NaN.
        return {
            "loss_ce": torch.stack(values) / torch.ones_like(layers.num_boxes).masked_fill(layers.failed, torch.nan)
        }

    def _lines(self, layers: _Layers) -> dict[str, Tensor]:
        predicted, annotated = self._matched_pairs(layers)
        return {"loss_line": (predicted - annotated).abs().sum(dim=(1, 2)) / layers.num_boxes}


def parse_label_loss_params(params: str | Mapping[str, float]) -> dict[str, float]:
    """Arguments of the focal loss from a dict or its text.

    Raises:
        ValueError: not a dict, or something else in it than "gamma", a number that is not negative.
    """
    try:
        parsed = ast.literal_eval(params) if isinstance(params, str) else dict(params)
        valid = isinstance(parsed, dict) and not set(parsed) - {"gamma"} and float(parsed.get("gamma", 2)) >= 0
    except (ValueError, TypeError, SyntaxError):
        valid = False
    if not valid:
        raise ValueError(f"label_loss_params is {params!r}; expected '{{}}' or a dict such as '{{\"gamma\": 2.0}}'")
    return parsed


class PostProcess_Line(nn.Module):
    """Scores, labels and lines in pixels."""

    @torch.no_grad()
    def forward(
        self, outputs: Mapping[str, Tensor] | Targets, target_sizes: Tensor, output_type: str = "prediction"
    ) -> list[dict[str, Tensor]]:
        """Take each query's best class other than no-object and scale its line to the image.

        Args:
            outputs: "prediction": "pred_logits" [B, Q, K], no-object last, and "pred_lines" [B, Q, 4], x1, y1, x2, y2
                in 0..1; "prediction_POST": "POST_pred_lines" instead; "ground_truth": B targets with "lines" [n, 4] in
                0..1, "labels" and "image_id".
            target_sizes: [B, 2], height and width in pixels.
            output_type: one of the three.

        Returns:
            For each image "scores" [Q] (softmax over all K classes), "labels" [Q] int64 and "lines" [Q, 4],
            x1, y1, x2, y2 in pixels; of ground truth "labels", "lines" and "image_id".

        Raises:
            ValueError: another output type, a key is missing, or a shape does not fit.
        """
        if output_type == "ground_truth":
            height, width = target_sizes.unbind(dim=1)
            scale = torch.stack((width, height, width, height), dim=1)
            return [
                {"labels": t["labels"], "lines": t["lines"] * s.to(t["lines"].device), "image_id": t["image_id"]}
                for t, s in zip(outputs, scale, strict=True)
            ]
        if output_type == "prediction_POST":
            outputs = {"pred_lines" if key == "POST_pred_lines" else key: outputs[key]
                       for key in ("pred_logits", "POST_pred_lines") if key in outputs}  # fmt: skip
        elif output_type != "prediction":
            raise ValueError(
                f"output_type is {output_type!r}; expected 'prediction', 'prediction_POST' or 'ground_truth'"
            )
        check_predictions(outputs, "lines")
        scores, labels, scale = best_classes(outputs["pred_logits"], target_sizes)
        lines = as_float(outputs["pred_lines"]) * scale[:, None]
        return [{"scores": s, "labels": c, "lines": x} for s, c, x in zip(scores, labels, lines, strict=True)]
