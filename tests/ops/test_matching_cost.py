"""`matching_cost` against plain Python, as reference on the CPU, as kernel through the interpreter, and on a GPU."""

import math
import os

import pytest
import torch

from detr_fast.ops import matching_cost, matching_cost_reference

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

both = [pytest.param(None, id="reference", marks=pytest.mark.skipif(INTERPRET, reason="runs without the interpreter"))]
both += [pytest.param(None, id="interpreted", marks=pytest.mark.interpret)]
either = pytest.mark.parametrize("_implementation", both)
# The interpreter's arithmetic is NumPy's, which warns of what it is asked to test.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

WEIGHTS = [(1, 5, 2), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.3, -2, 1.7)]


def make_inputs(sizes=(3, 0, 9), queries=5, classes=4, layers=2, dtype=torch.float32, seed=0):
    """Random predictions and targets, some boxes equal, nested, apart or without area."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, len(sizes), queries, classes, generator=g, dtype=torch.float64) * 3
    boxes = torch.rand(layers, len(sizes), queries, 4, generator=g, dtype=torch.float64) * 0.5 + 0.2
    labels = torch.randint(classes, (sum(sizes),), generator=g)
    target_boxes = torch.rand(sum(sizes), 4, generator=g, dtype=torch.float64) * 0.5 + 0.2
    boxes[:, :, :1, 2:] = 0
    if len(target_boxes) > 2 and queries > 1 and layers > 0:
        target_boxes[0] = boxes[0, 0, 1]
        target_boxes[1] = boxes[0, 0, 0]
        target_boxes[2] = torch.tensor([0.9, 0.9, 0.1, 0.1])
    offsets = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()])
    return logits.to(dtype), boxes.to(dtype), labels, target_boxes.to(dtype), offsets


def plain_cost(logits, box, label, target, weights):
    """One pair's cost, in plain Python."""
    highest = max(logits)
    exponentials = [math.exp(x - highest) for x in logits]
    l1 = sum(abs(p - t) for p, t in zip(box, target, strict=True))

    def corners(b):
        return b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2

    a, b = corners(box), corners(target)
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    giou = (inter / union if union else 0.0) - ((hull - union) / hull if hull else 0.0)
    return -weights[0] * exponentials[label] / sum(exponentials) + weights[1] * l1 - weights[2] * giou


def plain_costs(logits, boxes, labels, target_boxes, offsets, *weights):
    layers, images, queries, _ = logits.shape
    cost = torch.empty(layers, len(labels), queries, dtype=torch.float64)
    for layer in range(layers):
        for image in range(images):
            for t in range(offsets[image], offsets[image + 1]):
                for q in range(queries):
                    pair = logits[layer, image, q].tolist(), boxes[layer, image, q].tolist()
                    cost[layer, t, q] = plain_cost(*pair, int(labels[t]), target_boxes[t].tolist(), weights)
    return cost


@either
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_matching_cost_matches_plain_python(weights, _implementation):
    inputs = make_inputs()
    cost = matching_cost(*inputs, *weights)
    assert cost.dtype == torch.float32 and cost.is_contiguous() and not cost.requires_grad
    torch.testing.assert_close(cost.double(), plain_costs(*inputs, *weights), rtol=1e-5, atol=3e-6)


@either
def test_matching_cost_float64(_implementation):
    inputs = make_inputs(dtype=torch.float64)
    cost = matching_cost(*inputs, 1, 5, 2)
    torch.testing.assert_close(cost, plain_costs(*inputs, 1, 5, 2), rtol=1e-12, atol=1e-13)


@either
@pytest.mark.parametrize(
    "options",
    [
        dict(sizes=(20, 7), queries=70, classes=92, layers=1),  # several blocks of queries, classes and targets
        dict(sizes=(1,), queries=1, classes=1, layers=1),
        dict(sizes=(9, 8, 17), queries=33, classes=65, layers=2),
    ],
    ids=["detr", "one", "odd"],
)
def test_matching_cost_matches_reference(options, _implementation):
    inputs = make_inputs(**options)
    want = matching_cost_reference(*[t.double() if t.is_floating_point() else t for t in inputs], 1, 5, 2)
    torch.testing.assert_close(matching_cost(*inputs, 1, 5, 2).double(), want, rtol=1e-5, atol=3e-6)


