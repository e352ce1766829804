"""Finds what is wrong with a COCO-format dataset before the first training step."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from detr_fast.data.annotations import add_line_boxes, check_content, read_json, read_panoptic
from detr_fast.data.categories import Categories
from detr_fast.data.images import ImageReadError, MissingImageError, load_image, load_segment_ids
from detr_fast.data.validation import Findings, outside_problem, stated_size, validate

_UNLABELLED = 0  # the id of pixels that belong to no segment
_SHOWN = 10  # examples printed for each kind of problem
_AT_A_TIME = 4  # images that a process is given at a time; after ctrl-C it decodes those it has


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
    def verdict(self) -> str:
        """ "ok", or the number of errors."""
        count = sum(map(len, self.errors.values()))
        return "ok" if self.ok else f"{count} error{'s' * (count > 1)}"

    @property
    def exit_code(self) -> int:
        """0 if ok, else 1."""
        return 0 if self.ok else 1

    def __str__(self) -> str:
        return f"{self.details}\n{self.verdict}"

    @property
    def details(self) -> str:
        """What there is and what is wrong, without the verdict."""
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
        # A json can hold names that no terminal can print: lone halves of a surrogate pair.
        return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def check_coco(
    images_dir: str | os.PathLike | None,
    ann_file: str | os.PathLike,
    *,
    num_threads: int = 8,
    num_workers: int | None = 0,
    progress: bool = False,
    categories: Categories | None = None,
    allow_outside: bool = False,
) -> DatasetReport:
    """Reads the json and decodes every image; the rules are those of training, see ``detr_fast.data.validation``.

    Errors: a json or image folder that is missing or malformed; image files that are missing, corrupt or outside the
    folder (these are not opened); annotations that are malformed, not finite, of an unknown category or image;
    segmentations that are none; repeated ids; categories that differ from those given.

    Warnings: boxes outside their image or of no extent (training clamps or drops them), or that look like another
    format's; sizes that differ between json and file (the file counts); areas, crowd marks and segmentations that are
    dealt with by a rule; the annotation id 0 (pycocotools counts its matches as misses), categories without
    annotations, an image file that is listed twice.

    Args:
        images_dir: folder to which the json's ``file_name`` are relative. None: only the json is read.
        ann_file: COCO json. One whose annotations have a ``line`` and no ``bbox`` is read as one of line segments.
        num_threads: images decoded at a time, without ``num_workers``.
        num_workers: processes that decode images instead of threads, None: one for each core. What is found, and its
            order, is the same.
        progress: show a bar on stderr, if that is a terminal.
        categories: classes with which those of the json must agree, for instance the training set's.
        allow_outside: take file names that lead out of ``images_dir``.

    Returns:
        a ``DatasetReport``; nothing is raised for what is wrong with the data.

    Raises:
        ChildProcessError: one of the processes was killed.
    """
    pool = _Pool(num_workers, num_threads, progress)
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
        outside = {} if allow_outside else _outside(report.images_dir, content["images"])
        for problem in outside.values():
            found.error("image outside the folder", problem)
        inside = [entry for entry in content["images"] if entry["id"] not in outside]
        sizes = _check_images(report.images_dir, inside, pool, found)
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


def check_panoptic(
    images_dir: str | os.PathLike,
    segments_dir: str | os.PathLike,
    ann_file: str | os.PathLike,
    *,
    num_threads: int = 8,
    num_workers: int | None = 0,
    progress: bool = False,
    allow_outside: bool = False,
) -> DatasetReport:
    """Reads a COCO panoptic json and decodes every image and every PNG of segments, as ``CocoPanoptic`` will.

    Errors: a json or folder that is missing or malformed; files that are missing, corrupt or outside their folder; a
    PNG of another size than its image, or without a segment that the json lists; a segment that is listed twice.

    Warnings: a PNG with segments that the json does not list (they count as unlabelled); sizes that differ between json
    and file.

    Args:
        images_dir, segments_dir: folders to which the ``file_name`` of images and annotations are relative.
        ann_file: COCO panoptic json.
        num_threads: images decoded at a time, without ``num_workers``.
        num_workers: processes that decode images instead of threads, None: one for each core. What is found, and its
            order, is the same.
        progress: show a bar on stderr, if that is a terminal.
        allow_outside: take file names that lead out of their folder.

    Returns:
        a ``DatasetReport`` in which segments are counted as annotations; nothing is raised for what is wrong with the
        data.

    Raises:
        ChildProcessError: one of the processes was killed.
    """
    pool = _Pool(num_workers, num_threads, progress)
    report = DatasetReport(Path(images_dir), Path(ann_file))
    found = Findings()
    report.errors, report.warnings = found.errors, found.warnings
    try:
        content = read_panoptic(ann_file)
    except (OSError, ValueError) as error:
        found.error("annotation file", str(error))
        return report
    images, annotations = content["images"], content.get("annotations", [])
    report.categories = Categories.from_coco(content["categories"])
    names = dict(zip(report.categories.ids, report.categories.names, strict=True))
    segments = [segment for annotation in annotations for segment in annotation["segments_info"]]
    report.num_images, report.num_annotations = len(images), len(segments)
    report.num_crowd = sum(segment["iscrowd"] for segment in segments)
    report.num_without_annotations = len(images) - sum(bool(entry["segments_info"]) for entry in annotations)
    counts = Counter(segment["category_id"] for segment in segments)
    report.class_counts = {names[i]: n for i, n in sorted(counts.items())}
    if not images:
        found.error("annotation file", "there are no images")
    folders = {"image folder": Path(images_dir), "folder of segments": Path(segments_dir)}
    absent = {kind: folder for kind, folder in folders.items() if not folder.is_dir()}
    for kind, folder in absent.items():
        found.error(kind, f"{folder} does not exist")
    if absent:
        return report

    outside: dict[Any, str] = {} if allow_outside else {**_outside(folders["image folder"], images)}
    sizes = _check_images(folders["image folder"], [e for e in images if e["id"] not in outside], pool, found)
    for image in images:
        size, stated = sizes.get(image["id"]), (image["width"], image["height"])
        if size not in (None, stated):
            found.warn(
                "image size (the file's counts)",
                f"image {image['file_name']} (image id {image['id']}) is {size[0]}x{size[1]} pixels, the json says "
                f"{stated[0]}x{stated[1]}",
            )
    for annotation in annotations:
        problem = None if allow_outside else outside_problem(folders["folder of segments"], annotation)
        if problem is not None:
            outside[("segments", annotation["image_id"])] = problem
    for problem in outside.values():
        found.error("image outside the folder", problem)
    inside = [entry for entry in annotations if ("segments", entry["image_id"]) not in outside]

    judge = partial(_judged_segments, folders["folder of segments"])
    tasks = [(annotation, sizes.get(annotation["image_id"])) for annotation in inside]
    for judged in pool.results(judge, tasks, "segments"):
        found = found.joined(judged)
    report.errors, report.warnings = found.errors, found.warnings
    return report


def _judged_segments(folder: Path, task: tuple[dict, tuple[int, int] | None]) -> Findings:
    """Compares one PNG with the list of its segments; the task: (annotation, (width, height) of its image if known)."""
    annotation, size = task
    found, path = Findings(), folder / annotation["file_name"]
    try:
        pixels = load_segment_ids(path)
    except ImageReadError as error:
        found.error(f"{'missing' if isinstance(error, MissingImageError) else 'corrupt'} segments", str(error))
        return found
    which = f"{path} (image id {annotation['image_id']})"
    own = pixels.shape[1], pixels.shape[0]
    if size not in (None, own):
        found.error("size of segments", f"{which} has {own[0]}x{own[1]} pixels, its image {size[0]}x{size[1]}")
    listed = Counter(segment["id"] for segment in annotation["segments_info"])
    drawn = set(np.unique(pixels).tolist())
    for i, n in listed.items():
        if n > 1:
            found.error("repeated segment", f"{which}: segment {i} is listed {n} times")
        if i not in drawn:
            found.error("segment without pixels", f"{which} has no pixel of segment {i}, which the json lists")
    for i in sorted(drawn - set(listed) - {_UNLABELLED}):
        found.warn("segment that is not listed (counts as unlabelled)", f"{which}: segment {i}")
    return found


def _is_of_lines(content: dict) -> bool:
    annotations = content.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else None
    return isinstance(first, dict) and "line" in first and "bbox" not in first


def _outside(folder: Path, images: list[dict]) -> dict[int, str]:
    """Image id → what is wrong with its file name, of those outside the folder."""
    problems = ((entry["id"], outside_problem(folder, entry)) for entry in images)
    return {number: problem for number, problem in problems if problem is not None}


def _check_images(folder: Path, images: list[dict], pool: _Pool, found: Findings) -> dict[int, tuple[int, int]]:
    """Decodes all files; returns image id → (width, height) of those that can be read."""
    sizes = {}
    tasks = [(entry["file_name"], entry["id"], stated_size(entry)) for entry in images]
    for entry, result in zip(images, pool.results(partial(_decoded_size, folder), tasks, "images"), strict=True):
        if isinstance(result, ImageReadError):
            found.error("missing image" if isinstance(result, MissingImageError) else "corrupt image", str(result))
        else:
            sizes[entry["id"]] = result
    return sizes


def _decoded_size(folder: Path, task: tuple[str, int, tuple[int, int] | None]) -> tuple[int, int] | ImageReadError:
    """(width, height) of an image, or what is wrong with it; the task: (file name, id, stated size)."""
    name, image_id, size = task
    try:
        return load_image(folder / name, image_id, size=size).size
    except ImageReadError as error:
        return error


# Several at a time


@dataclass
class _Pool:
    """How images are gone through; the arguments are those of ``check_coco``."""

    num_workers: int | None
    num_threads: int
    progress: bool

    def __post_init__(self) -> None:
        if self.num_workers is None:
            self.num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self.num_workers < 0:
            raise ValueError(f"num_workers is {self.num_workers}; expected 0 or more")

    def results(self, function: Callable[[Any], Any], tasks: Sequence, what: str) -> Iterator:
        """``function`` of every task, in order.

        Raises:
            ChildProcessError: one of the processes was killed.
        """
        # A daemon may have no processes of its own.
        most = 0 if multiprocessing.current_process().daemon else -(-len(tasks) // _AT_A_TIME)
        num_workers = min(self.num_workers or 0, most)
        disable = None if self.progress else True  # None: unless it is a terminal
        done = 0
        try:
            with _executor(num_workers, self.num_threads) as executor:
                results = executor.map(function, tasks, chunksize=_AT_A_TIME)
                bar = _Bar(total=len(tasks), desc=what, unit="", disable=disable, leave=False, dynamic_ncols=True)
                try:
                    for result in results:
                        yield result
                        done += 1
                        bar.update()
                finally:
                    bar.close()
                    executor.shutdown(cancel_futures=True)  # who is interrupted does not wait for the rest
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"a process that decodes {what} was killed, perhaps for want of memory, when {done} of {len(tasks)} "
                "were done; --num_workers states how many there are (0: none, threads instead)"
            ) from error


class _Bar(tqdm):
    """A progress bar without tqdm's thread, so that no process is forked beside it."""

    monitor_interval = 0


def _executor(num_workers: int, num_threads: int) -> ProcessPoolExecutor | ThreadPoolExecutor:
    if not num_workers:
        return ThreadPoolExecutor(num_threads)
    # As a loader's workers; others would import torch first, which takes seconds.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=_begin)


def _begin() -> None:
    """What a process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C goes to all; the first process ends the others
    gc.freeze()  # else a collection would copy the json that it shares with the first process
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without its parent a process would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
