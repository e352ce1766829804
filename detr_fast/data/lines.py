"""Line segments: the data set and its augmentation.

The layout is LETR's: ``train2017/``, ``val2017/`` and ``annotations/lines_{train,val}2017.json``, in COCO's format with
``"line": [x1, y1, dx, dy]`` in pixels in the place of boxes. The left end is the first, of a vertical line the upper.

Source: mlpc-ucsd/LETR, src/datasets/coco.py and helper/wireframe.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torchvision.transforms as T

from detr_fast.data.annotations import read_lines
from detr_fast.data.categories import Categories
from detr_fast.data.coco import CocoDetection
from detr_fast.data.transforms import (
    Compose,
    ImageOnly,
    Img,
    Normalize,
    RandomHorizontalFlip,
    RandomResize,
    RandomSelect,
    RandomSizeCrop,
    RandomVerticalFlip,
    ToTensor,
    image_size,
)

LINES_MEAN = (0.538, 0.494, 0.453)
LINES_STD = (0.257, 0.263, 0.273)

# The original's numbers.
LINES_SCALES = (480, 512, 544, 576, 608, 640, 672, 680, 690, 704, 736, 768, 788, 800)
LINES_TEST_SCALE = 1100
LINES_MAX_SIZE = 1333
LINES_CROP_SCALES = (400, 500, 600)
LINES_CROP_RANGE = (384, 600)
_COLOUR_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.4}


class LineDetection(CocoDetection):
    """Images and lines of a json in LETR's format.

    An item is (image, target), as `CocoDetection`'s. target, with N lines: ``lines`` float32 [N, 4] (x1, y1, x2, y2 in
    pixels, clamped to the image; after ``Normalize`` in 0..1), ``labels`` int64 [N], ``image_id`` int64 [1], ``area``
    float32 [N] and ``iscrowd`` int64 [N], ``orig_size`` and ``size`` int64 [2].

    Args:
        img_folder, ann_file, transforms, categories, tensor_images, cache_dir: see `CocoDetection`.

    Raises:
        FileNotFoundError: no such folder or json.
        ValueError: a malformed json or annotation, repeated ids, or an annotation with an unknown category.
    """

    _read = staticmethod(read_lines)
    _lines = True
    mean, std = LINES_MEAN, LINES_STD  # with which its images are normalised

    def __init__(
        self,
        img_folder: str | os.PathLike,
        ann_file: str | os.PathLike,
        transforms,
        *,
        categories: Categories | None = None,
        tensor_images: bool = False,
        cache_dir: str | os.PathLike | None = None,
    ):
        super().__init__(
            img_folder, ann_file, transforms, categories=categories, tensor_images=tensor_images, cache_dir=cache_dir
        )
        self.prepare = ConvertLines()


class ConvertLines:
    """Turns (image, {"image_id", "annotations"}) into (image, target); see `LineDetection`."""

    def __call__(self, image: Img, target: dict[str, Any]) -> tuple[Img, dict[str, torch.Tensor]]:
        width, height = image_size(image)
        entries = target["annotations"]
        lines = torch.tensor([entry["line"] for entry in entries], dtype=torch.float32).reshape(-1, 4)
        lines[:, 2:] += lines[:, :2]
        lines[:, 0::2].clamp_(min=0, max=width)
        lines[:, 1::2].clamp_(min=0, max=height)
        size = torch.tensor([height, width])
        return image, {
            "lines": lines,
            "labels": torch.tensor([entry["category_id"] for entry in entries], dtype=torch.int64),
            "image_id": torch.tensor([target["image_id"]]),
            "area": torch.tensor([entry["area"] for entry in entries], dtype=torch.float32),
            "iscrowd": torch.tensor([entry["iscrowd"] for entry in entries], dtype=torch.int64),
            "orig_size": size,
            "size": size.clone(),
        }


def make_line_transforms(
    image_set: str, *, scale: int | None = None, max_size: int | None = None, uint8: bool = False
) -> Compose:
    """LETR's augmentation, or the same one at another size.

    train: flip left and right, or top and bottom; resize, or resize, crop and resize; jitter the colours. val: resize.

    Args:
        image_set: "train" or "val".
        scale: largest short side in pixels. None: train draws from 480 to 800, val takes 1100.
        max_size: longest side in pixels. None: 1333, scaled like ``scale`` to 800.
        uint8: leave the image uint8 [3, H, W], for ``pad_collate`` to normalise with LINES_MEAN and LINES_STD.

    Raises:
        ValueError: another ``image_set``, or sizes that are not positive.
    """
    if image_set not in ("train", "val"):
        raise ValueError(f"image_set must be 'train' or 'val', got {image_set!r}")
    ratio = 1.0 if scale is None else scale / LINES_SCALES[-1]
    max_size = round(LINES_MAX_SIZE * ratio) if max_size is None else max_size
    test_scale = LINES_TEST_SCALE if scale is None else scale
    if test_scale < 1 or max_size < test_scale:
        raise ValueError(f"scale must be at least 1 and max_size at least scale, got {test_scale} and {max_size}")
    finish = [ToTensor(uint8=uint8), Normalize(LINES_MEAN, LINES_STD)]
    if image_set == "val":
        return Compose([RandomResize([test_scale], max_size=max_size), *finish])

    def scaled(sides: Sequence[int]) -> list[int]:
        return [max(1, round(side * ratio)) for side in sides]

    resize = RandomResize(scaled(LINES_SCALES), max_size=max_size)
    cropped = Compose([RandomResize(scaled(LINES_CROP_SCALES)), RandomSizeCrop(*scaled(LINES_CROP_RANGE)), resize])
    return Compose(
        [
            RandomSelect(RandomHorizontalFlip(), RandomVerticalFlip()),
            RandomSelect(resize, cropped),
            ImageOnly(T.ColorJitter(**_COLOUR_JITTER)),
            *finish,
        ]
    )
