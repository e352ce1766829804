"""What the report says of boxes and masks: COCO's numbers, classes, curves, confusion, and each image's F1."""

import contextlib
import io
from collections import defaultdict

import numpy as np

from detr_fast.evaluation import rust
from detr_fast.evaluation.coco import CocoEvaluator
from detr_fast.evaluation.report import Chart, Confusion, Curve, Page, Table

IOU, SCORE = 0.5, 0.5
_TITLES = {"bbox": "boxes", "segm": "masks"}
# pycocotools' twelve, in its order.
_TWELVE = (
    "AP, IoU 0.50:0.95", "AP50", "AP75", "AP, small", "AP, medium", "AP, large", "AR, 1 detection", "AR, 10 detections",
    "AR, 100 detections", "AR, small", "AR, medium", "AR, large",
)  # fmt: skip


def coco_page(evaluator: CocoEvaluator) -> Page:
    """A page of the evaluator's results, after its `summarize`."""
    tables, charts = [], []
    kinds = [kind for kind in _TITLES if kind in evaluator.iou_types]
    counted = {kind: _matched(evaluator, kind) for kind in kinds}
    for kind in kinds:
        # -1 stands for "no such object".
        stats = [float(value) if value >= 0 else float("nan") for value in evaluator.coco_eval[kind].stats]
        numbers = list(zip(_TWELVE, stats, strict=True))
        tables.append(Table(f"COCO's numbers of {_TITLES[kind]}", ["", "value"], numbers))
        tables.append(_classes(evaluator, kind, counted[kind][0]))
        charts.append(_curves(evaluator, kind))
    confusion, notes = _confusion(evaluator, kinds[0])
    names = dict(zip(evaluator.coco_eval[kinds[0]].params.catIds, evaluator.per_class(kinds[0]), strict=True))
    return Page(tables, charts, confusion, notes, counted[kinds[-1]][1], evaluator.result_of, names, SCORE)


def _classes(evaluator: CocoEvaluator, kind: str, counts: dict[int, list[int]]) -> Table:
    table = evaluator.per_class(kind)
    coco_eval = evaluator.coco_eval[kind]
    recall = coco_eval.eval["recall"][..., coco_eval.params.areaRngLbl.index("all"), -1].mean(axis=0)  # [categories]
    rows = []
    for (name, row), ar, category in zip(table.items(), recall, coco_eval.params.catIds, strict=True):
        ar = float(ar) if ar >= 0 else float("nan")
        objects, right, wrong = counts.get(category, (0, 0, 0))
        rows.append([name, row["AP"], row["AP50"], ar, objects, right, objects - right, wrong])
    headings = ["class", "AP", "AP50", "AR", "objects", "found", "missed", "false alarms"]
    note = f"The counts are of detections with a score of at least {SCORE} and an IoU of at least {IOU}."
    return Table(f"classes, {_TITLES[kind]}", headings, rows, note, of_classes=True)


def _curves(evaluator: CocoEvaluator, kind: str) -> Chart:
    params = evaluator.coco_eval[kind].params
    precision = evaluator.coco_eval[kind].eval["precision"][..., params.areaRngLbl.index("all"), -1]
    recall = params.recThrs.tolist()
    at_50 = int(np.argmin(np.abs(params.iouThrs - 0.5)))
    at_75 = int(np.argmin(np.abs(params.iouThrs - 0.75)))
    occurs = np.flatnonzero((precision >= 0).all(axis=(0, 1)))  # classes with objects
    curves = []
    if len(occurs):
        of_them = precision[..., occurs]
        means = [("IoU 0.50", of_them[at_50]), ("IoU 0.75", of_them[at_75]), ("IoU 0.50:0.95", of_them.mean(axis=0))]
        curves = [Curve(name, recall, values.mean(axis=1).tolist()) for name, values in means]
    for k, name in enumerate(evaluator.per_class(kind)):
        if k in occurs:
            curves.append(Curve(name, recall, precision[at_50, :, k].tolist(), of_class=True))
    return Chart(f"precision and recall, {_TITLES[kind]}; a chosen class at IoU 0.50", curves)


def _confusion(evaluator: CocoEvaluator, kind: str) -> tuple[Confusion | None, list[str]]:
    if not rust.is_usable():
        return None, ["There is no confusion matrix: it needs the package hotcoco (pip install hotcoco)."]
    params = evaluator.coco_eval[kind].params
    counts = rust.confusion(evaluator.coco_gt, evaluator.detections(SCORE), params, iou=IOU)
    note = (
        f"Rows: annotated classes; columns: predicted ones, with a score of at least {SCORE} and an IoU of at least "
        f"{IOU}. The last column is missed objects, the last row false alarms. Colours are shares of a row."
    )
    return Confusion(list(evaluator.per_class(kind)), counts, note), []


def _matched(evaluator: CocoEvaluator, kind: str) -> tuple[dict[int, list[int]], dict[int, float]]:
    """Category id → [objects, right detections, wrong ones], and image id → F1, of confident detections.

    Images with neither objects nor detections have an F1 of 1.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    confident = evaluator.results(kind, SCORE)
    with contextlib.redirect_stdout(io.StringIO()):
        # loadRes cannot take an empty list.
        found = evaluator.coco_gt.loadRes(confident) if confident else COCO()
        evaluation = COCOeval(evaluator.coco_gt, found, kind)
        params = evaluation.params
        params.imgIds = evaluator.coco_eval[kind].params.imgIds
        params.iouThrs, params.maxDets = np.array([IOU]), [100]
        params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
        evaluation.evaluate()
    of_class: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
    of_image = {image_id: [0, 0, 0] for image_id in params.imgIds}
    for entry in evaluation.evalImgs:
        if entry is None:
            continue
        counts_too = ~entry["dtIgnore"][0].astype(bool)
        hit = entry["dtMatches"][0] > 0
        new = (int((entry["gtIgnore"] == 0).sum()), int((hit & counts_too).sum()), int((~hit & counts_too).sum()))
        for sums in (of_class[entry["category_id"]], of_image[entry["image_id"]]):
            sums[:] = [a + b for a, b in zip(sums, new, strict=True)]
    f1 = {
        int(image_id): 2 * right / (objects + right + wrong) if objects + wrong else 1.0
        for image_id, (objects, right, wrong) in of_image.items()
    }
    return dict(of_class), f1
