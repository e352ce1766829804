"""The training step: built once for the trainer and the benchmark, made of the fused ops, and its parts."""

import copy
import warnings
from collections import Counter
from unittest import mock

import pytest
import torch
from torch import nn
from torch.autograd.function import FunctionCtx

from detr_fast.benchmarks.shapes import nominal_batch
from detr_fast.benchmarks.studies import launches, training_step
from detr_fast.benchmarks.studies.same_training import criterion
from detr_fast.config import Config
from detr_fast.criterion import HungarianMatcher
from detr_fast.models import backbone
from detr_fast.ops import folded_conv as folded_conv_module
from detr_fast.ops.pointwise_conv import pointwise_conv
from detr_fast.tasks import task_of
from detr_fast.training import setup, step, trainer
from detr_fast.training.ema import ModelEma
from detr_fast.training.log import Metrics
from detr_fast.training.optim import build_optimizer, load_optimizer

CPU = torch.device("cpu")


def test_the_trainer_and_the_benchmark_build_and_take_the_same_step(tiny_flags, monkeypatch):
    built, taken, losses = [], [], step.TrainingStep.losses

    def recorded(model, criterion, config, device, say, **options):
        built.append(step.build_step(model, criterion, config, device, say, **options))
        return built[-1]

    for module in (trainer, training_step):
        monkeypatch.setattr(module, "build_step", recorded)
    monkeypatch.setattr(step.TrainingStep, "losses", lambda self, *args: taken.append(self) or losses(self, *args))
    run = trainer.Trainer(*setup.start(Config.from_arguments([*tiny_flags, "--max_steps", "1", "--epochs", "1"])))
    run.run()
    measured = training_step.Step(_ours_on_cpu(), training_step.build_model("tiny", 0.0), CPU)
    measured(training_step.make_batch(nominal_batch("R50", 1, 0.06), CPU, 0))
    assert built == taken == [run.step, measured.step]


def _ours_on_cpu():
    return training_step.Variant("ours", bf16=False, channels_last=False, compile="no")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_calls_the_fused_ops(precision, monkeypatch):
    """Of R50, on a GPU that is pretended: all its operators, and within `folded_conv` the kernels of cuDNN and ours."""
    kernels = Counter()

    def product(x, weight, bias, residual, *, relu):
        kernels["product"] += 1
        return pointwise_conv(x, weight, bias, residual, relu=relu)

    def cudnn(name, before_bias):
        def call(x, folded, *rest):
            kernels[name] += 1
            return nn.functional.conv2d(x, folded, *rest[before_bias:])

        return call

    def looked_into(x, weight, scale, bias, residual=None, *, relu=True, **options):
        # What the op does on a GPU, which a tensor without values does not show.
        geometry = (options[name] for name in ("stride", "padding", "dilation", "groups"))
        folded_conv_module._forward(x, weight, scale, bias, residual, relu, *geometry)
        return folded_conv_module.folded_conv(x, weight, scale, bias, residual, relu=relu, **options)

    def looked_into_fork(x, weight, scale, bias, **options):
        geometry = (options[name] for name in ("stride", "padding", "dilation", "groups"))
        folded_conv_module._forward(x, weight, scale, bias, None, True, *geometry)
        return folded_conv_module.forked_folded_conv(x, weight, scale, bias, **options)

    monkeypatch.setattr(folded_conv_module, "_cudnn_relu", cudnn("relu", 0))
    monkeypatch.setattr(folded_conv_module, "_cudnn_add_relu", cudnn("add_relu", 2))
    monkeypatch.setattr(folded_conv_module, "pointwise_conv", product)
    monkeypatch.setattr(backbone, "folded_conv", looked_into)
    monkeypatch.setattr(backbone, "forked_folded_conv", looked_into_fork)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    counter = launches.count(nominal_batch("R50", 2, 0.2), precision)
    called = counter.names
    expected = {
        "attention": 6, "attention_backward": 6, "packed_attention": 12, "packed_attention_backward": 12,
        "sine_position": 1, "pad_collate_packed": 1, "matching_cost": 1, "assign": 1, "folded_conv": 53,
        "folded_conv_backward": 42,
    }  # fmt: skip
    assert {name: called[f"detr_fast::{name}"] for name in expected} == expected
    # 33 products; the other sixteen with a ReLU by cuDNN; the stem and the strided downsamples step by step.
    assert kernels == {"product": 33, "relu": 16}
    # Images and targets are copied in one piece each, whatever the number of images; the third operator pads.
    assert counter.rows["input"]["operators"] == 3
    # One fused AdamW per list of tensors, and no loop over parameters.
    assert called["aten::_fused_adamw_"] == 2 and called["aten::_foreach_mul_"] == 1


