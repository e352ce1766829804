"""Mends what is wrong with an annotation file where there is but one way to do it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detr_fast.data.annotations import is_id, is_number, read_json
from detr_fast.data.images import header_size, leaves_folder, probable_file
from detr_fast.data.validation import crowd_of, stated_size


def mend_file(images_dir: str | os.PathLike, ann_file: str | os.PathLike, out: str | os.PathLike) -> list[str]:
    """Writes a copy of a COCO json in which is mended what can be without guessing.

    Ids that are whole numbers as a text or a float become integers where no other entry has that id; numbers of boxes
    likewise. Annotation ids that are repeated, missing or 0 are numbered anew (nothing refers to them). Sizes become
    those of the files. A file name that differs from a file's in its slashes, its case or a leading folder becomes
    that file's. ``iscrowd`` and ``area`` become numbers; pairs of points one list; polygons of fewer than three points
    and segmentations or keypoints that are null go.

    Returns:
        a line for each kind of change, with how often it was made.

    Raises:
        FileNotFoundError: no such json. ValueError: it is none, or ``out`` is the file itself.
    """
    if Path(out).resolve() == Path(ann_file).resolve():
        raise ValueError(f"{out} is the file to be mended; give another name, it is not overwritten")
    content = read_json(ann_file)
    done: Counter[str] = Counter()
    images, annotations, categories = (_objects(content, key) for key in ("images", "annotations", "categories"))
    _mend_ids(images, done, "image id")
    _mend_ids(categories, done, "category id")
    _mend_images(images, Path(images_dir), done)
    known = {
        "image_id": {entry["id"] for entry in images if is_id(entry.get("id"))},
        "category_id": {entry["id"] for entry in categories if is_id(entry.get("id"))},
    }
    for entry in annotations:
        for key, ids in known.items():
            number = _whole(entry.get(key))
            if key in entry and not is_id(entry[key]) and number in ids:
                entry[key] = number
                done[f"{key}: a text or float became the integer that it writes"] += 1
        _mend_annotation(entry, done)
    _renumber(annotations, done)
    # Half of a surrogate pair, which UTF-8 cannot write, becomes the json's escape again.
    Path(out).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8", errors="backslashreplace")
    return [f"  {count:>8}  {what}" for what, count in done.items()]


def _objects(content: Mapping[str, Any], key: str) -> list[dict]:
    entries = content.get(key)
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _whole(value) -> int | None:
    """The integer that a text or a float writes, or None."""
    if isinstance(value, str):
        digits = value.strip()
        value = int(digits) if len(digits) < 20 and digits.removeprefix("-").isdecimal() else None
    elif isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if is_id(value) else None


def _mend_ids(entries: list[dict], done: Counter, name: str) -> None:
    counts = Counter(_whole(entry.get("id")) for entry in entries)
    for entry in entries:
        number = _whole(entry.get("id"))
        if number is not None and not is_id(entry["id"]) and counts[number] == 1:
            entry["id"] = number
            done[f"{name}: a text or float became the integer that it writes"] += 1


def _mend_images(images: list[dict], folder: Path, done: Counter) -> None:
    paths = [_file_of(image, folder) for image in images]
    uses = Counter(paths)
    for image, path in zip(images, paths, strict=True):
        if path is None:
            continue
        if path != folder / image["file_name"]:
            if uses[path] > 1:  # which of the names means it would be a guess
                continue
            image["file_name"] = path.relative_to(folder).as_posix()
            done["file_name: slashes, case or leading folder became those of the file"] += 1
        stated = stated_size(image)
        size = header_size(path, stated)
        if size is not None and size != stated:
            image["width"], image["height"] = size
            done["width and height: became those of the file"] += 1


def _file_of(image: dict, folder: Path) -> Path | None:
    """The file below the folder that an entry means, or None."""
    name = image.get("file_name")
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    path = folder / name
    if os.path.isfile(path):  # Path.is_file raises where a name is too long for the file system
        return None if leaves_folder(folder, name) else path
    meant = probable_file(path)
    # Another extension would be a guess: nothing says that both show the same.
    if meant is None or Path(meant).suffix.lower() != path.suffix.lower() or not Path(meant).is_relative_to(folder):
        return None
    return Path(meant)


def _mend_annotation(entry: dict, done: Counter) -> None:
    box = entry.get("bbox")
    if isinstance(box, list) and any(isinstance(value, str) for value in box):
        numbers = [_number(value) for value in box]
        if None not in numbers:
            entry["bbox"] = box = numbers
            done["bbox: texts became the numbers that they write"] += 1
    crowd = entry.get("iscrowd", 0)
    understood = crowd_of(crowd)
    if understood is not None and (type(crowd) is not int):
        entry["iscrowd"] = understood
        done["iscrowd: became 0 or 1"] += 1
    if isinstance(box, list) and len(box) == 4 and all(map(is_number, box)):
        area = entry.get("area")
        if not is_number(area) or area < 0:
            entry["area"] = max(box[2], 0) * max(box[3], 0)
            done["area: computed from the box"] += 1
    for key in ("segmentation", "keypoints"):
        if key in entry and entry[key] is None:
            del entry[key]
            done[f"{key}: null was left out"] += 1
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, list):
        _mend_polygons(entry, segmentation, done)


def _mend_polygons(entry: dict, polygons: list, done: Counter) -> None:
    if len(polygons) > 2 and all(map(_is_point, polygons)):
        polygons = [polygons]  # one polygon, without the brackets around it
    kept = []
    for polygon in polygons:
        if isinstance(polygon, list) and polygon and all(_is_point(point) for point in polygon):
            polygon = [value for point in polygon for value in point]
            done["segmentation: pairs of points became one list"] += 1
        if isinstance(polygon, list) and len(polygon) < 6 and len(polygon) % 2 == 0 and all(map(is_number, polygon)):
            done["segmentation: a polygon of fewer than three points was left out"] += 1
        else:
            kept.append(polygon)
    entry["segmentation"] = kept


def _is_point(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def _number(value) -> float | int | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
        value = int(value) if value.is_integer() else value
    return value if is_number(value) else None


def _renumber(annotations: list[dict], done: Counter) -> None:
    free = max((entry["id"] for entry in annotations if is_id(entry.get("id"))), default=0)
    free = max(free, 0) + 1
    seen = set()
    for entry in annotations:
        number = entry.get("id")
        if not is_id(number) or number == 0 or number in seen:
            entry["id"], free = free, free + 1
            done["annotation id: repeated, missing, 0 or no integer, numbered anew"] += 1
        else:
            seen.add(number)
