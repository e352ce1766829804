"""Folders of labelled images as other tools write them: found, read, and given as COCO jsons.

COCO, Roboflow's COCO, YOLO (Ultralytics) and Pascal VOC. What is not a COCO json already is written as one, so that
checking, training and evaluation see a single format.

The readers are our own: supervision's take one folder of images at a time, without the lists of a data set, turn
polygons into bitmaps, and leave out VOC's "difficult" mark.

Source of the formats: docs.ultralytics.com/datasets; M. Everingham et al., "The PASCAL VOC Challenge development kit".
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from detr_fast.data.annotations import check_content, read_json

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
# The words by which folders, lists and jsons name a set.
_WORDS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_HELD_OUT = 10  # one of so many training images validates, where there are no others
_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 swap width and height
_SLACK = 0.01  # that a normalised coordinate may leave 0..1 by: rounding, not another unit
_LISTED = 12  # entries of a folder in a message

LOOKED_FOR = (
    "COCO: annotations/instances_{train,val}2017.json beside train2017/ and val2017/, or *train*.json and *val*.json "
    "beside their images; Roboflow's COCO: {train,valid}/_annotations.coco.json; YOLO: data.yaml, or images/ and "
    "labels/ with classes.txt; Pascal VOC: Annotations/ and JPEGImages/, or an .xml beside each image"
)


@dataclass(frozen=True)
class Split:
    """A set of images: the folder to which the json's ``file_name`` are relative, and the COCO json."""

    images: Path
    annotations: Path


@dataclass(frozen=True)
class Layout:
    """What `find_layout` found.

    Attributes:
        name: of the layout.
        splits: "train" and "val", or one of them.
        lines: for the user: what was found, how many images and boxes of each class, and what was decided.
    """

    name: str
    splits: dict[str, Split]
    lines: tuple[str, ...]


@dataclass
class _Set:
    """A set in memory. `file` is the json that says the same, None where there is none."""

    images: Path
    content: dict[str, Any]
    file: Path | None = None


@dataclass
class _Found:
    name: str
    sets: dict[str, _Set]
    notes: list[str] = field(default_factory=list)


