"""The matcher against exhaustive search over all assignments, and what it refuses."""

import itertools
import math

import pytest
import torch

from detr_fast.criterion import HungarianMatcher


def make_outputs(batch, queries, classes, dtype=torch.float32):
    return {
        "pred_logits": torch.randn(batch, queries, classes, dtype=dtype) * 2,
        "pred_boxes": torch.rand(batch, queries, 4, dtype=dtype) * 0.5 + 0.2,
    }


def make_targets(sizes, classes, dtype=torch.float32):
    return [{"labels": torch.randint(classes, (n,)), "boxes": torch.rand(n, 4, dtype=dtype) * 0.5 + 0.2} for n in sizes]


def pair_cost(logits, box, label, target, weights):
    """The cost of one pair, in plain Python."""
    exponentials = [math.exp(x) for x in logits]
    probability = exponentials[label] / sum(exponentials)
    l1 = sum(abs(p - t) for p, t in zip(box, target, strict=True))

    def corners(b):
        return b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2

    a, b = corners(box), corners(target)
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = box[2] * box[3] + target[2] * target[3] - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    giou = inter / union - (hull - union) / hull
    return -weights[0] * probability + weights[1] * l1 - weights[2] * giou


def best_assignment(costs):
    """All assignments of min(Q, n) pairs tried: the cheapest as (predictions, targets), sorted by prediction."""
    queries, n = len(costs), len(costs[0]) if costs else 0
    k = min(queries, n)
    candidates = (
        sorted(zip(predictions, targets, strict=True))
        for predictions in itertools.permutations(range(queries), k)
        for targets in itertools.combinations(range(n), k)
    )
    return min(candidates, key=lambda pairs: sum(costs[i][j] for i, j in pairs))


@pytest.mark.parametrize("weights", [(1, 5, 2), (1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
@pytest.mark.parametrize("queries, sizes", [(5, (3, 0, 5)), (3, (5, 1)), (1, (4,)), (4, (4, 4))], ids=str)
def test_matcher_finds_the_cheapest_assignment(weights, queries, sizes):
    outputs = make_outputs(len(sizes), queries, 4, torch.float64)
    targets = make_targets(sizes, 3, torch.float64)
    result = HungarianMatcher(*weights)(outputs, targets)
    assert len(result) == len(sizes)
    for image, (prediction, matched) in enumerate(result):
        costs = [
            [
                pair_cost(logits, box, label, target, weights)
                for label, target in zip(
                    targets[image]["labels"].tolist(), targets[image]["boxes"].tolist(), strict=True
                )
            ]
            for logits, box in zip(
                outputs["pred_logits"][image].tolist(), outputs["pred_boxes"][image].tolist(), strict=True
            )
        ]
        expected = best_assignment(costs)
        assert list(zip(prediction.tolist(), matched.tolist(), strict=True)) == expected
        assert prediction.dtype == matched.dtype == torch.int64


def test_matcher_by_hand():
    boxes = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1], [0.5, 0.5, 0.1, 0.1]])
    outputs = {"pred_logits": torch.zeros(1, 3, 2), "pred_boxes": boxes[None]}
    targets = [{"labels": torch.tensor([0, 0]), "boxes": boxes[[2, 0]]}]
    [(prediction, matched)] = HungarianMatcher()(outputs, targets)
    assert prediction.tolist() == [0, 2]
    assert matched.tolist() == [1, 0]


@pytest.mark.parametrize("sizes", [(0,), (0, 0, 0)])
def test_matcher_without_targets(sizes):
    result = HungarianMatcher()(make_outputs(len(sizes), 4, 3), make_targets(sizes, 2))
    assert [(len(i), len(j)) for i, j in result] == [(0, 0)] * len(sizes)
    assert all(i.dtype == j.dtype == torch.int64 for i, j in result)


def test_matcher_without_queries():
    result = HungarianMatcher()(make_outputs(2, 0, 3), make_targets((2, 0), 2))
    assert [(len(i), len(j)) for i, j in result] == [(0, 0)] * 2


