"""Masks: DETR with a mask head on data in COCO's format.

Source: facebookresearch/detr, models/detr.py and models/segmentation.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from detr_fast.config import Config
from detr_fast.criterion import PostProcessSegm
from detr_fast.errors import UsageError
from detr_fast.evaluation import CocoEvaluator, Evaluator
from detr_fast.models.segmentation import DETRsegm
from detr_fast.models.weights import DETECTOR, load_model
from detr_fast.tasks.base import Result
from detr_fast.tasks.boxes import Boxes
from detr_fast.tasks.registry import register

if TYPE_CHECKING:
    from pycocotools.coco import COCO


class Masks(Boxes):
    """A class, a box and a mask for each object."""

    name = "masks"
    postprocessor_names = ("bbox", "segm")
    with_masks = True
    detector = DETECTOR

    def check(self, config: Config) -> None:
        super().check(config)
        if config.frozen_weights is not None and config.weights:
            raise UsageError("--frozen_weights and --weights both say where the detector comes from; give one of them")

    def build_model(self, config: Config, num_classes: int) -> nn.Module:
        model = super().build_model(config, num_classes)
        return DETRsegm(model, freeze_detr=config.frozen_weights is not None)

    def loss_weights(self, config: Config) -> dict[str, float]:
        masks = {"loss_mask": config.mask_loss_coef, "loss_dice": config.dice_loss_coef}
        return super().loss_weights(config) | masks

    def losses(self, config: Config) -> list[str]:
        return [*super().losses(config), "masks"]

    def postprocessors(self, config: Config, num_classes: int) -> dict[str, nn.Module]:
        return super().postprocessors(config, num_classes) | {"segm": PostProcessSegm()}

    def load_frozen(self, model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
        load_model(model.detr, state, source)

    def evaluator(self, annotations: COCO, dataset: Any, output_dir: str = "", backend: str = "auto") -> Evaluator:
        return CocoEvaluator(annotations, ["segm", "bbox"], backend=backend)

    def postprocess(
        self,
        postprocessors: Mapping[str, nn.Module],
        outputs: Mapping[str, Any],
        orig_sizes: Tensor,
        sizes: Tensor,
        padded_size: Sequence[int],
    ) -> list[Result]:
        results = super().postprocess(postprocessors, outputs, orig_sizes, sizes, padded_size)
        return postprocessors["segm"](results, outputs, orig_sizes, sizes)

    def score(self, stats: Mapping[str, Any]) -> float | None:
        # Of masks: a frozen detector's boxes are always the same.
        return stats["coco_eval_masks"][0] if "coco_eval_masks" in stats else super().score(stats)


register(Masks())
