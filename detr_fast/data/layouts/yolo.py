"""YOLO's layout, as Ultralytics documents it, and what labelImg and Roboflow make of it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr_fast.data.layouts.files import (
    IMAGE_SUFFIXES,
    WORDS,
    Found,
    ImageSet,
    categories_of,
    images_in,
    label_notes,
    sizes_of,
    text_of,
)

_SLACK = 0.01  # that a normalised coordinate may leave 0..1 by: rounding, not another unit


@dataclass
class _Yolo:
    """`entries`: set → folders of images or lists of them; `names`: class index → name; `keypoints`:
    they follow a box."""

    root: Path
    names: dict[int, str]
    entries: dict[str, list[Path]]
    notes: list[str]
    keypoints: bool = False


def find_yolo(root: Path) -> _Yolo | None:
    """What a data.yaml in the folder says, or else its images/ and labels/; None: this is no YOLO layout."""
    files = [file for pattern in ("*.yaml", "*.yml") for file in sorted(root.glob(pattern))]
    usual = [file for file in files if file.stem in ("data", "dataset")]
    for file in usual or files:
        content = _read_yaml(file)
        if isinstance(content, dict) and "names" in content and set(WORDS) & set(content):
            others = [str(other.name) for other in files if other != file] if not usual else []
            if others:
                raise ValueError(f"--data {root}: more than one yaml, {', '.join([file.name, *others])}; name one")
            return described_by(file)
    return _undescribed(root)


def described_by(file: Path) -> _Yolo:
    """What a data.yaml says."""
    content = _read_yaml(file)
    if not isinstance(content, dict) or "names" not in content:
        raise ValueError(f"{file}: expected 'names', 'train' and 'val', as in a YOLO data.yaml")
    names = content["names"]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names or not all(str(index).isdecimal() for index in names):
        raise ValueError(f"{file}: names is {names!r:.80}; expected a list, or index: name")
    names = {int(index): str(name) for index, name in names.items()}
    if isinstance(content.get("nc"), int) and content["nc"] != len(names):
        raise ValueError(f"{file}: nc is {content['nc']}, but there are {len(names)} names")
    root = file.parent
    stated = content.get("path")
    # One that is not there was written on another machine, or is relative to Ultralytics' own folder.
    if stated and (root / str(stated)).is_dir():
        root = Path(os.path.normpath(root / str(stated)))
    described = _Yolo(root, names, {}, [], "kpt_shape" in content)
    for name in WORDS:
        value = content.get(name)
        entries = value if isinstance(value, list) else [value] if value else []
        places = [_placed(str(entry), root, file.parent) for entry in entries]
        absent = [str(entry) for entry, place in zip(entries, places, strict=True) if place is None]
        if absent and name != "test":
            described.notes.append(f"{file} names {name} {', '.join(absent)}, which is not there")
        described.entries[name] = [place for place in places if place is not None]
    if not any(described.entries.values()):
        raise FileNotFoundError(
            f"{file}: there is nothing where it says that images are: "
            f"{ {name: content[name] for name in WORDS if content.get(name)} }, looked in {root}"
        )
    return described


def _placed(entry: str, *bases: Path) -> Path | None:
    # Roboflow writes ../train/images for a folder beside the yaml.
    slashes = entry.replace("\\", "/")  # of a path that Windows wrote
    for text in (entry, slashes, re.sub(r"^(\.\./)+", "", slashes)):
        for base in bases:
            if (base / text).exists():
                return Path(os.path.normpath(base / text))
    return None


def _undescribed(root: Path) -> _Yolo | None:
    """YOLO labels without a data.yaml, as labelImg and others write them."""
    entries = {}
    for name, words in WORDS.items():
        for word in words:
            for images, labels in ((f"images/{word}", f"labels/{word}"), (f"{word}/images", f"{word}/labels")):
                if (root / images).is_dir() and (root / labels).is_dir():
                    entries[name] = [root / images]
    if not entries and (root / "images").is_dir() and (root / "labels").is_dir():
        entries["train"] = [root / "images"]
    classes = [root / name for name in ("classes.txt", "obj.names", "labels/classes.txt", "data/obj.names")]
    classes = [file for file in classes if file.is_file()]
    if not entries and classes and any(file.suffix.lower() in IMAGE_SUFFIXES for file in root.iterdir()):
        entries["train"] = [root]
    if not entries:
        return None
    if not classes:
        if not any(_yolo_label(image) for image in images_in(next(iter(entries.values()))[0])):
            return None  # two folders that are called so, without YOLO's labels
        raise FileNotFoundError(
            f"--data {root}: YOLO's labels, but nothing says what the classes are called; expected names in a "
            "data.yaml, or a classes.txt with one per line"
        )
    lines = [line.strip() for line in text_of(classes[0]).splitlines()]
    return _Yolo(root, dict(enumerate(filter(None, lines))), entries, [])


def _read_yaml(file: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ValueError(f"{file}: reading it needs PyYAML, which is not installed (pip install pyyaml)") from error
    try:
        return yaml.safe_load(text_of(file))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def read_yolo(described: _Yolo, known: Mapping[str, int]) -> Found:
    """Reads what `find_yolo` or `described_by` found. `known`: name → category id, see `categories_of`.

    Raises:
        ValueError, FileNotFoundError: a malformed label, an image that is not there or cannot be read, a set without
            labels; the message names the file.
    """
    found = Found("YOLO", {}, described.notes)
    indices = sorted(described.names)
    categories = categories_of([described.names[index] for index in indices], known)
    ids = {index: category["id"] for index, category in zip(indices, categories, strict=True)}
    if described.keypoints:
        found.notes.append("the labels' keypoints are left out: boxes only")
    for name, entries in described.entries.items():
        images = list(dict.fromkeys(image for entry in entries for image in _yolo_images(entry, described.root)))
        labels = [_yolo_label(image) for image in images]
        if images and not any(labels):
            raise FileNotFoundError(
                f"{name}: none of the {len(images)} images has a label file; looked for {_yolo_places(images[0])[0]}"
                " and the like"
            )
        sizes = sizes_of(name, images, found.notes)
        root = described.root
        if not all(image.is_relative_to(root) for image in images):
            root = Path(os.path.commonpath([root, *images]))
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        for number, (image, label, size) in enumerate(zip(images, labels, sizes, strict=True), start=1):
            width, height = size
            content["images"].append(
                {"id": number, "file_name": image.relative_to(root).as_posix(), "width": width, "height": height}
            )
            for entry in _yolo_objects(label, ids, size, described.keypoints) if label else ():
                entry |= {"id": len(content["annotations"]) + 1, "image_id": number, "iscrowd": 0}
                content["annotations"].append(entry)
        found.sets[name] = ImageSet(root, content)
        missing = labels.count(None)
        if missing:
            found.notes.append(f"{name}: {missing} images have no label file: taken as images without objects")
        found.notes += label_notes(name, labels, ".txt", is_list=not all(entry.is_dir() for entry in entries))
    return found


def _yolo_images(entry: Path, root: Path) -> list[Path]:
    if entry.is_dir():
        return images_in(entry)
    lines = text_of(entry).splitlines()
    places = [(line, _placed(line, root, entry.parent)) for line in map(str.strip, lines) if line]
    absent = [line for line, place in places if place is None]
    if absent:
        raise FileNotFoundError(
            f"{entry}: {len(absent)} of {len(places)} images are not there, the first: {absent[0]!r}; looked in {root} "
            f"and {entry.parent}"
        )
    return [place for _, place in places if place is not None]


def _yolo_places(image: Path) -> list[Path]:
    """Where an image's label file may be: in labels/ where the image is in images/, or beside it."""
    beside, parts = image.with_suffix(".txt"), image.parts
    if "images" not in parts[:-1]:
        return [beside]
    last = len(parts) - 1 - parts[::-1].index("images")
    return [Path(*parts[:last], "labels", *parts[last + 1 :]).with_suffix(".txt"), beside]