def test_matcher_computes_in_float32_inside_autocast():
    outputs, targets = make_outputs(2, 40, 6), make_targets((20, 30), 5)
    matcher = HungarianMatcher(1, 5, 2)
    expected = matcher(outputs, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = matcher(outputs, targets)
    for pairs in zip(expected, actual, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matcher_takes_low_precision(dtype):
    outputs = {k: v.to(dtype) for k, v in make_outputs(2, 30, 6).items()}
    targets = make_targets((12, 9), 5)
    matcher = HungarianMatcher(1, 5, 2)
    expected = matcher({k: v.float() for k, v in outputs.items()}, targets)
    for pairs in zip(expected, matcher(outputs, targets), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


def test_matcher_rejects_weights_of_zero():
    with pytest.raises(ValueError, match="all three are"):
        HungarianMatcher(0, 0, 0)


def spoil(outputs, targets, what):
    if what == "nan-logits":
        outputs["pred_logits"][1, 2, 0] = math.nan
    elif what == "inf-boxes":
        outputs["pred_boxes"][0, 0, 1] = math.inf
    elif what == "nan-target":
        targets[1]["boxes"][0, 0] = math.nan
    elif what == "negative-size":
        targets[0]["boxes"][1, 2] = -0.1
    elif what == "label-too-large":
        targets[1]["labels"][0] = 4
    elif what == "label-negative":
        targets[0]["labels"][1] = -1


@pytest.mark.parametrize(
    "what, message",
    [
        ("nan-logits", r"NaN or infinity in pred_logits \(1 of"),
        ("inf-boxes", r"NaN or infinity in pred_boxes \(1 of"),
        ("nan-target", r"NaN or infinity in targets\[1\]\['boxes'\] \(1 of"),
        ("negative-size", r"targets\[0\]\['boxes'\] has a negative width or height"),
        ("label-too-large", r"targets\[1\]\['labels'\] has 4, the model's classes are 0 to 3"),
        ("label-negative", r"targets\[0\]\['labels'\] has -1"),
    ],
)
def test_matcher_rejects_values(what, message):
    outputs, targets = make_outputs(2, 5, 4), make_targets((3, 2), 3)
    HungarianMatcher()(outputs, targets)
    spoil(outputs, targets, what)
    with pytest.raises(ValueError, match=message):
        HungarianMatcher()(outputs, targets)


def test_matcher_rejects_a_cost_that_overflows():
    outputs, targets = make_outputs(1, 3, 4), make_targets((2,), 3)
    outputs["pred_boxes"][0, 0, 0] = 3e38
    with pytest.raises(ValueError, match="the cost overflows"):
        HungarianMatcher(1, 5, 2)(outputs, targets)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda o, t: o.pop("pred_boxes"), ValueError, "outputs lack the key 'pred_boxes'"),
        (lambda o, t: o.update(pred_logits=o["pred_logits"][0]), ValueError, r"pred_logits must be \[B, Q, K\]"),
        (lambda o, t: o.update(pred_boxes=o["pred_boxes"][:, :2]), ValueError, r"pred_boxes \[B, Q, 4\]"),
        (lambda o, t: o.update(pred_logits=o["pred_logits"].long()), TypeError, "must be floating point"),
        (lambda o, t: t.pop(), ValueError, "got 1 for a batch of 2"),
        (lambda o, t: t[1].pop("labels"), ValueError, r"targets\[1\] lacks the key 'labels'"),
        (lambda o, t: t[0].update(boxes=t[0]["boxes"][:, :3]), ValueError, r"targets\[0\] must have labels \[n\]"),
        (lambda o, t: t[0].update(boxes=torch.zeros(0)), ValueError, r"targets\[0\] must have labels \[n\]"),
        (lambda o, t: t[0].update(labels=t[0]["labels"][:1]), ValueError, r"shapes \(1,\) and \(3, 4\)"),
        (lambda o, t: t[0].update(labels=t[0]["labels"].float()), TypeError, "must be integer, got torch.float32"),
        (lambda o, t: t[0].update(boxes=t[0]["boxes"].long()), TypeError, "must be floating point, got torch.int64"),
        (lambda o, t: t[0].update(labels=t[0]["labels"].to("meta")), ValueError, "is on meta, the predictions are on"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_matcher_rejects_structure(change, error, message):
    outputs, targets = make_outputs(2, 5, 4), make_targets((3, 2), 3)
    change(outputs, targets)
    with pytest.raises(error, match=message):
        HungarianMatcher()(outputs, targets)


@pytest.mark.parametrize(
    "outputs, targets, message",
    [
        (None, [], "outputs is a NoneType; expected a dict of tensors"),
        ([torch.zeros(1)], [], "outputs is a list; expected a dict of tensors"),
        ({"pred_logits": None}, None, "pred_logits is a NoneType; expected a tensor"),
        ({"pred_boxes": [[0.5] * 4]}, None, "pred_boxes is a list; expected a tensor"),
        ({}, None, "targets must be a list of dicts, one per image, got NoneType"),
        ({}, "ab", "targets must be a list of dicts, one per image, got str"),
        ({}, [None, None], r"targets\[0\] is a NoneType; expected a dict of tensors"),
        ({}, [{"labels": [1], "boxes": torch.zeros(1, 4)}] * 2, r"targets\[0\]\['labels'\] is a list; expected a"),
        ({}, [{"labels": torch.zeros(1).long(), "boxes": None}] * 2, r"targets\[0\]\['boxes'\] is a NoneType; exp"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_matcher_names_the_argument_of_a_wrong_kind(outputs, targets, message):
    if isinstance(outputs, dict):
        outputs = {**make_outputs(2, 5, 4), **outputs}
    with pytest.raises(TypeError, match=message):
        HungarianMatcher()(outputs, targets)


@pytest.mark.parametrize("name", ["cost_class", "cost_bbox", "cost_giou"])
def test_matcher_rejects_weights_that_are_no_numbers(name):
    for weight in (None, "1", [1]):
        with pytest.raises(TypeError, match=f"{name} is .*; expected a number"):
            HungarianMatcher(**{name: weight})


def test_matcher_rejects_an_empty_batch_and_a_single_dict():
    with pytest.raises(ValueError, match="got 0 for a batch of 0"):
        HungarianMatcher()(make_outputs(0, 5, 4), [])
    with pytest.raises(TypeError, match="targets must be a list of dicts"):
        HungarianMatcher()(make_outputs(1, 5, 4), make_targets((2,), 3)[0])


def test_matcher_rejects_targets_on_two_devices():
    outputs = {k: v.to("meta") for k, v in make_outputs(1, 5, 4).items()}
    targets = make_targets((2,), 3)
    targets[0]["boxes"] = targets[0]["boxes"].to("meta")
    with pytest.raises(ValueError, match=r"all targets must be on one device, got meta for targets\[0\]\['boxes'\]"):
        HungarianMatcher()(outputs, targets)


@pytest.mark.gpu
def test_matcher_waits_for_the_gpu_once(recwarn):
    outputs = {k: v.cuda() for k, v in make_outputs(2, 50, 6).items()}
    targets = [{k: v.cuda() for k, v in t.items()} for t in make_targets((7, 3), 5)]
    matcher = HungarianMatcher(1, 5, 2)
    matcher(outputs, targets)
    recwarn.clear()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        matcher(outputs, targets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(w.message) for w in recwarn) == 1
