"""For code that was written for facebookresearch/detr: its builders, which take its argparse namespace.

They are found where the original's names are looked for as well: `detr_fast.models.build_model`,
`detr_fast.data.build_dataset` and so on.
"""

import dataclasses
from typing import Any

from torch import nn

from detr_fast.config import Config
from detr_fast.data.categories import Categories
from detr_fast.data.coco import CocoDetection
from detr_fast.data.panoptic import CocoPanoptic
from detr_fast.tasks import dataset_files, tasks
from detr_fast.tasks.parts import build_backbone, build_position_encoding, build_transformer

__all__ = [
    "build_backbone",
    "build_dataset",
    "build_model",
    "build_panoptic",
    "build_position_encoding",
    "build_transformer",
]

# A data set that is neither COCO nor one of a task has this many classes.
_OTHER_CLASSES = 20


def build_model(args: Config | Any) -> tuple[nn.Module, nn.Module, dict[str, nn.Module]]:
    """Everything that training and evaluation need.

    Args:
        args: a `Config`, or an object with some of its attributes, such as the original's namespace; what is missing
            gets its default. Without `num_classes` (highest category id + 1) it is 91 for the dataset "coco", 250 for
            "coco_panoptic", 1 for "lines" and 20 for any other. `frozen_weights` other than None trains the mask head
            alone; the caller loads the file into ``model.detr``.

    Returns:
        The model (on the CPU), the criterion (on `args.device`) and the post-processors: "bbox", with `masks` "segm",
        and for the dataset "coco_panoptic" with `masks` "panoptic"; for "lines" "line".

    Raises:
        ValueError: `frozen_weights` without `masks`, or an argument of the parts is wrong.
    """
    config = Config.of(args)
    if config.dataset_file not in dataset_files():
        config = dataclasses.replace(config, dataset_file="coco", num_classes=config.num_classes or _OTHER_CLASSES)
    return _task(config).build(config)


def build_dataset(
    image_set: str, args: Config | Any, *, categories: Categories | None = None, uint8: bool = False
) -> CocoDetection | CocoPanoptic:
    """The training or validation set that the arguments name.

    Args:
        image_set: "train" or "val".
        args: a `Config`, or an object with some of its attributes: either `coco_path`, a directory in COCO's layout
            (category ids are the labels), or the four of own data (labels are 0..K-1 in the order of the ids of
            `train_ann`); `dataset_file`, `masks`, `image_size`, `max_size`, `augmentation`.
        categories: the classes, for instance a checkpoint's. None: from the annotations.
        uint8: see ``make_coco_transforms``. Training images are then also decoded and resized as uint8 tensors (see
            `CocoDetection`); validation images keep PIL's pixels, on which the original's results stand.

    Raises:
        ValueError: an unknown ``image_set`` or ``dataset_file``, no data named, both ways at once, one half of a pair
            missing, or no images in the annotations.
        FileNotFoundError: what is named does not exist; the message lists everything that is missing.
    """
    config = Config.of(args)
    return _task(config).build_dataset(image_set, config, categories=categories, uint8=uint8)


def build_panoptic(image_set: str, args: Config | Any, *, uint8: bool = False) -> CocoPanoptic:
    """`build_dataset` for the dataset "coco_panoptic", whatever `args.dataset_file` is."""
    return build_dataset(image_set, dataclasses.replace(Config.of(args), dataset_file="coco_panoptic"), uint8=uint8)


def _task(config: Config):
    for task in tasks():
        if task.handles(config):
            return task
    names = ", ".join(repr(name) for name in dataset_files())
    raise ValueError(f"dataset_file {config.dataset_file!r} is not supported; expected one of {names}")