def find_layout(path: str | os.PathLike, ids: Mapping[str, int] | None = None) -> Layout:
    """Finds out how a folder's images are labelled, and makes COCO jsons of it.

    A folder without validation images lends a tenth of its training images, always the same. Images without objects
    stay. The jsons that have to be written go to ``$DETR_FAST_CACHE``, or else ``~/.cache/detr_fast``.

    Args:
        path: the folder, or a YOLO data.yaml.
        ids: name → category id, of the model that is evaluated. A YOLO or VOC folder, whose classes are numbered by
            their order, gets these ids if all its names are among them.

    Raises:
        FileNotFoundError: there is no such folder, or nothing in it that is known; the message lists what is.
        ValueError: more than one layout fits, or a file is malformed; the message names file and line.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"--data {root}: there is no such folder")
    # Links stay as they are: names are given as the user knows them.
    root = Path(os.path.abspath(root))
    if root.is_file():
        if root.suffix not in (".yaml", ".yml"):
            raise ValueError(f"--data {root} is a file; expected a folder, or a YOLO data.yaml")
        found = _read_yolo(_described_by(root), ids or {})
    else:
        found = _read(root, ids or {})
    found.sets = {name: each for name, each in found.sets.items() if each.content["images"]}
    if not found.sets:
        raise FileNotFoundError(f"--data {root}: {found.name}, but there are no images")
    _choose(found)
    cache = _cache_folder(root, ids or {})
    splits, lines = {}, [f"--data {root}: {found.name}"]
    for name, each in found.sets.items():
        splits[name] = Split(each.images, each.file or _write(cache / f"{name}.json", each.content))
        lines.append(f"{name}: {_count(each.content)}")
    written = [name for name, each in found.sets.items() if each.file is None]
    if written:
        found.notes.append(f"as COCO jsons in {cache}: {', '.join(f'{name}.json' for name in written)}")
    return Layout(found.name, splits, (*lines, *found.notes))


def _read(root: Path, ids: Mapping[str, int]) -> _Found:
    kinds: list[tuple[str, Callable[[Path], Any], Callable[[Any, Mapping[str, int]], _Found]]] = [
        ("COCO", _coco_files, _read_coco),
        ("YOLO", _find_yolo, _read_yolo),
        ("Pascal VOC", _find_voc, _read_voc),
    ]
    there = [(name, what, read) for name, find, read in kinds if (what := find(root))]
    if not there:
        raise FileNotFoundError(
            f"--data {root}: no layout that is known. Looked for {LOOKED_FOR}. There is {_listing(root)}"
        )
    if len(there) > 1:
        raise ValueError(
            f"--data {root} is labelled in more than one way: {' and '.join(name for name, _, _ in there)}. Name the "
            "YOLO data.yaml instead of the folder, COCO's jsons by --train_ann, --train_images, --val_ann and "
            "--val_images, or take the others away"
        )
    _, what, read = there[0]
    return read(what, ids)


def _choose(found: _Found) -> None:
    """Leaves "train" and "val"; takes the latter from the former, or from "test", where there is none."""
    test = found.sets.pop("test", None)
    if "val" in found.sets:
        if test is not None:
            found.notes.append(f"the {len(test.content['images'])} images of the test set are not used")
        return
    if "train" not in found.sets:
        assert test is not None  # there is a set
        found.sets["val"] = test
        found.notes.append("val: the test set, as there is no other")
        return
    if test is not None:
        found.notes.append(f"the {len(test.content['images'])} images of the test set are not used")
    train = found.sets["train"]
    images = train.content["images"]
    count = math.ceil(len(images) / _HELD_OUT)
    if count == len(images):
        raise ValueError(f"--data: {found.name} with {len(images)} image; expected two at least, one to validate")
    # By a hash of the name: images that are added later move few of the others.
    ordered = sorted(images, key=lambda image: hashlib.sha1(image["file_name"].encode()).digest())
    held = {image["id"] for image in ordered[:count]}
    found.sets = {
        name: _Set(
            train.images,
            {
                **train.content,
                "images": [image for image in images if (image["id"] in held) == held_out],
                "annotations": [
                    entry
                    for entry in train.content["annotations"]
                    if (_number(entry.get("image_id")) in held) == held_out
                ],
            },
        )
        for name, held_out in (("train", False), ("val", True))
    }
    found.notes.append(f"no validation set: {count} of the {len(images)} training images validate instead")


def _count(content: Mapping[str, Any]) -> str:
    counts = Counter(_number(entry.get("category_id")) for entry in content["annotations"])
    annotated = {_number(entry.get("image_id")) for entry in content["annotations"]}
    empty = sum(image["id"] not in annotated for image in content["images"])
    names = [(str(c.get("name", c["id"])), counts[c["id"]]) for c in content["categories"]]
    classes = ", ".join(f"{name} {count}" for name, count in names)
    return (
        f"{len(content['images'])} images ({empty} without objects), {len(content['annotations'])} objects: {classes}"
    )


def _number(value: Any) -> int | None:
    """An id; None for what is none, of which checking the data will speak."""
    return value if isinstance(value, int) else None


# COCO


def _coco_files(root: Path) -> dict[str, tuple[Path, list[Path]]]:
    """Set → its json and the folders in which its images may lie; empty if this is no COCO layout."""
    roboflow = {
        name: (file, [file.parent])
        for name, words in _WORDS.items()
        for word in words
        if (file := root / word / "_annotations.coco.json").is_file()
    }
    if roboflow:
        return roboflow
    files = sorted((root / "annotations").glob("*.json")) or sorted(root.glob("*.json"))
    of_set: dict[str, list[Path]] = {}
    for file in files:
        name = _set_of(file.stem)
        if name is not None:
            of_set.setdefault(name, []).append(file)
    found = {}
    for name, candidates in of_set.items():
        if len(candidates) > 1:
            # COCO's own folder also has captions, key points and panoptic segments.
            candidates = [file for file in candidates if file.stem.startswith("instances")] or candidates
        candidates = [file for file in candidates if _is_coco(file)]
        if len(candidates) > 1:
            listed = ", ".join(str(file) for file in candidates)
            raise ValueError(f"--data {root}: more than one json for {name}: {listed}; use --train_ann and the like")
        if candidates:
            words = re.findall(r"[a-z]+\d*", candidates[0].stem.lower())
            folders = [word for word in words if _set_of(word)] + list(_WORDS[name])
            places = [root / folder for folder in folders] + [root / "images" / folder for folder in folders]
            found[name] = (candidates[0], [*places, *(root / folder / "images" for folder in folders)])
    if not found:
        # A single export, as of CVAT or Label Studio.
        single = [file for file in files if _is_coco(file)]
        if len(single) > 1:
            raise ValueError(
                f"--data {root}: jsons that name no set: {', '.join(file.name for file in single)}; expected 'train' "
                "and 'val' in their names"
            )
        found = {"train": (single[0], [])} if single else {}
    common = [root / "images", root / "JPEGImages", root]
    return {name: (file, [*places, file.parent, *common]) for name, (file, places) in found.items()}


def _set_of(name: str) -> str | None:
    """The set that a name speaks of: "instances_train2017" of "train"."""
    words = re.split(r"[^a-z]+", name.lower())
    sets = [each for each, known in _WORDS.items() if any(word in known for word in words)]
    return sets[0] if len(sets) == 1 else None


def _is_coco(file: Path) -> bool:
    # One that cannot be read, too, where it says by its name what it is: the reader's message says what is wrong.
    if file.stem.startswith("instances"):
        return True
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return _set_of(file.stem) is not None
    if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= set(content):
        return False
    annotations = content["annotations"]
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    return not (isinstance(first, dict) and "segments_info" in first)  # panoptic


def _read_coco(files: Mapping[str, tuple[Path, list[Path]]], ids: Mapping[str, int]) -> _Found:
    found, contents = _Found("COCO", {}), {}
    for name, (file, _) in files.items():
        content = contents[name] = read_json(file)
        if name == "test" and "annotations" not in content:
            del contents[name]
            continue
        check_content(content, file)
    placeholder = _placeholder(list(contents.values()))
    for name, content in contents.items():
        file, places = files[name]
        if file.name == "_annotations.coco.json":
            found.name = "Roboflow's COCO"
        changed = False
        if placeholder is not None:
            content["categories"] = [c for c in content["categories"] if c["id"] != placeholder["id"]]
            changed = True
        if found.name != "COCO" and any(entry.get("id") == 0 for entry in content["annotations"]):
            # pycocotools takes a match with annotation 0 for none.
            for number, entry in enumerate(content["annotations"], start=1):
                entry["id"] = number
            changed = True
        images = _image_folder(file, content["images"], places)
        found.sets[name] = _Set(images, content, None if changed else file)
    if placeholder is not None:
        found.notes.append(
            f"category {placeholder['id']} ({placeholder.get('name')!r}) is left out: Roboflow's placeholder, which "
            "no object has"
        )
    return found


def _placeholder(contents: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Roboflow's category 0, which stands for the whole project: the supercategory of the others, without objects."""
    for content in contents:
        for category in content["categories"]:
            others = [other for other in content["categories"] if other["id"] != category["id"]]
            is_above = any(other.get("supercategory") == category.get("name") for other in others)
            if category["id"] == 0 and category.get("supercategory") == "none" and is_above:
                used = any(entry.get("category_id") == 0 for each in contents for entry in each["annotations"])
                return None if used else category
    return None


