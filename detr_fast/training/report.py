"""The report of an evaluation, ``eval/report.html``: the task's page, and its worst and best images."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from detr_fast.data.images import load_image
from detr_fast.data.validation import stated_size
from detr_fast.evaluation import Evaluator
from detr_fast.evaluation.report import Confusion, Page, Shown, render
from detr_fast.evaluation.rust import draw_confusion
from detr_fast.tasks import Task

_WORST, _BEST = 12, 6  # how many images


def write_report(
    output_dir: Path, task: Task, evaluator: Evaluator, dataset: Any, annotations: Any, source: str = ""
) -> Path:
    """Writes the page and returns its path. Call it in the first process.

    Args:
        output_dir: gets "eval/report.html"; where there is a confusion matrix also "eval/confusion.json" with its
            numbers, and "eval/confusion.png" if matplotlib is installed.
        task: what was evaluated.
        evaluator: after its `summarize`.
        dataset: the validation set, which knows the folder of the images.
        annotations: what `task.annotations` returned.
        source: what was evaluated, for the heading.
    """
    page = task.page(evaluator)
    # Of equally bad ones those with most annotations: an empty image with a false alarm teaches less.
    order = sorted(page.scores, key=lambda i: (page.scores[i], -len(annotations.getAnnIds(i)), i))
    best = [image_id for image_id in reversed(order) if image_id not in order[:_WORST]][:_BEST]
    pictures = {"worst images": order[:_WORST], "best images": best}
    shown = {
        heading: [_shown(image_id, task, page, dataset, annotations) for image_id in ids]
        for heading, ids in pictures.items()
        if ids
    }
    subtitle = f"{len(page.scores)} images" if page.scores else ""
    path = Path(output_dir) / "eval" / "report.html"
    path.parent.mkdir(exist_ok=True)
    title = f"Evaluation of {source or task.name}"
    path.write_text(render(title, subtitle, page, shown), encoding="utf-8", errors="backslashreplace")
    _write_confusion(path.parent, page.confusion)
    return path


def _write_confusion(folder: Path, confusion: Confusion | None) -> None:
    files = folder / "confusion.json", folder / "confusion.png"
    for file in files:
        file.unlink(missing_ok=True)  # of an earlier evaluation
    if confusion is None:
        return
    described = {"names": [*confusion.names, "nothing"], "counts": confusion.counts.tolist(), "note": confusion.note}
    files[0].write_text(json.dumps(described), encoding="utf-8")
    draw_confusion(confusion.names, confusion.counts, files[1])


def annotated_image(image_id: int, dataset: Any, coco: Any) -> tuple[str, Image.Image]:
    """An image's file name, and the image as the model sees it: turned as its annotations are, with 8 bits."""
    entry = coco.loadImgs(image_id)[0]
    path = Path(dataset.img_folder) / entry["file_name"]
    return entry["file_name"], load_image(path, image_id, size=stated_size(entry))


def _shown(image_id: int, task: Task, page: Page, dataset: Any, coco: Any) -> Shown:
    assert page.results is not None
    name, image = annotated_image(image_id, dataset, coco)
    truth = [entry for entry in coco.loadAnns(coco.getAnnIds(image_id)) if not entry.get("iscrowd", 0)]
    result = page.results(image_id)
    pair = task.draw_sample(image, truth, result, page.names, page.threshold, coco)
    labels = [entry.get("category_id") for entry in truth]
    labels += result["labels"][result["scores"] >= page.threshold].tolist()
    classes = [page.names[label] for label in labels if label in page.names]
    return Shown(f"{name} · F1 {page.scores[image_id]:.2f}", *pair, classes)
