"""COCO's numbers and the confusion matrix by hotcoco, which matches and counts in Rust (``pip install hotcoco``).

Its arrays equal pycocotools' bit by bit, but that it counts a match with an annotation whose id is 0, which pycocotools
takes for none. Its threads start with the first evaluation and do not survive a fork: a process that was forked after
it would wait for them for ever.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from detr_fast.evaluation.detections import Detections

if TYPE_CHECKING:
    from pycocotools.coco import COCO

_started_in: int | None = None  # the process that has its threads


def is_usable() -> bool:
    """Whether hotcoco is installed, and its threads were not left behind in the process that forked this one."""
    return importlib.util.find_spec("hotcoco") is not None and _started_in in (None, os.getpid())


def accumulated(coco_gt: COCO, detections: Detections, params: Any) -> dict:
    """What pycocotools' ``COCOeval.eval`` is after ``accumulate``, but for "params" and "date".

    Args:
        coco_gt: the annotations.
        detections: of the images that count and of any categories.
        params: pycocotools' parameters: the IoU type, the images and the categories that count.
    """
    evaluation = _evaluation(coco_gt, detections, params)
    evaluation.evaluate()
    evaluation.accumulate()
    found = evaluation.eval
    arrays = {name: np.asarray(found[name]) for name in ("precision", "recall", "scores")}
    return {**arrays, "counts": list(arrays["precision"].shape)}


def confusion(coco_gt: COCO, detections: Detections, params: Any, *, iou: float) -> np.ndarray:
    """What the objects of each category were taken for.

    Args:
        coco_gt, detections, params: as `accumulated`'s.
        iou: overlap from which a detection belongs to an object, of whatever category.

    Returns:
        [K + 1, K + 1] counts, a row for each category of the objects and a column for each of the detections, in the
        order of `params.catIds`; the last row is false alarms, the last column missed objects.
    """
    matrix = _evaluation(coco_gt, detections, params).confusion_matrix(iou_thr=iou)["matrix"]
    return np.asarray(matrix).astype(np.int64)


def draw_confusion(names: Sequence[str], counts: np.ndarray, path: str | os.PathLike) -> bool:
    """Draws a confusion matrix, as shares of its rows; of more than 30 classes the 25 that are mistaken most.

    Args:
        names: of the K classes.
        counts: [K + 1, K + 1], see `confusion`.
        path: gets the picture.

    Returns:
        False if matplotlib is not installed: nothing is drawn then.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from hotcoco.plot import confusion_matrix
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = min(max(6.0, 0.35 * (len(names) + 1)), 10.0)
    figure = Figure(figsize=(size, size))
    FigureCanvasAgg(figure)  # hotcoco's own would need the backend that the user's settings name

    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # Between dollars matplotlib would read mathematics.
    labels = [name.replace("$", r"\$") for name in names]
    # The font lacks a weight that hotcoco asks for, and some scripts: matplotlib would tell users of both.
    fonts = logging.getLogger("matplotlib.font_manager")
    level = fonts.level
    fonts.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")
            described = {"matrix": counts, "normalized": shares, "cat_names": labels}
            confusion_matrix(described, ax=figure.subplots(), save_path=path)
    finally:
        fonts.setLevel(level)
    return True


def _evaluation(coco_gt: COCO, detections: Detections, params: Any) -> Any:
    global _started_in
    import hotcoco

    if _started_in not in (None, os.getpid()):
        raise RuntimeError(
            "hotcoco has been used before this process was forked, and cannot be used here: start processes by "
            "'spawn', or take another backend"
        )
    _started_in = os.getpid()
    # It takes no negative ids: it gets positions among the evaluated ones.
    image_of = {image_id: n for n, image_id in enumerate(params.imgIds, 1)}
    category_of = {category_id: n for n, category_id in enumerate(params.catIds, 1)}
    has_masks = params.iouType == "segm"

    truth = []
    for entry in coco_gt.dataset["annotations"]:
        if entry["image_id"] in image_of and entry["category_id"] in category_of:
            kept = {"bbox": entry["bbox"], "area": entry["area"], "iscrowd": entry.get("iscrowd", 0)}
            kept |= {"segmentation": _text(coco_gt.annToRLE(entry))} if has_masks else {}
            kept |= {"image_id": image_of[entry["image_id"]], "category_id": category_of[entry["category_id"]]}
            truth.append({**kept, "id": len(truth) + 1})
    annotations = hotcoco.COCO(
        {
            "images": [{**_size(coco_gt.imgs[image_id]), "id": n} for image_id, n in image_of.items()],
            "annotations": truth,
            "categories": [{"id": n, "name": str(n)} for n in category_of.values()],
        }
    )
    known = detections.of_categories(category_of)
    images = np.array([image_of[image_id] for image_id in known.image_ids], dtype=np.int64)[known.images]
    labels, which = np.unique(known.labels, return_inverse=True)
    categories = np.array([category_of[label] for label in labels.tolist()], dtype=np.int64)[which]
    if has_masks:
        found: Any = [
            {"image_id": image, "category_id": category, "segmentation": _text(rle), "score": score}
            for image, category, rle, score in zip(
                images.tolist(), categories.tolist(), known.rles, known.scores.tolist(), strict=True
            )
        ]
    else:
        found = np.column_stack((images, known.boxes, known.scores, categories))
    evaluation = hotcoco.COCOeval(annotations, annotations.load_res(found), params.iouType)
    evaluation.params.img_ids = list(image_of.values())
    evaluation.params.cat_ids = list(category_of.values())
    return evaluation


def _size(image: Mapping) -> dict[str, Any]:
    return {name: image[name] for name in ("width", "height") if name in image} | {"file_name": ""}


def _text(mask: Mapping) -> dict[str, Any]:
    counts = mask["counts"]
    return {"size": list(mask["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