@either
def test_matching_cost_large_logits(_implementation):
    """Softmax that would overflow without its maximum, or meets -inf."""
    logits, *others = make_inputs(classes=130, layers=1)
    logits[..., 70] = 3e4
    logits[..., :65] = -torch.inf
    others[1][:4] = torch.tensor([70, 3, 129, 70])  # the labels
    want = matching_cost_reference(logits.double(), *others, 1, 0, 0)
    assert want.isfinite().all()
    torch.testing.assert_close(matching_cost(logits, *others, 1, 0, 0).double(), want, rtol=1e-5, atol=1e-6)


@either
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matching_cost_low_precision_is_computed_in_float32(dtype, _implementation):
    inputs = make_inputs(dtype=dtype)
    upcast = [t.float() if t.is_floating_point() else t for t in inputs]
    assert torch.equal(matching_cost(*inputs, 1, 5, 2), matching_cost(*upcast, 1, 5, 2))


@either
def test_matching_cost_takes_any_strides(_implementation):
    inputs = make_inputs()
    want = matching_cost(*inputs, 1, 5, 2)
    strided = [torch.stack((t, t), dim=-1)[..., 0] for t in inputs]
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(matching_cost(*strided, 1, 5, 2), want)


@either
def test_matching_cost_empty(_implementation):
    for options in (dict(sizes=(0, 0)), dict(layers=0), dict(queries=0)):
        inputs = make_inputs(**{**dict(sizes=(2, 1), queries=4, layers=2), **options})
        cost = matching_cost(*inputs)
        assert cost.shape == (inputs[0].shape[0], len(inputs[2]), inputs[0].shape[2])


SPOIL = {
    "label-negative": lambda logits, boxes, labels, targets: labels[2:3].fill_(-1),
    "label-too-large": lambda logits, boxes, labels, targets: labels[2:3].fill_(4),
    "label-huge": lambda logits, boxes, labels, targets: labels[2:3].fill_(2**62),
    "negative-width": lambda logits, boxes, labels, targets: targets[2, 2].fill_(-0.1),
    "negative-height": lambda logits, boxes, labels, targets: targets[2, 3].fill_(-0.1),
    "nan-target": lambda logits, boxes, labels, targets: targets[2, 0].fill_(math.nan),
    "inf-target": lambda logits, boxes, labels, targets: targets[2, 1].fill_(math.inf),
    "nan-logit": lambda logits, boxes, labels, targets: logits[1, 0, 3, 0].fill_(math.nan),
    "inf-logit": lambda logits, boxes, labels, targets: logits[1, 0, 3, 0].fill_(math.inf),
    "nan-box": lambda logits, boxes, labels, targets: boxes[1, 0, 3, 3].fill_(math.nan),
    "overflow": lambda logits, boxes, labels, targets: boxes[1, 0, 3, 0].fill_(3e38),
}


@either
@pytest.mark.parametrize("what", SPOIL)
def test_matching_cost_is_nan_for_what_must_not_be_matched(what, _implementation):
    inputs = make_inputs()
    want = matching_cost(*inputs, 1, 5, 2)
    assert want.isfinite().all()
    SPOIL[what](*inputs[:4])
    cost = matching_cost(*inputs, 1, 5, 2)
    spoilt = torch.zeros_like(cost, dtype=torch.bool)
    if what in ("nan-logit", "inf-logit", "nan-box", "overflow"):
        spoilt[1, :3, 3] = True
    else:
        spoilt[:, 2] = True
    assert torch.equal(cost.isnan(), spoilt)
    assert torch.equal(cost[~spoilt], want[~spoilt])


