"""A generated dataset: circles, squares and triangles on textured backgrounds, in COCO's layout on disk.

With boxes, classes and masks, and, if asked for, with panoptic segments.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from detr_fast.data.generate.canvas import ASPECT_RATIOS, SUPERSAMPLE, background, place
from detr_fast.geometry.segment_ids import id2rgb

SHAPES = ("circle", "square", "triangle")
STUFF = ("sky", "ground")
_DESCRIPTION = "detr_fast generated shapes"


def make_shapes_dataset(
    root: str | os.PathLike,
    *,
    num_train: int = 1000,
    num_val: int = 200,
    image_size: int | tuple[int, int] = 64,
    max_objects: int = 3,
    seed: int = 0,
    empty_fraction: float = 0.0,
    panoptic: bool = False,
) -> Path:
    """Writes JPEG files and COCO json under ``root``, where ``coco_path`` finds them.

    Each image has 1 to ``max_objects`` large objects (diameter 0.35 to 0.6 of the short side) in a shade of the class's
    colour, which barely overlap, in one of five shapes of image: 1:1, 4:3, 3:2, lying or standing. Boxes, areas and
    polygons are exact up to the drawing's pixels. An image is a function of (seed, split, its number) alone, so a
    larger set begins with the smaller one.

    Args:
        root: directory, made if need be. Files of an earlier generated dataset are overwritten.
        num_train, num_val: images in ``train2017/`` and ``val2017/``.
        image_size: short side in pixels, or the smallest and largest to draw from.
        max_objects: most objects in an image.
        seed: not negative.
        empty_fraction: share of images without objects, in 0..1.
        panoptic: every background gets a darker lower part, "ground" below "sky"; and the segments of all pixels are
            written where ``coco_panoptic_path`` finds them: ``annotations/panoptic_{train,val}2017.json`` and PNG files
            in ``panoptic_{train,val}2017/``. The category ids are 1 to 3 for the shapes, 4 and 5 for sky and ground.

    Returns:
        ``root`` as a Path.

    Raises:
        ValueError: a number outside its range.
        FileExistsError: ``root`` holds annotations that were not generated here.
    """
    low, high = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not 16 <= low <= high:
        raise ValueError(f"image_size must be at least 16 pixels, smallest first, got {image_size}")
    if min(num_train, num_val, seed) < 0 or max_objects < 1 or not 0 <= empty_fraction <= 1:
        raise ValueError(
            "expected num_train, num_val and seed of at least 0, max_objects of at least 1 and empty_fraction in 0..1, "
            f"got {num_train}, {num_val}, {seed}, {max_objects}, {empty_fraction}"
        )
    root = Path(root)
    kinds = ("instances", "panoptic") if panoptic else ("instances",)
    for ann_file in [root / "annotations" / f"{kind}_{split}2017.json" for kind in kinds for split in ("train", "val")]:
        if ann_file.exists() and not _is_generated(ann_file):
            raise FileExistsError(f"{ann_file} exists and was not generated here; choose another directory")
    (root / "annotations").mkdir(parents=True, exist_ok=True)

    things = [{"id": i, "name": name, "supercategory": "shape"} for i, name in enumerate(SHAPES, start=1)]
    for split_number, (split, count) in enumerate((("train", num_train), ("val", num_val))):
        folder, png_folder = root / f"{split}2017", root / f"panoptic_{split}2017"
        folder.mkdir(exist_ok=True)
        if panoptic:
            png_folder.mkdir(exist_ok=True)
        images, annotations, segmented = [], [], []
        for number in range(count):
            rng = np.random.default_rng((seed, split_number, number))
            picture, objects, parts = _draw_image(rng, low, high, max_objects, empty_fraction, panoptic)
            image_id = number + 1
            name = f"{image_id:012}.jpg"
            picture.save(folder / name, quality=92)
            images.append({"id": image_id, "file_name": name, "width": picture.width, "height": picture.height})
            for entry in objects:
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0, **entry})
            if panoptic:
                png, segments = _segments(parts, objects)
                png.save(png_folder / f"{image_id:012}.png")
                segmented.append({"image_id": image_id, "file_name": f"{image_id:012}.png", "segments_info": segments})
        content = {
            "info": {"description": _DESCRIPTION, "seed": seed},
            "licenses": [],
            "images": images,
            "annotations": annotations,
            "categories": things,
        }
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        if panoptic:
            stuff = [{"id": i, "name": name, "supercategory": "background"} for i, name in enumerate(STUFF, start=4)]
            content["categories"] = [{**c, "isthing": 1} for c in things] + [{**c, "isthing": 0} for c in stuff]
            content["annotations"] = segmented
            (root / "annotations" / f"panoptic_{split}2017.json").write_text(json.dumps(content))
    return root


def _is_generated(ann_file: Path) -> bool:
    try:
        return json.loads(ann_file.read_bytes())["info"]["description"] == _DESCRIPTION
    except (ValueError, KeyError, TypeError):
        return False


def _draw_image(
    rng, low: int, high: int, max_objects: int, empty_fraction: float, with_ground: bool
) -> tuple[Image.Image, list[dict], np.ndarray]:
    """The picture, its objects' annotations, and what each pixel shows: [H, W], -2 sky, -1 ground, or the object."""
    short = int(rng.integers(low, high + 1))
    long = round(short * ASPECT_RATIOS[rng.integers(len(ASPECT_RATIOS))])
    width, height = (long, short) if rng.random() < 0.5 else (short, long)
    pixels = background(rng, width, height)
    parts = np.full((height, width), -2)
    if with_ground:
        horizon = round(rng.uniform(0.35, 0.65) * height)
        pixels[horizon:] *= 0.4
        parts[horizon:] = -1
    count = 0 if rng.random() < empty_fraction else int(rng.integers(1, max_objects + 1))
    objects = []
    for box in place(rng, width, height, count):
        kind = int(rng.integers(len(SHAPES)))
        polygon = _outline(SHAPES[kind], box)
        alpha = _coverage(polygon, width, height)
        colour = _colour(rng, kind) + rng.normal(0, 6, (height, width, 1))
        pixels = pixels * (1 - alpha) + colour * alpha
        parts[alpha[:, :, 0] >= 0.5] = len(objects)
        objects.append(_annotation(kind + 1, polygon))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)), objects, parts


