"""SetCriterion against formulas written out in plain Python, its structure, and what it refuses."""

import math

import pytest
import torch
from torch import nn

from detr_fast.criterion import HungarianMatcher, SetCriterion, accuracy, dice_loss, sigmoid_focal_loss

CLASSES = 4
EOS = 0.125  # exact in float32


class FixedMatcher(nn.Module):
    """Returns given indices, so that a test knows the pairs."""

    def __init__(self, indices):
        super().__init__()
        self.indices = [(torch.tensor(i, dtype=torch.int64), torch.tensor(j, dtype=torch.int64)) for i, j in indices]

    def forward(self, outputs, targets):
        return self.indices


def make_outputs(batch, queries, dtype=torch.float32, masks=None):
    outputs = {
        "pred_logits": (torch.randn(batch, queries, CLASSES + 1, dtype=dtype) * 2).requires_grad_(),
        "pred_boxes": (torch.rand(batch, queries, 4, dtype=dtype) * 0.5 + 0.2).requires_grad_(),
    }
    if masks:
        outputs["pred_masks"] = torch.randn(batch, queries, *masks, dtype=dtype, requires_grad=True)
    return outputs


def make_targets(sizes, dtype=torch.float32):
    return [{"labels": torch.randint(CLASSES, (n,)), "boxes": torch.rand(n, 4, dtype=dtype) * 0.5 + 0.2} for n in sizes]


def make_criterion(losses=("labels", "boxes", "cardinality"), matcher=None):
    return SetCriterion(CLASSES, matcher or HungarianMatcher(1, 5, 2), {"loss_ce": 1}, EOS, list(losses))


def scalar_giou(p, t):
    a = p[0] - p[2] / 2, p[1] - p[3] / 2, p[0] + p[2] / 2, p[1] + p[3] / 2
    b = t[0] - t[2] / 2, t[1] - t[3] / 2, t[0] + t[2] / 2, t[1] + t[3] / 2
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = p[2] * p[3] + t[2] * t[3] - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return inter / union - (hull - union) / hull


def expected_losses(outputs, targets, indices):
    """The four losses and the class error of given pairs, in plain Python."""
    num_boxes = max(1, sum(len(t["labels"]) for t in targets))
    weighted = total_weight = l1 = giou = cardinality = 0.0
    right = pairs = 0
    for image, (predictions, matched) in enumerate(indices):
        partner = dict(zip(predictions, matched, strict=True))
        logits, boxes = outputs["pred_logits"][image].tolist(), outputs["pred_boxes"][image].tolist()
        labels, target_boxes = targets[image]["labels"].tolist(), targets[image]["boxes"].tolist()
        found = 0
        for query, row in enumerate(logits):
            best = max(range(CLASSES + 1), key=row.__getitem__)
            found += best != CLASSES
            truth = labels[partner[query]] if query in partner else CLASSES
            weight = EOS if truth == CLASSES else 1.0
            weighted += weight * (math.log(sum(math.exp(x) for x in row)) - row[truth])
            total_weight += weight
            if query in partner:
                box = target_boxes[partner[query]]
                pairs += 1
                right += best == truth
                l1 += sum(abs(p - t) for p, t in zip(boxes[query], box, strict=True))
                giou += 1 - scalar_giou(boxes[query], box)
        cardinality += abs(found - len(labels))
    return {
        "loss_ce": weighted / total_weight,
        "class_error": 100 - 100 * right / pairs if pairs else 100.0,
        "loss_bbox": l1 / num_boxes,
        "loss_giou": giou / num_boxes,
        "cardinality_error": cardinality / len(targets),
    }


CASES = {
    "usual": ((3, 1), [([1, 2, 5], [0, 2, 1]), ([4], [0])]),
    "one-image-empty": ((0, 2), [([], []), ([0, 3], [1, 0])]),
    "all-empty": ((0, 0), [([], []), ([], [])]),
    "more-targets-than-queries": ((8, 1), [([0, 1, 2, 3, 4, 5], [7, 0, 2, 3, 6, 5]), ([5], [0])]),
}


