"""The training step: accumulation, clipping, skipping what is not finite and saying where it came from."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from detr_fast.config import Config
from detr_fast.errors import NonFiniteLossError
from detr_fast.nested_tensor import NestedTensor
from detr_fast.tasks import task_of
from detr_fast.training.ema import ModelEma
from detr_fast.training.engine import train_one_epoch
from detr_fast.training.nonfinite import FiniteWatch, explain_non_finite
from detr_fast.training.setup import build

CPU = torch.device("cpu")


class Line(nn.Module):
    """Predicts a number per image: w * mean + b."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5]))
        self.bias = nn.Parameter(torch.tensor([0.1]))

    def forward(self, samples):
        return {"y": samples.tensors.mean(dim=(1, 2, 3)) * self.weight + self.bias}


class Squares(nn.Module):
    """Mean squared error with weight 2, under a name of its own, and what the criterion logs."""

    weight_dict = {"loss_y": 2.0}

    def forward(self, outputs, targets):
        error = outputs["y"] - torch.cat([t["y"] for t in targets])
        return {"loss_y": (error**2).mean(), "class_error": torch.tensor(12.0)}


def batches(values, size):
    """Batches of `size` one-pixel images; the target of x is 3x."""
    result = []
    for start in range(0, len(values), size):
        x = torch.tensor(values[start : start + size])
        mask = torch.zeros(len(x), 1, 2, dtype=torch.bool)
        mask[:, :, 1] = True
        samples = NestedTensor(x[:, None, None, None].expand(-1, 1, 1, 2).clone(), mask)
        result.append((samples, [{"y": v[None] * 3} for v in x]))
    return result


def sgd(model, lr=0.1):
    return torch.optim.SGD(model.parameters(), lr=lr, fused=True)


def test_statistics_have_the_originals_names():
    model = Line()
    stats = train_one_epoch(model, Squares(), batches([1.0, 2.0], 1), sgd(model, lr=0.0), CPU, 0)
    loss = ((0.6 - 3) ** 2 + (1.1 - 6) ** 2) / 2
    assert stats["loss_y_unscaled"] == pytest.approx(loss)
    assert stats["loss_y"] == stats["loss"] == pytest.approx(2 * loss)
    assert stats["class_error"] == stats["class_error_unscaled"] == 12.0
    assert stats["padding"] == 0.5 and stats["lr"] == 0.0
    assert {"time", "data"} <= set(stats)


def test_accumulated_batches_equal_one_large_batch():
    values = [1.0, 2.0, -1.0, 0.5]
    one, many = Line(), Line()
    train_one_epoch(one, Squares(), batches(values, 4), sgd(one), CPU, 0)
    train_one_epoch(many, Squares(), batches(values, 1), sgd(many), CPU, 0, accumulate_steps=4)
    torch.testing.assert_close(one.weight, many.weight)
    torch.testing.assert_close(one.bias, many.bias)
    assert not torch.equal(one.weight, torch.tensor([0.5]))


def test_last_group_of_accumulation_may_be_smaller():
    model, by_hand = Line(), Line()
    train_one_epoch(model, Squares(), batches([1.0, 2.0, 3.0], 1), sgd(model), CPU, 0, accumulate_steps=2)
    optimizer = sgd(by_hand)
    for group in ([1.0, 2.0], [3.0]):
        for samples, targets in batches(group, 1):
            (2 * Squares()(by_hand(samples), targets)["loss_y"] / len(group)).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(model.weight, by_hand.weight)


def test_gradients_are_clipped_to_the_norm():
    model = Line()
    before = torch.cat([model.weight, model.bias]).detach()
    train_one_epoch(model, Squares(), batches([1.0], 1), sgd(model, lr=1.0), CPU, 0, max_norm=0.1)
    moved = (torch.cat([model.weight, model.bias]).detach() - before).norm()
    assert moved.item() == pytest.approx(0.1, rel=1e-4)


def test_stops_after_max_steps():
    limited, short = Line(), Line()
    train_one_epoch(limited, Squares(), batches([1.0, 2.0, 3.0, 4.0], 1), sgd(limited), CPU, 0, max_steps=2)
    train_one_epoch(short, Squares(), batches([1.0, 2.0], 1), sgd(short), CPU, 0)
    assert torch.equal(limited.weight, short.weight)


