"""A generated data set: wireframes of bright lines on textured backgrounds, in LETR's layout on disk."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from detr_fast.data.annotations import read_json
from detr_fast.data.generate.canvas import ASPECT_RATIOS, SUPERSAMPLE, background, place
from detr_fast.geometry.lines import ordered_ends

STRUCTURES = ("segment", "box", "grid", "cuboid")
_DESCRIPTION = "detr_fast generated lines"


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
    long = round(short * ASPECT_RATIOS[rng.integers(len(ASPECT_RATIOS))])
    width, height = (long, short) if rng.random() < 0.5 else (short, long)
    pixels = background(rng, width, height)
    lines = []
    for square in place(rng, width, height, int(rng.integers(1, max_structures + 1))):
        corners = _wireframe(rng, structures[rng.integers(len(structures))], square)
        canvas = Image.new("L", (width * SUPERSAMPLE, height * SUPERSAMPLE))
        for ends in corners:
            points = [tuple(point) for point in (ends.reshape(2, 2) * SUPERSAMPLE - 0.5).tolist()]
            ImageDraw.Draw(canvas).line(points, fill=255, width=max(1, round(short / 32 * SUPERSAMPLE)))
        alpha = np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float64)[..., None] / 255
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
