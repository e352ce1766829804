"""Detections of many images as arrays: five of them, where COCO's result format has a dictionary for each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Detections:
    """N detections of I images.

    Attributes:
        image_ids: of the images, those without detections included.
        counts: int64 [I], each image's detections, which stand one after another.
        labels: int64 [N], category ids; scores: float64 [N]; boxes: float64 [N, 4] x, y, width, height in pixels.
        rles: N run-length encodings, or none at all.
    """

    image_ids: list
    counts: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    rles: list[dict]

    @classmethod
    def of_images(cls, predictions: Mapping[Any, Mapping[str, Any]]) -> Detections:
        """Of image id → "scores" [n], "labels" [n], "boxes" [n, 4] as arrays, and "rles", a list."""
        parts = list(predictions.values())
        return cls(
            list(predictions),
            np.array([len(part["scores"]) for part in parts], dtype=np.int64),
            np.concatenate([np.zeros(0, dtype=np.int64), *(part["labels"] for part in parts)]).astype(np.int64),
            np.concatenate([np.zeros(0), *(part["scores"] for part in parts)]),
            np.concatenate([np.zeros((0, 4)), *(part["boxes"] for part in parts)]),
            list(chain.from_iterable(part["rles"] for part in parts)),
        )

    @classmethod
    def merged(cls, parts: Sequence[Detections]) -> Detections:
        """All images of several, each once, the ids ascending; the first that has an image counts."""
        spans: dict[Any, tuple[int, int]] = {}
        total = 0
        for part in parts:
            ends = total + np.cumsum(part.counts)
            starts = ends - part.counts
            for image_id, *span in zip(part.image_ids, starts.tolist(), ends.tolist(), strict=True):
                spans.setdefault(image_id, (span[0], span[1]))
            total += int(part.counts.sum())
        image_ids = sorted(spans)
        starts, ends = np.array([spans[i] for i in image_ids], dtype=np.int64).reshape(-1, 2).T
        counts = ends - starts
        rows = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        rles = list(chain.from_iterable(part.rles for part in parts))
        return cls(
            image_ids,
            counts,
            np.concatenate([part.labels for part in parts])[rows],
            np.concatenate([part.scores for part in parts])[rows],
            np.concatenate([part.boxes for part in parts])[rows],
            [rles[row] for row in rows.tolist()] if rles else [],
        )

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def images(self) -> np.ndarray:
        """int64 [N]: which of `image_ids` each belongs to."""
        return np.repeat(np.arange(len(self.image_ids)), self.counts)

    def kept(self, keep: np.ndarray) -> Detections:
        """Those where `keep`, bool [N], is true."""
        counts = np.bincount(self.images[keep], minlength=len(self.image_ids))
        rles = [self.rles[row] for row in np.flatnonzero(keep).tolist()] if self.rles else []
        return Detections(self.image_ids, counts, self.labels[keep], self.scores[keep], self.boxes[keep], rles)

    def of_categories(self, category_ids: Iterable[int]) -> Detections:
        """Those of some categories."""
        return self.kept(np.isin(self.labels, list(category_ids)))

    def entries(self, iou_type: str) -> list[dict]:
        """In COCO's result format: "bbox" entries have a "bbox", "segm" entries a "segmentation"."""
        key, shapes = ("bbox", self.boxes.tolist()) if iou_type == "bbox" else ("segmentation", map(dict, self.rles))
        columns = zip(self.images.tolist(), self.labels.tolist(), self.scores.tolist(), shapes, strict=True)
        ids = self.image_ids
        return [{"image_id": ids[n], "category_id": label, key: shape, "score": score}
                for n, label, score, shape in columns]  # fmt: skip
