"""Boxes: DETR on data in COCO's format.

Source: facebookresearch/detr, `build` in models/detr.py and in datasets/coco.py, and engine.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor, nn

from detr_fast.config import Config, default_of
from detr_fast.criterion import HungarianMatcher, PostProcess, SetCriterion
from detr_fast.data.categories import Categories
from detr_fast.data.coco import CocoDetection, read_categories
from detr_fast.data.transforms import Compose, make_coco_transforms
from detr_fast.data.validation import refuse_outside
from detr_fast.errors import UsageError
from detr_fast.evaluation import CocoEvaluator, Evaluator
from detr_fast.evaluation.coco_page import coco_page
from detr_fast.evaluation.report import Page
from detr_fast.models.detr import DETR
from detr_fast.tasks.base import Built, Result, Task
from detr_fast.tasks.parts import build_backbone, build_transformer, criterion_device, with_auxiliary_layers
from detr_fast.tasks.paths import dataset_paths
from detr_fast.tasks.pictures import best_detections, best_masks, draw_detections, run_lengths
from detr_fast.tasks.registry import register

if TYPE_CHECKING:
    from pycocotools.coco import COCO

# The original's numbers of classes; any other data set has 20 there.
_NUM_CLASSES = {"coco": 91, "coco_panoptic": 250}
_NUM_CLASSES_OTHER = 20


class Boxes(Task):
    """A class and a box for each object."""

    name = "boxes"
    dataset_file = "coco"
    with_masks = False
    detector = ""  # stands before the names of the detector's weights

    def handles(self, config: Config) -> bool:
        return super().handles(config) and config.masks == self.with_masks

    def check(self, config: Config) -> None:
        super().check(config)
        for name in ("frozen_weights", "mask_loss_coef", "dice_loss_coef"):
            if not config.masks and getattr(config, name) != default_of(name):
                raise UsageError(f"--{name} is about masks; it needs --masks")

    # The model

    def build(self, config: Config) -> Built:
        if config.frozen_weights is not None and not config.masks:
            raise ValueError("frozen_weights trains the mask head alone; expected masks to be set, too")
        num_classes = config.num_classes
        if num_classes is None:
            num_classes = _NUM_CLASSES.get(config.dataset_file, _NUM_CLASSES_OTHER)
        model = self.build_model(config, num_classes)
        matcher = HungarianMatcher(
            cost_class=config.set_cost_class, cost_bbox=config.set_cost_bbox, cost_giou=config.set_cost_giou
        )
        weights = self.loss_weights(config)
        if config.aux_loss:
            weights = with_auxiliary_layers(weights, config.dec_layers)
        criterion = SetCriterion(
            num_classes, matcher=matcher, weight_dict=weights, eos_coef=config.eos_coef, losses=self.losses(config)
        )
        return model, criterion.to(criterion_device(config)), self.postprocessors(config, num_classes)

    def build_model(self, config: Config, num_classes: int) -> nn.Module:
        """The model, on the CPU."""
        return DETR(
            build_backbone(config),
            build_transformer(config),
            num_classes=num_classes,
            num_queries=config.num_queries,
            aux_loss=config.aux_loss,
        )

    def loss_weights(self, config: Config) -> dict[str, float]:
        """Loss → weight, of the last decoder layer."""
        return {"loss_ce": 1, "loss_bbox": config.bbox_loss_coef, "loss_giou": config.giou_loss_coef}

    def losses(self, config: Config) -> list[str]:
        """Names of the losses, as `SetCriterion` knows them."""
        return ["labels", "boxes", "cardinality"]

    def postprocessors(self, config: Config, num_classes: int) -> dict[str, nn.Module]:
        """By name; those in `postprocessor_names`."""
        return {"bbox": PostProcess()}

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        return {f"{self.detector}class_embed.bias", f"{self.detector}bbox_embed.layers.0.weight"} <= set(state)

    def settings_of(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        num_classes = len(state[f"{self.detector}class_embed.bias"]) - 1
        return {"dataset_file": self.dataset_file, "masks": self.with_masks, "num_classes": num_classes}

    # Data

    def build_dataset(
        self, image_set: str, config: Config, *, categories: Categories | None = None, uint8: bool = False
    ) -> CocoDetection:
        transforms = self.transforms(image_set, config, uint8=uint8)
        images, annotations = dataset_paths(image_set, config)
        if categories is None and not config.coco_path:
            source = config.train_ann or annotations
            categories = Categories.from_coco(read_categories(source), contiguous=True)
        dataset = CocoDetection(
            images,
            annotations,
            transforms,
            config.masks,
            categories=categories,
            tensor_images=uint8 and image_set == "train",
            cache_dir=config.cache_dir,
        )
        if not dataset.ids:
            raise ValueError(f"{annotations}: there are no images")
        if not config.allow_outside:
            refuse_outside(images, dataset.named(), annotations)
        dataset.check_files()
        return dataset

    def bare_categories(self, config: Config) -> Categories | None:
        # Weights of the original: labels are category ids, also with own data.
        return Categories.from_coco(read_categories(config.val_ann)) if config.val_ann else None

    def resize(self, config: Config, *, uint8: bool = False) -> Compose:
        return make_coco_transforms("val", scales=config.image_size, max_size=config.max_size, uint8=uint8)

    def augment(self, config: Config, *, uint8: bool = False) -> Compose:
        return make_coco_transforms("train", scales=config.image_size, max_size=config.max_size, uint8=uint8)

    # Results

    def evaluator(self, annotations: COCO, dataset: Any, output_dir: str = "", backend: str = "auto") -> Evaluator:
        return CocoEvaluator(annotations, ["bbox"], backend=backend)

    def postprocess(
        self,
        postprocessors: Mapping[str, nn.Module],
        outputs: Mapping[str, Any],
        orig_sizes: Tensor,
        sizes: Tensor,
        padded_size: Sequence[int],
    ) -> list[Result]:
        return postprocessors["bbox"](outputs, orig_sizes)

    def score(self, stats: Mapping[str, Any]) -> float | None:
        return stats["coco_eval_bbox"][0] if "coco_eval_bbox" in stats else None

    def describe(self, result: Result, threshold: float) -> list[dict[str, Any]]:
        boxes, labels, scores = best_detections(result, threshold)
        found = [
            {
                "category_id": label,
                "bbox": [round(value, 3) for value in (x0, y0, x1 - x0, y1 - y0)],
                "score": score,
            }
            for (x0, y0, x1, y1), label, score in zip(boxes, labels, scores, strict=True)
        ]
        masks = best_masks(result, len(scores))
        if masks is not None:
            for entry, mask in zip(found, masks, strict=True):
                entry["segmentation"] = run_lengths(mask)
        return found

    def draw(self, image: Image.Image, result: Result, names: Mapping[int, str], threshold: float) -> Image.Image:
        return _draw(image, result, names, threshold)

    def draw_sample(
        self,
        image: Image.Image,
        truth: Sequence[Mapping],
        result: Result,
        names: Mapping[int, str],
        threshold: float,
        coco: COCO,
    ) -> tuple[Image.Image, Image.Image]:
        boxes = [(x, y, x + w, y + h) for x, y, w, h in (entry["bbox"] for entry in truth)]
        masks = [coco.annToMask(entry) for entry in truth] if "masks" in result else None
        left = draw_detections(image, boxes, [entry["category_id"] for entry in truth], names, masks=masks)
        # An untrained model's best three say more than an empty picture.
        return left, _draw(image, result, names, threshold, at_least=3)

    def report(self, evaluator: CocoEvaluator) -> list[str]:
        lines = []
        for iou_type, title in (("bbox", "category"), ("segm", "category (masks)")):
            if iou_type not in evaluator.iou_types:
                continue
            rows = evaluator.per_class(iou_type)
            width = max(len(title), *(len(name) for name in rows))
            lines.append(f"{title:{width}}     AP   AP50")
            lines += [
                f"{name:{width}}  {row['AP']:.3f}  {row['AP50']:.3f}"
                for name, row in rows.items()
                if not math.isnan(row["AP"])
            ]
        return lines

    def page(self, evaluator: CocoEvaluator) -> Page:
        return coco_page(evaluator)

    def results(self, evaluator: CocoEvaluator) -> dict[str, list[dict[str, Any]]]:
        # One file for each IoU type: of entries with a box and a mask pycocotools takes the box's area.
        names = {"bbox": "results.json", "segm": "results_segm.json"}
        return {names[kind]: [_rounded(entry) for entry in evaluator.results(kind)] for kind in evaluator.iou_types}


def _rounded(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry for COCO's server as json takes it, boxes with as many digits as COCO's own annotations."""
    rounded = {**entry, "score": round(entry["score"], 5)}
    if "bbox" in entry:
        rounded["bbox"] = [round(value, 2) for value in entry["bbox"]]
    else:
        mask = entry["segmentation"]
        rounded["segmentation"] = {"size": list(mask["size"]), "counts": mask["counts"].decode("ascii")}
    return rounded


def _draw(image: Image.Image, result: Result, names: Mapping[int, str], threshold: float, at_least: int = 0):
    boxes, labels, scores = best_detections(result, threshold, at_least)
    return draw_detections(image, boxes, labels, names, scores, best_masks(result, len(scores)))


register(Boxes())
