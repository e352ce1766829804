"""Panoptic segmentation: things and stuff, a segment for every pixel.

Source: facebookresearch/detr, datasets/coco_panoptic.py and engine.py.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from detr_fast.config import Config
from detr_fast.criterion import PostProcessPanoptic
from detr_fast.data.categories import Categories
from detr_fast.data.coco import CocoDetection
from detr_fast.data.panoptic import CocoPanoptic
from detr_fast.data.validation import refuse_outside
from detr_fast.errors import UsageError
from detr_fast.evaluation import CocoEvaluator, Evaluator, PanopticEvaluator
from detr_fast.evaluation.report import Page, Table
from detr_fast.models.hub import LAST_THING
from detr_fast.tasks.base import Result
from detr_fast.tasks.boxes import Boxes
from detr_fast.tasks.masks import Masks
from detr_fast.tasks.paths import dataset_paths, require
from detr_fast.tasks.registry import register

if TYPE_CHECKING:
    from pycocotools.coco import COCO

# COCO's panoptic ids end at 200; the original's models, and so its checkpoints, have this many classes.
_COCO_CLASSES = 250
_GROUPS = ("All", "Things", "Stuff")


class _PanopticData:
    """Images, and segments of things and stuff."""

    dataset_file = "coco_panoptic"
    own_flags = ("coco_panoptic_path",)
    only_if_asked = True

    def check(self, config: Config) -> None:
        super().check(config)
        if not (config.coco_path and config.coco_panoptic_path):
            raise UsageError(
                "--dataset_file coco_panoptic needs --coco_path (images) and --coco_panoptic_path (segments)"
            )

    def build_dataset(
        self, image_set: str, config: Config, *, categories: Categories | None = None, uint8: bool = False
    ) -> CocoPanoptic:
        """As `Task.build_dataset`; `categories` is not used, the json names things and stuff."""
        transforms = self.transforms(image_set, config, uint8=uint8)
        paths = {"coco_path": config.coco_path, "coco_panoptic_path": config.coco_panoptic_path}
        absent = [name for name, path in paths.items() if not path]
        if absent:
            raise ValueError(f"coco_panoptic data: {' and '.join(absent)} not given")
        root = Path(str(config.coco_panoptic_path))
        images, segments = Path(str(config.coco_path)) / f"{image_set}2017", root / f"panoptic_{image_set}2017"
        annotations = root / "annotations" / f"panoptic_{image_set}2017.json"
        require(image_set, {"image folder": images, "segments": segments}, {"annotation file": annotations})
        dataset = CocoPanoptic(
            images,
            segments,
            annotations,
            transforms,
            config.masks,
            tensor_images=uint8 and image_set == "train",
            cache_dir=config.cache_dir,
        )
        if not config.allow_outside:
            refuse_outside(images, dataset.named(), annotations)
            refuse_outside(segments, dataset.named_segments(), annotations)
        return dataset

    def classes(self, dataset: CocoPanoptic) -> dict[str, Any]:
        found = super().classes(dataset) | {"thing_classes": dataset.thing_classes}
        if LAST_THING < dataset.categories.ids[-1] < _COCO_CLASSES:
            found["num_classes"] = _COCO_CLASSES
        return found

    def annotations(self, dataset: CocoPanoptic, config: Config) -> COCO:
        """Those of boxes and masks: of ``coco_path``'s instances."""
        images, annotations = dataset_paths("val", config)
        return CocoDetection(images, annotations, None, cache_dir=config.cache_dir).coco


class PanopticBoxes(_PanopticData, Boxes):
    """The boxes of things and stuff: what `Panoptic` is without ``--masks``."""

    name = "panoptic boxes"


