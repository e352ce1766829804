"""Reading annotation files, and what can be wrong with them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from detr_fast.data.categories import Categories


def read_annotations(ann_file: str | os.PathLike) -> dict[str, Any]:
    """Reads a COCO json and checks that it has the lists ``images``, ``annotations`` and ``categories``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not json, or one of the lists is missing, malformed or (categories) empty.
    """
    content = read_json(ann_file)
    check_content(content, ann_file)
    return content


def read_json(ann_file: str | os.PathLike) -> dict[str, Any]:
    """Reads a json object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not json, or not an object.
    """
    ann_file = Path(ann_file)
    if not ann_file.is_file():
        raise FileNotFoundError(f"annotation file {ann_file} does not exist")
    try:
        content = json.loads(ann_file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{ann_file} is not valid json: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{ann_file}: expected a COCO json object, got a {type(content).__name__}")
    return content


def check_content(content: dict[str, Any], ann_file: str | os.PathLike) -> None:
    """Raises ValueError, see ``read_annotations``, unless the content of ``ann_file`` has its lists."""
    for key, needed in (("images", ("id", "file_name")), ("annotations", ()), ("categories", ("id",))):
        entries = content.get(key)
        if not isinstance(entries, list):
            raise ValueError(f"{ann_file}: expected a list '{key}', the file has {sorted(content)}")
        for position, entry in enumerate(entries):
            if not isinstance(entry, dict) or any(name not in entry for name in needed):
                raise ValueError(
                    f"{ann_file}: {key}[{position}] must be an object with {list(needed)}, got {entry!r:.200}"
                )
            if needed and not is_integer(entry["id"]):
                raise ValueError(f"{ann_file}: {key}[{position}] has id {entry['id']!r}; expected an integer")
            if key == "images" and not isinstance(entry["file_name"], str):
                raise ValueError(f"{ann_file}: {key}[{position}] has file_name {entry['file_name']!r}; expected a text")


def annotation_problem(annotation: dict, known_ids: Iterable[int]) -> str | None:
    """What keeps one annotation from being used, or None. ``known_ids``: the category ids there are."""
    which = f"annotation {annotation.get('id')!r}"
    missing = [key for key in ("id", "image_id", "category_id", "bbox") if key not in annotation]
    if missing:
        return f"{which} (image {annotation.get('image_id')!r}) has no {', '.join(missing)}"
    if not is_integer(annotation["category_id"]) or annotation["category_id"] not in known_ids:
        return (
            f"{which} (image {annotation['image_id']!r}) has unknown category id {annotation['category_id']!r}; "
            f"known ids are {sorted(known_ids)}"
        )
    box = annotation["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, Real) for value in box):
        return f"{which} (image {annotation['image_id']!r}) has bbox {box!r}; expected [x, y, width, height]"
    return None


def check_annotations(content: dict, categories: Categories, ann_file) -> None:
    """Raises ValueError for what cannot be trained on; fills in ``iscrowd`` and ``area`` where they are missing."""
    known_ids = categories.label_of
    for key in ("images", "annotations"):
        seen = set()
        for entry in content[key]:
            if key == "annotations":
                problem = annotation_problem(entry, known_ids)
                if problem is not None:
                    raise ValueError(f"{ann_file}: {problem}")
                # pycocotools needs both.
                entry.setdefault("iscrowd", 0)
                entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
            if entry["id"] in seen:
                raise ValueError(f"{ann_file}: id {entry['id']!r} occurs more than once in '{key}'")
            seen.add(entry["id"])


def check_same_names(own: Categories, categories: Categories, ann_file) -> None:
    expected = dict(zip(categories.ids, categories.names, strict=True))
    for category_id, name in zip(own.ids, own.names, strict=True):
        if expected.get(category_id, name) != name:
            raise ValueError(
                f"{ann_file}: category {category_id} is {name!r} here, but {expected[category_id]!r} in the classes "
                "given"
            )


def read_panoptic(ann_file: str | os.PathLike) -> dict:
    """Reads a COCO panoptic json, checks it, and orders images and annotations by image id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not json, a list or key is missing, or an image has no annotation or more than one.
    """
    ann_file = Path(ann_file)
    if not ann_file.is_file():
        raise FileNotFoundError(f"annotation file {ann_file} does not exist")
    try:
        content = json.loads(ann_file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{ann_file} is not valid json: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{ann_file}: expected a COCO panoptic json object, got a {type(content).__name__}")
    needed = {"images": ("id", "file_name", "height", "width"), "categories": ("id",)}
    if "annotations" in content:
        needed["annotations"] = ("image_id", "file_name", "segments_info")
    for key, names in needed.items():
        if not isinstance(content.get(key), list):
            raise ValueError(f"{ann_file}: expected a list '{key}', the file has {sorted(content)}")
        for position, entry in enumerate(content[key]):
            if not isinstance(entry, dict) or any(name not in entry for name in names):
                raise ValueError(f"{ann_file}: {key}[{position}] must be an object with {list(names)}")
    content["images"] = sorted(content["images"], key=lambda image: image["id"])
    if "annotations" not in content:
        return content
    content["annotations"] = sorted(content["annotations"], key=lambda annotation: annotation["image_id"])
    ids = [image["id"] for image in content["images"]]
    annotated = [annotation["image_id"] for annotation in content["annotations"]]
    if len(set(ids)) < len(ids) or ids != annotated:
        odd = sorted(set(ids) ^ set(annotated)) or sorted(ids)
        raise ValueError(
            f"{ann_file}: expected one annotation for each image, got {len(annotated)} for {len(ids)} images (see "
            f"image id {odd[0]})"
        )
    known = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            missing = [name for name in ("id", "category_id", "iscrowd", "area") if name not in segment]
            if missing or segment["category_id"] not in known:
                what = f"has no {', '.join(missing)}" if missing else f"is of unknown category {segment['category_id']}"
                raise ValueError(f"{ann_file}: segment {segment.get('id')} of image {annotation['image_id']} {what}")
    return content


def is_integer(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