def _image_folder(file: Path, images: Sequence[Mapping[str, Any]], places: Sequence[Path]) -> Path:
    """The folder that has the most of the first images."""
    first = [image["file_name"] for image in images[:20]]
    places = [place for place in dict.fromkeys(places) if place.is_dir()]
    counts = [sum((place / name).is_file() for name in first) for place in places]
    if first and not any(counts):
        raise FileNotFoundError(
            f"{file}: no folder with its images, such as {first[0]!r}; looked in {', '.join(map(str, places))}. If "
            "they lie elsewhere, use --train_ann, --train_images and the like"
        )
    return places[counts.index(max(counts))] if counts else file.parent


# YOLO


@dataclass
class _Yolo:
    """`entries`: set → folders of images or lists of them; `names`: class index → name; `boxed`: keypoints follow."""

    root: Path
    names: dict[int, str]
    entries: dict[str, list[Path]]
    notes: list[str]
    keypoints: bool = False


def _find_yolo(root: Path) -> _Yolo | None:
    files = [file for pattern in ("*.yaml", "*.yml") for file in sorted(root.glob(pattern))]
    usual = [file for file in files if file.stem in ("data", "dataset")]
    for file in usual or files:
        content = _read_yaml(file)
        if isinstance(content, dict) and "names" in content and {"train", "val"} & set(content):
            others = [str(other.name) for other in files if other != file] if not usual else []
            if others:
                raise ValueError(f"--data {root}: more than one yaml, {', '.join([file.name, *others])}; name one")
            return _described_by(file)
    return _undescribed(root)