class Panoptic(_PanopticData, Masks):
    """Things and stuff: a segment for every pixel."""

    name = "panoptic"
    postprocessor_names = ("bbox", "segm", "panoptic")

    def postprocessors(self, config: Config, num_classes: int) -> dict[str, nn.Module]:
        things = range(LAST_THING + 1) if config.thing_classes is None else config.thing_classes
        panoptic = PostProcessPanoptic(_things(things, num_classes))
        return super().postprocessors(config, num_classes) | {"panoptic": panoptic}

    def fit_postprocessors(
        self, postprocessors: Mapping[str, nn.Module], dataset: CocoPanoptic, config: Config
    ) -> None:
        postprocessors["panoptic"].is_thing_map = _things(dataset.thing_classes, config.num_classes)

    def evaluator(self, annotations: COCO, dataset: Any, output_dir: str = "", backend: str = "auto") -> Evaluator:
        while not isinstance(dataset, CocoPanoptic):
            if not hasattr(dataset, "dataset"):
                raise ValueError(f"panoptic pictures are evaluated on a CocoPanoptic, got a {type(dataset).__name__}")
            dataset = dataset.dataset
        folder = Path(output_dir) / "panoptic_eval" if output_dir else None
        return BoxesAndSegments(annotations, dataset, folder, backend=backend)

    def page(self, evaluator: Any) -> Page:
        page = super().page(evaluator)
        return replace(page, tables=[*_panoptic_tables(evaluator), *page.tables])

    def postprocess(
        self,
        postprocessors: Mapping[str, nn.Module],
        outputs: Mapping[str, Any],
        orig_sizes: Tensor,
        sizes: Tensor,
        padded_size: Sequence[int],
    ) -> list[Result]:
        results = super().postprocess(postprocessors, outputs, orig_sizes, sizes, padded_size)
        pictures = postprocessors["panoptic"](outputs, sizes, orig_sizes, padded_size=padded_size)
        return [{**result, "panoptic": picture} for result, picture in zip(results, pictures, strict=True)]


def _things(things: Container[int], num_classes: int) -> dict[int, bool]:
    return {label: label in things for label in range(num_classes)}


class BoxesAndSegments(CocoEvaluator):
    """COCO's metrics of boxes and masks, and the panoptic quality of the pictures under "panoptic" in the results.

    Args:
        annotations: of boxes and masks.
        dataset: the panoptic validation set.
        output_dir: gets the predicted pictures; None: they are not kept.
        backend: as `CocoEvaluator`'s.
    """

    def __init__(self, annotations: COCO, dataset: CocoPanoptic, output_dir: Path | None, *, backend: str = "auto"):
        super().__init__(annotations, ["segm", "bbox"], backend=backend)
        self.panoptic = PanopticEvaluator(dataset.ann_file, dataset.ann_folder, output_dir, annotations=dataset.store)
        self.quality: dict | None = None

    def update(self, predictions: Mapping[int, Mapping[str, Any]]) -> None:
        super().update(predictions)
        self.panoptic.update(
            {**result["panoptic"], "image_id": image_id, "file_name": f"{image_id:012d}.png"}
            for image_id, result in predictions.items()
        )

    def synchronize_between_processes(self) -> None:
        super().synchronize_between_processes()
        self.panoptic.synchronize_between_processes()

    def summarize(self) -> None:
        super().summarize()
        self.quality = self.panoptic.summarize()

    def log_row(self) -> dict[str, Any]:
        """As `CocoEvaluator.log_row`, and, in the first process, "PQ_all", "PQ_th", "PQ_st" (see `pq_compute`)."""
        row = dict(super().log_row())
        if self.quality is not None:
            row.update(PQ_all=self.quality["All"], PQ_th=self.quality["Things"], PQ_st=self.quality["Stuff"])
        return row


def _panoptic_tables(evaluator: BoxesAndSegments) -> list[Table]:
    """Panoptic quality of all, of things and of stuff, and of each class."""
    quality = evaluator.quality or {}
    means = [[name, *(quality[name][key] for key in ("pq", "sq", "rq")), quality[name]["n"]] for name in _GROUPS]
    categories = evaluator.panoptic.categories
    rows = [
        [f"{c.get('name', '')} ({c['id']})", *(quality["per_class"][c["id"]][key] for key in ("pq", "sq", "rq"))]
        for c in categories
    ]
    return [
        Table("panoptic quality", ["", "PQ", "SQ", "RQ", "classes"], means),
        Table("panoptic quality of each class", ["class", "PQ", "SQ", "RQ"], rows),
    ]


register(PanopticBoxes())
register(Panoptic())
