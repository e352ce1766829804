"""The fused body against the same modules called one by one."""

import copy
import os

import pytest
import torch
from plain_detr import randomize_norms
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from detr_fast.layers import BatchNorm2d, FrozenBatchNorm2d
from detr_fast.models import backbone as backbone_module
from detr_fast.models.backbone import BackboneBase
from detr_fast.ops import folded_conv as folded_conv_module

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
both = [pytest.param(None, id="reference", marks=pytest.mark.skipif(INTERPRET, reason="runs without the interpreter"))]
both += [pytest.param(None, id="interpreted", marks=pytest.mark.interpret)]


def _body(block=BasicBlock, norm=FrozenBatchNorm2d, level=1, **options):
    """A shallow, and for bottlenecks narrow, ResNet: one block per stage, two in layer2."""
    resnet = ResNet(block, [1, 2, 1, 1], norm_layer=norm, **options)
    base = BackboneBase(resnet, True, 1, True, level=level)
    randomize_norms(base)
    return base.body


@pytest.fixture
def folded(monkeypatch):
    """The folded convolutions that were computed, by their weight."""
    calls = []
    for name in ("folded_conv", "forked_folded_conv"):
        function = getattr(backbone_module, name)

        def counted(x, weight, *args, _function=function, **kwargs):
            calls.append(weight)
            return _function(x, weight, *args, **kwargs)

        monkeypatch.setattr(backbone_module, name, counted)
    return calls


@pytest.fixture
def products(monkeypatch):
    """Shapes of the weights that `pointwise_conv` was called with from `folded_conv`."""
    calls = []

    def counted(x, weight, *args, **kwargs):
        calls.append(weight.shape)
        return pointwise_conv(x, weight, *args, **kwargs)

    pointwise_conv = folded_conv_module.pointwise_conv
    monkeypatch.setattr(folded_conv_module, "pointwise_conv", counted)
    return calls


def _products_of(body):
    """Shapes of the weights of the convolutions that are matrix products, in the order in which they run."""
    blocks = [block for name, layer in body.named_children() if name.startswith("layer") for block in layer]
    convolutions = []
    for block in blocks:
        *first, last = [module for module in block.children() if isinstance(module, nn.Conv2d)]
        convolutions += [*first, *([] if block.downsample is None else [block.downsample[0]]), last]
    return [m.weight.shape for m in convolutions if m.kernel_size == (1, 1) and m.stride == (1, 1)]


def _step(body, x, fused):
    body.fused = fused
    body.zero_grad()
    out = body(x)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(level.shape, generator=generator).to(level) for level in list(out.values())[1:]]
    torch.autograd.backward(list(out.values())[1:], cotangents)
    return list(out.values()), {name: p.grad for name, p in body.named_parameters() if p.grad is not None}


NARROW = dict(block=Bottleneck, width_per_group=4)
BODIES = {
    "basic": dict(level=1),
    "bottleneck-dilated": dict(**NARROW, level=3, replace_stride_with_dilation=[False, False, True]),
    "bottleneck-groups": dict(**NARROW, level=1, groups=4),
}


@pytest.mark.parametrize("kind", BODIES)
def test_fused_body_equals_its_modules(kind, folded):
    """In float64, where no ReLU is active on one side only because of rounding."""
    body = _body(**BODIES[kind]).double()
    x = torch.randn(2, 3, 33, 40, dtype=torch.float64)
    out, gradients = _step(body, x, fused=True)
    convolutions = [module.weight for module in body.modules() if isinstance(module, nn.Conv2d)]
    assert {id(w) for w in folded} == {id(w) for w in convolutions} and len(folded) == len(convolutions)
    expected, expected_gradients = _step(body, x, fused=False)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert gradients.keys() == expected_gradients.keys() and all(name.startswith("layer") for name in gradients)
    assert not any(name.startswith("layer1") for name in gradients)
    for name, gradient in gradients.items():
        limit = 1e-9 * expected_gradients[name].abs().max().item()
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=limit)