def _described_by(file: Path) -> _Yolo:
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
    for name in _WORDS:
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
            f"{ {name: content[name] for name in _WORDS if content.get(name)} }, looked in {root}"
        )
    return described


def _placed(entry: str, *bases: Path) -> Path | None:
    # Roboflow writes ../train/images for a folder beside the yaml.
    for text in (entry, re.sub(r"^(\.\./)+", "", entry)):
        for base in bases:
            if (base / text).exists():
                return Path(os.path.normpath(base / text))
    return None


def _undescribed(root: Path) -> _Yolo | None:
    """YOLO labels without a data.yaml, as labelImg and others write them."""
    entries = {}
    for name, words in _WORDS.items():
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
        if not any(_yolo_label(image) for image in _images_in(next(iter(entries.values()))[0])):
            return None  # two folders that are called so, without YOLO's labels
        raise FileNotFoundError(
            f"--data {root}: YOLO's labels, but nothing says what the classes are called; expected names in a "
            "data.yaml, or a classes.txt with one per line"
        )
    lines = [line.strip() for line in classes[0].read_text(encoding="utf-8-sig").splitlines()]
    return _Yolo(root, dict(enumerate(filter(None, lines))), entries, [])


def _read_yaml(file: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ValueError(f"{file}: reading it needs PyYAML, which is not installed (pip install pyyaml)") from error
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def _read_yolo(described: _Yolo, known: Mapping[str, int]) -> _Found:
    found = _Found("YOLO", {}, described.notes)
    indices = sorted(described.names)
    categories = _categories([described.names[index] for index in indices], known)
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
        sizes = _sizes(images)
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
        found.sets[name] = _Set(root, content)
        missing = labels.count(None)
        if missing:
            found.notes.append(f"{name}: {missing} images have no label file: taken as images without objects")
        used = {label for label in labels if label}
        if all(entry.is_dir() for entry in entries):  # a list may leave some out
            found.notes += _unused(name, used, ".txt")
    return found


def _yolo_images(entry: Path, root: Path) -> list[Path]:
    if entry.is_dir():
        return _images_in(entry)
    lines = entry.read_text(encoding="utf-8-sig").splitlines()
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
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), start=1):
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


# Pascal VOC


@dataclass
class _Voc:
    """`images`: set → image and its xml, if it has one."""

    root: Path
    images: dict[str, list[tuple[Path, Path | None]]]
    annotations: list[Path]
    notes: list[str]


