"""Line segments: LETR.

Source: mlpc-ucsd/LETR, src/models/letr.py and src/engine.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor, nn

from detr_fast.config import Config, default_of
from detr_fast.criterion.lines import HungarianMatcher_Line, PostProcess_Line, SetCriterion
from detr_fast.data.categories import Categories
from detr_fast.data.lines import LINES_MEAN, LINES_STD, LineDetection, make_line_transforms
from detr_fast.data.transforms import Compose
from detr_fast.data.validation import refuse_outside
from detr_fast.errors import UsageError
from detr_fast.evaluation import Evaluator, LineEvaluator
from detr_fast.evaluation.lines_page import lines_page
from detr_fast.evaluation.report import Page
from detr_fast.models.letr import LETR, LETRstack, Transformer, load_first_stage
from detr_fast.tasks.base import Built, Result, Task
from detr_fast.tasks.parts import build_backbone, build_transformer, criterion_device, with_auxiliary_layers
from detr_fast.tasks.paths import dataset_paths
from detr_fast.tasks.pictures import best_lines, draw_lines
from detr_fast.tasks.registry import register

if TYPE_CHECKING:
    from pycocotools.coco import COCO

_SECOND_STAGE = (
    "second_enc_layers", "second_dec_layers", "second_dim_feedforward", "second_hidden_dim", "second_dropout",
    "second_nheads", "second_pre_norm",
)  # fmt: skip


class Lines(Task):
    """Two end points for each line segment."""

    name = "lines"
    dataset_file = "lines"
    own_flags = (
        "LETRpost", "layer1_num", "layer2_num", "layer1_frozen", *_SECOND_STAGE, "set_cost_line", "line_loss_coef",
        "label_loss_func", "label_loss_params",
    )  # fmt: skip
    ignored_flags = (
        "set_cost_bbox", "set_cost_giou", "bbox_loss_coef", "giou_loss_coef", "masks", "mask_loss_coef",
        "dice_loss_coef",
    )  # fmt: skip
    postprocessor_names = ("line",)
    found = "lines"
    mean, std = LINES_MEAN, LINES_STD

    def check(self, config: Config) -> None:
        super().check(config)
        if not config.LETRpost:
            if config.frozen_weights is not None:
                raise UsageError("--frozen_weights is a trained first stage here; it needs --LETRpost")
            for name in ("layer2_num", "layer1_frozen", *_SECOND_STAGE):
                if getattr(config, name) != default_of(name):
                    raise UsageError(f"--{name} is about the second stage; it needs --LETRpost")
        elif config.second_hidden_dim != config.hidden_dim or config.hidden_dim % config.second_nheads:
            raise UsageError(
                "--second_hidden_dim must be --hidden_dim and divisible by --second_nheads, got "
                f"{config.second_hidden_dim}, {config.hidden_dim} and {config.second_nheads}"
            )
        if config.frozen_weights is not None and config.weights:
            raise UsageError("--frozen_weights and --weights both say where the detector comes from; give one of them")

    def stride(self, config: Config) -> int:
        return 16 if config.layer1_num == 3 and config.dilation else 4 * 2**config.layer1_num

    # The model

    def build(self, config: Config) -> Built:
        num_classes = config.num_classes or 1
        model: nn.Module = LETR(
            build_backbone(config, return_interm_layers=True),
            build_transformer(config, Transformer),
            num_classes=num_classes,
            num_queries=config.num_queries,
            args=config,
            aux_loss=config.aux_loss,
        )
        if config.LETRpost:
            model = LETRstack(model, config)
        matcher = HungarianMatcher_Line(cost_class=config.set_cost_class, cost_line=config.set_cost_line)
        weights = {"loss_ce": 1, "loss_line": config.line_loss_coef}
        if config.aux_loss:
            weights = with_auxiliary_layers(weights, config.second_dec_layers if config.LETRpost else config.dec_layers)
        losses = ["POST_lines_labels", "POST_lines"] if config.LETRpost else ["lines_labels", "lines"]
        criterion = SetCriterion(num_classes, weights, config.eos_coef, losses, config, matcher=matcher)
        return model, criterion.to(criterion_device(config)), self.postprocessors(config, num_classes)

    def postprocessors(self, config: Config, num_classes: int) -> dict[str, nn.Module]:
        return {"line": PostProcess_Line()}

    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        return "class_embed.bias" in state and "lines_embed.layers.0.weight" in state

    def load_frozen(self, model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
        load_first_stage(model, state)

    # Data

    def build_dataset(
        self, image_set: str, config: Config, *, categories: Categories | None = None, uint8: bool = False
    ) -> LineDetection:
        transforms = self.transforms(image_set, config, uint8=uint8)
        images, annotations = dataset_paths(image_set, config, "lines")
        dataset = LineDetection(
            images,
            annotations,
            transforms,
            categories=categories,
            tensor_images=uint8 and image_set == "train",
            cache_dir=config.cache_dir,
        )
        if not config.allow_outside:
            refuse_outside(images, dataset.named(), annotations)
        dataset.check_files()
        return dataset

    def resize(self, config: Config, *, uint8: bool = False) -> Compose:
        return make_line_transforms("val", scale=config.image_size, max_size=config.max_size, uint8=uint8)

    def augment(self, config: Config, *, uint8: bool = False) -> Compose:
        return make_line_transforms("train", scale=config.image_size, max_size=config.max_size, uint8=uint8)

    # Results

    def evaluator(self, annotations: COCO, dataset: Any, output_dir: str = "") -> Evaluator:
        return LineEvaluator(annotations)

    def page(self, evaluator: LineEvaluator) -> Page:
        return lines_page(evaluator)

    def postprocess(
        self,
        postprocessors: Mapping[str, nn.Module],
        outputs: Mapping[str, Any],
        orig_sizes: Tensor,
        sizes: Tensor,
        padded_size: Sequence[int],
    ) -> list[Result]:
        return postprocessors["line"](outputs, orig_sizes)

    def score(self, stats: Mapping[str, Any]) -> float | None:
        return stats["line_eval"]["sAP10"] if "line_eval" in stats else None

    def describe(self, result: Result, threshold: float) -> list[dict[str, Any]]:
        """ "line" is x1, y1, dx, dy, as in the data sets."""
        lines, labels, scores = best_lines(result, threshold)
        return [
            {
                "category_id": label,
                "line": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
                "score": score,
            }
            for (x1, y1, x2, y2), label, score in zip(lines, labels, scores, strict=True)
        ]

    def draw(self, image: Image.Image, result: Result, names: Mapping[int, str], threshold: float) -> Image.Image:
        return draw_lines(image, best_lines(result, threshold)[0])

    def draw_sample(
        self,
        image: Image.Image,
        truth: Sequence[Mapping],
        result: Result,
        names: Mapping[int, str],
        threshold: float,
        coco: COCO,
    ) -> tuple[Image.Image, Image.Image]:
        lines = [(x, y, x + dx, y + dy) for x, y, dx, dy in (entry["line"] for entry in truth)]
        return draw_lines(image, lines), self.draw(image, result, names, threshold)


def build(args: Config | Any) -> Built:
    """LETR's function of this name: model (on the CPU), criterion and the post-processor "line".

    Args:
        args: a `Config`, or an object with some of its attributes (see `Config.of`).
    """
    return Lines().build(Config.of(args))


register(Lines())