def test_matching_cost_opcheck():
    for inputs in (make_inputs(), make_inputs(sizes=(0, 0)), make_inputs(dtype=torch.float64)):
        torch.library.opcheck(torch.ops.detr_fast.matching_cost.default, (*inputs, 1.0, 5.0, 2.0))


@pytest.mark.skipif(INTERPRET, reason="judges the graph, not the kernel")
def test_matching_cost_compiles_dynamic():
    compilations = []

    def backend(module, _):
        compilations.append(module)
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(matching_cost, fullgraph=True, dynamic=True, backend=backend)
    for queries, sizes in ((7, (3, 2, 4, 0, 1)), (9, (7, 4, 6)), (20, (2, 3, 4, 5, 1, 2))):
        inputs = make_inputs(sizes, queries, classes=12)
        assert torch.equal(compiled(*inputs), matching_cost(*inputs))
    assert len(compilations) == 1


@pytest.mark.parametrize(
    "index, change, error, message",
    [
        (0, lambda t: t.long(), TypeError, "logits must be floating point; got torch.int64"),
        (1, lambda t: t.long(), TypeError, "boxes must be floating point; got torch.int64"),
        (2, lambda t: t.int(), TypeError, "labels must be int64; got torch.int32"),
        (4, lambda t: t.float(), TypeError, "offsets must be int64; got torch.float32"),
        (0, lambda t: t[0], ValueError, r"logits must be \[layers, images, queries, classes\]"),
        (1, lambda t: t[..., :2], ValueError, r"got shapes \(2, 3, 5, 4\) and \(2, 3, 5, 2\)"),
        (2, lambda t: t[1:], ValueError, r"got shapes \(11,\), \(12, 4\) and \(4,\)"),
        (4, lambda t: t[1:], ValueError, r"offsets \[images \+ 1\] = \[4\]; got shapes .* and \(3,\)"),
        (3, lambda t: t.to("meta"), ValueError, "on one device; got cpu, cpu, cpu, meta, cpu"),
        (0, lambda t: None, TypeError, "logits is a NoneType; expected a tensor"),
        (1, lambda t: t.tolist(), TypeError, "boxes is a list; expected a tensor"),
        (2, lambda t: "cat", TypeError, "labels is a str; expected a tensor"),
        (3, lambda t: t.numpy(), TypeError, "target_boxes is a ndarray; expected a tensor"),
        (4, lambda t: t.tolist(), TypeError, "offsets is a list; expected a tensor"),
    ],
)
def test_matching_cost_rejects(index, change, error, message):
    inputs = list(make_inputs())
    inputs[index] = change(inputs[index])
    for function in (matching_cost, matching_cost_reference):
        with pytest.raises(error, match=message):
            function(*inputs)


@pytest.mark.parametrize("name", ["cost_class", "cost_bbox", "cost_giou"])
@pytest.mark.parametrize("weight", [None, "1", [1.0]], ids=str)
def test_matching_cost_rejects_weights_that_are_no_numbers(name, weight):
    for function in (matching_cost, matching_cost_reference):
        with pytest.raises(TypeError, match=f"{name} is .*; expected a number"):
            function(*make_inputs(), **{name: weight})


@pytest.mark.gpu
@pytest.mark.parametrize("sizes, queries, classes", [((7, 0, 63, 20), 100, 92), ((300,), 300, 92), ((2, 3), 25, 1204)])
def test_matching_cost_on_the_gpu(sizes, queries, classes):
    inputs = make_inputs(sizes, queries, classes, layers=6)
    want = matching_cost_reference(*[t.double() if t.is_floating_point() else t for t in inputs], 1, 5, 2)
    inputs = [t.cuda() for t in inputs]
    matching_cost(*inputs, 1, 5, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cost = matching_cost(*inputs, 1, 5, 2)
        matching_cost_reference(*inputs, 1, 5, 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(cost.cpu().double(), want, rtol=1e-5, atol=1e-5)