def _segments(parts: np.ndarray, objects: list[dict]) -> tuple[Image.Image, list[dict]]:
    """The panoptic picture and list of what `_draw_image` made."""
    ids, segments = np.zeros(parts.shape, dtype=np.int64), []
    for part in np.unique(parts).tolist():
        category_id = objects[part]["category_id"] if part >= 0 else len(SHAPES) + len(STUFF) + 1 + part
        where = parts == part
        # Any number but 0 would do; these are easily told apart in the picture.
        segment_id = 40 * category_id + 256 * (60 + 50 * (part + 2))
        ids[where] = segment_id
        rows, columns = np.flatnonzero(where.any(axis=1)), np.flatnonzero(where.any(axis=0))
        x, y = int(columns[0]), int(rows[0])
        bbox = [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1]
        entry = {"id": segment_id, "category_id": category_id, "iscrowd": 0, "bbox": bbox, "area": int(where.sum())}
        segments.append(entry)
    return Image.fromarray(id2rgb(ids)), segments


def _colour(rng, kind: int) -> np.ndarray:
    """float [3]: a bright red, green or blue by class, so that a small model tells the classes apart in minutes."""
    colour = rng.uniform(0, 90, 3)
    colour[kind] = rng.uniform(190, 255)
    return colour


def _outline(shape: str, box: tuple[float, float, float]) -> list[tuple[float, float]]:
    """Corner points of the shape that fills the square ``box`` = (x, y, side)."""
    x, y, side = box
    if shape == "circle":
        angles = [2 * math.pi * i / 32 for i in range(32)]
        return [(x + side / 2 * (1 + math.cos(a)), y + side / 2 * (1 + math.sin(a))) for a in angles]
    if shape == "square":
        return [(x, y), (x + side, y), (x + side, y + side), (x, y + side)]
    return [(x + side / 2, y), (x + side, y + side), (x, y + side)]


def _coverage(polygon: list[tuple[float, float]], width: int, height: int) -> np.ndarray:
    """float [height, width, 1]: how much of each pixel the polygon covers, 0..1."""
    canvas = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
    # PIL's coordinates name pixel centres.
    ImageDraw.Draw(canvas).polygon([(x * SUPERSAMPLE - 0.5, y * SUPERSAMPLE - 0.5) for x, y in polygon], fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float64)[..., None] / 255


def _annotation(category_id: int, polygon: list[tuple[float, float]]) -> dict:
    points = np.array(polygon).round(3)
    (x0, y0), (x1, y1) = points.min(axis=0), points.max(axis=0)
    x, y = points.T
    area = abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
    return {
        "category_id": category_id,
        "bbox": [round(float(v), 3) for v in (x0, y0, x1 - x0, y1 - y0)],
        "area": round(area, 3),
        "segmentation": [points.ravel().tolist()],
    }
