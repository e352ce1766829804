"""Finds what is wrong with a COCO-format dataset before the first training step."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from detr_fast.data.annotations import add_line_boxes, check_content, read_json
from detr_fast.data.categories import Categories
from detr_fast.data.images import ImageReadError, MissingImageError, load_image
from detr_fast.data.validation import Findings, stated_size, validate

_SHOWN = 10  # examples printed for each kind of problem


@dataclass
class DatasetReport:
    """What ``check_coco`` found. ``str(report)`` is for reading.

    Attributes:
        num_images, num_annotations, num_crowd, num_without_annotations: counts.
        class_counts: category name → number of annotations, crowd regions included.
        errors: kind → messages; with them training fails or learns the wrong thing.
        warnings: kind → messages; worth a look, but training deals with them by rule.
        categories: those of the json, None where it cannot be read.
    """

    images_dir: Path | None
    ann_file: Path
    num_images: int = 0
    num_annotations: int = 0
    num_crowd: int = 0
    num_without_annotations: int = 0
    class_counts: dict[str, int] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    categories: Categories | None = None

    @property
    def ok(self) -> bool:
        """No errors; there may be warnings."""
        return not self.errors

    @property
    def exit_code(self) -> int:
        """0 if ok, else 1."""
        return 0 if self.ok else 1

    def __str__(self) -> str:
        lines = [
            f"{self.ann_file} "
            + ("alone, no image was read" if self.images_dir is None else f"with images in {self.images_dir}"),
            f"{self.num_images} images ({self.num_without_annotations} without annotations), "
            f"{self.num_annotations} annotations ({self.num_crowd} crowd), {len(self.class_counts)} classes",
        ]
        lines += [f"  {count:>8}  {name}" for name, count in sorted(self.class_counts.items(), key=lambda c: -c[1])]
        for title, problems in (("ERROR", self.errors), ("warning", self.warnings)):
            for kind, messages in problems.items():
                lines.append(f"{title}: {kind} ({len(messages)})")
                lines += [f"  {message}" for message in messages[:_SHOWN]]
                if len(messages) > _SHOWN:
                    lines.append(f"  … and {len(messages) - _SHOWN} more")
        count = sum(map(len, self.errors.values()))
        lines.append("ok" if self.ok else f"{count} error{'s' * (count > 1)}")
        return "\n".join(lines)


def check_coco(
    images_dir: str | os.PathLike | None,
    ann_file: str | os.PathLike,
    *,
    num_threads: int = 8,
    categories: Categories | None = None,
) -> DatasetReport:
    """Reads the json and decodes every image; the rules are those of training, see ``detr_fast.data.validation``.

    Errors: a json or image folder that is missing or malformed; image files that are missing or corrupt; annotations
    that are malformed, not finite, of an unknown category or image; segmentations that are none; repeated ids;
    categories that differ from those given.

    Warnings: boxes outside their image or of no extent (training clamps or drops them), or that look like another
    format's; sizes that differ between json and file (the file counts); areas, crowd marks and segmentations that are
    dealt with by a rule; the annotation id 0 (pycocotools counts its matches as misses), categories without
    annotations, an image file that is listed twice.

    Args:
        images_dir: folder to which the json's ``file_name`` are relative. None: only the json is read.
        ann_file: COCO json. One whose annotations have a ``line`` and no ``bbox`` is read as one of line segments.
        num_threads: images decoded at a time.
        categories: classes with which those of the json must agree, for instance the training set's.

    Returns:
        a ``DatasetReport``; nothing is raised for what is wrong with the data.
    """
    report = DatasetReport(None if images_dir is None else Path(images_dir), Path(ann_file))
    try:
        content = read_json(ann_file)
        lines = _is_of_lines(content)
        (add_line_boxes if lines else check_content)(content, ann_file)
    except (OSError, ValueError) as error:
        report.errors = {"annotation file": [str(error)]}
        return report

    found = Findings()
    report.num_images, report.num_annotations = len(content["images"]), len(content["annotations"])
    for key in ("categories", "images"):
        if not content[key]:
            found.error("annotation file", f"there are no {key}")
    sizes: dict[int, tuple[int, int]] = {}
    if report.images_dir is not None and not report.images_dir.is_dir():
        found.error("image folder", f"{images_dir} does not exist")
    elif report.images_dir is not None:
        sizes = _check_images(report.images_dir, content["images"], num_threads, found)
    if content["categories"]:
        report.categories = Categories.from_coco(content["categories"])
        names = dict(zip(report.categories.ids, report.categories.names, strict=True))
        judged = validate(content, report.categories if categories is None else categories, sizes, lines=lines)
        found = found.joined(judged)
        annotations = [entry for n, entry in enumerate(content["annotations"]) if n not in judged.broken]
        report.num_crowd = sum(entry["iscrowd"] for entry in annotations)
        counts = Counter(entry["category_id"] for entry in annotations)
        report.class_counts = {names.get(i, str(i)): n for i, n in sorted(counts.items())}
        annotated = {entry["image_id"] for entry in annotations}
        report.num_without_annotations = len({entry["id"] for entry in content["images"]} - annotated)
    report.errors, report.warnings = found.errors, found.warnings
    return report


def _is_of_lines(content: dict) -> bool:
    annotations = content.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    return isinstance(first, dict) and "line" in first and "bbox" not in first


def _check_images(folder: Path, images: list[dict], num_threads: int, found: Findings) -> dict[int, tuple[int, int]]:
    """Decodes all files; returns image id → (width, height) of those that can be read."""

    def decode(entry: dict) -> tuple[int, int] | ImageReadError:
        try:
            return load_image(folder / entry["file_name"], entry["id"], size=stated_size(entry)).size
        except ImageReadError as error:
            return error

    sizes = {}
    with ThreadPoolExecutor(num_threads) as pool:
        for entry, result in zip(images, pool.map(decode, images), strict=True):
            if isinstance(result, ImageReadError):
                found.error("missing image" if isinstance(result, MissingImageError) else "corrupt image", str(result))
            else:
                sizes[entry["id"]] = result
    return sizes