@pytest.mark.parametrize("returned", [("layer4",), ("layer2", "layer4"), ("layer1", "layer2", "layer3", "layer4")])
@pytest.mark.parametrize("trained", ["all", "original", "layer4"])
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "bottleneck-dilated"])
def test_gradients_of_every_parameter_whatever_is_trained_and_returned(kind, trained, returned):
    """Each ReLU's mask is applied once, by its readers or by its maker, where the stage is returned."""
    options = {"layers": [2, 2, 1, 2], "norm_layer": FrozenBatchNorm2d}
    options |= {"block": BasicBlock} if kind == "basic" else NARROW
    if kind == "bottleneck-dilated":
        options["replace_stride_with_dilation"] = [False, False, True]
    torch.manual_seed(0)
    resnet = ResNet(**options)
    body = backbone_module.ResNetBody(resnet, {stage: stage for stage in returned})
    randomize_norms(nn.ModuleDict({"0": nn.ModuleDict({"body": body})}))
    frozen = {"all": (), "original": ("conv1", "layer1"), "layer4": ("conv1", "layer1", "layer2", "layer3")}[trained]
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    body.double()
    x = torch.randn(1, 3, 48, 33, dtype=torch.float64, requires_grad=trained == "all")
    results = []
    for body.fused in (True, False):
        body.zero_grad()
        x.grad = None
        out = [level for level in body(x).values() if level.requires_grad]
        generator = torch.Generator().manual_seed(1)
        torch.autograd.backward(out, [torch.randn(level.shape, generator=generator).double() for level in out])
        gradients = {name: p.grad for name, p in body.named_parameters() if p.grad is not None}
        results.append(gradients | ({} if x.grad is None else {"x": x.grad.clone()}))
    ours, right = results
    assert ours.keys() == right.keys() and len(ours) >= 5
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, right[name], rtol=0, atol=1e-9 * right[name].abs().max().item())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_body_has_the_same_gradients(use_reentrant):
    body, x = _body(), torch.randn(1, 3, 40, 40, requires_grad=True)
    results = []
    for out in (body(x)["1"], checkpoint(lambda x: body(x)["1"], x, use_reentrant=use_reentrant)):
        body.zero_grad()
        x.grad = None
        out.backward(torch.ones_like(out))
        results.append([x.grad, *(p.grad for p in body.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_block_adds_and_masks_in_one_step(monkeypatch):
    """No addition of autograd's, one product for each block's input, no mask of its own for what blocks read."""
    called = []
    products = folded_conv_module.pointwise_conv_input_grad

    def counted(grad, weight, shortcut, gate):
        called.append((shortcut is not None, gate is not None))
        return products(grad, weight, shortcut, gate)

    monkeypatch.setattr(folded_conv_module, "pointwise_conv_input_grad", counted)
    monkeypatch.setattr(folded_conv_module, "runs_kernel", lambda x: True)
    resnet = ResNet(Bottleneck, [1, 3, 2, 1], norm_layer=FrozenBatchNorm2d, width_per_group=4)
    base = BackboneBase(resnet, True, 1, False)
    x = torch.randn(1, 3, 40, 33).contiguous(memory_format=torch.channels_last)
    out = base.body(x)["0"]
    with _Operators() as operators:
        out.backward(torch.randn_like(out))
    # layer2 to layer4 are trained: six blocks' last convolutions, and the first ones of all blocks but layer2's.
    assert sorted(called) == [(False, True)] * 6 + [(True, True)] * 5
    assert operators.names.count("aten.add.Tensor") == 0
    # The whole body's last ReLU; those before a 3x3 convolution are masked in place.
    assert operators.names.count("aten.threshold_backward.default") == 1


def test_max_pooling_on_a_cpu_is_channels_last():
    """Its contiguous form takes 19 times as long. Values and gradients are the same, bit for bit, ties included."""
    pool = nn.MaxPool2d(3, 2, 1)
    pooled = []
    pool.register_forward_pre_hook(lambda module, args: pooled.append(args[0]))
    x = torch.randn(2, 4, 9, 7).round_().requires_grad_()
    out, expected = backbone_module._pool_channels_last(x, pool), pool(x)
    assert [y.is_contiguous(memory_format=torch.channels_last) for y in pooled] == [True, False]
    assert torch.equal(out, expected) and out.is_contiguous()
    cotangent = torch.randn_like(out)
    gradients = [torch.autograd.grad(y, x, cotangent)[0] for y in (out, expected)]
    assert torch.equal(*gradients)


class _Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_fused_body_in_float32():
    body = _body(**NARROW)
    x = torch.randn(2, 3, 40, 33)
    out, gradients = _step(body, x, fused=True)
    expected, expected_gradients = _step(body, x, fused=False)
    for value, right in zip(out, expected, strict=True):
        assert (value - right).abs().max() <= 1e-5 * right.abs().max()
    for name, gradient in gradients.items():
        right = expected_gradients[name]
        assert (gradient - right).abs().max() <= 1e-5 * right.abs().max(), name


@pytest.mark.parametrize("_implementation", both)
@pytest.mark.parametrize("dilation", [False, True])
def test_convolutions_that_are_products_run_as_products(dilation, _implementation, products, monkeypatch):
    """As on a GPU: in channels-last memory, where kernels are used."""
    monkeypatch.setattr(folded_conv_module, "runs_kernel", lambda x: True)
    body = _body(**NARROW, level=3, replace_stride_with_dilation=[False, False, dilation])
    x = torch.randn(2, 3, 40, 33).contiguous(memory_format=torch.channels_last)
    out, gradients = _step(body, x, fused=True)
    # Two of each of five blocks, and layer1's downsampling; with dilation layer4's as well.
    assert products == _products_of(body) and len(products) == 11 + dilation
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in out)
    expected, expected_gradients = _step(body, x, fused=False)
    for value, right in zip(out, expected, strict=True):
        assert (value - right).abs().max() <= 1e-5 * right.abs().max()
    for name, gradient in gradients.items():
        right = expected_gradients[name]
        assert (gradient - right).norm() <= 1e-4 * right.norm(), name


def test_contiguous_images_on_a_cpu_run_no_products(products):
    _step(_body(**NARROW), torch.randn(1, 3, 40, 33), fused=True)
    assert products == []


def test_frozen_stages_keep_nothing():
    body = _body()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = body(torch.randn(1, 3, 40, 40))
    assert not out["0"].requires_grad and out["1"].requires_grad
    kept = {t.data_ptr() for t in saved if t.dim() == 4 and t.shape[-1] > 3}
    # layer2: its input, and what each of its four convolutions with a ReLU puts out.
    assert len(kept) == 5 and out["0"].data_ptr() in kept and out["1"].data_ptr() in kept


def test_nothing_is_promoted_to_float32():
    body = _body()
    with torch.autocast("cpu", torch.bfloat16):
        out = body(torch.randn(1, 3, 40, 40))
        body.fused = False
        expected = body(torch.randn(1, 3, 40, 40))
    assert [level.dtype for level in out.values()] == [torch.bfloat16] * 2 == [x.dtype for x in expected.values()]


def test_bfloat16_error_is_within_twice_the_modules():
    body = _body()
    exact = copy.deepcopy(body).double()
    x = torch.randn(1, 3, 40, 40)
    errors = {}
    right = exact(x.double())["1"]
    for fused in (True, False):
        body.fused = fused
        with torch.autocast("cpu", torch.bfloat16):
            errors[fused] = (body(x)["1"].double() - right).abs()
    assert errors[True].mean() <= 2 * errors[False].mean() and errors[True].max() <= 2 * errors[False].max()


def _watch(body):
    body.layer1[0].conv1.register_forward_hook(lambda *args: None)


def _replace(body):
    body.layer2[1].relu = nn.GELU()


def _thaw(body):
    body.layer2[0].bn1 = nn.BatchNorm2d(128)


def _train(body):
    body.layer1[0].bn1.weight = nn.Parameter(body.layer1[0].bn1.weight)


@pytest.mark.parametrize("change", [_watch, _replace, _thaw, _train])
@torch.no_grad()
def test_changed_modules_are_called(change, folded):
    body = _body().eval()
    change(body)
    x = torch.randn(1, 3, 40, 40)
    out = body(x)
    body.fused = False
    assert folded == [] and all(torch.equal(a, b) for a, b in zip(out.values(), body(x).values(), strict=True))


@pytest.mark.parametrize("norm", [BatchNorm2d, lambda n: nn.GroupNorm(32, n)])
@torch.no_grad()
def test_trained_norms_are_not_folded(norm, folded):
    _body(level=0, norm=norm)(torch.randn(1, 3, 40, 40))
    assert folded == []


def test_hooks_fire():
    body = _body(level=0)
    seen = []
    body.layer1[0].bn1.register_forward_hook(lambda *args: seen.append(args))
    body(torch.randn(1, 3, 40, 40))
    assert len(seen) == 1


def test_other_dtypes_are_refused_as_by_a_convolution():
    with pytest.raises(RuntimeError, match="should be the same|expected scalar type"):
        _body(level=0)(torch.randn(1, 3, 40, 40).bfloat16())


@pytest.mark.gpu
def test_fused_body_on_a_gpu(products):
    body = _body(**NARROW).cuda()
    exact = copy.deepcopy(body).double()
    x = torch.randn(2, 3, 128, 96, device="cuda")
    right, _ = _step(exact, x.double(), fused=False)
    errors, grads = {}, {}
    for fused in (True, False):
        with torch.autocast("cuda", torch.bfloat16):
            out, grads[fused] = _step(body, x, fused)
        assert out[-1].dtype == torch.bfloat16
        assert products == _products_of(body)
        errors[fused] = (out[-1].double() - right[-1]).abs().mean()
    assert errors[True] <= 2 * errors[False]
    for name, gradient in grads[True].items():
        difference = (gradient - grads[False][name]).norm() / grads[False][name].norm()
        assert difference < 0.1, name
