"""Finds what is wrong with a COCO-format dataset before the first training step."""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from detr_fast.data.annotations import annotation_problem, read_annotations
from detr_fast.data.images import ImageReadError, MissingImageError, load_image

_SHOWN = 10  # examples printed for each kind of problem
_SLACK = 1.0  # pixels that a box may reach beyond its image: rounding, not a mistake


@dataclass
class DatasetReport:
    """What ``check_coco`` found. ``str(report)`` is for reading.

    Attributes:
        num_images, num_annotations, num_crowd, num_without_annotations: counts.
        class_counts: category name → number of annotations, crowd regions included.
        errors: kind → messages; with them training fails or learns the wrong thing.
        warnings: kind → messages; worth a look, but training deals with them by rule.
    """

    images_dir: Path
    ann_file: Path
    num_images: int = 0
    num_annotations: int = 0
    num_crowd: int = 0
    num_without_annotations: int = 0
    class_counts: dict[str, int] = field(default_factory=dict)
    errors: dict[str, list[str]] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)

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
            f"{self.ann_file} with images in {self.images_dir}",
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


def check_coco(images_dir: str | os.PathLike, ann_file: str | os.PathLike, *, num_threads: int = 8) -> DatasetReport:
    """Reads the json and decodes every image.

    Errors: a json or image folder that is missing or malformed; image files that are missing or corrupt; sizes that
    differ between json and file; annotations that are malformed, not finite, of an unknown category or image;
    repeated ids.

    Warnings: boxes outside their image or of no extent (training clamps or drops them), the annotation id 0
    (pycocotools counts its matches as misses), categories without annotations, an image file that is listed twice.

    Args:
        images_dir: folder to which the json's ``file_name`` are relative.
        ann_file: COCO json.
        num_threads: images decoded at a time.

    Returns:
        a ``DatasetReport``; nothing is raised for what is wrong with the data.
    """
    report = DatasetReport(Path(images_dir), Path(ann_file))
    errors, warnings = defaultdict(list), defaultdict(list)
    try:
        content = read_annotations(ann_file)
    except (OSError, ValueError) as error:
        report.errors = {"annotation file": [str(error)]}
        return report

    names = {entry["id"]: str(entry.get("name", entry["id"])) for entry in content["categories"]}
    if not names:
        errors["annotation file"].append("there are no categories")
    if not content["images"]:
        errors["annotation file"].append("there are no images")
    report.num_images, report.num_annotations = len(content["images"]), len(content["annotations"])
    for key in ("images", "annotations", "categories"):
        counts = Counter(entry["id"] for entry in content[key] if "id" in entry)
        errors["repeated id"] += [f"id {i} occurs {n} times in '{key}'" for i, n in counts.items() if n > 1]
    files = Counter(entry["file_name"] for entry in content["images"])
    warnings["file listed more than once"] += [f"{name} ({n} times)" for name, n in files.items() if n > 1]

    if not report.images_dir.is_dir():
        errors["image folder"].append(f"{images_dir} does not exist")
        sizes = {}
    else:
        sizes = _check_images(report.images_dir, content["images"], num_threads, errors)
    image_of = {entry["id"]: entry for entry in content["images"]}
    counts = Counter()
    for entry in content["annotations"]:
        problem = annotation_problem(entry, names)
        if problem is not None:
            unknown = "unknown category" in problem
            errors["unknown category" if unknown else "malformed annotation"].append(problem)
        if entry.get("iscrowd"):
            report.num_crowd += 1
        if "image_id" in entry and entry["image_id"] not in image_of:
            errors["unknown image"].append(f"annotation {entry.get('id')} has unknown image id {entry['image_id']!r}")
        elif problem is None:
            image = image_of[entry["image_id"]]
            size = sizes.get(entry["image_id"]) or (image.get("width"), image.get("height"))
            _check_box(entry, size, errors, warnings)
        if problem is None:
            counts[entry["category_id"]] += 1
            if entry["id"] == 0:
                warnings["annotation id 0"].append("pycocotools takes a match with it for none; number from 1")

    annotated = {entry["image_id"] for entry in content["annotations"] if "image_id" in entry}
    report.num_without_annotations = len(image_of.keys() - annotated)
    warnings["category without annotations"] += [f"{i} ({name})" for i, name in names.items() if not counts[i]]
    report.class_counts = {names[i]: n for i, n in sorted(counts.items())}
    report.errors = {kind: messages for kind, messages in errors.items() if messages}
    report.warnings = {kind: messages for kind, messages in warnings.items() if messages}
    return report


def _check_images(folder: Path, images: list[dict], num_threads: int, errors) -> dict[int, tuple[int, int]]:
    """Decodes all files; returns image id → (width, height) of those that can be read."""

    def decode(entry: dict) -> tuple[int, int] | ImageReadError:
        try:
            return load_image(folder / entry["file_name"], entry["id"]).size
        except ImageReadError as error:
            return error

    sizes = {}
    with ThreadPoolExecutor(num_threads) as pool:
        for entry, result in zip(images, pool.map(decode, images), strict=True):
            if isinstance(result, ImageReadError):
                errors["missing image" if isinstance(result, MissingImageError) else "corrupt image"].append(
                    str(result)
                )
                continue
            sizes[entry["id"]] = result
            stated = (entry.get("width", result[0]), entry.get("height", result[1]))
            if stated != result:
                errors["image size"].append(
                    f"image {entry['file_name']} (image id {entry['id']}) is {result[0]}x{result[1]} pixels, "
                    f"the json says {stated[0]}x{stated[1]}"
                )
    return sizes


def _check_box(entry: dict, size: tuple[int | None, int | None], errors, warnings) -> None:
    x, y, width, height = entry["bbox"]
    which = f"annotation {entry['id']} (image {entry['image_id']}), bbox {entry['bbox']}"
    if not all(map(math.isfinite, entry["bbox"])):
        errors["box not finite"].append(which)
    elif width <= 0 or height <= 0:
        warnings["box without extent (dropped in training)"].append(which)
    elif None not in size:
        right, bottom = size
        if x >= right or y >= bottom or x + width <= 0 or y + height <= 0:
            warnings["box wholly outside its image (dropped in training)"].append(f"{which}, image {right}x{bottom}")
        elif min(x, y) < -_SLACK or x + width > right + _SLACK or y + height > bottom + _SLACK:
            warnings["box partly outside its image (clamped in training)"].append(f"{which}, image {right}x{bottom}")
