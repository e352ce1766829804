"""What the report says of line segments: their structural average precision, and how good each image is."""

from detr_fast.evaluation.lines import GRID, THRESHOLDS, LineEvaluator
from detr_fast.evaluation.report import Page, Table

SCORE = 0.5
_THRESHOLD = 10  # by which an image's lines are right


def lines_page(evaluator: LineEvaluator) -> Page:
    """A page of the evaluator's results, after its `summarize`."""
    rows = [[f"sAP{threshold}", evaluator.stats[f"sAP{threshold}"]] for threshold in THRESHOLDS]
    rows.append([f"distance of matched ends, in 1/{GRID} of the image", evaluator.stats["distance"]])
    counts = {image_id: evaluator.count(image_id, _THRESHOLD, SCORE) for image_id in evaluator.img_ids}
    objects, found, right = (sum(column) for column in zip(*counts.values(), strict=True))
    of_counts = Table(
        "lines",
        ["", "lines"],
        [["annotated", objects], ["found", right], ["missed", objects - right], ["false alarms", found - right]],
        f"Predictions with a score of at least {SCORE}, right as for sAP{_THRESHOLD}.",
    )
    scores = {
        i: 2 * right / (objects + found) if objects + found else 1.0 for i, (objects, found, right) in counts.items()
    }
    tables = [Table("structural average precision", ["", "value"], rows), of_counts]
    return Page(tables, scores=scores, results=evaluator.result_of, threshold=SCORE)
