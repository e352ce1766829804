"""Line segments: the data set, its augmentation, and a small generated one.

The layout is LETR's: ``train2017/``, ``val2017/`` and ``annotations/lines_{train,val}2017.json``, in COCO's format with
``"line": [x1, y1, dx, dy]`` in pixels in the place of boxes. The left end is the first, of a vertical line the upper.

Source: mlpc-ucsd/LETR, src/datasets/coco.py and helper/wireframe.py.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms as T
from PIL import Image, ImageDraw

from detr_fast.data.categories import Categories
from detr_fast.data.coco import CocoDetection, check_content, dataset_paths, read_json
from detr_fast.data.shapes import _ASPECT_RATIOS, _background, _place
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
from detr_fast.geometry.lines import ordered_ends

LINES_MEAN = (0.538, 0.494, 0.453)
LINES_STD = (0.257, 0.263, 0.273)

# The original's numbers.
LINES_SCALES = (480, 512, 544, 576, 608, 640, 672, 680, 690, 704, 736, 768, 788, 800)
LINES_TEST_SCALE = 1100
LINES_MAX_SIZE = 1333
LINES_CROP_SCALES = (400, 500, 600)
LINES_CROP_RANGE = (384, 600)
_COLOUR_JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.4}

STRUCTURES = ("segment", "box", "grid", "cuboid")
_DESCRIPTION = "detr_fast generated lines"
_SUPERSAMPLE = 4


class LineDetection(CocoDetection):
    """Images and lines of a json in LETR's format.

    An item is (image, target), as `CocoDetection`'s. target, with N lines: ``lines`` float32 [N, 4] (x1, y1, x2, y2 in
    pixels, clamped to the image; after ``Normalize`` in 0..1), ``labels`` int64 [N], ``image_id`` int64 [1], ``area``
    float32 [N] and ``iscrowd`` int64 [N], ``orig_size`` and ``size`` int64 [2].

    Args:
        img_folder, ann_file, transforms, categories, tensor_images: see `CocoDetection`.

    Raises:
        FileNotFoundError: no such folder or json.
        ValueError: a malformed json or annotation, repeated ids, or an annotation with an unknown category.
    """

    mean, std = LINES_MEAN, LINES_STD  # with which its images are normalised

    def __init__(
        self,
        img_folder: str | os.PathLike,
        ann_file: str | os.PathLike,
        transforms,
        *,
        categories: Categories | None = None,
        tensor_images: bool = False,
    ):
        super().__init__(img_folder, ann_file, transforms, categories=categories, tensor_images=tensor_images)
        self.prepare = ConvertLines()

    @staticmethod
    def _read(ann_file: str | os.PathLike) -> dict[str, Any]:
        """As `read_annotations`; the annotations get the box around their line, which COCO's tools ask for."""
        content = read_json(ann_file)
        for category in content.get("categories") or []:
            # LETR's own files have the id "0".
            if isinstance(category, dict) and str(category.get("id")).isdigit():
                category["id"] = int(category["id"])
        check_content(content, ann_file)
        for entry in content["annotations"]:
            line = entry.get("line")
            if not isinstance(line, list) or len(line) != 4 or not all(isinstance(value, Real) for value in line):
                raise ValueError(
                    f"{ann_file}: annotation {entry.get('id')!r} (image {entry.get('image_id')!r}) has line {line!r}; "
                    "expected [x1, y1, dx, dy]"
                )
            x, y, dx, dy = line
            entry["bbox"] = [min(x, x + dx), min(y, y + dy), abs(dx), abs(dy)]
        return content


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


def build_lines(image_set: str, args, *, categories: Categories | None = None, uint8: bool = False) -> LineDetection:
    """The training or validation set of lines that the command line names; see ``build_dataset``."""
    transforms = make_line_transforms(
        image_set, scale=getattr(args, "image_size", None), max_size=getattr(args, "max_size", None), uint8=uint8
    )
    images, annotations = dataset_paths(image_set, args, "lines")
    return LineDetection(
        images, annotations, transforms, categories=categories, tensor_images=uint8 and image_set == "train"
    )