def _find_voc(root: Path) -> _Voc | None:
    below = sorted(path for path in (root / "VOCdevkit").glob("VOC*") if path.is_dir())
    if len(below) > 1:
        raise ValueError(f"--data {root}: {', '.join(path.name for path in below)} in VOCdevkit/; name one of them")
    root = below[0] if below else root
    if (root / "Annotations").is_dir():
        folder = next((root / name for name in ("JPEGImages", "images") if (root / name).is_dir()), root)
        files = sorted((root / "Annotations").glob("*.xml"))
        return _voc_in_folders(root, folder, files) if files else None
    flat = {name: root / word for name, words in _WORDS.items() for word in words if any((root / word).glob("*.xml"))}
    if not flat and any(root.glob("*.xml")):
        flat = {"train": root}
    images, annotations, notes = {}, [], []
    for name, folder in flat.items():
        images[name] = [(image, _xml_of(image, folder)) for image in _images_in(folder)]
        annotations += sorted(folder.glob("*.xml"))
        notes += _unused(name, {file for _, file in images[name] if file}, ".xml")
    return _Voc(root, images, annotations, notes) if flat else None


def _voc_in_folders(root: Path, folder: Path, files: list[Path]) -> _Voc:
    of_stem = {image.stem: image for image in _images_in(folder)}
    lists = root / "ImageSets" / "Main"
    names = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}
    images = {}
    for name, stems in names.items():
        file = next((lists / f"{stem}.txt" for stem in stems if (lists / f"{stem}.txt").is_file()), None)
        if file is None:
            continue
        images[name] = []
        for line in filter(None, map(str.strip, file.read_text(encoding="utf-8-sig").splitlines())):
            stem = line if line in of_stem else line.split()[0]
            if stem not in of_stem:
                raise FileNotFoundError(f"{file} names {line!r}; there is no such image in {folder}")
            images[name].append((of_stem[stem], _xml_of(of_stem[stem], root / "Annotations")))
    if images:
        return _Voc(root, images, files, [])
    listed = [(image, _xml_of(image, root / "Annotations")) for image in of_stem.values()]
    notes = _unused("train", {file for _, file in listed if file}, ".xml")
    return _Voc(root, {"train": listed}, files, notes)


def _xml_of(image: Path, folder: Path) -> Path | None:
    file = folder / f"{image.stem}.xml"
    return file if file.is_file() else None


def _read_voc(voc: _Voc, known: Mapping[str, int]) -> _Found:
    found = _Found("Pascal VOC", {}, voc.notes)
    trees = {file: _xml(file) for file in voc.annotations}
    objects = {file: _voc_objects(file, tree) for file, tree in trees.items()}
    # Over all sets: an id means the same in each of them.
    names = sorted({entry["name"] for entries in objects.values() for entry in entries})
    if not names:
        raise ValueError(f"{voc.root}: none of the {len(objects)} xml files has an object")
    categories = _categories(names, known)
    ids = {category["name"]: category["id"] for category in categories}
    # Pixels are numbered from 1, unless a 0 says that this set's tool numbers them from 0.
    first = min(min(entry["corners"][:2]) for entries in objects.values() for entry in entries)
    origin = 1 if first >= 1 else 0
    if not origin:
        found.notes.append("boxes begin at 0: read as 0-based corners; VOC's own count from 1")
    difficult = 0
    for name, images in voc.images.items():
        sizes = _sizes([image for image, _ in images])
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        for number, ((image, file), (width, height)) in enumerate(zip(images, sizes, strict=True), start=1):
            if file and [trees[file].findtext(f"size/{key}") for key in ("height", "width")] == [
                str(width),
                str(height),
            ]:
                width, height = height, width  # drawn on the image as it lies in the file
            content["images"].append(
                {"id": number, "file_name": image.relative_to(voc.root).as_posix(), "width": width, "height": height}
            )
            for entry in objects[file] if file else ():
                x0, y0, x1, y1 = entry["corners"]
                box = [x0 - origin, y0 - origin, x1 - x0 + origin, y1 - y0 + origin]
                difficult += entry["difficult"]
                content["annotations"].append(
                    {
                        "id": len(content["annotations"]) + 1,
                        "image_id": number,
                        "category_id": ids[entry["name"]],
                        "bbox": box,
                        "area": box[2] * box[3],
                        "iscrowd": int(entry["difficult"]),
                    }
                )
        found.sets[name] = _Set(voc.root, content)
        missing = sum(file is None for _, file in images)
        if missing:
            found.notes.append(f"{name}: {missing} images have no xml: taken as images without objects")
    if difficult:
        found.notes.append(
            f"{difficult} objects are marked as difficult: as in VOC's evaluation, finding one counts neither for nor "
            "against (iscrowd), and training leaves them out"
        )
    return found


