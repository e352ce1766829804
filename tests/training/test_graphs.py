"""Replayed passes: what is recorded, what gives way, and that a step on a GPU is the same with and without."""

import copy

import pytest
import torch
from torch import nn

from detr_fast.config import Config
from detr_fast.data import PackedCollate
from detr_fast.models import build_model
from detr_fast.nested_tensor import NestedTensor
from detr_fast.training.graphs import Graphs, kind_of, record_passes
from detr_fast.training.step import build_step, optimizer_step, why_without_graphs

TINY = [
    "--backbone", "resnet18", "--backbone_weights", "none", "--backbone_norm", "frozen", "--hidden_dim", "64",
    "--enc_layers", "1", "--dec_layers", "2", "--dim_feedforward", "32", "--num_queries", "9", "--nheads", "2",
]  # fmt: skip


class Doubler(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.calls = []

    def forward(self, samples):
        self.calls.append((samples.tensors.shape, samples.no_padding))
        return {"doubled": samples.tensors * self.scale}


def batch(height, width, padded=True):
    mask = torch.zeros(2, height, width, dtype=torch.bool) if padded else None
    return NestedTensor(torch.rand(2, 3, height, width), mask, no_padding=not padded)


@pytest.fixture
def recorded():
    """Of each recording the kind; the "graph" calls the model's parameters directly."""
    kinds = []

    def record(model, call, samples, pool):
        kind = kind_of(samples)
        kinds.append(kind)

        def replay(samples):
            assert kind_of(samples) == kind
            return {"doubled": samples.tensors * model.scale}

        return replay

    return kinds, record


def test_a_kind_is_recorded_when_it_comes_again(recorded):
    kinds, record = recorded
    model, said = Doubler(), []
    graphs = Graphs(model, said.append, record=record)
    for size, times in (((4, 6), 3), ((5, 6), 1), ((4, 6), 2)):
        for _ in range(times):
            samples = batch(*size)
            assert torch.equal(graphs(samples)["doubled"], samples.tensors * 2)
    assert len(kinds) == 1 and (graphs.eager, graphs.replayed) == (2, 4) and not said
    assert [shape[2:] for shape, _ in model.calls] == [(4, 6), (5, 6)]


def test_padding_layout_and_autocast_make_kinds_of_their_own():
    padded, full = batch(4, 6), batch(4, 6, padded=False)
    last = NestedTensor(padded.tensors.to(memory_format=torch.channels_last), padded.mask)
    with torch.autocast("cpu", torch.bfloat16):
        low = kind_of(padded)
    assert len({kind_of(padded), kind_of(full), kind_of(last), low}) == 4
    assert full.no_padding, "asking for the kind must not make a mask"
    assert kind_of(batch(4, 6)) == kind_of(padded)


def test_beyond_the_limit_batches_run_without_a_graph(recorded):
    kinds, record = recorded
    said = []
    graphs = Graphs(Doubler(), said.append, limit=1, record=record)
    for height in (4, 5, 6):
        for _ in range(3):
            graphs(batch(height, 6))
    assert len(kinds) == 1 and (graphs.eager, graphs.replayed) == (7, 2)
    assert said == ["--graphs: 1 kinds of batches are recorded, further ones run without a graph"]


def test_evaluation_is_not_replayed(recorded):
    kinds, record = recorded
    graphs = Graphs(Doubler().eval(), print, record=record)
    for _ in range(3):
        graphs(batch(4, 6))
    assert not kinds and graphs.eager == 3


def test_what_cannot_be_recorded_runs_as_always():
    def refuse(model, call, samples, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    model, said = Doubler(), []
    graphs = Graphs(model, said.append, record=refuse)
    for _ in range(4):
        samples = batch(4, 6)
        assert torch.equal(graphs(samples)["doubled"], samples.tensors * 2)
    assert graphs.eager == len(model.calls) == 4
    assert said == ["--graphs: the steps run without graphs: operation not permitted when stream is capturing"]


def test_a_module_with_a_hook_is_not_recorded(recorded):
    kinds, record = recorded
    model, said = nn.Sequential(Doubler()), []
    model[0].register_forward_hook(lambda *_: None)
    graphs = Graphs(model, said.append, record=record)
    for _ in range(3):
        graphs(batch(4, 6))
    assert not kinds and said == ["--graphs: the steps run without graphs: 0 has a hook, which a graph would not call"]


def test_a_flag_that_cannot_be_honoured_says_why():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert why_without_graphs(Config(graphs=True), cpu) == "CUDA graphs need a GPU"
    assert "accumulate_steps" in why_without_graphs(Config(graphs=True, accumulate_steps=2), cuda)
    assert why_without_graphs(Config(graphs=True), cuda) is None
    said = []
    config = Config.from_arguments([*TINY, "--graphs", "--precision", "fp32", "--device", "cpu"])
    model, criterion, _ = build_model(config)
    assert build_step(model, criterion, config, cpu, said.append).call is None
    assert said == ["--graphs has no effect: CUDA graphs need a GPU"]


def _batches(device):
    """Of two sizes, one with padding and one without, each three times with other pixels."""
    generator = torch.Generator().manual_seed(1)

    def image(height, width):
        return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)

    for sizes in (((64, 96), (96, 64)), ((64, 64), (64, 64))) * 3:
        targets = [{"labels": torch.tensor([1, 2]), "boxes": torch.rand(2, 4, generator=generator) * 0.4 + 0.3}] * 2
        samples, targets = PackedCollate()([(image(*s), t) for s, t in zip(sizes, targets, strict=True)])
        yield samples.to(device), [{k: v.to(device) for k, v in target.items()} for target in targets]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_with_graphs_equals_training_without(precision):
    device = torch.device("cuda")
    flags = [*TINY, "--dropout", "0", "--precision", precision, "--device", "cuda", "--lr", "1e-3"]
    model, criterion, _ = build_model(Config.from_arguments(flags))
    said, weights, losses = [], [], []
    for extra in ([], ["--graphs"]):
        config = Config.from_arguments(flags + extra)
        step = build_step(copy.deepcopy(model).train(), criterion, config, device, said.append)
        for samples, targets in _batches(device):
            loss = step.losses(step.outputs(samples), targets).total
            step.backward(loss)
            optimizer_step(step)
            step.optimizer.zero_grad()
            losses.append(loss.item())
        weights.append([p.detach().clone() for p in step.model.parameters()])
    assert step.call.replayed == 4 and step.call.eager == 2 and not said, said
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    torch.testing.assert_close(losses[6:], losses[:6], rtol=tolerance, atol=tolerance)
    for with_graphs, without in zip(weights[1], weights[0], strict=True):
        torch.testing.assert_close(with_graphs, without, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_replays_draw_new_dropout_and_leave_generators_and_statistics_alone():
    device = torch.device("cuda")
    flags = [*TINY, "--backbone_norm", "batch", "--dropout", "0.5", "--device", "cuda", "--precision", "fp32"]
    config = Config.from_arguments([*flags, "--graphs"])
    model, criterion, _ = build_model(config)
    step = build_step(model.train(), criterion, config, device, pytest.fail)
    samples = next(_batches(device))[0]
    step.outputs(samples)
    before = torch.cuda.get_rng_state(), {n: b.clone() for n, b in model.named_buffers()}
    record_passes(model, model, samples, torch.cuda.graph_pool_handle())
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert all(torch.equal(buffer, before[1][name]) for name, buffer in model.named_buffers())
    first, second = (step.outputs(samples)["pred_logits"].clone() for _ in range(2))
    assert step.call.replayed == 2 and not torch.equal(first, second)


@pytest.mark.gpu
def test_several_kinds_share_memory_without_harm():
    """Replaying one kind between two replays of another changes nothing."""
    device = torch.device("cuda")
    config = Config.from_arguments([*TINY, "--dropout", "0", "--graphs", "--device", "cuda", "--precision", "fp32"])
    model, criterion, _ = build_model(config)
    step = build_step(model.train(), criterion, config, device, pytest.fail)
    (one, _), (other, _), *_ = _batches(device)

    def grads(samples):
        outputs = step.outputs(samples)
        (outputs["pred_logits"].square().mean() + outputs["pred_boxes"].mean()).backward()
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found

    expected = grads(one), grads(other)
    for _ in range(3):
        for samples, wanted in zip((one, other), expected, strict=True):
            for got, want in zip(grads(samples), wanted, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert step.call.replayed == 6
