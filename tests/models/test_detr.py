import pytest
import torch
import torch.nn.functional as F
from plain_detr import plain_detr, randomize_norms

from detr_fast.layers import PositionEmbeddingSine
from detr_fast.models import DETR, Backbone, Joiner, Transformer
from detr_fast.nested_tensor import NestedTensor, nested_tensor_from_tensor_list

IMAGES = [(65, 90), (96, 40), (33, 64)]


def tiny_detr(
    aux_loss=True,
    pre_norm=False,
    activation="relu",
    backbone="resnet18",
    dilation=False,
    level=None,
    dropout=0.0,
    layers=2,
):
    body = Backbone(backbone, True, False, dilation, weights=None, norm="frozen", level=level)
    transformer = Transformer(32, 4, layers, layers, 48, dropout, activation, pre_norm, True)
    model = DETR(Joiner(body, PositionEmbeddingSine(16, normalize=True)), transformer, 5, 6, aux_loss)
    randomize_norms(model)
    return model


def _images(sizes=IMAGES, dtype=torch.float32):
    return [torch.randn(3, *size, dtype=dtype) for size in sizes]


def _flat(out):
    """All logits and boxes, first layer first."""
    layers = [*out.get("aux_outputs", []), {key: out[key] for key in ("pred_logits", "pred_boxes")}]
    return [torch.stack([layer[key] for layer in layers]) for key in ("pred_logits", "pred_boxes")]


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    "options",
    [
        dict(layers=3),  # the fewest whose auxiliary outputs have an order
        dict(pre_norm=True, activation="gelu"),
        dict(level=1),
        dict(backbone="resnet50", dilation=True),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_detr_matches_plain(options, mode):
    model = tiny_detr(**options).train(mode == "train")
    images = _images()
    with torch.no_grad():
        logits, boxes = _flat(model(images))
        plain = {key: options[key] for key in ("backbone", "dilation", "level", "pre_norm") if key in options}
        if "activation" in options:
            plain["activation"] = getattr(F, options["activation"])
        expected = plain_detr(model.state_dict(), images, **plain)
    layers = options.get("layers", 2)
    assert logits.shape == (layers, 3, 6, 6) and boxes.shape == (layers, 3, 6, 4)
    torch.testing.assert_close((logits, boxes), expected, rtol=1e-4, atol=1e-5)


def test_detr_gradients_match_plain():
    model = tiny_detr().double()
    images = _images(dtype=torch.float64)
    state = {**model.state_dict(), **dict(model.named_parameters())}
    # The plain backbone copies its weights, so compare what lies behind it.
    names = [name for name in dict(model.named_parameters()) if not name.startswith("backbone.")]
    parameters = [state[name] for name in names]
    out, expected = _flat(model(images)), plain_detr(state, images)
    cotangents = [torch.randn_like(x) for x in out]
    gradients = torch.autograd.grad(out, parameters, cotangents)
    expected = torch.autograd.grad(expected, parameters, cotangents)
    # The plain position is computed in float32.
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


def test_outputs_with_and_without_aux_loss():
    every, last = tiny_detr(aux_loss=True), tiny_detr(aux_loss=False)
    last.load_state_dict(every.state_dict(), strict=True)
    images = _images()
    out_every, out_last = every(images), last(images)
    assert set(out_every) == {"pred_logits", "pred_boxes", "aux_outputs"}
    assert len(out_every["aux_outputs"]) == 1 and set(out_every["aux_outputs"][0]) == {"pred_logits", "pred_boxes"}
    assert set(out_last) == {"pred_logits", "pred_boxes"}
    for key in out_last:
        torch.testing.assert_close(out_every[key], out_last[key])
    assert 0 <= out_last["pred_boxes"].min() and out_last["pred_boxes"].max() <= 1


@torch.no_grad()
def test_takes_nested_tensor_batch_and_list():
    model = tiny_detr().eval()
    images = _images([(64, 80)] * 2)
    batch = torch.stack(images)
    expected = _flat(model(nested_tensor_from_tensor_list(images)))
    for samples in (images, tuple(images), batch, batch.contiguous(memory_format=torch.channels_last)):
        torch.testing.assert_close(_flat(model(samples)), expected)


@torch.no_grad()
def test_padding_does_not_change_a_detection_much():
    """Only through the convolutions' borders: the padded image must not differ by more than its own neighbourhood."""
    model = tiny_detr(level=0).eval()
    small, large = _images([(64, 64), (64, 128)])
    alone = model([small])["pred_boxes"][0]
    padded = model([small, large])["pred_boxes"][0]
    swapped = model([large, small])["pred_boxes"][1]
    torch.testing.assert_close(padded, swapped, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, padded, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "samples, error, message",
    [
        ([], ValueError, "got no image"),
        ([torch.zeros(3, 32, 32), torch.zeros(32, 32)], ValueError, r"3-D|\[C, H, W\]"),
        (torch.zeros(3, 32, 32), ValueError, r"\[3, 32, 32\]; expected \[B, 3, H, W\]"),
        (torch.zeros(1, 4, 32, 32), ValueError, r"\[1, 4, 32, 32\]; expected \[B, 3, H, W\]"),
        ([torch.zeros(1, 32, 32)], ValueError, r"\[1, 1, 32, 32\]; expected \[B, 3, H, W\]"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), TypeError, "uint8"),
        ("image.jpg", TypeError, "got str"),
        (NestedTensor(torch.zeros(1, 3, 32, 32), None), TypeError, "mask is None"),
    ],
)
def test_rejects_bad_samples(samples, error, message):
    with pytest.raises(error, match=message):
        tiny_detr(level=0)(samples)


def test_trains_and_follows_the_seed():
    model = tiny_detr(dropout=0.1).train()
    images = _images()
    torch.manual_seed(1)
    first = _flat(model(images))
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, _flat(model(images)), strict=True))
    torch.autograd.backward(first, [torch.randn_like(x) for x in first])
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_runs_under_autocast():
    model = tiny_detr(level=0)
    images = _images([(33, 40), (24, 64)])
    expected = _flat(model(images))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = _flat(model(images))
    for a, b in zip(out, expected, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.1)
    torch.autograd.backward(out, [torch.randn_like(x) for x in out])
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.interpret
def test_kernels_match_references_through_the_whole_model(monkeypatch):
    model = tiny_detr(level=1)
    images = _images([(41, 64), (56, 40)])

    def run():
        model.zero_grad()
        out = _flat(model(images))
        torch.autograd.backward(out, cotangents)
        return out, [parameter.grad.clone() for parameter in model.parameters()]

    cotangents = [torch.randn(2, 2, 6, 6), torch.randn(2, 2, 6, 4)]
    out, gradients = run()
    monkeypatch.setenv("DETR_FAST_KERNELS", "torch")
    expected, expected_gradients = run()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4 * max(1.0, expected.abs().max().item()))
