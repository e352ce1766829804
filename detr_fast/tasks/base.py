"""What a task is: everything that differs between boxes, masks, panoptic segmentation and lines.

Training, evaluation, prediction and the command line ask the task; none of them knows which tasks there are.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from detr_fast.config import Config, default_of
from detr_fast.data.categories import Categories
from detr_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD, Compose, RandomHorizontalFlip
from detr_fast.errors import UsageError
from detr_fast.evaluation import Evaluator
from detr_fast.evaluation.coco import resolved_backend
from detr_fast.evaluation.report import Page, Table

Built = tuple[nn.Module, nn.Module, dict[str, nn.Module]]
Result = dict[str, Any]


class Task(ABC):
    """One kind of detection. Subclass it in a file of its own and call `register` with an instance.

    A dataset of a task has, beside ``__getitem__`` → (image, target) and ``__len__``: ``categories`` (`Categories`),
    ``img_folder``, and, so that batches can be grouped by size, ``can_plan`` and ``planned_size(index)``. A target has
    at least "image_id" [1], "orig_size" and "size" [2] (height, width of the file, and of the image as it is given).

    Attributes:
        name: what the task is called in messages and docs.
        dataset_file: the value of ``--dataset_file`` that stands for it.
        own_flags: settings that this task alone reads; any other task refuses them.
        ignored_flags: settings of the ordinary detector that this task does not read, and refuses.
        postprocessor_names: keys of the post-processors that `build` returns.
        only_if_asked: a checkpoint is taken for this task only if ``--dataset_file`` says so, since its model is
            another task's as well and its data need more than that task's.
        found: what detections are called when they are counted.
        mean, std: with which images are normalised.
    """

    name: str
    dataset_file: str
    own_flags: Sequence[str] = ()
    ignored_flags: Sequence[str] = ()
    postprocessor_names: Sequence[str] = ("bbox",)
    only_if_asked = False
    found = "detections"
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD

    def handles(self, config: Config) -> bool:
        """Whether a configuration asks for this task."""
        return config.dataset_file == self.dataset_file

    def check(self, config: Config) -> None:
        """Refuses settings that this task does not honour, and those that do not go together.

        Raises:
            UsageError: says which flag.
        """
        for name in self.ignored_flags:
            if getattr(config, name) != default_of(name):
                raise UsageError(f"--{name} does nothing with --dataset_file {self.dataset_file}")
        self.check_backend(config)

    def check_backend(self, config: Config) -> None:
        """Refuses an `eval_backend` that is not installed, or any where `evaluator` has no such argument.

        Raises:
            UsageError: it was chosen.
        """
        if config.eval_backend == default_of("eval_backend"):
            return
        if "backend" not in inspect.signature(self.evaluator).parameters:
            raise UsageError(f"--eval_backend does nothing with --dataset_file {self.dataset_file}")
        try:
            resolved_backend(config.eval_backend)
        except ImportError as error:
            raise UsageError(f"--eval_backend: {error}") from error

    def check_image_size(self, config: Config) -> None:
        """Refuses images without a single whole cell of the feature map. The model's settings are known by now.

        Raises:
            UsageError: `image_size` is below the stride of the backbone's level in use.
        """
        stride = self.stride(config)
        if config.image_size is not None and config.image_size < stride:
            raise UsageError(
                f"--image_size must be at least {stride}, one cell of the feature map at the backbone's stride, got "
                f"{config.image_size}; for smaller images read an earlier stage (--backbone_level)"
            )

    def stride(self, config: Config) -> int:
        """Pixels of the image per cell of the feature map that the transformer reads."""
        level = config.backbone_level
        if level in (None, 3) and config.dilation:
            return 16
        return 4 * 2 ** (3 if level is None else level)

    # The model

    @abstractmethod
    def build(self, config: Config) -> Built:
        """Model (on the CPU), criterion (on `config.device`) and post-processors by name.

        Raises:
            ValueError: a setting of the parts is wrong.
        """

    def postprocessors(self, config: Config, num_classes: int) -> dict[str, nn.Module]:
        """The post-processors by name, as `build` returns them; without a model where a task can do without."""
        return self.build(config)[2]

    @abstractmethod
    def recognises(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a state dict is that of this task's model."""

    def settings_of(self, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """What a state dict that is recognised says about the configuration; no "num_classes" if it has no classes."""
        return {"dataset_file": self.dataset_file, "num_classes": len(state["class_embed.bias"]) - 1}

    def load_frozen(self, model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
        """Loads ``--frozen_weights`` into the part of the model that they are for.

        Raises:
            ValueError: they do not fit, or the model has no such part.
        """
        raise UsageError(f"--frozen_weights does nothing with --dataset_file {self.dataset_file}")

    # Data

    @abstractmethod
    def build_dataset(
        self, image_set: str, config: Config, *, categories: Categories | None = None, uint8: bool = False
    ) -> Dataset:
        """The "train" or "val" set that the configuration names.

        Args:
            image_set: "train" or "val".
            config: paths, sizes and augmentation.
            categories: the classes, for instance a checkpoint's. None: those of the annotations.
            uint8: images are left uint8, to be normalised with `mean` and `std` on the device. Training images are
                then also decoded and resized as tensors.

        Raises:
            ValueError, FileNotFoundError: no data, or something is wrong with it.
        """

    @abstractmethod
    def resize(self, config: Config, *, uint8: bool = False) -> Compose:
        """The transforms of validation and prediction: resize, and normalise unless `uint8`."""

    @abstractmethod
    def augment(self, config: Config, *, uint8: bool = False) -> Compose:
        """The original's augmentation, for training."""

    def transforms(self, image_set: str, config: Config, *, uint8: bool = False) -> Compose:
        """Those of "train" (as `config.augmentation` says) or "val".

        Raises:
            ValueError: another set.
        """
        if image_set not in ("train", "val"):
            raise ValueError(f"image_set must be 'train' or 'val', got {image_set!r}")
        if image_set == "val":
            return self.resize(config, uint8=uint8)
        if config.augmentation == "flip":
            return Compose([RandomHorizontalFlip(), self.resize(config, uint8=uint8)])
        return self.augment(config, uint8=uint8)

    def classes(self, dataset: Any) -> dict[str, Any]:
        """What a training set says about the configuration: "num_classes", and what else the task needs."""
        return {"num_classes": dataset.categories.num_classes}

    def bare_categories(self, config: Config) -> Categories | None:
        """The classes of weights that came without any: None for those of the annotations, as `build_dataset` finds
        them."""
        return None

    def annotations(self, dataset: Any, config: Config) -> Any:
        """What `evaluator` compares with; for COCO's metrics a ``pycocotools`` object."""
        return dataset.coco

    # Results

    def fit_postprocessors(self, postprocessors: Mapping[str, nn.Module], dataset: Any, config: Config) -> None:
        """Gives post-processors what they need to know of the set that is evaluated; most need nothing."""
        return

    @abstractmethod
    def evaluator(self, annotations: Any, dataset: Any, output_dir: str = "", backend: str = "auto") -> Evaluator:
        """Collects results and computes the task's numbers; see `detr_fast.evaluation.Evaluator`.

        Args:
            annotations: what `annotations` returned.
            dataset: the validation set.
            output_dir: where files that belong to the evaluation go; empty: nowhere.
            backend: who computes COCO's numbers, see `CocoEvaluator`. A task without them leaves the argument out.
        """

    @abstractmethod
    def postprocess(
        self,
        postprocessors: Mapping[str, nn.Module],
        outputs: Mapping[str, Any],
        orig_sizes: Tensor,
        sizes: Tensor,
        padded_size: Sequence[int],
    ) -> list[Result]:
        """A batch's results, a dict for each image, with at least "scores" [n] and "labels" [n].

        Args:
            postprocessors: what `build` returned.
            outputs: of the model.
            orig_sizes, sizes: [B, 2] height and width of the files, and of the images in the batch without padding.
            padded_size: height and width of the batch.
        """

    @abstractmethod
    def score(self, stats: Mapping[str, Any]) -> float | None:
        """The number, the higher the better, by which the best checkpoint is chosen; None if it is not there.

        Args:
            stats: what the evaluator's `log_row` returned.
        """

    @abstractmethod
    def describe(self, result: Result, threshold: float) -> list[dict[str, Any]]:
        """An image's detections of at least that score, best first, as ``predictions.json`` has them."""

    @abstractmethod
    def draw(self, image: Image.Image, result: Result, names: Mapping[int, str], threshold: float) -> Image.Image:
        """A copy of an image with its detections of at least that score. `names`: category id → name."""

    @abstractmethod
    def draw_sample(
        self,
        image: Image.Image,
        truth: Sequence[Mapping],
        result: Result,
        names: Mapping[int, str],
        threshold: float,
        coco: Any,
    ) -> tuple[Image.Image, Image.Image]:
        """Two copies of an image: with its annotations, and with its detections.

        Args:
            truth: the image's annotations without crowd regions, as they stand in the json.
            coco: what `annotations` returned.
            image, result, names, threshold: as `draw`'s.
        """

    def report(self, evaluator: Evaluator) -> list[str]:
        """Lines to print after the evaluator's own summary, such as a table of the classes."""
        return []

    def page(self, evaluator: Evaluator) -> Page:
        """What the evaluation's report says, after the evaluator's `summarize`: at the least its single numbers."""
        numbers = [[name, value] for name, value in evaluator.log_row().items() if isinstance(value, (int, float))]
        return Page([Table("numbers", ["", "value"], numbers)] if numbers else [])

    def results(self, evaluator: Evaluator) -> dict[str, list[dict[str, Any]]]:
        """File name → detections as COCO's server takes them; empty for a task that it does not know."""
        return {}
