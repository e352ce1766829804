"""Pascal VOC's layout, and an xml beside each image."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detr_fast.data.layouts.files import (
    WORDS,
    Found,
    ImageSet,
    categories_of,
    images_in,
    label_notes,
    sizes_of,
    text_of,
)


@dataclass
class _Voc:
    """`images`: set → image and its xml, if it has one."""

    root: Path
    images: dict[str, list[tuple[Path, Path | None]]]
    annotations: list[Path]
    notes: list[str]


def find_voc(root: Path) -> _Voc | None:
    """The images and their xml files; None: this is no layout of VOC's."""
    below = sorted(path for path in (root / "VOCdevkit").glob("VOC*") if path.is_dir())
    if len(below) > 1:
        raise ValueError(f"--data {root}: {', '.join(path.name for path in below)} in VOCdevkit/; name one of them")
    root = below[0] if below else root
    if (root / "Annotations").is_dir():
        folder = next((root / name for name in ("JPEGImages", "images") if (root / name).is_dir()), root)
        files = sorted((root / "Annotations").rglob("*.xml"))
        return _voc_in_folders(root, folder, files) if files else None
    flat = {name: root / word for name, words in WORDS.items() for word in words if any((root / word).glob("*.xml"))}
    if not flat and any(root.glob("*.xml")):
        flat = {"train": root}
    images, annotations, notes = {}, [], []
    for name, folder in flat.items():
        images[name] = [(image, _xml_of(image, folder, folder)) for image in images_in(folder)]
        annotations += sorted(folder.rglob("*.xml"))
        notes += label_notes(name, [file for _, file in images[name]], ".xml")
    return _Voc(root, images, annotations, notes) if flat else None


def _voc_in_folders(root: Path, folder: Path, files: list[Path]) -> _Voc:
    of_stem = {image.stem: image for image in images_in(folder)}
    lists = root / "ImageSets" / "Main"
    names = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}
    images = {}
    for name, stems in names.items():
        file = next((lists / f"{stem}.txt" for stem in stems if (lists / f"{stem}.txt").is_file()), None)
        if file is None:
            continue
        images[name] = []
        for line in filter(None, map(str.strip, text_of(file).splitlines())):
            stem = line if line in of_stem else line.rsplit(maxsplit=1)[0]
            if stem not in of_stem:
                raise FileNotFoundError(f"{file} names {line!r}; there is no such image in {folder}")
            images[name].append((of_stem[stem], _xml_of(of_stem[stem], folder, root / "Annotations")))
    if images:
        if "train" in images and not (lists / "train.txt").is_file():  # trainval has both
            validating = set(images.get("val", []))
            images["train"] = [each for each in images["train"] if each not in validating]
        return _Voc(root, images, files, [])
    listed = [(image, _xml_of(image, folder, root / "Annotations")) for image in images_in(folder)]
    notes = label_notes("train", [file for _, file in listed], ".xml")
    return _Voc(root, {"train": listed}, files, notes)


def _xml_of(image: Path, images: Path, annotations: Path) -> Path | None:
    """At the same place below the folder of the annotations, or in it."""
    places = [(annotations / image.relative_to(images)).with_suffix(".xml"), annotations / f"{image.stem}.xml"]
    return next((file for file in places if file.is_file()), None)


def read_voc(voc: _Voc, known: Mapping[str, int]) -> Found:
    """Reads what `find_voc` found. `known`: name → category id, see `categories_of`.

    Raises:
        ValueError: a malformed xml, or images that cannot be read; the message names the file.
    """
    found = Found("Pascal VOC", {}, voc.notes)
    trees = {file: _xml(file) for file in voc.annotations}
    objects = {file: _voc_objects(file, tree) for file, tree in trees.items()}
    # Over all sets: an id means the same in each of them.
    names = sorted({entry["name"] for entries in objects.values() for entry in entries})
    if not names:
        raise ValueError(f"{voc.root}: none of the {len(objects)} xml files has an object")
    categories = categories_of(names, known)
    ids = {category["name"]: category["id"] for category in categories}
    # Pixels are numbered from 1, unless a 0 says that this set's tool numbers them from 0.
    first = min(min(entry["corners"][:2]) for entries in objects.values() for entry in entries)
    origin = 1 if first >= 1 else 0
    if not origin:
        found.notes.append("boxes begin at 0: read as 0-based corners; VOC's own count from 1")
    difficult = 0
    for name, images in voc.images.items():
        sizes = sizes_of(name, [image for image, _ in images], found.notes)
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
        found.sets[name] = ImageSet(voc.root, content)
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
