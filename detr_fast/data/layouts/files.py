"""What all layouts share: sets of images in memory, and the files of a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from detr_fast.data.images import is_turned_in_place, refuse_pipe, upright_size

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")
# The words by which folders, lists and jsons name a set.
WORDS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


@dataclass
class ImageSet:
    """A set in memory. `file` is the json that says the same, None where there is none."""

    images: Path
    content: dict[str, Any]
    file: Path | None = None


@dataclass
class Found:
    """What a reader gives: the layout's name, "train", "val" and "test" as far as there are such, and remarks."""

    name: str
    sets: dict[str, ImageSet]
    notes: list[str] = field(default_factory=list)


def categories_of(names: Sequence[str], known: Mapping[str, int]) -> list[dict[str, Any]]:
    """With the ids that are known, if all are; otherwise from 1 on, as in the other layouts, so that a checkpoint's
    classes fit whichever of them the data come in."""
    if set(names) <= set(known) and len(set(names)) == len(names):
        return [{"id": known[name], "name": name} for name in names]
    return [{"id": number, "name": name} for number, name in enumerate(names, start=1)]


def images_in(folder: Path) -> list[Path]:
    """The image files in a folder and those below it, by name; not hidden ones, which macOS puts beside each."""
    files = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir())
    return sorted(path for path in files if not path.name.startswith("."))


def text_of(file: Path) -> str:
    """A text file's content, with or without a byte order mark.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} cannot be read: {error}; expected UTF-8") from error


def label_notes(name: str, labels: Sequence[Path | None], suffix: str, *, is_list: bool = False) -> list[str]:
    """Notes on the label files of images (None: it has none): those of several images, which differ in their ending
    alone, and, unless the images are of a list, which may leave some out, those beside them that have no image."""
    uses = Counter(filter(None, labels))
    several = sorted(file for file, count in uses.items() if count > 1)
    notes = (
        [f"{name}: {len(several)} label files are of more than one image, the first: {several[0]}"] if several else []
    )
    return notes if is_list else notes + _unused(name, set(uses), suffix)


def _unused(name: str, used: set[Path], suffix: str) -> list[str]:
    there = {file for folder in {label.parent for label in used} for file in folder.glob(f"*{suffix}")}
    others = ("classes", "README", "train", "val", "test")
    left = sorted(file for file in there - used if not file.name.startswith(others))
    return [f"{name}: {len(left)} label files have no image, the first: {left[0]}"] if left else []


def sizes_of(name: str, images: Sequence[Path], notes: list[str]) -> list[tuple[int, int]]:
    """(width, height) of each as it is shown: turned as its EXIF orientation says, since the labels are drawn on that.

    A turn that leaves the size as it is cannot be stated by it: of these images there is a note.

    Raises:
        ValueError: some cannot be read.
    """
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(_size, images))
    broken = [str(image) for image, size in zip(images, read, strict=True) if size is None]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(f"images that cannot be read: {', '.join(broken[:3])}{more}; mend them or take them away")
    lost = [image for image, size in zip(images, read, strict=True) if size is not None and size[1]]
    if lost:
        notes.append(
            f"{name}: {len(lost)} images, the first {lost[0]}, are mirrored or turned by their EXIF orientation in a "
            "way that keeps their size: they are taken as they are stored, labels too"
        )
    return [size[0] for size in read if size is not None]


def _size(path: Path) -> tuple[tuple[int, int], bool] | None:
    try:
        refuse_pipe(path)
        with Image.open(path) as image:
            return upright_size(image), is_turned_in_place(image)
    except Exception:  # PIL raises what the format's reader does
        return None
