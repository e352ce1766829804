"""Targets of a batch in one buffer: they read like the dicts that they are made of, and so they are trained on."""

import copy
import pickle

import pytest
import torch

from detr_fast.criterion import HungarianMatcher, SetCriterion
from detr_fast.criterion.lines import SetCriterion as LineCriterion
from detr_fast.criterion.packing import pack_targets, sizes_of
from detr_fast.criterion.target_batch import TargetBatch
from detr_fast.data.prefetch import copy_batch
from detr_fast.training.step import LossSum

CPU = torch.device("cpu")


def make_targets(sizes=(3, 0, 2), **more):
    targets = []
    for i, n in enumerate(sizes):
        target = {
            "boxes": torch.rand(n, 4) * 0.4 + 0.3,
            "labels": torch.randint(4, (n,)),
            "image_id": torch.tensor([i]),
            "difficult": torch.rand(n) < 0.5,
            "weight": torch.tensor(i / 2, dtype=torch.float64),
            "masks": torch.rand(n, 5 + i, 7) < 0.5,  # sizes of their own
            "file": f"{i}.jpg",
            "picture": torch.rand(300, 300),
        }
        target |= {key: value[i] for key, value in more.items()}
        targets.append(target)
    del targets[1]["difficult"]
    return targets


def same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert list(one) == list(other)
        for key, value in one.items():
            got = other[key]
            assert got == value if not isinstance(value, torch.Tensor) else torch.equal(got, value), key
            assert not isinstance(value, torch.Tensor) or got.dtype == value.dtype


def criterion(kind="boxes"):
    losses = ["labels", "boxes", "cardinality"] if kind == "boxes" else ["lines_labels", "lines", "cardinality"]
    if kind == "boxes":
        return SetCriterion(4, HungarianMatcher(1, 5, 2), {"loss_ce": 1.0, "loss_bbox": 5.0}, 0.1, losses)
    return LineCriterion(4, {"loss_ce": 1.0, "loss_line": 5.0}, 0.1, losses, object.__new__(type("Args", (), {})))


