"""The body on a CPU in evaluation: equal to its modules, and never from weights that are no longer there."""

import copy
import functools
import io
import os
import pickle

import pytest
import torch
from plain_detr import randomize_norms
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from detr_fast.benchmarks.studies import infer, memory
from detr_fast.layers import FrozenBatchNorm2d
from detr_fast.models.backbone import BackboneBase
from detr_fast.ops._onednn import HAS_ONEDNN
from detr_fast.training.ema import ModelEma
from detr_fast.training.regions import compile_regions

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs without the interpreter"),
    pytest.mark.skipif(not HAS_ONEDNN, reason="PyTorch without oneDNN"),
]

NARROW = dict(block=Bottleneck, width_per_group=4)
BODIES = {
    "basic": dict(block=BasicBlock, level=3),
    "bottleneck": dict(**NARROW, level=3),
    "dilated": dict(**NARROW, level=3, replace_stride_with_dilation=[False, False, True]),
    "groups": dict(**NARROW, level=2, groups=4),
}


def _body(block=Bottleneck, level=1, **options):
    torch.manual_seed(0)
    if block is Bottleneck:
        options.setdefault("width_per_group", 4)
    resnet = ResNet(block, [2, 2, 1, 1], norm_layer=FrozenBatchNorm2d, **options)
    base = BackboneBase(resnet, True, 1, True, level=level)
    randomize_norms(base)
    return base.body.eval()


def _modules(body, x):
    body.fused = False
    try:
        return body(x)
    finally:
        body.fused = True


def _assert_same(body, x, limit=2e-5):
    """The body, packed, gives what its modules do now."""
    out, expected = body(x), _modules(body, x)
    assert out.keys() == expected.keys()
    for value, right in zip(out.values(), expected.values(), strict=True):
        assert value.dtype == right.dtype and value.shape == right.shape
        assert (value - right).abs().max() <= limit * right.abs().max()
    return out


@pytest.mark.parametrize("kind", BODIES)
@torch.no_grad()
def test_packed_body_equals_its_modules(kind):
    body = _body(**BODIES[kind])
    convolutions = sum(isinstance(module, nn.Conv2d) for module in body.modules())
    for size in ((2, 3, 65, 96), (1, 3, 33, 40), (3, 3, 32, 32), (1, 3, 1, 1)):  # the last stage down to one pixel
        x = torch.randn(size)
        before = x.clone()
        out = _assert_same(body, x)
        assert torch.equal(x, before)
        assert all(level.is_contiguous(memory_format=torch.channels_last) for level in out.values())
    assert len(body._packed) == convolutions


@torch.no_grad()
def test_levels_that_were_returned_stay():
    """The residual's memory is used again within a stage only."""
    body = _body(BasicBlock, level=2)
    out = body(torch.randn(1, 3, 64, 64))
    before = {name: level.clone() for name, level in out.items()}
    body(torch.randn(1, 3, 64, 64))
    assert all(torch.equal(out[name], before[name]) for name in out)


def test_in_float64_and_with_gradients_nothing_is_packed():
    body = _body()
    body(torch.randn(1, 3, 32, 32))
    body.train()
    with torch.no_grad():
        body(torch.randn(1, 3, 32, 32))
    body.eval().double()
    with torch.no_grad():
        body(torch.randn(1, 3, 32, 32).double())
    assert len(body._packed) == 0


@torch.no_grad()
def test_the_backbone_of_a_model_compiled_by_regions_is_packed():
    model = infer.build_model("tiny")[0]
    compiled = copy.deepcopy(model)
    compile_regions(compiled, pytest.fail, backend="eager")
    x = torch.randn(1, 3, 64, 96)
    for name, value in compiled(x).items():
        assert torch.allclose(value, model(x)[name], atol=1e-5)
    assert len(compiled.backbone[0].body._packed) == len(model.backbone[0].body._packed) > 0
    body = _body()
    torch.compile(body, backend="eager")(x)  # whole, it is the compiler's to fuse
    assert len(body._packed) == 0


@torch.no_grad()
def test_an_empty_batch():
    assert _body()(torch.randn(0, 3, 32, 32))["1"].shape == (0, 512, 4, 4)


@torch.no_grad()
def test_bfloat16_error_is_within_twice_the_modules():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("a CPU that oneDNN has no bfloat16 for")
    body = _body(level=3)
    x = torch.randn(1, 3, 64, 64)
    right = _modules(copy.deepcopy(body).double(), x.double())["3"]
    with torch.autocast("cpu", torch.bfloat16):
        out, plain = body(x)["3"], _modules(body, x)["3"]
    assert out.dtype == torch.bfloat16 and len(body._packed) > 0
    ours, theirs = (out.double() - right).abs(), (plain.double() - right).abs()
    assert ours.mean() <= 2 * theirs.mean() and ours.max() <= 2 * theirs.max()
    _assert_same(body, x)  # float32 again, from the same kept object


# What may happen to weights between two calls.


def _train(body):
    body.train()
    optimizer = torch.optim.SGD(body.parameters(), lr=1e-2)
    with torch.enable_grad():
        sum(level.square().mean() for level in body(torch.randn(1, 3, 32, 32)).values()).backward()
    optimizer.step()
    body.eval()


def _train_in_evaluation_mode(body):
    optimizer = torch.optim.AdamW(body.parameters(), lr=1e-2, fused=True)
    with torch.enable_grad():
        sum(level.square().mean() for level in body(torch.randn(1, 3, 32, 32)).values()).backward()
    optimizer.step()


def _load(body):
    body.load_state_dict({name: value * 1.1 for name, value in body.state_dict().items()})


def _load_assigning(body):
    body.load_state_dict({name: value * 1.1 for name, value in body.state_dict().items()}, assign=True)


