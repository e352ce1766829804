import pickle
import random

import pytest
import torch

from detr_fast.data import CocoDetection, PackedCollate, Prefetcher, build_loader, make_coco_transforms
from detr_fast.data.prefetch import copy_batch


def dataset(root, image_set="train", uint8=False):
    transforms = make_coco_transforms(image_set, scales=48, uint8=uint8)
    return CocoDetection(root / "train2017", root / "annotations" / "instances_train2017.json", transforms)


def epoch(loader, number):
    loader.set_epoch(number)
    return [(s.tensors, [(t["image_id"].item(), t["boxes"]) for t in targets]) for s, targets in loader]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) and all(i == j and torch.equal(p, q) for (i, p), (j, q) in zip(s, t, strict=True))
        for (x, s), (y, t) in zip(a, b, strict=True)
    )


def test_epoch_is_independent_of_workers_and_history(shapes):
    plain = build_loader(dataset(shapes), 5, train=True)
    workers = build_loader(dataset(shapes), 5, train=True, num_workers=2)
    first, second = epoch(workers, 0), epoch(workers, 1)
    assert len(second) == 2 and same(epoch(plain, 1), second) and same(epoch(plain, 0), first)
    assert not same(first, second) and not same(second, epoch(build_loader(dataset(shapes), 5, train=True, seed=1), 1))


def test_loader_can_be_sent_to_spawned_workers(shapes):
    seeded = build_loader(dataset(shapes, uint8=True), 5, train=True).dataset
    image, target = pickle.loads(pickle.dumps(seeded))[0, 3]
    assert torch.equal(image, seeded[0, 3][0]) and torch.equal(target["boxes"], seeded[0, 3][1]["boxes"])


def test_loading_leaves_the_global_generators_alone(shapes):
    before = random.getstate(), torch.get_rng_state()
    epoch(build_loader(dataset(shapes), 4, train=True), 0)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_validation_in_the_originals_order_keeps_the_last_batch(shapes):
    batches = epoch(build_loader(dataset(shapes, "val"), 5, train=False, group_by_size=False), 0)
    assert [i for _, targets in batches for i, _ in targets] == list(range(1, 13))


def test_packed_batches_equal_padding_in_the_worker(shapes):
    plain = build_loader(dataset(shapes), 4, train=True)
    packed = build_loader(dataset(shapes, uint8=True), 4, train=True, num_workers=1, collate_fn=PackedCollate())
    for (expected, targets), (batch, packed_targets) in zip(plain, packed, strict=True):
        got = batch.to("cpu")
        torch.testing.assert_close(got.tensors, expected.tensors, rtol=1e-5, atol=1e-6)
        assert torch.equal(got.mask, expected.mask) and len(batch) == len(targets)
        assert all(torch.equal(a["boxes"], b["boxes"]) for a, b in zip(targets, packed_targets, strict=True))


def test_rejects_a_dataset_smaller_than_a_batch(shapes):
    with pytest.raises(ValueError, match="12 images per process give no complete batch of 13"):
        build_loader(dataset(shapes), 13, train=True)


def prefetched(root, device):
    loader = build_loader(dataset(root, uint8=True), 3, train=True, num_workers=1, collate_fn=PackedCollate())
    prefetcher = Prefetcher(loader, device)
    assert len(prefetcher) == 4
    plain = build_loader(dataset(root, uint8=True), 3, train=True, collate_fn=PackedCollate())
    got = list(prefetcher)
    assert len(got) == 4
    for (samples, targets), (batch, plain_targets) in zip(got, plain, strict=True):
        expected = batch.to(device)
        assert samples.tensors.device.type == device and targets[0]["boxes"].device.type == device
        assert torch.equal(samples.tensors, expected.tensors) and torch.equal(samples.mask, expected.mask)
        assert all(torch.equal(a["boxes"].cpu(), b["boxes"]) for a, b in zip(targets, plain_targets, strict=True))


def test_prefetcher_passes_batches_on(shapes):
    prefetched(shapes, "cpu")
    nested = {"a": [torch.ones(1), "text"], "b": (None, 3)}
    assert list(Prefetcher([nested], "cpu")) == [nested]


def test_copied_batch_equals_its_source():
    """What the GPU gets, on the CPU: small tensors of every dtype and shape share a buffer, large ones do not."""
    part = {
        "boxes": torch.rand(3, 4),
        "labels": torch.arange(3),
        "none": torch.zeros(0, 4),
        "flag": torch.tensor(True),
        "strided": torch.arange(12.0, dtype=torch.float64).reshape(3, 4).t(),
        "large": torch.rand(200, 200),
        "name": "a",
    }
    packed = PackedCollate()([(torch.zeros(3, 4, 5, dtype=torch.uint8), part)])[0]
    got, (first, second) = copy_batch((packed, [part, dict(part)]), torch.device("cpu"))
    assert got is not packed and torch.equal(got.buffer, packed.buffer)
    for name, value in part.items():
        for copy in (first[name], second[name]):
            assert copy == value if name == "name" else torch.equal(copy, value) and copy.dtype == value.dtype
    shared = {name: copy.untyped_storage().data_ptr() for name, copy in second.items() if name not in ("name", "large")}
    assert len(set(shared.values())) == 1 and first["boxes"].untyped_storage().data_ptr() == shared["labels"]


@pytest.mark.gpu
def test_prefetcher_copies_ahead(shapes):
    prefetched(shapes, "cuda")


def test_every_iteration_is_the_next_epoch_unless_told(shapes):
    loader = build_loader(dataset(shapes), 5, train=True)
    first, second = epoch(loader, 0), [(s.tensors, []) for s, _ in loader]
    assert not same([(tensors, []) for tensors, _ in first], second)
    assert same(second, [(tensors, []) for tensors, _ in epoch(loader, 1)])