def _xml(file: Path) -> ET.Element:
    try:
        return ET.fromstring(file.read_bytes())
    except ET.ParseError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _voc_objects(file: Path, tree: ET.Element) -> list[dict[str, Any]]:
    """Name, corners (as they stand) and difficult of each object in an xml."""
    objects = []
    for number, entry in enumerate(tree.findall("object"), start=1):
        name, box = (entry.findtext("name") or "").strip(), entry.find("bndbox")
        texts = [box.findtext(key) for key in ("xmin", "ymin", "xmax", "ymax")] if box is not None else []
        try:
            corners = [float(text or "") for text in texts]
        except ValueError:
            corners = []
        if not name or len(corners) != 4 or not all(map(math.isfinite, corners)):
            raise ValueError(
                f"{file}: object {number} ({name or 'without a name'}) has bndbox {texts}; expected a name and xmin, "
                "ymin, xmax, ymax"
            )
        is_difficult = (entry.findtext("difficult") or "0").strip() not in ("0", "")
        objects.append({"name": name, "corners": corners, "difficult": is_difficult})
    return objects


# Files


def _categories(names: Sequence[str], known: Mapping[str, int]) -> list[dict[str, Any]]:
    """With the ids that are known, if all are; otherwise from 1 on, as in the other layouts, so that a checkpoint's
    classes fit whichever of them the data come in."""
    if set(names) <= set(known) and len(set(names)) == len(names):
        return [{"id": known[name], "name": name} for name in names]
    return [{"id": number, "name": name} for number, name in enumerate(names, start=1)]


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())


def _unused(name: str, used: Iterable[Path], suffix: str) -> list[str]:
    """A note on the label files beside those in use that have no image."""
    used = set(used)
    there = {file for folder in {label.parent for label in used} for file in folder.glob(f"*{suffix}")}
    others = ("classes", "README", "train", "val", "test")
    left = sorted(file for file in there - used if not file.name.startswith(others))
    return [f"{name}: {len(left)} label files have no image, the first: {left[0]}"] if left else []


def _sizes(images: Sequence[Path]) -> list[tuple[int, int]]:
    """(width, height) of each as it is shown: turned as its EXIF orientation says, since the labels are drawn on that.

    Raises:
        ValueError: some cannot be read.
    """
    with ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(_size, images))
    broken = [str(image) for image, size in zip(images, sizes, strict=True) if size is None]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(f"images that cannot be read: {', '.join(broken[:3])}{more}; mend them or take them away")
    return [size for size in sizes if size is not None]


def _size(path: Path) -> tuple[int, int] | None:
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return (height, width) if turned else (width, height)
    except Exception:  # PIL raises what the format's reader does
        return None


def _cache_folder(root: Path, ids: Mapping[str, int]) -> Path:
    """A folder of its own for each data set; in the temporary folder where there is no home to write to."""
    stated, cache = os.environ.get("DETR_FAST_CACHE"), os.environ.get("XDG_CACHE_HOME")
    base = Path(stated) if stated else (Path(cache) if cache else Path.home() / ".cache") / "detr_fast"
    key = json.dumps([str(root), sorted(ids.items())])
    folder = Path("data", f"{root.name}-{hashlib.sha1(key.encode()).hexdigest()[:8]}")
    try:
        (base / folder).mkdir(parents=True, exist_ok=True)
    except OSError:
        if stated:
            raise
        base = Path(tempfile.gettempdir()) / "detr_fast"
        (base / folder).mkdir(parents=True, exist_ok=True)
    return base / folder


def _write(file: Path, content: Mapping[str, Any]) -> Path:
    """Writes the json whole or not at all: several processes write the same at the same time."""
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False, encoding="utf-8") as temporary:
        try:
            json.dump(content, temporary)
        except BaseException:
            os.unlink(temporary.name)
            raise
    os.replace(temporary.name, file)
    return file


def _listing(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more if names else "nothing"
