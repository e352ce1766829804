"""COCO's layout and Roboflow's export in COCO's format."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detr_fast.data.annotations import check_content, read_json
from detr_fast.data.layouts.files import WORDS, Found, ImageSet


def find_coco(root: Path) -> dict[str, tuple[Path, list[Path]]]:
    """Set → its json and the folders in which its images may lie; empty if this is no COCO layout."""
    roboflow = {
        name: (file, [file.parent])
        for name, words in WORDS.items()
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
            folders = [word for word in words if _set_of(word)] + list(WORDS[name])
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
    sets = [each for each, known in WORDS.items() if any(word in known for word in words)]
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


def read_coco(files: Mapping[str, tuple[Path, list[Path]]], known: Mapping[str, int]) -> Found:
    """Reads what `find_coco` found. `known` is for layouts without ids of their own.

    Raises:
        ValueError, FileNotFoundError: a malformed json, or no folder with its images.
    """
    found, contents = Found("COCO", {}), {}
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
        found.sets[name] = ImageSet(images, content, None if changed else file)
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
    counts = [sum(os.path.isfile(place / name) for name in first) for place in places]
    if first and not any(counts):
        raise FileNotFoundError(
            f"{file}: no folder with its images, such as {first[0]!r}; looked in {', '.join(map(str, places))}. If "
            "they lie elsewhere, use --train_ann, --train_images and the like"
        )
    return places[counts.index(max(counts))] if counts else file.parent