def test_ema_follows_with_its_decay():
    model = Line()
    ema = ModelEma(model, decay=0.15)
    train_one_epoch(model, Squares(), batches([1.0, 2.0], 1), sgd(model), CPU, 0, ema=ema)
    again = Line()
    values = [again.weight.detach().clone()]
    optimizer = sgd(again)
    for samples, targets in batches([1.0, 2.0], 1):
        (2 * Squares()(again(samples), targets)["loss_y"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(again.weight.detach().clone())
    # The first decays are limited to (1 + n) / (10 + n) = 2/11 > 0.15 already.
    expected = values[0]
    for value in values[1:]:
        expected = 0.15 * expected + 0.85 * value
    torch.testing.assert_close(ema.values["weight"], expected)
    with ema.applied_to(model):
        assert torch.equal(model.weight, ema.values["weight"])
    assert torch.equal(model.weight, values[-1])


def test_rejects_an_unknown_precision_and_fp16_without_scaler():
    model = Line()
    with pytest.raises(ValueError, match="fp8"):
        train_one_epoch(model, Squares(), batches([1.0], 1), sgd(model), CPU, 0, precision="fp8")
    with pytest.raises(ValueError, match="scaler"):
        train_one_epoch(model, Squares(), batches([1.0], 1), sgd(model), CPU, 0, precision="fp16")


class Root(Line):
    """Finite everywhere, but with an infinite gradient at 0."""

    def forward(self, samples):
        return {"y": (samples.tensors.mean(dim=(1, 2, 3)) * self.weight).sqrt() + self.bias}


def test_gradient_that_is_not_finite_moves_no_weight_and_is_named():
    model = Root()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    with pytest.raises(NonFiniteLossError, match="epoch 7, batch 0: the gradients of 1 parameters.*weight"):
        train_one_epoch(model, Squares(), batches([0.0], 1), optimizer, CPU, 7, max_norm=0.1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_loss_that_is_not_finite_is_named():
    model = Line()
    with pytest.raises(NonFiniteLossError, match="'y' of the target of image 0 has 1 NaN"):
        train_one_epoch(model, Squares(), _nan_target(), sgd(model), CPU, 0)
    assert model.weight.item() == 0.5


def _nan_target():
    [(samples, _)] = batches([1.0], 1)
    return [(samples, [{"y": torch.tensor([float("nan")])}])]


@pytest.fixture
def detector():
    config = Config.from_arguments(
        "--backbone resnet18 --backbone_weights none --backbone_level 1 --hidden_dim 32 --nheads 2 --enc_layers 1 "
        "--dec_layers 2 --dim_feedforward 32 --num_queries 5 --device cpu".split()
    )
    config = replace(config, num_classes=3)
    return build(task_of(config), config, own_weights=False)


def detector_batch():
    mask = torch.zeros(2, 48, 64, dtype=torch.bool)
    mask[1, :, 40:] = True
    target = {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    targets = [{**target, "image_id": torch.tensor([i])} for i in (11, 12)]
    return NestedTensor(torch.randn(2, 3, 48, 64), mask), targets


@pytest.mark.parametrize(
    "module", ["bbox_embed.layers.1", "transformer.encoder.layers.0.linear2", "backbone.0.body.layer1.0.conv2"]
)
def test_first_module_that_is_not_finite_is_named(detector, module):
    model, criterion, _ = detector
    handle = model.get_submodule(module).register_forward_hook(lambda m, i, o: o / 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    before = {name: value.clone() for name, value in model.named_parameters()}
    try:
        with pytest.raises(NonFiniteLossError) as error:
            train_one_epoch(model, criterion, [detector_batch()], optimizer, CPU, 0, 0.1)
    finally:
        handle.remove()
    assert f"first module whose output is not finite is {module} (" in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_image_and_parameter_that_are_not_finite_are_named(detector):
    model, _, _ = detector
    samples, targets = detector_batch()
    assert explain_non_finite(model, samples, targets) is None
    with torch.no_grad():
        value = model.class_embed.bias[0].clone()
        model.class_embed.bias[0] = float("inf")
        assert "parameter class_embed.bias has 0 NaN and 1 infinite" in explain_non_finite(model, samples, targets)
        model.class_embed.bias[0] = value
    samples.tensors[1, 0, 3, 3] = float("nan")
    assert "image 1 of the batch (image id 12) has 1 NaN" in explain_non_finite(model, samples, targets)


def test_what_the_matcher_refuses_for_other_reasons_keeps_its_message(detector):
    model, criterion, _ = detector
    samples, targets = detector_batch()
    targets[0]["labels"] = torch.tensor([9])
    with pytest.raises(ValueError, match="9"):
        train_one_epoch(model, criterion, [(samples, targets)], sgd(model), CPU, 0)


def test_watch_returns_the_bad_batch_once():
    watch = FiniteWatch(CPU)
    assert watch.add(torch.tensor(True), "good") is None
    assert watch.add(torch.tensor(False), "bad") == "bad"
    assert watch.drain() is None