def test_the_count_of_a_backward_pass_is_that_of_torchs_engine(monkeypatch):
    monkeypatch.setattr(FunctionCtx, "set_materialize_grads", launches._set_materialize_grads)
    batch, found = training_step.make_batch(nominal_batch("R50", 2, 0.1), CPU, 0), []
    model = training_step.build_model("tiny", 0.0)
    for backward in (torch.Tensor.backward, launches.walk_backward):
        ours = training_step.Step(_ours_on_cpu(), copy.deepcopy(model), CPU)
        loss = ours.loss(batch)
        with launches.Counter() as counter:
            backward(loss)
        found.append((counter.names, [p.grad for p in ours.step.parameters if p.grad is not None]))
    (names, gradients), (walked, walked_gradients) = found
    assert names == walked and len(gradients) > 50
    assert all(torch.equal(a, b) for a, b in zip(gradients, walked_gradients, strict=True))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch's convolutions are not oneDNN's")
def test_images_weights_and_features_on_a_cpu_are_channels_last():
    """Convolutions in the other memory format take a twentieth of a step longer; they compute the same."""
    config, model = Config(device="cpu", precision="fp32"), training_step.build_model("tiny", 0.0)
    assert setup.packed_collate(task_of(config), config).options["channels_last"]
    seen, results = [], []
    for channels_last in (None, False):
        built = step.build_step(
            copy.deepcopy(model),
            criterion(HungarianMatcher, 2, training_step.CLASSES),
            config,
            CPU,
            print,
            channels_last=channels_last,
        )
        hook = built.model.input_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        batch, _, targets = training_step.make_batch(nominal_batch("R50", 2, 0.1), CPU, 0)
        batch.options |= {"channels_last": channels_last is None}
        losses = built.losses(built.outputs(batch.to(CPU)), targets)
        built.backward(losses.total)
        hook.remove()
        results.append([losses.total, *(p.grad for p in built.parameters if p.grad is not None)])
        weights = [m.weight for m in built.model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]
        assert all(x.is_contiguous(memory_format=torch.channels_last) == (channels_last is None) for x in weights)
    assert [x.is_contiguous(memory_format=torch.channels_last) for x in seen] == [True, False]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_losses_are_summed_with_their_weights_and_gradients_are_the_weights():
    values = {name: torch.tensor(value, requires_grad=True) for name, value in (("a", 1.5), ("b", 2.0), ("c", 7.0))}
    weights = {"c": 0.1, "a": 3.0, "absent": 5.0}
    losses = step.LossSum(weights)({**values, "class_error": torch.tensor(40.0)})
    losses.total.backward()
    assert losses.total.item() == pytest.approx(1.5 * 3 + 7 * 0.1)
    assert [value.grad and value.grad.item() for value in values.values()] == [3.0, None, pytest.approx(0.1)]
    logged = {name: round(value.item(), 6) for name, value in losses.for_log().items()}
    assert logged == {
        "loss": 5.2, "a": 4.5, "c": 0.7, "a_unscaled": 1.5, "b_unscaled": 2.0, "c_unscaled": 7.0,
        "class_error_unscaled": 40.0, "class_error": 40.0,
    }  # fmt: skip