def outputs(geometry="boxes", batch=3, queries=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = [
        {
            "pred_logits": torch.randn(batch, queries, 5, generator=generator).requires_grad_(),
            f"pred_{geometry}": (torch.rand(batch, queries, 4, generator=generator) * 0.4 + 0.3).requires_grad_(),
        }
        for _ in range(3)
    ]
    return {**layers[0], "aux_outputs": layers[1:]}


def test_reads_like_its_dicts():
    targets = make_targets()
    packed = TargetBatch.of(targets)
    assert isinstance(packed, TargetBatch) and len(packed) == 3
    same(targets, packed)
    same(targets[1:], packed[1:])
    same([targets[-1]], [packed[-1]])
    storages = {key: value.untyped_storage().data_ptr() for key, value in packed[0].items() if key != "file"}
    alone = {"masks", "picture", "difficult"}
    assert {key for key, place in storages.items() if place != packed.buffer.data_ptr()} == alone
    assert packed[0] is packed[0] and "TargetBatch([{'boxes'" in repr(packed)


@pytest.mark.parametrize("targets", [(), ({},), (1, 2), ({"size": (3, 4)},), ({"labels": [1]}, None)], ids=str)
def test_what_cannot_be_packed_stays_as_it_is(targets):
    assert TargetBatch.of(targets) is targets


@pytest.mark.parametrize("way", [lambda b: pickle.loads(pickle.dumps(b)), copy.deepcopy, lambda b: copy_batch(b, CPU)])
@pytest.mark.parametrize("change", [False, True])
def test_travels_with_what_was_put_into_its_dicts(way, change):
    targets = make_targets()
    packed = TargetBatch(targets)
    if change:
        for some in (targets, packed):
            some[0]["boxes"] = torch.zeros(3, 4)
            some[0]["labels"][:] = 1
            some[2]["more"] = "text"
            del some[2]["image_id"]
    arrived = way(packed)
    assert isinstance(arrived, TargetBatch)
    same(targets, arrived)


def test_a_worker_sends_the_buffer_and_no_views():
    few, many = (TargetBatch([{"labels": torch.arange(2), "boxes": torch.rand(2, 4)}] * n) for n in (1, 16))
    assert all(len(batch) == n and batch[0] for batch, n in ((few, 1), (many, 16)))  # the dicts are made
    count = [pickle.dumps(batch).count(b"_rebuild_tensor") for batch in (few, many)]
    assert count == [1, 1]


@pytest.mark.parametrize("kind", ["boxes", "lines"])
def test_losses_and_gradients_are_those_of_the_dicts(kind):
    targets = make_targets()
    if kind == "lines":
        targets = [{**target, "lines": target["boxes"]} for target in targets]
    found = []
    for some in (targets, TargetBatch(targets)):
        predictions, judge = outputs(kind), criterion(kind)
        losses = judge(predictions, some)
        LossSum(judge.weight_dict)(losses).total.backward()
        found.append((losses, predictions["pred_logits"].grad, predictions[f"pred_{kind}"].grad))
        assert sizes_of(some) == [3, 0, 2]
    (losses, *gradients), (packed_losses, *packed_gradients) = found
    assert losses.keys() == packed_losses.keys()
    assert all(torch.equal(losses[name], packed_losses[name]) for name in losses)
    assert all(torch.equal(a, b) for a, b in zip(gradients, packed_gradients, strict=True))


def test_the_criterion_reads_the_buffer_alone():
    packed = TargetBatch(make_targets())
    criterion()(outputs(), packed)
    found = pack_targets(packed, CPU)
    assert packed._dicts is None
    place = packed.buffer.untyped_storage().data_ptr()
    assert all(t.untyped_storage().data_ptr() == place for t in found[:4])


@pytest.mark.parametrize(
    "change",
    [
        lambda targets: targets[0].update(boxes=torch.full((3, 4), 0.25)),
        lambda targets: targets[0]["boxes"].mul_(0.5),
        lambda targets: targets[2].update(labels=torch.zeros(1, dtype=torch.int64), boxes=torch.rand(1, 4) * 0 + 0.5),
    ],
    ids=["another tensor", "in place", "fewer objects"],
)
def test_changed_targets_count(change):
    targets = make_targets()
    packed, before = TargetBatch(targets), criterion()(outputs(), targets)["loss_bbox"]
    packed.buffer = packed.buffer.clone()
    change(targets)
    change(packed)
    expected = criterion()(outputs(), targets)
    got = criterion()(outputs(), packed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert not torch.equal(expected["loss_bbox"], before)
    assert sizes_of(packed) == sizes_of(targets)


WRONG = {
    "label": lambda t: t[0]["labels"].fill_(4),
    "negative label": lambda t: t[0]["labels"].fill_(-1),
    "size": lambda t: t[2]["boxes"].mul_(-1),
    "nan": lambda t: t[2]["boxes"].fill_(torch.nan),
    "no labels": lambda t: [target.pop("labels") for target in t],
    "shape": lambda t: [target.update(boxes=target["boxes"][:, :3]) for target in t],
    "dtype": lambda t: [target.update(labels=target["labels"].float()) for target in t],
    "count": lambda t: t[0].update(labels=torch.zeros(5, dtype=torch.int64)),
    "batch": lambda t: t.pop(),
}


def test_memory_that_was_replaced_counts():
    """``.data =`` and ``resize_`` leave the tensor itself the same object."""
    batch = TargetBatch(make_targets())
    batch[0]["labels"].resize_(1)
    batch[0]["boxes"].resize_(1, 4)
    batch[2]["boxes"].data = torch.full((2, 4), 0.25)
    packed, expected = (pack_targets(targets, CPU) for targets in (batch, list(batch)))
    assert packed.sizes == expected.sizes == [1, 0, 2]
    assert torch.equal(packed.boxes, expected.boxes)


def test_a_compiled_criterion_is_one_graph():
    torch._dynamo.reset()
    ours, batch = criterion(), TargetBatch(make_targets())
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    losses = [f(outputs(), batch) for f in (compiled, ours)]
    for key, value in losses[1].items():
        torch.testing.assert_close(losses[0][key], value)


@pytest.mark.parametrize("wrong", WRONG)
def test_refuses_what_it_refuses_in_dicts_with_the_same_words(wrong):
    targets = make_targets()
    WRONG[wrong](targets)
    with pytest.raises((ValueError, TypeError)) as expected:
        criterion()(outputs(), targets)
    with pytest.raises(type(expected.value)) as got:
        criterion()(outputs(), TargetBatch(targets))
    assert str(got.value) == str(expected.value)


@pytest.mark.gpu
def test_on_a_gpu():
    targets = make_targets()
    batch = TargetBatch(targets).pin_memory()
    assert batch.buffer.is_pinned() and batch[0]["masks"].is_pinned()
    arrived = copy_batch(batch, torch.device("cuda"))
    same(targets, [{k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in t.items()} for t in arrived])
    on_gpu = outputs()
    on_gpu = {
        key: [{k: v.cuda() for k, v in layer.items()} for layer in value] if key == "aux_outputs" else value.cuda()
        for key, value in on_gpu.items()
    }
    judge = criterion().cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        judge(on_gpu, arrived)
        judge(on_gpu, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = judge(on_gpu, [{k: v.cuda() for k, v in t.items() if k in ("labels", "boxes")} for t in targets])
    for some in (arrived, batch):
        got = judge(on_gpu, some)
        assert all(torch.equal(expected[name], got[name]) for name in expected)
