"""COCO's detection and segmentation metrics over one or several processes.

Built on the public interface of pycocotools alone (``COCO``, ``COCO.loadRes``, ``COCOeval``), which faster-coco-eval
has as well: predictions are only collected during the run and evaluated once at its end. faster-coco-eval matches and
counts in C++, and pycocotools makes the twelve numbers of its arrays. Its precision of a single right detection is 1.0,
pycocotools' 1 - 2e-16, so that means may differ in the last digit; and it counts a match with an annotation whose id is
0, which pycocotools takes for none. hotcoco does it in Rust, see ``rust.py``.

Source: facebookresearch/detr ``datasets/coco_eval.py``, whose numbers this equals.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from detr_fast.data.categories import category_name
from detr_fast.distributed import all_gather, is_main_process
from detr_fast.evaluation import rust

if TYPE_CHECKING:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

IOU_TYPES = ("bbox", "segm")
BACKENDS = ("auto", "pycocotools", "faster_coco_eval", "hotcoco")


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
            ``pip install detr_fast[eval]``), or "auto": hotcoco or else faster_coco_eval where they are installed.

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
        self.backend = _resolved(backend)
        self.coco_gt = copy.deepcopy(coco_gt)
        self.coco_eval = {t: COCOeval(self.coco_gt, iouType=t) for t in self.iou_types}
        self._accumulated: dict[str, dict] = {}  # the backend's arrays, by IoU type
        self._known_ids = set(self.coco_gt.getImgIds())
        self._predictions = {}
        self._merged: dict[int, dict] = {}  # all processes' predictions

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
        merged = {}
        for predictions in all_gather(self._predictions):
            for image_id, prediction in predictions.items():
                merged.setdefault(image_id, prediction)
        if not merged:
            raise ValueError("there is nothing to evaluate: update() has seen no image")
        self._merged = merged

        image_ids = sorted(merged)
        for iou_type, coco_eval in self.coco_eval.items():
            results = [r for image_id in image_ids for r in _results(image_id, merged[image_id], iou_type)]
            coco_eval.params.imgIds = image_ids
            with contextlib.redirect_stdout(io.StringIO()):
                if self.backend == "pycocotools":
                    self._accumulated[iou_type] = _by_pycocotools(coco_eval, self.coco_gt, results)
                elif self.backend == "hotcoco":
                    self._accumulated[iou_type] = rust.accumulated(self.coco_gt, results, coco_eval.params)
                else:
                    self._accumulated[iou_type] = _by_faster_coco_eval(coco_eval, self.coco_gt, results)

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
        entries = (entry for i in sorted(self._merged) for entry in _results(i, self._merged[i], iou_type))
        return [entry for entry in entries if entry["score"] >= threshold]

    def result_of(self, image_id: int) -> dict[str, Tensor]:
        """An image's detections as :meth:`update` took them, after :meth:`synchronize_between_processes`."""
        kept = self._merged[image_id]
        boxes = torch.as_tensor(np.asarray(kept["boxes"])).reshape(-1, 4).float()
        result = {
            "scores": torch.as_tensor(np.asarray(kept["scores"])).float(),
            "labels": torch.as_tensor(np.asarray(kept["labels"])).long(),
            "boxes": torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), dim=1),
        }
        if "segm" in self.iou_types:
            image = self.coco_gt.imgs[image_id]
            from pycocotools import mask as mask_utils

            masks = [torch.from_numpy(mask_utils.decode(rle)) for rle in kept["rles"]]
            size = (image["height"], image["width"])
            result["masks"] = torch.stack(masks)[:, None] if masks else torch.zeros((0, 1, *size), dtype=torch.uint8)
        return result

    def _prepare(self, image_id: int, prediction: Mapping[str, Tensor]) -> dict:
        """One image's predictions on the host, compact enough to be sent to other processes."""
        if not prediction:
            return {"scores": [], "labels": [], "boxes": [], "rles": []}
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


def _resolved(backend: str) -> str:
    """The backend that is meant, if it is there."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    installed = [name for name in ("hotcoco", "faster_coco_eval") if importlib.util.find_spec(name) is not None]
    if backend == "auto":
        return [*(name for name in installed if name != "hotcoco" or rust.is_usable()), "pycocotools"][0]
    if backend not in (*installed, "pycocotools"):
        raise ImportError(f"backend={backend!r}: it is not installed (pip install detr_fast[eval])")
    return backend


def _by_pycocotools(coco_eval: COCOeval, coco_gt: COCO, results: list[dict]) -> dict:
    from pycocotools.coco import COCO

    # loadRes cannot take an empty list.
    coco_eval.cocoDt = coco_gt.loadRes(results) if results else COCO()
    coco_eval.evaluate()
    coco_eval.accumulate()
    return coco_eval.eval


def _by_faster_coco_eval(coco_eval: COCOeval, coco_gt: COCO, results: list[dict]) -> dict:
    from faster_coco_eval import COCO as FasterCOCO
    from faster_coco_eval import COCOeval_faster

    # It takes no negative ids, and fewer forms of masks: it gets positions among the evaluated ids, and compressed RLE.
    image_of = {image_id: n for n, image_id in enumerate(coco_eval.params.imgIds, 1)}
    category_of = {category_id: n for n, category_id in enumerate(coco_eval.params.catIds, 1)}
    has_masks = coco_eval.params.iouType == "segm"

    def renumbered(entry: Mapping) -> dict:
        return {**entry, "image_id": image_of[entry["image_id"]], "category_id": category_of[entry["category_id"]]}

    truth = []
    for n, entry in enumerate(coco_gt.dataset["annotations"], 1):
        if entry["image_id"] in image_of and entry["category_id"] in category_of:
            kept = {name: entry[name] for name in ("image_id", "category_id", "bbox", "area")}
            kept |= {"id": n, "iscrowd": entry.get("iscrowd", 0)}
            truth.append(renumbered(kept | ({"segmentation": coco_gt.annToRLE(entry)} if has_masks else {})))
    annotations = FasterCOCO()
    annotations.dataset = {
        "images": [{**coco_gt.imgs[image_id], "id": n} for image_id, n in image_of.items()],
        "annotations": truth,
        "categories": [{"id": n} for n in category_of.values()],
    }
    annotations.createIndex()
    found = annotations.loadRes([renumbered(entry) for entry in results if entry["category_id"] in category_of])
    faster = COCOeval_faster(annotations, found, coco_eval.params.iouType)
    faster.params.imgIds = list(image_of.values())
    faster.evaluate()
    faster.accumulate()
    return faster.eval


def _results(image_id: int, prediction: dict, iou_type: str) -> Iterator[dict]:
    """One image's predictions as COCO's result format has them."""
    key, shapes = ("bbox", prediction["boxes"]) if iou_type == "bbox" else ("segmentation", prediction["rles"])
    for score, label, shape in zip(prediction["scores"], prediction["labels"], shapes, strict=True):
        shape = shape.tolist() if iou_type == "bbox" else dict(shape)
        yield {"image_id": image_id, "category_id": int(label), key: shape, "score": float(score)}