@pytest.mark.parametrize("sizes, indices", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_losses_match_plain_python(sizes, indices, dtype):
    outputs, targets = make_outputs(2, 6, dtype), make_targets(sizes, dtype)
    losses = make_criterion(matcher=FixedMatcher(indices))(outputs, targets)
    expected = expected_losses(outputs, targets, indices)
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert losses[name].shape == ()
        tolerance = 1e-12 if losses[name].dtype == torch.float64 else 1e-5
        assert losses[name].item() == pytest.approx(value, rel=tolerance), name
        assert losses[name].dtype == (dtype if name.startswith("loss") else torch.float32)


def test_losses_with_the_hungarian_matcher():
    outputs, targets = make_outputs(2, 6, torch.float64), make_targets((3, 2), torch.float64)
    matcher = HungarianMatcher(1, 5, 2)
    indices = [(i.tolist(), j.tolist()) for i, j in matcher(outputs, targets)]
    losses = make_criterion(matcher=matcher)(outputs, targets)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(expected_losses(outputs, targets, indices))


def test_loss_gradcheck():
    outputs, targets = make_outputs(2, 5, torch.float64, masks=(3, 4)), make_targets((2, 1), torch.float64)
    for target in targets:
        target["masks"] = torch.rand(len(target["labels"]), 5, 7) > 0.5
    criterion = make_criterion(("labels", "boxes", "masks"), FixedMatcher([([1, 4], [1, 0]), ([0], [0])]))
    names = list(outputs)

    def losses(*tensors):
        values = criterion(dict(zip(names, tensors, strict=True)), targets)
        return tuple(v for k, v in values.items() if k.startswith("loss"))

    assert torch.autograd.gradcheck(losses, tuple(outputs.values()))


def test_matched_queries_alone_have_box_gradients():
    outputs, targets = make_outputs(2, 6), make_targets((3, 1))
    losses = make_criterion(matcher=FixedMatcher([([1, 2, 5], [0, 2, 1]), ([4], [0])]))(outputs, targets)
    gradient = torch.autograd.grad(losses["loss_bbox"] * 0.3 + losses["loss_giou"] * 0.9, outputs["pred_boxes"])[0]
    touched = gradient.abs().sum(dim=-1) > 0
    assert touched.tolist() == [[False, True, True, False, False, True], [False, False, False, False, True, False]]


def test_no_targets_keep_the_graph_connected():
    outputs, targets = make_outputs(2, 6, masks=(4, 4)), make_targets((0, 0))
    for target in targets:
        target["masks"] = torch.zeros(0, 8, 9, dtype=torch.bool)
    losses = make_criterion(("labels", "boxes", "cardinality", "masks"))(outputs, targets)
    assert losses["class_error"].item() == 100
    for name in ("loss_bbox", "loss_giou", "loss_mask", "loss_dice"):
        assert losses[name].item() == 0
    sum(v for k, v in losses.items() if k.startswith("loss")).backward()
    assert torch.equal(outputs["pred_boxes"].grad, torch.zeros(2, 6, 4))
    assert torch.equal(outputs["pred_masks"].grad, torch.zeros(2, 6, 4, 4))
    assert outputs["pred_logits"].grad.abs().sum() > 0


def test_auxiliary_layers():
    layers = [make_outputs(2, 6, torch.float64) for _ in range(3)]
    targets = make_targets((3, 2), torch.float64)
    criterion = make_criterion()
    losses = criterion({**layers[2], "aux_outputs": layers[:2]}, targets)
    names = ["loss_ce", "class_error", "loss_bbox", "loss_giou", "cardinality_error"]
    suffixed = [f"{name}_{i}" for i in range(2) for name in names if name != "class_error"]
    assert list(losses) == names + suffixed
    for layer, suffix in ((0, "_0"), (1, "_1"), (2, "")):
        indices = [(i.tolist(), j.tolist()) for i, j in criterion.matcher(layers[layer], targets)]
        for name, value in expected_losses(layers[layer], targets, indices).items():
            if name + suffix in losses:
                assert losses[name + suffix].item() == pytest.approx(value), name + suffix


def scalar_masks(outputs, targets, indices, size):
    """Focal and dice loss, in plain Python on predictions that already have the targets' size."""
    num_boxes = max(1, sum(len(t["labels"]) for t in targets))
    focal = dice = 0.0
    for image, (predictions, matched) in enumerate(indices):
        for query, j in zip(predictions, matched, strict=True):
            mask = targets[image]["masks"][j]
            pixels = overlap = area = 0.0
            for y in range(size[0]):
                for x in range(size[1]):
                    inside = y < mask.shape[0] and x < mask.shape[1] and bool(mask[y, x])
                    p = 1 / (1 + math.exp(-outputs["pred_masks"][image, query, y, x].item()))
                    p_true = p if inside else 1 - p
                    pixels += (0.25 if inside else 0.75) * (1 - p_true) ** 2 * -math.log(p_true)
                    overlap += p * inside
                    area += p + inside
            focal += pixels / (size[0] * size[1])
            dice += 1 - (2 * overlap + 1) / (area + 1)
    return focal / num_boxes, dice / num_boxes


def test_masks_match_plain_python():
    outputs, targets = make_outputs(2, 4, torch.float64, masks=(5, 7)), make_targets((2, 1), torch.float64)
    targets[0]["masks"] = torch.rand(2, 5, 6) > 0.5  # padded to 5 x 7, the batch's maximum
    targets[1]["masks"] = torch.rand(1, 3, 7) > 0.5
    indices = [([0, 3], [1, 0]), ([2], [0])]
    losses = make_criterion(["masks"], FixedMatcher(indices))(outputs, targets)
    focal, dice = scalar_masks(outputs, targets, indices, (5, 7))
    assert losses["loss_mask"].item() == pytest.approx(focal)
    assert losses["loss_dice"].item() == pytest.approx(dice)


def test_masks_are_resized_bilinearly_to_the_targets():
    """Between pixel centres a ramp stays a ramp: 2 pixels to 4 gives the weights 1, 3/4, 1/4, 0 of the first."""
    a, b = -1.0, 3.0
    outputs, targets = make_outputs(1, 1, torch.float64), make_targets((1,), torch.float64)
    outputs["pred_masks"] = torch.tensor([[[[a, b]]]], dtype=torch.float64)
    targets[0]["masks"] = torch.tensor([[[True, False, True, False]]])
    losses = make_criterion(["masks"], FixedMatcher([([0], [0])]))(outputs, targets)
    resized = {"pred_masks": torch.tensor([a, 0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b, b]).view(1, 1, 1, 4)}
    focal, dice = scalar_masks(resized, targets, [([0], [0])], (1, 4))
    assert losses["loss_mask"].item() == pytest.approx(focal, rel=1e-6)
    assert losses["loss_dice"].item() == pytest.approx(dice, rel=1e-6)


def test_auxiliary_layers_have_no_mask_losses():
    outputs, targets = make_outputs(1, 4, masks=(4, 4)), make_targets((2,))
    targets[0]["masks"] = torch.rand(2, 4, 4) > 0.5
    losses = make_criterion(("boxes", "masks"))({**outputs, "aux_outputs": [make_outputs(1, 4)]}, targets)
    assert list(losses) == ["loss_bbox", "loss_giou", "loss_mask", "loss_dice", "loss_bbox_0", "loss_giou_0"]


def test_focal_loss_without_alpha_is_unweighted():
    logits, truth = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    assert sigmoid_focal_loss(logits, truth, 1, alpha=-1).item() == pytest.approx(0.25 * math.log(2))
    assert sigmoid_focal_loss(logits, truth, 4, gamma=0).item() == pytest.approx(0.5 * math.log(2) / 4)


def test_dice_loss_by_hand():
    truth = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    sure = (truth - 0.5) * 200
    assert dice_loss(sure, truth, 1).item() == pytest.approx(0)
    assert dice_loss(-sure, truth, 2).item() == pytest.approx(((1 - 1 / 5) + (1 - 1 / 5)) / 2)


def test_criterion_computes_in_float32_inside_autocast():
    outputs, targets = make_outputs(2, 12, masks=(4, 4)), make_targets((3, 4))
    for target in targets:
        target["masks"] = torch.rand(len(target["labels"]), 9, 11) > 0.5
    outputs["aux_outputs"] = [make_outputs(2, 12)]
    criterion = make_criterion(("labels", "boxes", "cardinality", "masks"))
    expected = criterion(outputs, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = criterion(outputs, targets)
    for name in expected:
        assert actual[name].dtype == torch.float32
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_criterion_computes_low_precision_in_float32(dtype):
    outputs, targets = make_outputs(2, 12), make_targets((3, 4))
    outputs = {k: v.to(dtype) for k, v in outputs.items()}
    expected = make_criterion()({k: v.float() for k, v in outputs.items()}, targets)
    for name, value in make_criterion()(outputs, targets).items():
        assert torch.equal(value, expected[name]), name


def test_criterion_keeps_the_originals_attributes():
    criterion = make_criterion()
    assert criterion.weight_dict == {"loss_ce": 1}
    assert criterion.num_classes == CLASSES and criterion.eos_coef == EOS
    assert list(criterion.state_dict()) == ["empty_weight"]
    torch.testing.assert_close(criterion.empty_weight, torch.tensor([1.0] * CLASSES + [EOS]))


def test_accuracy():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.2, 0.3, 0.5], [0.3, 0.6, 0.1]])
    target = torch.tensor([1, 2, 0, 1])
    assert [a.item() for a in accuracy(scores, target, (1, 2, 3))] == [50.0, 75.0, 100.0]
    assert [a.item() for a in accuracy(scores[:0], target[:0], (1, 2))] == [0.0, 0.0]


