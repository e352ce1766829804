"""COCO's detection and segmentation metrics over one or several processes.

Built on the public interface of pycocotools alone (``COCO``, ``COCO.loadRes``, ``COCOeval``), which faster-coco-eval
has as well: predictions are only collected during the run, as arrays, and evaluated once at its end. Both take
dictionaries, and get a few categories at a time: a category's numbers do not depend on the others, and all of them at
once take many times the memory. faster-coco-eval matches and counts in C++, and pycocotools makes the twelve numbers of
its arrays. Its precision of a single right detection is 1.0, pycocotools' 1 - 2e-16, so that means may differ in the
last digit; and it counts a match with an annotation whose id is 0, which pycocotools takes for none. hotcoco does it in
Rust, see ``rust.py``.

Source: facebookresearch/detr ``datasets/coco_eval.py``, whose numbers this equals.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from detr_fast.data.categories import category_name
from detr_fast.distributed import all_gather, is_main_process
from detr_fast.evaluation import rust
from detr_fast.evaluation.detections import Detections

if TYPE_CHECKING:
    from pycocotools.coco import COCO

IOU_TYPES = ("bbox", "segm")
BACKENDS = ("auto", "pycocotools", "faster_coco_eval", "hotcoco")
_TOGETHER = 8  # categories that are evaluated at a time


class CocoEvaluator:
    """Collects predictions image by image and computes COCO's numbers over the images seen.

    Call :meth:`update` for every batch, then :meth:`synchronize_between_processes`, :meth:`accumulate` and
    :meth:`summarize` once each. The numbers are in ``coco_eval[iou_type].stats`` (12 values, see pycocotools) and the
    curves in ``coco_eval[iou_type].eval``.

    An image counts as soon as it is seen, also without predictions, and once however often it comes: its first
    predictions stay, in the order of the ranks (a distributed sampler repeats images to fill the last batch).

    Args:
        coco_gt: the annotations; a copy is kept, because pycocotools writes into them.
        iou_types: any of "bbox" and "segm".
        backend: who computes the numbers: "pycocotools", "faster_coco_eval" or "hotcoco" (both with
            ``pip install detr_fast[eval]``), or "auto": hotcoco or else faster_coco_eval where they are installed,
            but pycocotools where an annotation has the id 0.

    Raises:
        TypeError: if ``iou_types`` is not a list or tuple.
        ValueError: if an IoU type or backend is unknown.
        ImportError: if the backend is not installed, or pycocotools, which both need.
    """

    def __init__(self, coco_gt: COCO, iou_types: Sequence[str], *, backend: str = "auto"):
        if not isinstance(iou_types, list | tuple):
            raise TypeError(f"iou_types must be a list or tuple of {IOU_TYPES}, got {iou_types!r}")
        unknown = [t for t in iou_types if t not in IOU_TYPES]
        if unknown or not iou_types:
            raise ValueError(f"iou_types must be taken from {IOU_TYPES}, got {list(iou_types)}")
        try:
            from pycocotools.cocoeval import COCOeval
        except ImportError as error:
            raise ImportError("evaluation needs pycocotools (pip install pycocotools)") from error
        self.iou_types = list(iou_types)
        if backend == "auto" and 0 in coco_gt.anns:
            backend = "pycocotools"  # which takes a match with this id for none, as the original does; others do not
        self.backend = resolved_backend(backend)
        self.coco_gt = copy.deepcopy(coco_gt)
        self.coco_eval = {t: COCOeval(self.coco_gt, iouType=t) for t in self.iou_types}
        self._accumulated: dict[str, dict] = {}  # the backend's arrays, by IoU type
        self._known_ids = set(self.coco_gt.getImgIds())
        self._predictions = {}
        self._merged = Detections.of_images({})  # all processes' predictions

    @property
    def img_ids(self) -> list:
        """Ids of the images this process has seen, in the order of their coming."""
        return list(self._predictions)

    def update(self, predictions: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Add the predictions of some images.

        Args:
            predictions: image id → "scores" [n], "labels" [n] (category ids), "boxes" [n, 4] x0, y0, x1, y1 in pixels
                of the original image, and for "segm" "masks" [n, 1, H, W] or [n, H, W] of the original image's size
                (above 0.5 = object). An empty dict, as n = 0, is an image without predictions.

        Raises:
            ValueError: if an image id is not in the annotations, a key is missing, shapes do not fit or a score or
                box is not finite.
        """
        for image_id, prediction in predictions.items():
            if image_id not in self._known_ids:
                raise ValueError(f"image id {image_id!r} is not among the {len(self._known_ids)} annotated images")
            prepared = self._prepare(image_id, prediction)
            self._predictions.setdefault(image_id, prepared)

    def synchronize_between_processes(self) -> None:
        """Bring all processes' predictions together and evaluate them; every process then holds the same result.

        Raises:
            ValueError: if no process has seen an image.
        """
        self._merged = Detections.merged(all_gather(Detections.of_images(self._predictions)))
        if not self._merged.image_ids:
            raise ValueError("there is nothing to evaluate: update() has seen no image")
        for iou_type, coco_eval in self.coco_eval.items():
            coco_eval.params.imgIds = self._merged.image_ids
            with contextlib.redirect_stdout(io.StringIO()):
                if self.backend == "hotcoco":
                    self._accumulated[iou_type] = rust.accumulated(self.coco_gt, self._merged, coco_eval.params)
                else:
                    evaluate = _by_pycocotools if self.backend == "pycocotools" else _by_faster_coco_eval
                    self._accumulated[iou_type] = _by_groups(evaluate, self.coco_gt, self._merged, coco_eval.params)

    def accumulate(self) -> None:
        """Take over precision and recall, which :meth:`synchronize_between_processes` has computed.

        Raises:
            RuntimeError: if :meth:`synchronize_between_processes` has not been called.
        """
        if not self._accumulated:
            raise RuntimeError("call synchronize_between_processes() before accumulate()")
        for iou_type, coco_eval in self.coco_eval.items():
            coco_eval.eval = self._accumulated[iou_type]

    def summarize(self) -> None:
        """Compute ``stats`` and print COCO's 12 lines for each IoU type (in the first process only).

        Raises:
            RuntimeError: if :meth:`accumulate` has not been called.
        """
        is_main = is_main_process()
        for iou_type, coco_eval in self.coco_eval.items():
            if not coco_eval.eval:
                raise RuntimeError("call accumulate() before summarize()")
            with contextlib.nullcontext() if is_main else contextlib.redirect_stdout(io.StringIO()):
                print(f"IoU metric: {iou_type}")
                coco_eval.summarize()

    def log_row(self) -> dict[str, list[float]]:
        """pycocotools' twelve numbers, "coco_eval_bbox" and, of masks, "coco_eval_masks"."""
        names = {"bbox": "coco_eval_bbox", "segm": "coco_eval_masks"}
        return {name: self.coco_eval[kind].stats.tolist() for kind, name in names.items() if kind in self.coco_eval}

    def state(self) -> dict:
        """pycocotools' arrays of the boxes (of the masks where there are no boxes) as tensors.

        Keys: "precision" [IoU thresholds, recalls, classes, areas, detections], "scores" likewise, "recall" without the
        second axis, "counts", and "stats", the twelve numbers; -1 where there is no object.
        """
        coco_eval = self.coco_eval["bbox" if "bbox" in self.coco_eval else "segm"]
        state = {name: torch.from_numpy(coco_eval.eval[name]) for name in ("precision", "recall", "scores")}
        return {**state, "counts": list(coco_eval.eval["counts"]), "stats": coco_eval.stats.tolist()}

    def per_class(self, iou_type: str = "bbox") -> dict[str, dict[str, float]]:
        """Average precision of each category, after :meth:`accumulate`.

        Args:
            iou_type: one of those given to the constructor.

        Returns:
            category name → {"AP": over IoU 0.50:0.95, "AP50": at IoU 0.50}, both over all areas with 100 detections,
            and NaN for a category without objects in the images seen. A category without a name is called by its id;
            where categories share a name, the id is added to it.

        Raises:
            ValueError: if the IoU type is not evaluated.
            RuntimeError: if :meth:`accumulate` has not been called.
        """
        if iou_type not in self.coco_eval:
            raise ValueError(f"iou_type must be one of {self.iou_types}, got {iou_type!r}")
        coco_eval = self.coco_eval[iou_type]
        if not coco_eval.eval:
            raise RuntimeError("call accumulate() before per_class()")
        params = coco_eval.params
        precision = coco_eval.eval["precision"][..., params.areaRngLbl.index("all"), -1]  # [IoUs, recalls, categories]
        precision = np.where(precision < 0, np.nan, precision)  # -1 stands for a category without objects
        at_50 = int(np.argmin(np.abs(params.iouThrs - 0.5)))

        categories = self.coco_gt.loadCats(params.catIds)
        names = [category_name(category) for category in categories]
        uses = Counter(names)
        table = {}
        for k, (name, category) in enumerate(zip(names, categories, strict=True)):
            name = name if uses[name] == 1 else f"{name} ({category['id']})"
            table[name] = {"AP": float(precision[..., k].mean()), "AP50": float(precision[at_50, :, k].mean())}
        return table

    def results(self, iou_type: str = "bbox", threshold: float = -math.inf) -> list[dict]:
        """All processes' detections in COCO's result format, after :meth:`synchronize_between_processes`.

        Args:
            iou_type: "bbox": entries have a "bbox"; "segm": a "segmentation" (run lengths).
            threshold: lowest score.
        """
        return self.detections(threshold).entries(iou_type)

    def detections(self, threshold: float = -math.inf) -> Detections:
        """As :meth:`results`, in arrays."""
        return self._merged.kept(self._merged.scores >= threshold)

    def result_of(self, image_id: int) -> dict[str, Tensor]:
        """An image's detections as :meth:`update` took them, after :meth:`synchronize_between_processes`."""
        number = self._merged.image_ids.index(image_id)
        end = int(self._merged.counts[: number + 1].sum())
        rows = slice(end - int(self._merged.counts[number]), end)
        boxes = torch.from_numpy(self._merged.boxes[rows]).float()
        result = {
            "scores": torch.from_numpy(self._merged.scores[rows]).float(),
            "labels": torch.from_numpy(self._merged.labels[rows]),
            "boxes": torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), dim=1),
        }
        if "segm" in self.iou_types:
            image = self.coco_gt.imgs[image_id]
            from pycocotools import mask as mask_utils

            masks = [torch.from_numpy(mask_utils.decode(rle)) for rle in self._merged.rles[rows]]
            size = (image["height"], image["width"])
            result["masks"] = torch.stack(masks)[:, None] if masks else torch.zeros((0, 1, *size), dtype=torch.uint8)
        return result

    def _prepare(self, image_id: int, prediction: Mapping[str, Tensor]) -> dict:
        """One image's predictions on the host, compact enough to be sent to other processes."""
        if not prediction:
            none = np.zeros(0)
            return {"scores": none, "labels": none.astype(np.int64), "boxes": none.reshape(0, 4), "rles": []}
        needed = ["scores", "labels", "boxes", *(["masks"] if "segm" in self.iou_types else [])]
        missing = [key for key in needed if key not in prediction]
        if missing:
            raise ValueError(f"predictions of image {image_id!r} lack {missing}, they have {sorted(prediction)}")
        scores, labels, boxes = (prediction[key].detach().cpu() for key in ("scores", "labels", "boxes"))
        if scores.dim() != 1 or labels.shape != scores.shape or boxes.shape != (len(scores), 4):
            raise ValueError(
                f"predictions of image {image_id!r} must have scores [n], labels [n] and boxes [n, 4], got shapes "
                f"{tuple(scores.shape)}, {tuple(labels.shape)} and {tuple(boxes.shape)}"
            )
        if not (torch.isfinite(scores).all() and torch.isfinite(boxes).all()):
            raise ValueError(f"predictions of image {image_id!r} hold NaN or infinity in scores or boxes")
        x0, y0, x1, y1 = boxes.unbind(dim=1)
        return {
            "scores": scores.double().numpy(),
            "labels": labels.numpy(),
            "boxes": torch.stack((x0, y0, x1 - x0, y1 - y0), dim=1).double().numpy(),
            "rles": self._encode(image_id, prediction["masks"], len(scores)) if "segm" in self.iou_types else [],
        }

    def _encode(self, image_id: int, masks: Tensor, count: int) -> list[dict]:
        image = self.coco_gt.imgs[image_id]
        size = (image["height"], image["width"])
        if masks.shape not in ((count, 1, *size), (count, *size)):
            raise ValueError(
                f"masks of image {image_id!r} must be [{count}, 1, {size[0]}, {size[1]}], the size of the original "
                f"image, got shape {tuple(masks.shape)}"
            )
        from pycocotools import mask as mask_utils

        pixels = (masks.detach().reshape(count, *size) > 0.5).to(torch.uint8).cpu().numpy()
        return [mask_utils.encode(np.asfortranarray(mask)) for mask in pixels]