def _yolo_label(image: Path) -> Path | None:
    return next((place for place in _yolo_places(image) if place.is_file()), None)


def _yolo_objects(file: Path, ids: Mapping[int, int], size: tuple[int, int], keypoints: bool) -> list[dict[str, Any]]:
    """The objects of a label file, in pixels. A line: class, then cx cy w h, or the corners of a polygon, in 0..1."""
    width, height = size
    objects = []
    for number, line in enumerate(text_of(file).splitlines(), start=1):
        words = line.split()
        if not words:
            continue
        where = f"{file}:{number}"
        try:
            index, *values = (float(word) for word in words)
        except ValueError:
            raise ValueError(f"{where}: {line!r:.80}; expected numbers: class, centre x and y, width, height") from None
        if keypoints:
            values = values[:4]
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise ValueError(
                f"{where}: {len(words)} numbers; expected 5 (class, centre x and y, width, height), or a class and the "
                "x and y of at least three corners"
            )
        if index not in ids:
            raise ValueError(f"{where}: class {words[0]}; expected one of {_ranged(sorted(ids))}, as there are names")
        if not all(-_SLACK <= value <= 1 + _SLACK for value in values):
            raise ValueError(f"{where}: {line!r:.80}; expected shares of the image's width and height, in 0..1")
        entry: dict[str, Any] = {"category_id": ids[int(index)]}
        if len(values) == 4:
            x, y, w, h = values
            entry["bbox"] = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            entry["area"] = w * width * h * height
        else:
            xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
            entry["bbox"] = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            entry["segmentation"] = [[value for point in zip(xs, ys, strict=True) for value in point]]
            entry["area"] = abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))) / 2
        objects.append(entry)
    return objects


def _ranged(numbers: Sequence[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return f"{first} to {last}" if last - first + 1 == len(numbers) else ", ".join(map(str, numbers))
