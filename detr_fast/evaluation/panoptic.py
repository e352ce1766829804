"""Panoptic quality, as COCO defines it.

A predicted and an annotated segment of one category match if their IoU exceeds 0.5 (so that there is at most one match
for each); unlabelled pixels (void) do not count in the union. Over the matches (TP), the predictions left over (FP) and
the annotations left over (FN) of a category,

    SQ = sum of the matches' IoU / TP      RQ = TP / (TP + FP / 2 + FN / 2)      PQ = SQ * RQ

Crowd segments never match and are no FN. A prediction left over is no FP either if more than half of it lies on void
and on crowd segments of its own category. Categories that occur nowhere stay out of the means.

Source: Kirillov et al. 2019, "Panoptic Segmentation", section 4; the numbers are those of COCO's panopticapi.
"""

import io
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from detr_fast.data.annotations import read_panoptic
from detr_fast.data.images import load_segment_ids
from detr_fast.data.segments import MappedSegments, open_segments
from detr_fast.distributed import all_gather, is_main_process
from detr_fast.geometry.segment_ids import rgb2id

# The id of pixels that belong to no segment.
VOID = 0


@dataclass
class Tally:
    """Counts of one category; they can be added."""

    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __iadd__(self, other: "Tally") -> "Tally":
        self.iou += other.iou
        self.tp += other.tp
        self.fp += other.fp
        self.fn += other.fn
        return self

    @property
    def seen(self) -> bool:
        """Whether the category occurs at all."""
        return self.tp + self.fp + self.fn > 0

    @property
    def sq(self) -> float:
        return self.iou / self.tp if self.tp else 0.0

    @property
    def rq(self) -> float:
        return self.tp / (self.tp + 0.5 * self.fp + 0.5 * self.fn) if self.seen else 0.0

    @property
    def pq(self) -> float:
        return self.sq * self.rq


def count_image(
    truth: np.ndarray,
    truth_segments: Sequence[Mapping],
    prediction: np.ndarray,
    predicted_segments: Sequence[Mapping],
) -> dict[int, Tally]:
    """Matches the segments of one image.

    Args:
        truth, prediction: [H, W] integers, the pixels' segment ids. 0 is void, unless a segment has this id.
        truth_segments: dicts with "id", "category_id" and, optionally, "iscrowd".
        predicted_segments: dicts with "id" and "category_id".

    Returns:
        category id → counts.

    Raises:
        ValueError: pictures of different sizes; a predicted segment without a pixel, or a pixel without a segment.
    """
    if truth.shape != prediction.shape or truth.ndim != 2:
        raise ValueError(f"expected two pictures of one size, got {truth.shape} annotated and {prediction.shape}")
    annotated = {segment["id"]: segment for segment in truth_segments}
    predicted = {segment["id"]: segment["category_id"] for segment in predicted_segments}

    base = int(prediction.max(initial=0)) + 1
    pairs, counts = np.unique(truth.astype(np.int64) * base + prediction, return_counts=True)
    overlap: dict[tuple[int, int], int] = {}
    truth_area, area = defaultdict(int), defaultdict(int)
    for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
        t, p = divmod(pair, base)
        overlap[t, p] = count
        truth_area[t] += count
        area[p] += count
    unknown = [p for p in area if p not in predicted and p != VOID]
    empty = [p for p in predicted if not area[p]]
    if unknown or empty:
        raise ValueError(
            f"the picture has pixels of segment {unknown[0]}, which is not listed"
            if unknown
            else f"segment {empty[0]} is listed, but the picture has no pixel of it"
        )

    tallies: dict[int, Tally] = defaultdict(Tally)
    matched_truth, matched = set(), set()
    for (t, p), count in overlap.items():
        if t not in annotated or p not in predicted:
            continue
        category = predicted[p]
        if annotated[t].get("iscrowd", 0) or annotated[t]["category_id"] != category:
            continue
        void = 0 if VOID in annotated else overlap.get((VOID, p), 0)
        iou = count / (area[p] + truth_area[t] - count - void)
        if iou > 0.5:
            tallies[category] += Tally(iou=iou, tp=1)
            matched_truth.add(t)
            matched.add(p)

    crowds = defaultdict(list)
    for t, segment in annotated.items():
        if segment.get("iscrowd", 0):
            crowds[segment["category_id"]].append(t)
        elif t not in matched_truth:
            tallies[segment["category_id"]] += Tally(fn=1)
    for p, category in predicted.items():
        if p in matched:
            continue
        ignored = [] if VOID in annotated else [VOID]
        outside = sum(overlap.get((t, p), 0) for t in ignored + crowds[category])
        if outside / area[p] <= 0.5:
            tallies[category] += Tally(fp=1)
    return dict(tallies)


