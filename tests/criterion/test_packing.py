"""Packed targets and matched pairs."""

import pytest
import torch

from detr_fast.criterion.packing import copy_at_once, pack_targets, pairs_from_indices, pairs_from_queries


def make_targets(sizes, dtype=torch.float32, labels=torch.int64):
    return [{"labels": torch.randint(9, (n,), dtype=labels), "boxes": torch.rand(n, 4, dtype=dtype)} for n in sizes]


@pytest.mark.parametrize("sizes", [(3, 0, 2), (0, 0), (1,)], ids=str)
def test_pack_targets(sizes):
    targets = make_targets(sizes, labels=torch.int32)
    packed = pack_targets(targets, torch.device("cpu"))
    assert packed.sizes == list(sizes)
    assert packed.offsets.diff().tolist() == list(sizes) and packed.offsets[0] == 0
    assert packed.labels.dtype == packed.image.dtype == torch.int64
    for i, target in enumerate(targets):
        place = slice(packed.offsets[i], packed.offsets[i + 1])
        assert torch.equal(packed.labels[place], target["labels"].long())
        assert torch.equal(packed.boxes[place], target["boxes"])
        assert (packed.image[place] == i).all()


def check_copies(device):
    tensors = [
        torch.arange(5),
        torch.rand(0, 4),
        torch.rand(3, 4),
        torch.rand(3, 4, dtype=torch.float64),
        torch.rand(1, 4).half(),
        torch.arange(3),
    ]
    copies = copy_at_once(tensors, torch.device(device))
    for copy, tensor in zip(copies, tensors, strict=True):
        assert copy.device.type == device and copy.dtype == tensor.dtype and copy.shape == tensor.shape
        if device != "meta":
            assert torch.equal(copy.cpu(), tensor)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_copy_at_once(device):
    check_copies(device)


@pytest.mark.gpu
def test_copy_at_once_to_the_gpu():
    torch.zeros(1).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        copies = copy_at_once([torch.arange(5), torch.rand(3, 4)], torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert copies[0].tolist() == [0, 1, 2, 3, 4]
    check_copies("cuda")


def test_pairs_from_queries_and_from_indices_agree():
    packed = pack_targets(make_targets((2, 0, 4)), torch.device("cpu"))
    query = torch.tensor([[2, 0, 1, -1, 0, 2], [1, 2, -1, 2, 1, 0]])  # 3 queries: of four targets one is left over
    pairs = pairs_from_queries(query, packed, 3)
    none = torch.zeros(0, dtype=torch.int64)
    layers = [
        [([0, 2], [1, 0]), ([0, 1, 2], [2, 0, 3])],
        [([1, 2], [0, 1]), ([0, 1, 2], [3, 2, 1])],
    ]
    for layer, (first, last) in enumerate(layers):
        indices = [tuple(map(torch.tensor, first)), (none, none), tuple(map(torch.tensor, last))]
        alone = pairs_from_indices(indices, packed, 3)
        got = sorted(zip(pairs.query[layer].tolist(), pairs.target[layer].tolist(), strict=True))
        want = sorted(zip(alone.query[0].tolist(), alone.target[0].tolist(), strict=True))
        assert got == want and len(got) == 5


def test_pairs_have_their_number_even_if_an_assignment_failed():
    packed = pack_targets(make_targets((2, 4)), torch.device("cpu"))
    pairs = pairs_from_queries(torch.full((1, 6), -1), packed, 3)
    assert pairs.query.shape == pairs.target.shape == (1, 5)
    assert pairs.query.min() >= 0 and pairs.query.max() < 6
