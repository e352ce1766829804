"""Structural average precision of line segments, over one or several processes.

Lines are compared on a grid of 128 x 128 cells, whatever the image's size. Two lines are as far apart as the sum of
the squared distances of their ends, with the ends of one swapped if that is closer. A predicted line is right if the
nearest annotated line is closer than a threshold, 5, 10 or 15, and no better prediction of the image is right by it.

Source: Zhou et al. 2019, "End-to-End Wireframe Parsing" (L-CNN), section 4.4, and mlpc-ucsd/LETR,
evaluation/eval-sAP-wireframe.py and lcnn/metric.py, whose numbers (in percent there) this equals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from detr_fast.distributed import all_gather, is_main_process

if TYPE_CHECKING:
    from pycocotools.coco import COCO

GRID = 128
THRESHOLDS = (5, 10, 15)


class LineEvaluator:
    """Collects predicted lines image by image and compares them with the annotated ones of the images seen.

    Call :meth:`update` for every batch, then :meth:`synchronize_between_processes`, :meth:`accumulate` and
    :meth:`summarize` once each. An image counts as soon as it is seen, also without predictions, and once however often
    it comes.

    Args:
        coco_gt: annotations with "line" [x1, y1, dx, dy] in pixels; images with "width" and "height".

    Attributes:
        stats: after `accumulate` "sAP5", "sAP10", "sAP15", in 0..1, -1 without annotated lines; and "distance", the
            mean distance of an annotated line's ends from those of the prediction matched with it, in cells: each
            image's n lines are matched, one to one and with the smallest sum, with its n best predictions; -1 if
            nothing is matched.
    """

    def __init__(self, coco_gt: COCO):
        self.coco_gt = coco_gt
        self.stats: dict[str, float] = {}
        self._predictions: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._merged: dict[int, tuple[np.ndarray, np.ndarray]] | None = None

    def update(self, predictions: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Add the predictions of some images.

        Args:
            predictions: image id → "scores" [n] and "lines" [n, 4], x1, y1, x2, y2 in pixels of the original image.

        Raises:
            ValueError: if an image id is not in the annotations, shapes do not fit or a value is not finite.
        """
        for image_id, prediction in predictions.items():
            if image_id not in self.coco_gt.imgs:
                raise ValueError(f"image id {image_id!r} is not among the {len(self.coco_gt.imgs)} annotated images")
            scores, lines = (prediction[name].detach().cpu().double().numpy() for name in ("scores", "lines"))
            if scores.ndim != 1 or lines.shape != (len(scores), 4):
                raise ValueError(f"scores must be [n] and lines [n, 4], got shapes {scores.shape} and {lines.shape}")
            if not (np.isfinite(scores).all() and np.isfinite(lines).all()):
                raise ValueError(f"a score or line of image {image_id!r} is not finite")
            self._predictions.setdefault(image_id, (scores, lines))

    def synchronize_between_processes(self) -> None:
        """Bring all processes' predictions together; every process then holds the same.

        Raises:
            ValueError: if no process has seen an image.
        """
        self._merged = {}
        for predictions in all_gather(self._predictions):
            for image_id, prediction in predictions.items():
                self._merged.setdefault(image_id, prediction)
        if not self._merged:
            raise ValueError("there is nothing to evaluate: update() has seen no image")

    def accumulate(self) -> None:
        """Compare and compute `stats`.

        Raises:
            RuntimeError: if :meth:`synchronize_between_processes` has not been called.
        """
        if self._merged is None:
            raise RuntimeError("call synchronize_between_processes() before accumulate()")
        count, scores, distances = 0, [np.empty(0)], []
        hits = {threshold: [np.empty(0, dtype=bool)] for threshold in THRESHOLDS}
        for image_id in sorted(self._merged):
            annotated, (score, predicted) = self._annotated(image_id), self._merged[image_id]
            order = np.argsort(-score, kind="stable")
            predicted = _to_grid(predicted[order], self.coco_gt.imgs[image_id])
            count += len(annotated)
            scores.append(score[order])
            for threshold in THRESHOLDS:
                hits[threshold].append(match_lines(predicted, annotated, threshold))
            distances.extend(_matched_distances(predicted[: len(annotated)], annotated))
        order = np.argsort(-np.concatenate(scores), kind="stable")
        for threshold in THRESHOLDS:
            hit = np.concatenate(hits[threshold])[order]
            self.stats[f"sAP{threshold}"] = average_precision(hit, count) if count else -1.0
        self.stats["distance"] = float(np.mean(distances)) if distances else -1.0

    def summarize(self) -> None:
        """Print `stats`, in the first process only.

        Raises:
            RuntimeError: if :meth:`accumulate` has not been called.
        """
        if not self.stats:
            raise RuntimeError("call accumulate() before summarize()")
        if not is_main_process():
            return
        for threshold in THRESHOLDS:
            print(f" Structural average precision @[ threshold={threshold:2d} ] = {self.stats[f'sAP{threshold}']:.3f}")
        print(f" Mean distance of matched ends, in 1/{GRID} of the image  = {self.stats['distance']:.2f}")

    def log_row(self) -> dict[str, dict[str, float]]:
        """`stats` under "line_eval"."""
        return {"line_eval": self.stats}

    def state(self) -> dict[str, dict[str, float]]:
        """`stats` under "stats"."""
        return {"stats": dict(self.stats)}

    @property
    def img_ids(self) -> list[int]:
        """The images that count, of all processes, after :meth:`synchronize_between_processes`."""
        return sorted(self._merged or {})

    def result_of(self, image_id: int) -> dict[str, Tensor]:
        """An image's predictions, as those of :meth:`update`, after :meth:`synchronize_between_processes`; "labels" are
        0, since lines have one class."""
        scores, lines = (self._merged or {})[image_id]
        labels = torch.zeros(len(scores), dtype=torch.int64)
        return {"scores": torch.from_numpy(scores), "labels": labels, "lines": torch.from_numpy(lines)}

    def count(self, image_id: int, threshold: float, score: float) -> tuple[int, int, int]:
        """How many lines of an image are annotated, predicted with at least this score, and right by a threshold."""
        annotated, (scores, lines) = self._annotated(image_id), (self._merged or {})[image_id]
        order = np.argsort(-scores, kind="stable")
        order = order[scores[order] >= score]
        right = match_lines(_to_grid(lines[order], self.coco_gt.imgs[image_id]), annotated, threshold)
        return len(annotated), len(order), int(right.sum())

    def _annotated(self, image_id: int) -> np.ndarray:
        lines = [entry["line"] for entry in self.coco_gt.imgToAnns.get(image_id, [])]
        lines = np.array(lines, dtype=np.float64).reshape(-1, 4)
        lines[:, 2:] += lines[:, :2]
        return _to_grid(lines, self.coco_gt.imgs[image_id])