def make_lines_dataset(
    root: str | os.PathLike,
    *,
    num_train: int = 1000,
    num_val: int = 200,
    image_size: int = 64,
    max_structures: int = 2,
    structures: Sequence[str] = STRUCTURES,
    seed: int = 0,
) -> Path:
    """Writes JPEG files and json of generated wireframes under ``root``, in LETR's layout.

    Each image has 1 to ``max_structures`` drawings of bright lines on a dim background, which barely overlap: a single
    segment, a box (a turned rectangle, 4 lines), a grid (5 lines) or a cuboid (9 lines). Ends are exact up to the
    drawing's pixels. An image is a function of (seed, split, its number) alone.

    Args:
        root: directory, made if need be. Files of an earlier generated dataset are overwritten.
        num_train, num_val: images in ``train2017/`` and ``val2017/``.
        image_size: short side in pixels.
        max_structures: most drawings in an image.
        structures: the kinds to draw from, any of "segment", "box", "grid", "cuboid".
        seed: not negative.

    Returns:
        ``root`` as a Path.

    Raises:
        ValueError: a number outside its range, or an unknown structure.
        FileExistsError: ``root`` holds annotations that were not generated here.
    """
    if min(num_train, num_val, seed) < 0 or max_structures < 1 or image_size < 16:
        raise ValueError(
            "expected num_train, num_val and seed of at least 0, max_structures of at least 1 and image_size of at "
            f"least 16, got {num_train}, {num_val}, {seed}, {max_structures}, {image_size}"
        )
    if not structures or set(structures) - set(STRUCTURES):
        raise ValueError(f"structures must be taken from {STRUCTURES}, got {list(structures)}")
    root = Path(root)
    files = {split: root / "annotations" / f"lines_{split}2017.json" for split in ("train", "val")}
    for file in files.values():
        if file.exists() and read_json(file).get("info", {}).get("description") != _DESCRIPTION:
            raise FileExistsError(f"{file} exists and was not generated here; choose another directory")
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split_number, (split, count) in enumerate((("train", num_train), ("val", num_val))):
        folder = root / f"{split}2017"
        folder.mkdir(exist_ok=True)
        content = {
            "info": {"description": _DESCRIPTION, "seed": seed},
            "images": [],
            "annotations": [],
            "categories": [{"id": 0, "name": "line", "supercategory": "line"}],
        }
        for number in range(count):
            rng = np.random.default_rng((seed, split_number, number))
            picture, lines = _draw_image(rng, image_size, max_structures, structures)
            name = f"{number:08}.jpg"
            picture.save(folder / name, quality=92)
            content["images"].append(
                {"id": number, "file_name": name, "width": picture.width, "height": picture.height}
            )
            for x1, y1, x2, y2 in lines.tolist():
                line = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
                entry = {
                    "id": len(content["annotations"]),
                    "image_id": number,
                    "category_id": 0,
                    "line": line,
                    "area": 1,
                }
                content["annotations"].append(entry)
        files[split].write_text(json.dumps(content))
    return root


def _draw_image(rng, short: int, max_structures: int, structures: Sequence[str]) -> tuple[Image.Image, torch.Tensor]:
    """The picture and its lines [N, 4]."""
    long = round(short * _ASPECT_RATIOS[rng.integers(len(_ASPECT_RATIOS))])
    width, height = (long, short) if rng.random() < 0.5 else (short, long)
    pixels = _background(rng, width, height)
    lines = []
    for square in _place(rng, width, height, int(rng.integers(1, max_structures + 1))):
        corners = _wireframe(rng, structures[rng.integers(len(structures))], square)
        canvas = Image.new("L", (width * _SUPERSAMPLE, height * _SUPERSAMPLE))
        for ends in corners:
            points = [tuple(point) for point in (ends.reshape(2, 2) * _SUPERSAMPLE - 0.5).tolist()]
            ImageDraw.Draw(canvas).line(points, fill=255, width=max(1, round(short / 32 * _SUPERSAMPLE)))
        alpha = np.asarray(canvas.reduce(_SUPERSAMPLE), dtype=np.float64)[..., None] / 255
        pixels = pixels * (1 - alpha) + rng.uniform(190, 255, 3) * alpha
        lines.append(corners)
    picture = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    return picture, ordered_ends(torch.from_numpy(np.concatenate(lines)))


def _wireframe(rng, structure: str, square: tuple[float, float, float]) -> np.ndarray:
    """Lines [N, 4] of a structure that fills the square (x, y, side) as far as its random turn allows."""
    x, y, side = square
    if structure == "segment":
        angle, half = rng.uniform(0, math.pi), side / 2 * rng.uniform(0.7, 1.0)
        unit = np.array([[-math.cos(angle), -math.sin(angle)], [math.cos(angle), math.sin(angle)]])
        return (np.array([x, y]) + side / 2 + half * unit).reshape(1, 4)
    if structure == "cuboid":
        depth = rng.uniform(0.25, 0.4)
        front = np.array([[0, depth], [1 - depth, depth], [1 - depth, 1], [0, 1]])
        back = front[:3] + [depth, -depth]
        pairs = [*_ring(front), (front[0], back[0]), (front[1], back[1]), (front[2], back[2]), *_path(back)]
    else:
        aspect = rng.uniform(0.6, 1.0)
        box = np.array([[0, 0], [1, 0], [1, aspect], [0, aspect]])
        pairs = list(_ring(box))
        if structure == "grid":
            pairs.append((box[0] + [0.5, 0], box[3] + [0.5, 0]))
    points = np.array(pairs) - 0.5  # [N, 2, 2]
    if structure != "cuboid":
        angle = rng.uniform(-0.3, 0.3)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        points = points @ turn.T / (math.cos(angle) + math.sin(abs(angle)))  # so that it stays in the square
    return ((points + 0.5) * side + [x, y]).reshape(-1, 4)


def _path(points: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return list(zip(points[:-1], points[1:], strict=True))


def _ring(points: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    return [*_path(points), (points[-1], points[0])]
