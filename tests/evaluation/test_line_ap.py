"""Structural average precision by hand and against a plain reading of its definition."""

import numpy as np
import pytest
import torch

from detr_fast.evaluation.lines import LineEvaluator, average_precision, match_lines

COCO = pytest.importorskip("pycocotools.coco").COCO


def annotations(per_image, size=(256, 128)):
    """COCO object with images 1, 2, … of `size` and lines x1, y1, x2, y2."""
    coco = COCO()
    coco.dataset = {
        "images": [{"id": i, "width": size[0], "height": size[1]} for i in range(1, len(per_image) + 1)],
        "categories": [{"id": 0, "name": "line"}],
        "annotations": [],
    }
    for i, lines in enumerate(per_image, 1):
        for x1, y1, x2, y2 in lines:
            entry = {"id": len(coco.dataset["annotations"]), "image_id": i, "category_id": 0}
            coco.dataset["annotations"].append({**entry, "line": [x1, y1, x2 - x1, y2 - y1]})
    coco.createIndex()
    return coco


def evaluate(coco, predictions):
    evaluator = LineEvaluator(coco)
    evaluator.update({
        i: {"scores": torch.tensor(scores), "lines": torch.tensor(lines).reshape(-1, 4)}
        for i, (scores, lines) in predictions.items()
    })  # fmt: skip
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    return evaluator


def test_exact_lines_give_one_and_ends_may_be_swapped(capsys):
    lines = [[0.0, 0.0, 100.0, 50.0], [20.0, 100.0, 200.0, 10.0]]
    coco = annotations([lines])
    swapped = [lines[0], lines[1][2:] + lines[1][:2]]
    evaluator = evaluate(coco, {1: ([0.9, 0.8], swapped)})
    assert evaluator.stats == {"sAP5": 1.0, "sAP10": 1.0, "sAP15": 1.0, "distance": 0.0}
    evaluator.summarize()
    out = capsys.readouterr().out
    assert out.count("average precision") == 3 and "= 1.000" in out


def test_thresholds_are_squared_distances_in_128ths_of_the_image():
    # 256 pixels wide: 4 pixels in x are 2 cells; 128 high: 2 pixels in y are 2 cells. Both ends off by 2: 4 + 4 = 8.
    coco = annotations([[[10.0, 10.0, 100.0, 50.0]]])
    stats = evaluate(coco, {1: ([0.9], [[14.0, 10.0, 100.0, 52.0]])}).stats
    assert (stats["sAP5"], stats["sAP10"], stats["sAP15"]) == (0.0, 1.0, 1.0)
    assert stats["distance"] == pytest.approx(2.0)


def test_each_line_is_found_once_and_false_ones_lower_precision():
    lines = [[0.0, 0.0, 100.0, 100.0], [0.0, 100.0, 200.0, 100.0]]
    coco = annotations([lines, []])
    predictions = {
        1: ([0.9, 0.8, 0.6], [lines[0], lines[0], lines[1]]),  # right, a repetition, right
        2: ([0.7], [[5.0, 5.0, 50.0, 50.0]]),  # nothing is there
    }
    # Precision at the two right ones: 1/1 and 2/4.
    assert evaluate(coco, predictions).stats["sAP5"] == pytest.approx(0.5 * 1 + 0.5 * 0.5)


def plain_match(predicted, annotated, threshold):
    taken, right = set(), []
    for p in predicted:
        distance = []
        for a in annotated:
            straight = ((p[:2] - a[:2]) ** 2).sum() + ((p[2:] - a[2:]) ** 2).sum()
            crossed = ((p[:2] - a[2:]) ** 2).sum() + ((p[2:] - a[:2]) ** 2).sum()
            distance.append(min(straight, crossed))
        nearest = int(np.argmin(distance))
        right.append(distance[nearest] < threshold and nearest not in taken)
        if right[-1]:
            taken.add(nearest)
    return np.array(right)


def test_match_and_precision_match_plain():
    rng = np.random.default_rng(0)
    for _ in range(20):
        annotated = rng.uniform(0, 128, (rng.integers(1, 6), 4))
        predicted = annotated[rng.integers(len(annotated), size=12)] + rng.normal(0, 1.2, (12, 4))
        for threshold in (5, 10):
            right = match_lines(predicted, annotated, threshold)
            assert right.tolist() == plain_match(predicted, annotated, threshold).tolist()
            found, area, last = 0, 0.0, 0
            points = []
            for n, is_right in enumerate(right, 1):
                found += is_right
                points.append((found / len(annotated), found / n))
            for recall in sorted({r for r, _ in points if r > 0}):
                area += (recall - last) * max(p for r, p in points if r >= recall)
                last = recall
            assert average_precision(right, len(annotated)) == pytest.approx(area)


def test_distance_matches_one_to_one_with_the_best_predictions():
    lines = [[0.0, 0.0, 0.0, 128.0], [256.0, 0.0, 256.0, 128.0]]
    coco = annotations([lines])
    # The third would be exact, but is not among the two best.
    predictions = {1: ([0.9, 0.8, 0.1], [[2.0, 0.0, 2.0, 128.0], [4.0, 0.0, 4.0, 128.0], lines[1]])}
    assert evaluate(coco, predictions).stats["distance"] == pytest.approx((1 + 126) / 2)


def test_nothing_to_find_and_nothing_found():
    stats = evaluate(annotations([[]]), {1: ([0.5], [[0.0, 0.0, 1.0, 1.0]])}).stats
    assert set(stats.values()) == {-1.0}
    stats = evaluate(annotations([[[0.0, 0.0, 9.0, 9.0]]]), {1: ([], [])}).stats
    assert stats == {"sAP5": 0.0, "sAP10": 0.0, "sAP15": 0.0, "distance": -1.0}


def test_an_image_counts_once():
    line = [0.0, 0.0, 100.0, 100.0]
    evaluator = LineEvaluator(annotations([[line]]))
    for score, x in ((0.9, 0.0), (0.99, 50.0)):
        evaluator.update({1: {"scores": torch.tensor([score]), "lines": torch.tensor([[x, 0.0, 100.0, 100.0]])}})
    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    assert evaluator.stats["sAP5"] == 1.0


def test_rejects():
    evaluator = LineEvaluator(annotations([[]]))
    with pytest.raises(ValueError, match="seen no image"):
        evaluator.synchronize_between_processes()
    with pytest.raises(RuntimeError, match="accumulate"):
        LineEvaluator(annotations([[]])).summarize()
    with pytest.raises(RuntimeError, match="synchronize"):
        LineEvaluator(annotations([[]])).accumulate()
    for image_id, lines, match in (
        (7, torch.zeros(1, 4), "image id 7"),
        (1, torch.zeros(2, 4), "got shapes"),
        (1, torch.full((1, 4), torch.nan), "not finite"),
    ):
        with pytest.raises(ValueError, match=match):
            evaluator.update({image_id: {"scores": torch.ones(1), "lines": lines}})
