"""Reading annotation files, and what can be wrong with them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from numbers import Integral, Real
from pathlib import Path
from typing import Any


def read_annotations(ann_file: str | os.PathLike) -> dict[str, Any]:
    """Reads a COCO json and checks that it has the lists ``images``, ``annotations`` and ``categories``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not json, or one of the lists is missing or malformed.
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
        raise FileNotFoundError(f"annotation file {ann_file} {'is no file' if ann_file.exists() else 'does not exist'}")
    text = ann_file.read_bytes()
    for start, kind in ((b"\x1f\x8b", "gzip"), (b"PK\3\4", "zip")):
        if text.startswith(start):
            raise ValueError(f"{ann_file} is compressed ({kind}); unpack it first")
    try:
        content = json.loads(text, object_pairs_hook=refuse_two_lists)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{ann_file} is not valid json: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{ann_file}: expected a COCO json object, got a {type(content).__name__}")
    return content


def refuse_two_lists(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads: an object. Of a list that stands there twice, json would drop the first one without a word.

    Raises:
        ValueError: such a list.
    """
    entry = dict(pairs)
    if len(entry) < len(pairs) and {"images", "annotations"} <= entry.keys():  # entries may have such keys, too
        for key in ("images", "annotations", "categories"):
            if [name for name, _ in pairs].count(key) > 1:
                raise ValueError(f"'{key}' stands there more than once; expected one list")
    return entry


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
            if needed and not is_id(entry["id"]):
                hint = "; check-data --fix OUT.json can mend that" if _could_be_id(entry["id"]) else ""
                raise ValueError(
                    f"{ann_file}: {key}[{position}] has id {entry['id']!r:.60}; expected an integer"
                    f"{' of at most 63 bits' if is_integer(entry['id']) else ''}{hint}"
                )
            if key == "images":
                problem = file_name_problem(entry["file_name"])
                if problem is not None:
                    raise ValueError(
                        f"{ann_file}: {key}[{position}] has file_name {entry['file_name']!r:.200}; {problem}"
                    )
    check_categories(content["categories"], ann_file)


def check_categories(categories: list[dict], ann_file: str | os.PathLike) -> None:
    """Raises ValueError for ids that are negative or repeated, and for names that are no text."""
    seen = set()
    for position, entry in enumerate(categories):
        number, name = entry["id"], entry.get("name")
        which = f"{ann_file}: categories[{position}]"
        if number < 0:
            raise ValueError(f"{which} has id {number}; category ids must not be negative")
        if number in seen:
            raise ValueError(f"{which} has id {number}, as another category before it; category ids must be unique")
        if name is not None and not isinstance(name, str) and not is_integer(name):
            raise ValueError(f"{which} has name {name!r:.60}; expected a text")
        seen.add(number)


def file_name_problem(name) -> str | None:
    """What keeps a ``file_name`` from being one, or None."""
    if not isinstance(name, str):
        return "expected a text"
    if not name.strip() or "\0" in name:
        return "expected the name of a file"
    return None


def annotation_problem(annotation: dict, known_ids: Iterable[int]) -> str | None:
    """What keeps one annotation from being used, or None. ``known_ids``: the category ids there are."""
    which = f"annotation {annotation.get('id')!r:.60}"
    missing = [key for key in ("id", "image_id", "category_id", "bbox") if key not in annotation]
    if missing:
        return f"{which} (image {annotation.get('image_id')!r}) has no {', '.join(missing)}"
    if not is_integer(annotation["category_id"]) or annotation["category_id"] not in known_ids:
        return (
            f"{which} (image {annotation['image_id']!r}) has unknown category id {annotation['category_id']!r:.60}; "
            f"known ids are {sorted(known_ids)}"
        )
    if not is_id(annotation["id"]):
        return f"{which} (image {annotation['image_id']!r:.60}) has an id that is no integer of at most 63 bits"
    box = annotation["bbox"]
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(value, Real) and not isinstance(value, bool) for value in box)
    ):
        return f"{which} (image {annotation['image_id']!r}) has bbox {box!r:.200}; expected [x, y, width, height]"
    return None


def read_lines(ann_file: str | os.PathLike) -> dict[str, Any]:
    """As ``read_annotations``; the annotations get the box around their line, which COCO's tools ask for."""
    content = read_json(ann_file)
    add_line_boxes(content, ann_file)
    return content


def add_line_boxes(content: dict[str, Any], ann_file: str | os.PathLike) -> None:
    """Checks a json of lines and gives each annotation its box."""
    categories = content.get("categories")
    for category in categories if isinstance(categories, list) else []:
        # LETR's own files have the id "0".
        if isinstance(category, dict) and str(category.get("id")).isdecimal():
            category["id"] = int(category["id"])
    check_content(content, ann_file)
    for entry in content["annotations"]:
        line = entry.get("line")
        if not isinstance(line, list) or len(line) != 4 or not all(map(is_number, line)):
            raise ValueError(
                f"{ann_file}: annotation {entry.get('id')!r} (image {entry.get('image_id')!r}) has line {line!r:.200}; "
                "expected [x1, y1, dx, dy]"
            )
        x, y, dx, dy = line
        entry["bbox"] = [min(x, x + dx), min(y, y + dy), abs(dx), abs(dy)]


def read_panoptic(ann_file: str | os.PathLike) -> dict:
    """Reads a COCO panoptic json, checks it, and orders images and annotations by image id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not json, a list or key is missing, or an image has no annotation or more than one.
    """
    content = read_json(ann_file)
    check_panoptic_content(content, ann_file)
    return content


def check_panoptic_content(content: dict[str, Any], ann_file: str | os.PathLike) -> None:
    """Raises ValueError, see ``read_panoptic``, or puts the content's images and annotations in order."""
    needed = {"images": ("id", "file_name", "height", "width"), "categories": ("id",)}
    if "annotations" in content:
        needed["annotations"] = ("image_id", "file_name", "segments_info")
    for key, names in needed.items():
        if not isinstance(content.get(key), list):
            raise ValueError(f"{ann_file}: expected a list '{key}', the file has {sorted(content)}")
        for position, entry in enumerate(content[key]):
            if not isinstance(entry, dict) or any(name not in entry for name in names):
                raise ValueError(f"{ann_file}: {key}[{position}] must be an object with {list(names)}")
            _check_panoptic_entry(entry, f"{ann_file}: {key}[{position}]")
    if not content["categories"]:
        raise ValueError(f"{ann_file}: there are no categories")
    check_categories(content["categories"], ann_file)
    content["images"] = sorted(content["images"], key=lambda image: image["id"])
    if "annotations" not in content:
        return
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
            problem = _segment_problem(segment, known)
            if problem is not None:
                which = segment.get("id") if isinstance(segment, dict) else segment
                raise ValueError(f"{ann_file}: segment {which!r:.60} of image {annotation['image_id']} {problem}")


def _check_panoptic_entry(entry: dict, which: str) -> None:
    for key in {"id", "image_id"} & entry.keys():
        # The annotations' own ids are not used.
        if "segments_info" in entry and key == "id":
            continue
        if not is_id(entry[key]):
            raise ValueError(f"{which} has {key} {entry[key]!r:.60}; expected an integer")
    for key in {"width", "height"} & entry.keys():
        if not is_integer(entry[key]) or entry[key] < 1:
            raise ValueError(f"{which} has {key} {entry[key]!r:.60}; expected pixels, an integer of at least 1")
    if "file_name" in entry:
        problem = file_name_problem(entry["file_name"])
        if problem is not None:
            raise ValueError(f"{which} has file_name {entry['file_name']!r:.200}; {problem}")
    if not isinstance(entry.get("segments_info", []), list):
        raise ValueError(f"{which} has segments_info {entry['segments_info']!r:.60}; expected a list")


def _segment_problem(segment, known_ids: Iterable[int]) -> str | None:
    if not isinstance(segment, dict):
        return "is no object"
    missing = [name for name in ("id", "category_id", "iscrowd", "area") if name not in segment]
    if missing:
        return f"has no {', '.join(missing)}"
    if not is_integer(segment["category_id"]) or segment["category_id"] not in known_ids:
        return f"is of unknown category {segment['category_id']!r:.60}"
    if not is_integer(segment["id"]) or not 0 <= segment["id"] < 1 << 24:
        return "has an id that no colour stands for; expected an integer of 0 to 2**24 - 1"
    if segment["iscrowd"] not in (0, 1):
        return f"has iscrowd {segment['iscrowd']!r:.60}; expected 0 or 1"
    if not is_number(segment["area"]) or not 0 <= segment["area"] < 1 << 63:
        return f"has area {segment['area']!r:.60}; expected a number of pixels"
    return None


def is_integer(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_id(value) -> bool:
    """Whether it is an integer that an int64 tensor can hold."""
    return is_integer(value) and -(1 << 63) <= value < 1 << 63


def is_number(value) -> bool:
    """Whether it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond a float's range
        return False


def _could_be_id(value) -> bool:
    if isinstance(value, str):
        return value.strip().removeprefix("-").isdecimal()
    return isinstance(value, float) and value.is_integer()
