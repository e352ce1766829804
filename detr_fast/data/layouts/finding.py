"""Which layout a folder has, what is trained and what validates, and the jsons that say so."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr_fast.data.layouts.coco import find_coco, read_coco
from detr_fast.data.layouts.files import Found, ImageSet
from detr_fast.data.layouts.voc import find_voc, read_voc
from detr_fast.data.layouts.yolo import described_by, find_yolo, read_yolo

_HELD_OUT = 10  # one of so many training images validates, where there are no others
_LISTED = 12  # entries of a folder in a message

_LOOKED_FOR = (
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
        found = read_yolo(described_by(root), ids or {})
    else:
        found = _read(root, ids or {})
    found.sets = {name: each for name, each in found.sets.items() if each.content["images"]}
    if not found.sets:
        raise FileNotFoundError(f"--data {root}: {found.name}, but there are no images")
    _choose(found)
    lines = [f"--data {root}: {found.name}", *(f"{name}: {_count(each.content)}" for name, each in found.sets.items())]
    written = {name: each for name, each in found.sets.items() if each.file is None}
    if written:
        cache = _cache_folder(root, ids or {})
        for name, each in written.items():
            each.file = _write(cache / f"{name}.json", each.content)
        found.notes.append(f"as COCO jsons in {cache}: {', '.join(f'{name}.json' for name in written)}")
    splits = {name: Split(each.images, each.file) for name, each in found.sets.items() if each.file is not None}
    return Layout(found.name, splits, (*lines, *found.notes))


def _read(root: Path, ids: Mapping[str, int]) -> Found:
    kinds: list[tuple[str, Callable[[Path], Any], Callable[[Any, Mapping[str, int]], Found]]] = [
        ("COCO", find_coco, read_coco),
        ("YOLO", find_yolo, read_yolo),
        ("Pascal VOC", find_voc, read_voc),
    ]
    there = [(name, what, read) for name, find, read in kinds if (what := find(root))]
    inside = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))]
    if not there and len(inside) == 1:
        # An archive that was unpacked into a folder of its own.
        there = [(name, what, read) for name, find, read in kinds if (what := find(inside[0]))]
    if not there:
        raise FileNotFoundError(
            f"--data {root}: no layout that is known. Looked for {_LOOKED_FOR}. There is {_listing(root)}"
        )
    if len(there) > 1:
        raise ValueError(
            f"--data {root} is labelled in more than one way: {' and '.join(name for name, _, _ in there)}. Name the "
            "YOLO data.yaml instead of the folder, COCO's jsons by --train_ann, --train_images, --val_ann and "
            "--val_images, or take the others away"
        )
    _, what, read = there[0]
    return read(what, ids)


def _choose(found: Found) -> None:
    """Leaves "train" and "val"; takes the latter from the former, or from "test", where there is none."""
    test = found.sets.pop("test", None)
    if test is not None and not found.sets:
        found.sets["val"] = test
        found.notes.append("val: the test set, as there is no other")
    elif test is not None:
        found.notes.append(f"the {len(test.content['images'])} images of the test set are not used")
    if "val" in found.sets:
        if "train" in found.sets and (shared := _files(found.sets["train"]) & _files(found.sets["val"])):
            found.notes.append(
                f"{len(shared)} images are in train and in val, the first: {min(shared)}: validation is too good"
            )
        return
    train = found.sets["train"]
    images = train.content["images"]
    count = math.ceil(len(images) / _HELD_OUT)
    if count == len(images):
        raise ValueError(f"--data: {found.name} with {len(images)} image; expected two at least, one to validate")
    # By a hash of the name: images that are added later move few of the others.
    ordered = sorted(images, key=lambda image: hashlib.sha1(image["file_name"].encode()).digest())
    held = {image["id"] for image in ordered[:count]}
    found.sets = {
        name: ImageSet(
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


def _files(each: ImageSet) -> set[str]:
    return {os.path.join(each.images, image["file_name"]) for image in each.content["images"]}


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
    """Writes the json whole or not at all: several processes write the same at the same time.

    One that says the same already stays, with its time: what is kept of it (`detr_fast.data.store`) is used again.
    """
    text = json.dumps(content)
    with suppress(OSError, ValueError):
        if file.read_text(encoding="utf-8") == text:
            return file
    with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False, encoding="utf-8") as temporary:
        try:
            temporary.write(text)
        except BaseException:
            os.unlink(temporary.name)
            raise
    os.replace(temporary.name, file)
    return file


def _listing(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more if names else "nothing"