def average(tallies: Mapping[int, Tally], categories: Sequence[Mapping]) -> dict:
    """The means over categories.

    Args:
        tallies: category id → counts over all images.
        categories: of the annotations, with "id" and "isthing".

    Returns:
        "All", "Things" and "Stuff", each {"pq", "sq", "rq" in 0..1, "n": number of categories that occur}, with zeros
        where none does; and "per_class": {category id: {"pq", "sq", "rq"}}.
    """
    groups = {
        "All": categories,
        "Things": [c for c in categories if c.get("isthing", 1)],
        "Stuff": [c for c in categories if not c.get("isthing", 1)],
    }
    results = {}
    for name, group in groups.items():
        seen = [t for t in (tallies.get(c["id"], Tally()) for c in group) if t.seen]
        means = {key: sum(getattr(t, key) for t in seen) / max(len(seen), 1) for key in ("pq", "sq", "rq")}
        results[name] = {**means, "n": len(seen)}
    results["per_class"] = {
        c["id"]: {key: getattr(tallies.get(c["id"], Tally()), key) for key in ("pq", "sq", "rq")} for c in categories
    }
    return results


def pq_compute(
    gt_json_file: str | os.PathLike,
    pred_json_file: str | os.PathLike,
    gt_folder: str | os.PathLike | None = None,
    pred_folder: str | os.PathLike | None = None,
) -> dict:
    """Panoptic quality of predictions on disk, over all annotated images.

    Args:
        gt_json_file: COCO panoptic json.
        pred_json_file: json with "annotations": the predictions in the same format.
        gt_folder, pred_folder: folders of the PNG files; None: beside the jsons, named like them without ".json".

    Returns:
        See ``average``.

    Raises:
        FileNotFoundError: a json or PNG does not exist.
        ValueError: an image without a prediction, or a prediction that does not fit its picture or the categories.
    """
    gt_folder = Path(str(gt_json_file).removesuffix(".json")) if gt_folder is None else Path(gt_folder)
    pred_folder = Path(str(pred_json_file).removesuffix(".json")) if pred_folder is None else Path(pred_folder)
    content = read_panoptic(gt_json_file)
    predictions = {p["image_id"]: p for p in json.loads(Path(pred_json_file).read_bytes())["annotations"]}
    tallies: dict[int, Tally] = defaultdict(Tally)
    for annotation in content["annotations"]:
        if annotation["image_id"] not in predictions:
            raise ValueError(f"{pred_json_file} has no prediction for image {annotation['image_id']}")
        prediction = predictions[annotation["image_id"]]
        picture = load_segment_ids(pred_folder / prediction["file_name"])
        for category, tally in _count(annotation, prediction, picture, gt_folder, content["categories"]).items():
            tallies[category] += tally
    return average(tallies, content["categories"])