def test_criterion_rejects_an_unknown_loss():
    with pytest.raises(
        ValueError, match="unknown loss 'mask', the losses are 'labels', 'boxes', 'cardinality', 'masks'"
    ):
        make_criterion(["labels", "mask"])
    with pytest.raises(ValueError, match="unknown loss 'giou'"):
        make_criterion().get_loss("giou", {}, [], [], 1)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda o, t: o.pop("pred_logits"), ValueError, "lack the key 'pred_logits'"),
        (lambda o, t: t.pop(), ValueError, "got 1 for a batch of 2"),
        (lambda o, t: o.update(pred_logits=o["pred_logits"][..., 1:]), ValueError, "= 5 columns, got 4"),
        (lambda o, t: t[0].update(labels=t[0]["labels"] * 0 + CLASSES), ValueError, "has 4, the classes are 0 to 3"),
        (lambda o, t: t[1].update(labels=t[1]["labels"] - CLASSES), ValueError, r"targets\[1\]\['labels'\] has -"),
        (lambda o, t: o["aux_outputs"][0].pop("pred_boxes"), ValueError, "lack the key 'pred_boxes'"),
        (lambda o, t: o["pred_boxes"].data.fill_(math.nan), ValueError, "NaN or infinity in pred_boxes"),
    ],
    ids=["key", "batch", "columns", "no-object-label", "negative-label", "aux-key", "nan"],
)
def test_criterion_rejects(change, error, message):
    outputs, targets = make_outputs(2, 6), make_targets((3, 2))
    outputs["aux_outputs"] = [make_outputs(2, 6)]
    change(outputs, targets)
    with pytest.raises(error, match=message):
        make_criterion()(outputs, targets)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda o, t: (None, t), "outputs is a NoneType; expected a dict of tensors"),
        (lambda o, t: ("outputs", t), "outputs is a str; expected a dict of tensors"),
        (lambda o, t: ({**o, "pred_boxes": [1.0]}, t), "pred_boxes is a list; expected a tensor"),
        (lambda o, t: ({**o, "aux_outputs": None}, t), r"outputs\['aux_outputs'\] is a NoneType; expected a list"),
        (lambda o, t: ({**o, "aux_outputs": [None]}, t), r"outputs\['aux_outputs'\]\[0\] is a NoneType; expected"),
        (lambda o, t: (o, None), "targets must be a list of dicts, one per image, got NoneType"),
        (lambda o, t: (o, [t[0], "dog"]), r"targets\[1\] is a str; expected a dict of tensors"),
        (lambda o, t: (o, [t[0], {**t[1], "labels": [0, 1]}]), r"targets\[1\]\['labels'\] is a list; expected a ten"),
        (lambda o, t: (o, [t[0], {**t[1], "masks": None}]), r"targets\[1\]\['masks'\] is a NoneType; expected a ten"),
    ],
)
def test_criterion_names_the_argument_of_a_wrong_kind(change, message):
    outputs, targets = make_outputs(2, 6), make_targets((3, 2))
    outputs["pred_masks"] = torch.zeros(2, 6, 4, 4)
    for target in targets:
        target["masks"] = torch.zeros(len(target["labels"]), 4, 4, dtype=torch.bool)
    criterion = make_criterion(["labels", "boxes", "masks"])
    criterion(outputs, targets)
    with pytest.raises(TypeError, match=message):
        criterion(*change(outputs, targets))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_classes="4"), "num_classes is '4'; expected an integer"),
        (dict(matcher=None), "matcher is a NoneType; expected a HungarianMatcher or alike"),
        (dict(eos_coef=None), "eos_coef is None; expected a number"),
        (dict(losses="labels"), "losses is 'labels'; expected a list of names"),
        (dict(losses=None), "losses is None; expected a list of names"),
    ],
)
def test_criterion_names_the_setting_of_a_wrong_kind(change, message):
    settings = dict(num_classes=4, matcher=HungarianMatcher(), weight_dict={}, eos_coef=0.1, losses=["labels"])
    with pytest.raises(TypeError, match=message):
        SetCriterion(**{**settings, **change})


