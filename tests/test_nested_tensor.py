"""NestedTensor and the collate functions."""

import pickle

import pytest
import torch
from torch.utils import _pytree as pytree

from detr_fast import NestedTensor, collate_fn, nested_tensor_from_tensor_list, pad_collate


class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.full((3, 4 + index, 9 - index), float(index)), {"image_id": index}


def nested():
    return NestedTensor(torch.rand(2, 3, 4, 5), torch.zeros(2, 4, 5, dtype=torch.bool))


def test_collate_fn_pads_images_and_keeps_targets():
    batch, targets = collate_fn([Samples()[i] for i in range(3)])
    assert isinstance(batch, NestedTensor) and batch.tensors.shape == (3, 3, 6, 9)
    assert targets == ({"image_id": 0}, {"image_id": 1}, {"image_id": 2})
    tensors, mask = batch.decompose()
    for index in range(3):
        assert (tensors[index, :, : 4 + index, : 9 - index] == index).all()
        assert mask[index].logical_not().sum() == (4 + index) * (9 - index)
        assert not tensors[index][:, mask[index]].any()


def test_collate_fn_takes_samples_of_any_length():
    (batch,) = collate_fn([(torch.zeros(1, 2, 3),)])
    assert batch.tensors.shape == (1, 1, 2, 3)
    assert collate_fn([(torch.zeros(1, 2, 3), 7, "name")])[1:] == ((7,), ("name",))


@pytest.mark.parametrize(
    "samples, error, message",
    [
        ([], ValueError, "got an empty batch"),
        ([(torch.zeros(2, 3), {})], ValueError, r"image 0 has shape \(2, 3\)"),
        ([("picture", {})], TypeError, "image 0 is a str"),
    ],
)
def test_collate_fn_rejects(samples, error, message):
    with pytest.raises(error, match=message):
        collate_fn(samples)


def test_nested_tensor_from_list_is_pad_collate():
    images = [torch.rand(3, 4, 5), torch.rand(3, 7, 2)]
    options = {"mean": [0.1] * 3, "std": [0.5] * 3, "dtype": torch.float64, "channels_last": True, "size_divisor": 4}
    result = nested_tensor_from_tensor_list(images, **options).decompose()
    for actual, expected in zip(result, pad_collate(images, **options), strict=True):
        assert torch.equal(actual, expected) and actual.stride() == expected.stride()


def test_nested_tensor_from_list_pads_masks_of_different_counts():
    """As `loss_masks` does: the first axis is the number of boxes, which may be 0."""
    masks = [torch.ones(n, 2 + n, 3, dtype=torch.bool) for n in (2, 0, 1)]
    tensors, mask = nested_tensor_from_tensor_list(masks).decompose()
    assert tensors.shape == (3, 2, 4, 3) and tensors.dtype == torch.bool
    assert tensors.sum((1, 2, 3)).tolist() == [24, 0, 9] and (~mask).sum((1, 2)).tolist() == [12, 6, 9]


def test_nested_tensor_from_a_batch():
    batch = torch.rand(2, 3, 4, 5)
    result = nested_tensor_from_tensor_list(batch)
    assert result.tensors is batch and result.mask.shape == (2, 4, 5) and not result.mask.any()
    assert nested_tensor_from_tensor_list(batch, size_divisor=8).tensors.shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match="got no image"):
        nested_tensor_from_tensor_list(batch[:0])
    with pytest.raises(ValueError, match="image 0 has shape"):
        nested_tensor_from_tensor_list(batch[0])


@pytest.mark.parametrize(
    "tensors, mask, error, message",
    [
        ([1], None, TypeError, "tensors is a list"),
        (torch.zeros(2, 3, 4, 5), [1], TypeError, "mask is a list"),
        (torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5), TypeError, "mask has dtype torch.float32"),
        (torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 6).bool(), ValueError, r"mask has shape \(2, 4, 6\)"),
        (torch.zeros(2, 3, 4, 5), torch.zeros(4, 5).bool(), ValueError, r"mask has shape \(4, 5\)"),
        (torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 5).bool(), ValueError, "expected mask"),
        (torch.zeros(4, 5), torch.zeros(4, 4, 5).bool(), ValueError, "expected mask"),
        (torch.zeros(2, 3, 4, 5, device="meta"), torch.zeros(2, 4, 5).bool(), ValueError, "mask is on cpu"),
    ],
)
def test_nested_tensor_rejects(tensors, mask, error, message):
    with pytest.raises(error, match=message):
        NestedTensor(tensors, mask)


