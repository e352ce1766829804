"""A batch that is known to have no padding is computed without a mask, with the same numbers."""

import copy
import importlib
import pickle

import pytest
import torch
from test_detr import _flat, tiny_detr
from test_letr import make_args
from test_padded_memory import DetectorOfAnother, Foreign, LayerOfTheOriginal, TransformerOfAnother, _step
from test_segmentation import small_detr
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from detr_fast import NestedTensor, PositionEmbeddingLearned, PositionEmbeddingSine, nested_tensor_from_tensor_list
from detr_fast.data.packed import PackedBatch, PackedCollate
from detr_fast.data.prefetch import Prefetcher
from detr_fast.models import DETRsegm, letr
from detr_fast.training.engine import WithPadding


class Ops(TorchDispatchMode):
    """Records the calls of this package's ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "detr_fast":
            self.calls.append((function.name().split("::")[1].split(".")[0], args))
        return function(*args, **(kwargs or {}))

    def count(self, name):
        return sum(called == name for called, _ in self.calls)

    def masks(self):
        """The two padding masks and the two lists of valid rows of each attention."""
        after_inputs = {"attention": 3, "packed_attention": 1}
        options = [args[after_inputs[name] :] for name, args in self.calls if name in after_inputs]
        return [(args[0], *args[4:]) for args in options]


def unpadded(batch=2, height=64, width=96):
    return NestedTensor(torch.randn(batch, 3, height, width), None, no_padding=True)


def with_mask(samples):
    batch, _, height, width = samples.tensors.shape
    return NestedTensor(samples.tensors, torch.zeros(batch, height, width, dtype=torch.bool))


def models():
    return {
        "detr": tiny_detr(level=1, dropout=0.3),
        "segmentation": DETRsegm(small_detr(norm="frozen", aux_loss=True)),
        "letr": letr.build(make_args(layer1_num=2, dropout=0.3))[0],
        "letr stack": letr.build(make_args(LETRpost=True, layer1_num=2, layer2_num=1, second_dropout=0.3))[0],
    }


@pytest.mark.parametrize("name", [*models(), "detr, learned position"])
def test_outputs_and_gradients_are_those_with_a_mask_bit_for_bit(name):
    model = models()[name.split(",")[0]].train()
    if "learned" in name:
        model.backbone[1] = PositionEmbeddingLearned(16)
    samples = unpadded()
    with Ops() as ops:
        out, gradients = _step(model, samples)
    assert ops.masks() and all(mask is None for masks in ops.masks() for mask in masks)
    with Ops() as ops:
        expected, expected_gradients = _step(model, with_mask(samples))
    assert any(masks[0] is not None for masks in ops.masks())
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    for key, gradient in gradients.items():
        assert gradient is expected_gradients[key] is None or torch.equal(gradient, expected_gradients[key]), key


@torch.no_grad()
def test_no_mask_is_made_and_no_position_twice(monkeypatch):
    model, samples = tiny_detr(level=1).eval(), unpadded(height=72, width=88)
    # Not by `Ops`: under a mode nothing is remembered.
    module, made = importlib.import_module("detr_fast.ops.sine_position"), []
    forward = module._forward
    monkeypatch.setattr(module, "_forward", lambda mask, *rest: made.append(mask.shape) or forward(mask, *rest))
    for calls in (1, 1):
        model(samples)
        assert len(made) == calls
        assert samples.no_padding and samples._mask is None
    model(samples.tensors), model(list(samples.tensors))
    assert len(made) == 1
    with Ops() as ops:
        model(samples.tensors)
    assert all(mask is None for masks in ops.masks() for mask in masks)
    made.clear()
    padded = nested_tensor_from_tensor_list([samples.tensors[0], samples.tensors[1, :, :40]])
    model(padded)
    assert len(made) == 1
    with Ops() as ops:
        model(padded)
    assert ops.count("sine_position") == 1 and sum(masks[0] is not None for masks in ops.masks()) == 4


@pytest.mark.interpret
@torch.no_grad()
def test_lists_of_rows_are_made_for_padding_alone():
    model, samples = tiny_detr(level=2).eval(), unpadded()
    with Ops() as ops:
        model(samples)
    assert ops.count("valid_rows") == 0
    samples.mask[0, 32:] = True
    with Ops() as ops:
        model(samples)
    assert ops.count("valid_rows") == 1  # for two layers of the encoder and two of the decoder
    assert len({id(rows) for masks in ops.masks() for rows in masks[2:] if rows is not None}) == 1


@pytest.mark.parametrize("kind", ["transformer", "foreign", "layer", "detector"])
@torch.no_grad()
def test_anothers_transformer_gets_a_mask(kind):
    model, samples = tiny_detr(level=1).eval(), unpadded()
    expected = _flat(model(samples))
    masks = []
    if kind == "transformer":
        model.transformer.__class__ = TransformerOfAnother
    elif kind == "foreign":
        model.transformer = Foreign(model.transformer)
    elif kind == "layer":
        model.transformer.encoder.layers[1].__class__ = LayerOfTheOriginal
    else:
        model.__class__ = DetectorOfAnother
    model.transformer.register_forward_pre_hook(lambda module, args: masks.append(args[1]))
    out = _flat(model(samples))
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    assert (masks[0] is None) == (kind == "detector")


def test_whoever_asks_gets_a_mask_and_may_write_in_it():
    samples = unpadded()
    moved, again = samples.to("cpu"), pickle.loads(pickle.dumps(samples))
    assert moved.no_padding and again.no_padding and copy.copy(samples).no_padding
    mask = samples.mask
    assert mask.shape == (2, 64, 96) and mask.dtype == torch.bool and not mask.any()
    assert not samples.no_padding and samples.decompose()[1] is mask
    mask[0, 32:] = True
    model = tiny_detr(level=1).eval()
    with torch.no_grad():
        assert not torch.equal(_flat(model(samples))[0][:, 0], _flat(model(moved))[0][:, 0])
    moved.mask = mask
    assert not moved.no_padding and moved.mask is mask


def test_a_batch_that_was_pickled_with_a_plain_mask():
    samples = with_mask(unpadded())
    old = NestedTensor.__new__(NestedTensor)
    old.__setstate__({"tensors": samples.tensors, "mask": samples.mask})
    assert old.mask is samples.mask and not old.no_padding


def test_the_share_of_padding_is_known_without_a_mask():
    samples, padded = unpadded(), with_mask(unpadded())
    padded.mask[0] = True
    assert [share for _, _, share in WithPadding([(samples, ()), (padded, ())])] == [0.0, 0.5]
    assert samples.no_padding


def test_what_the_makers_of_batches_know():
    same, other = [torch.rand(3, 32, 64)] * 2, torch.rand(3, 32, 60)
    assert nested_tensor_from_tensor_list(same).no_padding
    assert nested_tensor_from_tensor_list(same, size_divisor=32).no_padding
    assert not nested_tensor_from_tensor_list(same, size_divisor=48).no_padding
    assert not nested_tensor_from_tensor_list([*same, other]).no_padding
    assert not nested_tensor_from_tensor_list([other], size_divisor=32).no_padding
    assert nested_tensor_from_tensor_list(torch.stack(same)).no_padding


@pytest.mark.parametrize(
    ("widths", "size_divisor", "expected"), [((64, 64), 1, True), ((64, 64), 64, False), ((64, 60), 1, False)]
)
def test_packed_batches_know_from_their_header(widths, size_divisor, expected, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
    images = [torch.randint(0, 256, (3, 32, width), dtype=torch.uint8) for width in widths]
    packed, targets = PackedCollate(size_divisor=size_divisor)([(image, {}) for image in images])
    assert isinstance(packed, PackedBatch)
    ((samples, _),) = Prefetcher([(packed.pin_memory(), targets)], "cpu")
    assert samples.no_padding is expected
    assert bool(samples.mask.any()) is not expected


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_position_without_padding_is_that_of_an_empty_mask(dtype, normalize):
    features = torch.zeros(3, 5, 7, 9, dtype=dtype)
    for embedding in (PositionEmbeddingSine(8, normalize=normalize), PositionEmbeddingLearned(8)):
        mask = torch.zeros(3, 50, 70, dtype=torch.bool)
        expected = embedding.from_mask(mask, (7, 9), dtype=dtype, layout="tokens")[0]
        for _ in range(2):
            pos = embedding.without_padding(features)
            assert pos.dtype == dtype and torch.equal(pos, expected)


def test_a_position_that_was_remembered_in_inference_mode_can_be_trained_with():
    embedding, features = PositionEmbeddingSine(8, temperature=78), torch.zeros(1, 5, 7, 9)
    with torch.inference_mode():
        expected = embedding.without_padding(features).clone()
    x = torch.ones(1, 63, 16, requires_grad=True)
    (x * embedding.without_padding(features)).sum().backward()
    assert torch.equal(x.grad, expected)


def test_a_remembered_position_that_was_written_in_is_made_anew():
    embedding = PositionEmbeddingSine(8, temperature=77)
    features = torch.zeros(1, 5, 7, 9)
    expected = embedding.without_padding(features).clone()
    embedding.without_padding(features).zero_()
    assert torch.equal(embedding.without_padding(features), expected)


@pytest.mark.slow
@torch.no_grad()
def test_one_graph_with_and_one_without_padding():
    torch._dynamo.reset()
    model = tiny_detr(level=0, layers=1).eval()
    model.backbone[0].body.fused = False
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for size in [(2, 96, 130), (3, 70, 101), (5, 160, 64)]:
        for samples in (unpadded(*size), with_mask(unpadded(*size))):
            torch.testing.assert_close(_flat(compiled(samples)), _flat(model(samples)), rtol=1e-4, atol=1e-5)
        counts.append(counter.frame_count)
    # Dynamo may call the backend more than once for the first compilation, when it specialises a float.
    assert counts == counts[:1] * 3