def test_criterion_rejects_a_negative_number_of_classes():
    with pytest.raises(ValueError, match="num_classes is -1; expected at least 0"):
        SetCriterion(-1, HungarianMatcher(), {}, 0.1, ["labels"])


def test_criterion_rejects_missing_masks():
    outputs, targets = make_outputs(1, 6), make_targets((3,))
    with pytest.raises(ValueError, match="outputs lack the key 'pred_masks'"):
        make_criterion(["masks"])(outputs, targets)
    outputs["pred_masks"] = torch.zeros(1, 6, 4, 4)
    with pytest.raises(ValueError, match=r"targets\[0\] lacks the key 'masks'"):
        make_criterion(["masks"])(outputs, targets)
    targets[0]["masks"] = torch.zeros(2, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"targets\[0\]\['masks'\] must be \[3, H, W\], got shape \(2, 4, 4\)"):
        make_criterion(["masks"])(outputs, targets)


def averaging_process(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    outputs, targets = make_outputs(1, 6, torch.float64), make_targets(((0, 5)[rank],), torch.float64)
    criterion = make_criterion()
    pairs = [(i.tolist(), j.tolist()) for i, j in criterion.matcher(outputs, targets)]
    losses = criterion(outputs, targets)
    torch.save((outputs, targets, pairs, losses), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_boxes_are_averaged_over_two_processes(tmp_path):
    # Forked: two processes that import torch anew take seconds.
    torch.multiprocessing.start_processes(averaging_process, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank, own in ((0, 1), (1, 5)):
        outputs, targets, pairs, losses = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        alone = expected_losses(outputs, targets, pairs)
        for name in ("loss_bbox", "loss_giou"):
            assert losses[name].item() == pytest.approx(alone[name] * own / 2.5), (rank, name)
        assert losses["loss_ce"].item() == pytest.approx(alone["loss_ce"])


class OneByOne(SetCriterion):
    """Overrides a loss without changing it, so that layers come one by one."""

    def loss_boxes(self, *args, **kwargs):
        return super().loss_boxes(*args, **kwargs)


ALL_LOSSES = ("labels", "boxes", "cardinality", "masks")


def layered_batch(sizes, queries=6, layers=4, dtype=torch.float64):
    layer_outputs = [make_outputs(len(sizes), queries, dtype) for _ in range(layers)]
    outputs = {**layer_outputs[-1], "aux_outputs": layer_outputs[:-1]}
    outputs["pred_masks"] = torch.randn(len(sizes), queries, 5, 7, dtype=dtype, requires_grad=True)
    targets = make_targets(sizes, dtype)
    for i, target in enumerate(targets):
        target["masks"] = torch.rand(len(target["labels"]), 9 + i, 11) > 0.5
    return outputs, targets


def leaves(outputs):
    tensors = [outputs["pred_logits"], outputs["pred_boxes"], outputs["pred_masks"]]
    return tensors + [layer[key] for layer in outputs["aux_outputs"] for key in ("pred_logits", "pred_boxes")]


@pytest.mark.parametrize("sizes", [(3, 1), (0, 6, 2), (0, 0), (9, 0, 4, 7)], ids=str)
def test_one_pass_equals_layer_by_layer(sizes, monkeypatch):
    outputs, targets = layered_batch(sizes)
    arguments = CLASSES, HungarianMatcher(1, 5, 2), {}, EOS, ALL_LOSSES
    expected = OneByOne(*arguments)(outputs, targets)
    one_pass = SetCriterion(*arguments)
    monkeypatch.setattr(SetCriterion, "_one_by_one", None)  # must not be needed
    losses = one_pass(outputs, targets)
    assert list(losses) == list(expected)
    weights = torch.rand(len(losses), dtype=torch.float64)

    def gradients(values):
        total = sum(w * v for w, v in zip(weights, values.values(), strict=True) if v.requires_grad)
        return torch.autograd.grad(total, leaves(outputs))

    for name in losses:
        assert losses[name].dtype == expected[name].dtype and losses[name].shape == ()
        assert losses[name].dtype == (torch.float64 if name.startswith("loss") else torch.float32)
        tolerance = 1e-12 if losses[name].dtype == torch.float64 else 1e-6
        torch.testing.assert_close(losses[name], expected[name], rtol=tolerance, atol=tolerance)
    for got, want in zip(gradients(losses), gradients(expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_what_is_not_ours_is_asked_layer_by_layer():
    outputs, targets = layered_batch((3, 2), layers=3)
    calls = []

    class Doubled(SetCriterion):
        def get_loss(self, loss, outputs, targets, indices, num_boxes, **kwargs):
            calls.append((loss, kwargs, len(indices)))
            values = super().get_loss(loss, outputs, targets, indices, num_boxes, **kwargs)
            return {k: 2 * v for k, v in values.items()}

    class Matcher(HungarianMatcher):
        def forward(self, outputs, targets):
            calls.append("matcher")
            return super().forward(outputs, targets)

    arguments = {}, EOS, ("labels", "masks")
    expected = SetCriterion(CLASSES, HungarianMatcher(1, 5, 2), *arguments)(outputs, targets)
    doubled = Doubled(CLASSES, HungarianMatcher(1, 5, 2), *arguments)(outputs, targets)
    assert calls == [("labels", {}, 2), ("masks", {}, 2)] + 2 * [("labels", {"log": False}, 2)]
    torch.testing.assert_close(doubled, {k: 2 * v for k, v in expected.items()})
    calls.clear()
    torch.testing.assert_close(SetCriterion(CLASSES, Matcher(1, 5, 2), *arguments)(outputs, targets), expected)
    assert calls == 3 * ["matcher"]


def test_layers_of_different_shape():
    outputs, targets = layered_batch((3, 2), layers=3)
    outputs["aux_outputs"][1] = make_outputs(2, 9, torch.float64)
    losses = make_criterion()(outputs, targets)
    for layer, suffix in ((outputs, ""), (outputs["aux_outputs"][0], "_0"), (outputs["aux_outputs"][1], "_1")):
        alone = make_criterion()({key: layer[key] for key in ("pred_logits", "pred_boxes")}, targets)
        for name in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error"):
            torch.testing.assert_close(losses[name + suffix], alone[name])


def test_a_layer_that_cannot_be_matched_is_nan_where_nobody_may_wait(monkeypatch):
    """What a GPU does: its losses and gradients are NaN, those of the other layers are not."""
    outputs, targets = layered_batch((3, 2), layers=3)
    criterion = SetCriterion(CLASSES, HungarianMatcher(1, 5, 2), {}, EOS, ALL_LOSSES)
    expected = criterion(outputs, targets)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert criterion(outputs, targets) == expected
    with torch.no_grad():
        outputs["aux_outputs"][0]["pred_boxes"][1, 2, 0] = math.nan
    losses = criterion(outputs, targets)
    for name, value in losses.items():
        if name in ("loss_ce_0", "loss_bbox_0", "loss_giou_0"):
            assert value.isnan(), name
        else:
            assert torch.equal(value, expected[name]), name
    sum(v for k, v in losses.items() if k.startswith("loss")).backward()
    assert outputs["aux_outputs"][0]["pred_logits"].grad.isnan().any()
    assert outputs["aux_outputs"][0]["pred_boxes"].grad.isnan().any()
    assert outputs["pred_boxes"].grad.isfinite().all() and outputs["pred_boxes"].grad.abs().sum() > 0

    outputs, targets = layered_batch((3, 2), layers=3)
    targets[0]["labels"][1] = -1
    losses = criterion(outputs, targets)
    assert all(v.isnan() == k.startswith("loss") for k, v in losses.items())


def test_one_pass_says_which_layer_is_refused():
    outputs, targets = layered_batch((3, 2), layers=3)
    with torch.no_grad():
        outputs["aux_outputs"][1]["pred_logits"][0, 0, :2] = math.nan
    with pytest.raises(ValueError, match=r"no matching: NaN or infinity in pred_logits \(2 of 60 values\)"):
        make_criterion()(outputs, targets)


def test_criterion_compiles():
    outputs, targets = layered_batch((3, 9), layers=2)
    del outputs["pred_masks"]
    criterion = make_criterion()
    torch._dynamo.reset()
    compiled = torch.compile(criterion, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(outputs, targets), criterion(outputs, targets))


@pytest.mark.interpret
@pytest.mark.parametrize("sizes", [(3, 1), (9, 0)], ids=str)
def test_one_pass_through_the_kernels(sizes):
    outputs, targets = layered_batch(sizes, layers=2, dtype=torch.float32)
    arguments = CLASSES, HungarianMatcher(1, 5, 2), {}, EOS, ALL_LOSSES
    losses, expected = SetCriterion(*arguments)(outputs, targets), OneByOne(*arguments)(outputs, targets)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)


def gpu_batch(target_device="cuda"):
    outputs, targets = layered_batch((30, 0, 7, 120), queries=100, layers=6, dtype=torch.float32)
    layers = [outputs, *outputs["aux_outputs"]]
    layers = [{k: v.detach().cuda().requires_grad_() for k, v in x.items() if k != "aux_outputs"} for x in layers]
    targets = [{k: v.to("cuda" if k == "masks" else target_device) for k, v in t.items()} for t in targets]
    return {**layers[0], "aux_outputs": layers[1:]}, targets


@pytest.mark.gpu
@pytest.mark.parametrize("target_device", ["cuda", "cpu"])
def test_criterion_with_its_matcher_does_not_wait_for_the_gpu(target_device):
    outputs, targets = gpu_batch(target_device)
    arguments = CLASSES, HungarianMatcher(1, 5, 2), {}, EOS
    criterion = SetCriterion(*arguments, ("labels", "boxes", "cardinality")).cuda()
    sum(v for k, v in criterion(outputs, targets).items() if k.startswith("loss")).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = criterion(outputs, targets)
        sum(v for k, v in losses.items() if k.startswith("loss")).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    host_outputs = {k: v.detach().cpu() for k, v in outputs.items() if k != "aux_outputs"}
    host_outputs["aux_outputs"] = [{k: v.detach().cpu() for k, v in x.items()} for x in outputs["aux_outputs"]]
    host_targets = [{k: v.cpu() for k, v in t.items()} for t in targets]
    expected = SetCriterion(*arguments, ("labels", "boxes", "cardinality"))(host_outputs, host_targets)
    assert list(losses) == list(expected)
    for name, value in losses.items():
        torch.testing.assert_close(value.detach().cpu(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_mask_losses_on_the_gpu_equal_the_cpu():
    outputs, targets = gpu_batch()
    criterion = SetCriterion(CLASSES, HungarianMatcher(1, 5, 2), {}, EOS, ALL_LOSSES).cuda()
    losses = criterion({k: v for k, v in outputs.items() if k != "aux_outputs"}, targets)
    host = {k: v.detach().cpu() for k, v in outputs.items() if k != "aux_outputs"}
    expected = criterion.cpu()(host, [{k: v.cpu() for k, v in t.items()} for t in targets])
    for name, value in losses.items():
        torch.testing.assert_close(value.detach().cpu(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_what_cannot_be_matched_on_the_gpu_is_nan_and_the_matcher_says_why():
    outputs, targets = gpu_batch()
    for label in (-1, 2**40):
        targets[0]["labels"][0] = label
        criterion = make_criterion().cuda()
        losses = criterion(outputs, targets)
        assert all(v.isnan() for k, v in losses.items() if k.startswith("loss"))
        with pytest.raises(ValueError, match=r"targets\[0\]\['labels'\] has"):
            criterion.matcher(outputs, targets)


@pytest.mark.gpu
def test_losses_and_gradients_do_not_wait_for_the_gpu():
    outputs = {k: v.detach().cuda().requires_grad_() for k, v in make_outputs(2, 6).items()}
    outputs["aux_outputs"] = [{k: v.detach().cuda().requires_grad_() for k, v in make_outputs(2, 6).items()}]
    targets = [{k: v.cuda() for k, v in t.items()} for t in make_targets((3, 1))]
    criterion = make_criterion(matcher=FixedMatcher([([1, 2, 5], [0, 2, 1]), ([4], [0])])).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = criterion(outputs, targets)
        sum(v for k, v in losses.items() if k.startswith("loss")).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert outputs["pred_boxes"].grad.abs().sum() > 0