def test_nested_tensor_without_mask():
    part = NestedTensor(torch.rand(2, 3, 4, 5), None)
    assert part.to("meta").decompose()[1] is None and part.decompose()[0] is part.tensors
    assert repr(part) == str(part.tensors)


def test_nested_tensor_to_and_pickle():
    part = nested()
    moved = part.to("meta", non_blocking=True)
    assert moved.tensors.device.type == moved.mask.device.type == "meta" and part.tensors.device.type == "cpu"
    again = pickle.loads(pickle.dumps(part))
    assert torch.equal(again.tensors, part.tensors) and torch.equal(again.mask, part.mask)


def test_nested_tensor_pins(monkeypatch):
    """`DataLoader(pin_memory=True)` asks for `pin_memory`; both parts must follow. (Pinning itself needs a GPU.)"""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone())
    part = nested()
    result = torch.utils.data._utils.pin_memory.pin_memory((part, {"boxes": torch.zeros(1, 4)}))[0]
    assert isinstance(result, NestedTensor)
    assert any(tensor is part.tensors for tensor in pinned) and any(tensor is part.mask for tensor in pinned)


def test_nested_tensor_records_its_stream(monkeypatch):
    recorded = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: recorded.append((tensor, stream)))
    part = nested()
    part.record_stream("stream")
    assert [stream for _, stream in recorded] == ["stream"] * 2
    assert recorded[0][0] is part.tensors and recorded[1][0] is part.mask


def test_nested_tensor_crosses_loader_workers():
    loader = torch.utils.data.DataLoader(Samples(), batch_size=2, collate_fn=collate_fn, num_workers=1)
    batches = list(loader)
    assert [batch.tensors.shape for batch, _ in batches] == [(2, 3, 5, 9), (2, 3, 7, 7)]
    assert [target["image_id"] for _, targets in batches for target in targets] == [0, 1, 2, 3]


def test_nested_tensor_is_a_tree():
    part = nested()
    leaves, spec = pytree.tree_flatten({"samples": part})
    assert len(leaves) == 2 and leaves[0] is part.tensors and leaves[1] is part.mask
    again = pytree.tree_unflatten(leaves, spec)["samples"]
    assert isinstance(again, NestedTensor) and again.mask is part.mask
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(part)[0]]
    assert paths == [".tensors", ".mask"]


class Halve(torch.nn.Module):
    def forward(self, samples: NestedTensor):
        tensors, mask = samples.decompose()
        return NestedTensor(tensors[..., ::2, ::2] * 2, mask[..., ::2, ::2])


def test_nested_tensor_exports():
    sizes = {0: torch.export.Dim("b", min=2), 2: torch.export.Dim("h", min=4), 3: torch.export.Dim("w", min=4)}
    shapes = ([sizes, {0: sizes[0], 1: sizes[2], 2: sizes[3]}],)
    program = torch.export.export(
        Halve(), (nested_tensor_from_tensor_list([torch.rand(3, 6, 8)] * 2),), dynamic_shapes=shapes
    )
    part = nested_tensor_from_tensor_list([torch.rand(3, 10, 12), torch.rand(3, 4, 5), torch.rand(3, 7, 7)])
    actual, expected = program.module()(part), Halve()(part)
    assert torch.equal(actual.tensors, expected.tensors) and torch.equal(actual.mask, expected.mask)


def test_nested_tensor_compiles_dynamic():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(images):
        return Halve()(nested_tensor_from_tensor_list(images)).decompose()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, height in ((2, 6), (3, 10), (5, 8)):
        images = torch.rand(batch, 3, height, height + 3)
        for actual, expected in zip(compiled(images), step(images), strict=True):
            assert torch.equal(actual, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