def match_lines(predicted: np.ndarray, annotated: np.ndarray, threshold: float) -> np.ndarray:
    """Which predictions of an image are right.

    Args:
        predicted: [n, 4], x1, y1, x2, y2 in cells of the grid, best first.
        annotated: [m, 4], likewise.
        threshold: of the sum of squared distances of the ends.

    Returns:
        [n] bool.
    """
    right = np.zeros(len(predicted), dtype=bool)
    if len(annotated):
        distance = np.minimum(*(square.sum(axis=-1) for square in _squares(predicted, annotated)))
        nearest = distance.argmin(axis=1)
        close = distance.min(axis=1) < threshold
        # Of the close predictions with the same nearest line the first is right.
        right[np.flatnonzero(close)[np.unique(nearest[close], return_index=True)[1]]] = True
    return right


def average_precision(right: np.ndarray, count: int) -> float:
    """Area under the curve of precision over recall, the precision made monotonous.

    Args:
        right: [n] bool, which predictions are right, best first.
        count: number of annotated lines, at least 1.
    """
    found = np.cumsum(right)
    recall = np.concatenate(([0.0], found / count, [1.0]))
    precision = np.concatenate(([0.0], found / np.arange(1, len(right) + 1), [0.0]))
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall) * precision[1:]).sum())


def _to_grid(lines: np.ndarray, image: Mapping) -> np.ndarray:
    return lines * (GRID / np.array([image["width"], image["height"]] * 2))


def _squares(predicted: np.ndarray, annotated: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances [n, m, 2] of the first and of the second ends, as they are and with one line's ends swapped."""
    ends = annotated.reshape(1, -1, 2, 2)
    difference = predicted.reshape(-1, 1, 2, 2) - ends, predicted.reshape(-1, 1, 2, 2) - ends[:, :, ::-1]
    return tuple((d**2).sum(axis=-1) for d in difference)


def _matched_distances(predicted: np.ndarray, annotated: np.ndarray) -> np.ndarray:
    """Mean distance of the two ends of each matched pair."""
    from scipy.optimize import linear_sum_assignment  # half a second

    distance = np.minimum(*(np.sqrt(square).mean(axis=-1) for square in _squares(predicted, annotated)))
    return distance[linear_sum_assignment(distance)]