def test_metrics_take_numbers_beside_tensors_and_go_on_from_a_checkpoint():
    whole, first = Metrics(), Metrics()
    for i in range(5):
        values = {"loss": torch.tensor(1.0 + i), "padding": 0.25 * i, "class_error": torch.tensor(2.0), "lr": 1e-4}
        whole.update(values)
        if i == 3:
            second = Metrics()
            second.load_state(first.state())
            first = second
        first.update(values)
    assert first.averages(CPU) == whole.averages(CPU)
    assert whole.averages(CPU) == {"loss": 3.0, "padding": 0.5, "class_error": 2.0, "lr": pytest.approx(1e-4)}


def test_the_share_of_padding_is_that_of_the_mask():
    packed, *_ = training_step.make_batch(nominal_batch("R50", 1, 0.1), CPU, 0)
    assert packed.padding() == 0
    images = [torch.zeros(3, h, w, dtype=torch.uint8) for h, w in ((40, 64), (64, 33), (7, 9))]
    for divisor in (1, 32, 50):
        collate = training_step.PackedCollate(size_divisor=divisor)
        batch, _ = collate([(image, {}) for image in images])
        assert batch.padding() == pytest.approx(batch.to("cpu").mask.double().mean().item(), abs=1e-12)


@pytest.mark.parametrize("norm, shares", [("frozen", False), ("batch", True)])
def test_statistics_are_exchanged_where_they_are_trained(norm, shares):
    model = nn.Sequential(nn.Conv2d(1, 1, 1), backbone._NORMS[norm](1))
    ours = step.TrainingStep(model, mock.Mock(weight_dict={}), None, CPU)
    with mock.patch.object(nn.parallel, "DistributedDataParallel") as wrapper:
        step.distributed(ours)
    assert wrapper.call_args.kwargs[step._SYNC_BUFFERS] is shares
    assert ours.model is wrapper.return_value


def test_torch_does_not_warn_of_the_strides_of_1x1_weights(tmp_path):
    class Product(nn.Conv2d):  # whose gradient is a matrix's
        def forward(self, x):
            return x.permute(0, 2, 3, 1) @ self.weight.flatten(1).t() + self.bias

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layers = Product(3, 4, 1).to(memory_format=torch.channels_last)
            built = step.TrainingStep(layers, mock.Mock(weight_dict={}), None, CPU)
            step.distributed(built)
            built.model(torch.ones(1, 3, 5, 5)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert not any("Grad strides" in str(one.message) for one in caught)


def test_averages_of_another_layout_are_taken_over():
    def optimizer(layout):
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 3).to(memory_format=layout)
        optimizer = build_optimizer(model, Config())
        model(torch.ones(1, 3, 5, 5)).square().sum().backward()
        return model, optimizer

    (first, saved), (model, loaded) = optimizer(torch.contiguous_format), optimizer(torch.channels_last)
    saved.step()
    model.load_state_dict(first.state_dict())
    load_optimizer(loaded, copy.deepcopy(saved.state_dict()))
    assert loaded.state[model.weight]["exp_avg"].stride() == model.weight.stride() != first.weight.stride()
    for either in (saved, loaded):
        either.step()
    torch.testing.assert_close(first.weight, model.weight, rtol=0, atol=1e-8)


def test_averaged_weights_take_buffers_over_and_do_without():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    ema = ModelEma(model, 0.9)
    model(torch.randn(4, 2))
    ema.update(model)
    assert torch.equal(ema.values["1.running_mean"], model[1].running_mean)
    assert ema.values["1.num_batches_tracked"] == 1
    ModelEma(nn.Linear(2, 2), 0.9).update(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "flags",
    [{}, *(pytest.param(more, marks=pytest.mark.slow) for more in (
        {"dilation": True}, {"masks": True}, {"precision": "fp32"}, {"backbone": "resnet101"}, {"backbone": "resnet18"},
        {"backbone_norm": "batch"},
    ))],
    ids=str,
)  # fmt: skip
def test_the_estimate_of_kept_bytes_is_that_of_autograd(flags):
    config = Config(**{"precision": "bf16", "backbone_weights": "none", "backbone_norm": "frozen", **flags})
    assert setup.kept_per_pixel(config) == pytest.approx(launches.kept_per_pixel(config, (416, 672)), rel=0.15)