def resolved_backend(backend: str) -> str:
    """The backend that is meant.

    Raises:
        ImportError: it is not installed. ValueError: an unknown one.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    installed = [name for name in ("hotcoco", "faster_coco_eval") if importlib.util.find_spec(name) is not None]
    if backend == "auto":
        return [*(name for name in installed if name != "hotcoco" or rust.is_usable()), "pycocotools"][0]
    if backend not in (*installed, "pycocotools"):
        raise ImportError(f"backend={backend!r}: it is not installed (pip install detr_fast[eval])")
    return backend


def _by_groups(evaluate: Callable, coco_gt: COCO, detections: Detections, params: Any) -> dict:
    """What pycocotools' ``COCOeval.eval`` is after ``accumulate``, made of a few categories at a time.

    Args:
        evaluate: called with the annotations and the detections of some categories (all annotations, for the images
            and categories), and with the parameters for them.
    """
    if not params.useCats:
        return evaluate(coco_gt, coco_gt.dataset["annotations"], detections, params)
    parts = []
    for first in range(0, max(len(params.catIds), 1), _TOGETHER):
        own = copy.copy(params)
        own.catIds = params.catIds[first : first + _TOGETHER]
        wanted = set(own.catIds)
        truth = [entry for entry in coco_gt.dataset["annotations"] if entry["category_id"] in wanted]
        parts.append(evaluate(coco_gt, truth, detections.of_categories(own.catIds), own))
    arrays = {
        name: np.concatenate([part[name] for part in parts], axis=axis)
        for name, axis in (("precision", 2), ("recall", 1), ("scores", 2))
    }
    return {**parts[-1], "params": params, "counts": list(arrays["precision"].shape), **arrays}


def _by_pycocotools(coco_gt: COCO, truth: list[dict], detections: Detections, params: Any) -> dict:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = COCO()
    images, categories = list(coco_gt.imgs.values()), list(coco_gt.cats.values())
    annotations.dataset = {"images": images, "annotations": truth, "categories": categories}
    annotations.createIndex()
    # loadRes cannot take an empty list.
    found = annotations.loadRes(detections.entries(params.iouType)) if len(detections) else COCO()
    evaluation = COCOeval(annotations, found, params.iouType)
    evaluation.params = params
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval


def _by_faster_coco_eval(coco_gt: COCO, truth: list[dict], detections: Detections, params: Any) -> dict:
    from faster_coco_eval import COCO as FasterCOCO
    from faster_coco_eval import COCOeval_faster

    # It takes no negative ids, and fewer forms of masks: it gets positions among the evaluated ids, and compressed RLE.
    image_of = {image_id: n for n, image_id in enumerate(params.imgIds, 1)}
    category_of = {category_id: n for n, category_id in enumerate(params.catIds, 1)}
    has_masks = params.iouType == "segm"

    def renumbered(entry: Mapping) -> dict:
        return {**entry, "image_id": image_of[entry["image_id"]], "category_id": category_of[entry["category_id"]]}

    kept = []
    for n, entry in enumerate(truth, 1):
        if entry["image_id"] in image_of and entry["category_id"] in category_of:
            own = {name: entry[name] for name in ("image_id", "category_id", "bbox", "area")}
            own |= {"id": n, "iscrowd": entry.get("iscrowd", 0)}
            kept.append(renumbered(own | ({"segmentation": coco_gt.annToRLE(entry)} if has_masks else {})))
    annotations = FasterCOCO()
    annotations.dataset = {
        "images": [{**coco_gt.imgs[image_id], "id": n} for image_id, n in image_of.items()],
        "annotations": kept,
        "categories": [{"id": n} for n in category_of.values()],
    }
    annotations.createIndex()
    known = detections.of_categories(category_of)
    found = annotations.loadRes([renumbered(entry) for entry in known.entries(params.iouType)])
    faster = COCOeval_faster(annotations, found, params.iouType)
    faster.params.imgIds = list(image_of.values())
    faster.evaluate()
    faster.accumulate()
    return faster.eval