def _count(annotation: dict, prediction: dict, picture: np.ndarray, folder, categories) -> dict[int, Tally]:
    known = {category["id"] for category in categories}
    unknown = [s["category_id"] for s in prediction["segments_info"] if s["category_id"] not in known]
    where = f"prediction of image {annotation['image_id']}"
    if unknown:
        raise ValueError(f"{where}: category {unknown[0]} is not among the annotations' {len(known)}")
    truth = load_segment_ids(Path(folder) / annotation["file_name"])
    try:
        return count_image(truth, annotation["segments_info"], picture, prediction["segments_info"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


class PanopticEvaluator:
    """Collects panoptic predictions image by image and computes the panoptic quality of the images seen.

    Call :meth:`update` for every batch, then :meth:`synchronize_between_processes` and :meth:`summarize` once each.
    Matching is done in :meth:`update`; what the processes exchange are counts. An image counts once however often it
    comes (a distributed sampler repeats images to fill the last batch).

    Args:
        ann_file: COCO panoptic json.
        ann_folder: folder of its PNG files.
        output_dir: gets the predicted PNG files and ``predictions.json``, in COCO's format; None writes nothing.
        annotations: of ``ann_file``, if it has been read already, such as the ``store`` of a ``CocoPanoptic``.

    Raises:
        FileNotFoundError, ValueError: the annotations, see ``read_panoptic``.
    """

    def __init__(
        self,
        ann_file: str | os.PathLike,
        ann_folder: str | os.PathLike,
        output_dir: str | os.PathLike | None = "panoptic_eval",
        *,
        annotations: MappedSegments | None = None,
    ):
        self.ann_folder = Path(ann_folder)
        self._annotations = open_segments(ann_file) if annotations is None else annotations
        if not self._annotations.has_annotations:
            raise ValueError(f"{ann_file} has no annotations to compare with")
        self.categories = self._annotations.meta["categories"]
        self.output_dir = None if output_dir is None else Path(output_dir)
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        self._index_of = {image_id: index for index, image_id in enumerate(self._annotations.image_ids())}
        self._tallies: dict[int, dict[int, Tally]] = {}
        self.predictions: list[dict] = []

    def update(self, predictions: Iterable[Mapping]) -> None:
        """Adds the predictions of some images.

        Args:
            predictions: what ``PostProcessPanoptic`` returned, each with "image_id" and "file_name" (of the PNG to
                write) added.

        Raises:
            ValueError: an image that is not annotated, a picture of another size than the annotated one, or segments
                that do not fit it.
        """
        for prediction in predictions:
            image_id = prediction["image_id"]
            if image_id not in self._index_of:
                raise ValueError(f"image id {image_id!r} is not among the {len(self._annotations)} annotated images")
            if image_id in self._tallies:
                continue
            with Image.open(io.BytesIO(prediction["png_string"])) as file:
                picture = rgb2id(np.asarray(file.convert("RGB")))
            annotation = self._annotations.annotation(self._index_of[image_id])
            self._tallies[image_id] = _count(annotation, prediction, picture, self.ann_folder, self.categories)
            if self.output_dir is not None:
                (self.output_dir / prediction["file_name"]).write_bytes(prediction["png_string"])
            self.predictions.append({key: value for key, value in prediction.items() if key != "png_string"})

    def synchronize_between_processes(self) -> None:
        """Brings all processes' counts together; every process then holds the same."""
        merged, predictions = {}, []
        for tallies, listed in all_gather((self._tallies, self.predictions)):
            predictions += [p for p in listed if p["image_id"] not in merged]
            merged = {**tallies, **merged}
        self._tallies, self.predictions = merged, predictions

    def summarize(self) -> dict | None:
        """Computes and prints the panoptic quality, and writes ``predictions.json``, in the first process.

        Returns:
            See ``average``; None in other processes.

        Raises:
            ValueError: no image has been seen.
        """
        if not self._tallies:
            raise ValueError("there is nothing to evaluate: update() has seen no image")
        if not is_main_process():
            return None
        if self.output_dir is not None:
            (self.output_dir / "predictions.json").write_text(json.dumps({"annotations": self.predictions}))
        total: dict[int, Tally] = defaultdict(Tally)
        for tallies in self._tallies.values():
            for category, tally in tallies.items():
                total[category] += tally
        results = average(total, self.categories)
        print(f"{'panoptic':8} |    PQ    SQ    RQ  categories")
        for name in ("All", "Things", "Stuff"):
            row = results[name]
            print(f"{name:8} | {100 * row['pq']:5.1f} {100 * row['sq']:5.1f} {100 * row['rq']:5.1f}  {row['n']:10}")
        return results