def _assign_data(body):
    body.layer2[0].conv1.weight.data = body.layer2[0].conv1.weight.data * 2


def _copy_into_data(body):
    weight = body.layer2[0].conv2.weight
    weight.data.copy_(weight.data.flip(0))  # the same values in another order


def _one_value_by_numpy(body):
    body.layer2[0].conv3.weight.detach().numpy()[0, 0] += 3


def _a_statistic(body):
    body.layer2[0].bn2.running_var.data[0] += 1


def _a_sign_of_zero(body):
    body.conv1.weight.data.zero_()


def _average(body):
    average = ModelEma(body, 0.5)
    _train(body)
    average.update(body)
    with average.applied_to(body):
        _assert_same(body, torch.randn(1, 3, 40, 40))


def _half_and_back(body):
    body.to(torch.bfloat16)
    body.float()


def _channels_last(body):
    body.to(memory_format=torch.channels_last)
    body.layer1[0].conv2.weight.data.mul_(2)


def _other_convolution(body):
    old = body.layer2[0].conv1
    body.layer2[0].conv1 = nn.Conv2d(old.in_channels, old.out_channels, 1, bias=False)


CHANGES = [
    _train, _train_in_evaluation_mode, _load, _load_assigning, _assign_data, _copy_into_data, _one_value_by_numpy,
    _a_statistic, _a_sign_of_zero, _average, _half_and_back, _channels_last, _other_convolution,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_changed_weights_are_seen(change):
    body, x = _body(), torch.randn(1, 3, 40, 40)
    before = body(x)["1"]
    change(body)
    after = _assert_same(body, x)["1"]
    assert not torch.equal(before, after)
    assert torch.equal(body(x)["1"], after)


@torch.no_grad()
def test_unchanged_weights_are_folded_once(monkeypatch):
    folds = []
    fold = torch._C._nn.mkldnn_reorder_conv2d_weight
    monkeypatch.setattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", lambda *a: folds.append(a) or fold(*a))
    body = _body()
    for size in ((40, 40), (40, 33), (40, 40)):
        body(torch.randn(1, 3, *size))
    assert len(folds) == sum(isinstance(m, nn.Conv2d) for m in body.modules()) - 1  # the stem is not reordered
    body.layer1[0].conv1.weight.mul_(2)
    body(torch.randn(1, 3, 40, 40))
    assert len(folds) == sum(isinstance(m, nn.Conv2d) for m in body.modules())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@torch.no_grad()
def test_nan_and_infinity_reach_the_results(value):
    """oneDNN's ReLU would make 0 of NaN."""
    body, x = _body(), torch.randn(2, 3, 40, 40)
    _assert_same(body, x)
    x[0, 0, 20, 20] = value
    out, expected = body(x)["1"], _modules(body, x)["1"]
    assert torch.equal(out.isfinite(), expected.isfinite()) and not out[0].isfinite().all() and out[1].isfinite().all()
    for tensor in (body.layer2[0].conv2.weight, body.layer2[0].bn2.bias):
        before = tensor.clone()
        tensor[0] = value
        out, expected = body(x[1:])["1"], _modules(body, x[1:])["1"]
        assert torch.equal(out.isfinite(), expected.isfinite()) and not out.isfinite().all()
        tensor.copy_(before)
    _assert_same(body, x[1:])


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), "saved"])
@torch.no_grad()
def test_copies_have_their_own(copied):
    body, x = _body(), torch.randn(1, 3, 40, 40)
    names = set(body.state_dict())
    before = body(x)["1"]
    assert set(body.state_dict()) == names
    if copied == "saved":
        file = io.BytesIO()
        torch.save(body, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copied(body)
    assert torch.equal(other(x)["1"], before)
    if copied is not copy.copy:  # which shares the weights
        other.layer1[0].conv1.weight.mul_(-1)
        assert not torch.equal(_assert_same(other, x)["1"], before)
        assert torch.equal(body(x)["1"], before)


def test_a_body_that_was_pickled_without_kept_weights():
    body = _body()
    state = body.__getstate__()
    del state["_packed"]
    old = type(body).__new__(type(body))
    old.__setstate__(state)
    _assert_same(old.eval().train().eval(), torch.randn(1, 3, 40, 40))


@torch.no_grad()
def test_transforms_of_the_weights_are_refused():
    """Not computed without their tangents, and not kept."""
    body, x = _body(), torch.randn(1, 3, 40, 40)
    weights = {name: weight.detach() for name, weight in body.named_parameters()}
    tangents = {name: torch.ones_like(weight) for name, weight in weights.items()}
    call = functools.partial(torch.func.functional_call, body)
    with pytest.raises(NotImplementedError, match="folded_conv does not support vmap"):
        torch.func.jvp(lambda weights: call(weights, (x,))["1"], (weights,), (tangents,))
    with pytest.raises(NotImplementedError, match="folded_conv does not support vmap"):
        torch.func.vmap(lambda weights: call(weights, (x,))["1"])({k: w[None] for k, w in weights.items()})
    assert len(body._packed) == 0


def test_inference_mode_and_weights_made_in_it():
    with torch.inference_mode():
        body, x = _body(), torch.randn(1, 3, 40, 40)
        before = body(x)["1"]
        body.layer1[0].conv1.weight.mul_(2)
        assert not torch.equal(_assert_same(body, x)["1"], before)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux")
def test_memory_over_images_of_ever_new_sizes_is_bounded():
    """About 140 new sizes after the first 360 images: if each kept its code, they would take some 700 MB more."""
    *figures, _ = memory.alone(500, 20, (64, 160), True)
    assert max(figures[18:]) - max(figures[:18]) < 60 and figures[-1] < 500
