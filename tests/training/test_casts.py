"""Weights that are cast together: the same numbers as autocast's own casts, in fewer operators."""

import copy
import pickle
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from detr_fast.config import Config
from detr_fast.models import build_model
from detr_fast.nested_tensor import NestedTensor
from detr_fast.training.casts import CastWeights
from detr_fast.training.step import build_step, outputs_of

TINY = [
    "--backbone", "resnet18", "--backbone_weights", "none", "--hidden_dim", "64", "--enc_layers", "2", "--dec_layers",
    "2", "--dim_feedforward", "32", "--num_queries", "9", "--nheads", "2", "--dropout", "0", "--device", "cpu",
]  # fmt: skip
FINE = [
    "--dataset_file", "lines", "--LETRpost", "--second_enc_layers", "1", "--second_dec_layers", "1",
    "--second_hidden_dim", "64", "--second_nheads", "2", "--second_dropout", "0",
]  # fmt: skip
KINDS = {
    "boxes": ["--backbone_norm", "frozen"],
    "trained norm": ["--backbone_norm", "batch"],
    "learned positions": ["--backbone_norm", "frozen", "--position_embedding", "learned", "--pre_norm"],
    "masks": ["--backbone_norm", "frozen", "--masks", "--hidden_dim", "128", "--nheads", "8"],
    "lines": ["--backbone_norm", "frozen", *FINE],
}


def built(kind, *flags):
    torch.manual_seed(0)
    config = Config.from_arguments([*TINY, *KINDS[kind], *flags])
    model, criterion, _ = build_model(config)
    return model.train(), criterion, config


def batch():
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 48:], mask[1, :, 64:] = True, True
    return NestedTensor(torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)), mask)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def computed(model, call, dtype):
    """Outputs, gradients and operators of a forward and backward pass."""
    with Operators() as operators:
        with torch.autocast("cpu", dtype):
            outputs = outputs_of(call, batch())
        values = [outputs["pred_logits"], *(v for k, v in outputs.items() if k in ("pred_boxes", "pred_lines"))]
        values += [outputs["pred_masks"]] if "pred_masks" in outputs else []
        sum(value.float().square().mean() for value in values).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return values, gradients, operators.names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_are_autocasts(kind, dtype):
    model, _, _ = built(kind)
    other = copy.deepcopy(model)
    expected, expected_gradients, before = computed(model, model, dtype)
    got, gradients, after = computed(other, CastWeights(other, dtype), dtype)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        same = gradients[name] is None if expected is None else torch.equal(gradients[name], expected)
        assert same, name
        assert expected is None or gradients[name].dtype == torch.float32
    # Of the casts that remain, most are of activations.
    assert after["aten::_to_copy"] < 0.6 * before["aten::_to_copy"], (before, after)


def test_the_model_keeps_its_own_parameters():
    model, _, _ = built("boxes")
    before = dict(model.named_parameters())
    call = CastWeights(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        call(batch())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    pickle.loads(pickle.dumps(model))
    model.transformer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.autocast("cpu", torch.bfloat16):
        call(batch())
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


def test_weights_that_change_or_are_frozen():
    model, _, _ = built("boxes")
    model.input_proj.requires_grad_(False)
    call = CastWeights(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        first = call(batch())["pred_logits"]
        with torch.no_grad():
            model.class_embed.bias += 1
        second = call(batch())["pred_logits"]
        second.sum().backward()
    torch.testing.assert_close(second.float(), first.float() + 1, rtol=0, atol=0.02)
    assert model.input_proj.weight.grad is None and model.class_embed.weight.grad is not None


def test_shared_weights_and_other_peoples_modules_are_left_to_autocast():
    class Doubled(nn.Linear):
        def forward(self, x):
            return x @ self.weight.double().float().T

    Doubled.__module__ = "somebody"
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Linear(4, 4), "c": Doubled(4, 4), "d": nn.LayerNorm(4)})
    model["b"].weight = shared.weight
    call = CastWeights(model, torch.bfloat16)
    names = {(id(parameters), name) for group in call._groups for parameters, name in group}
    assert names == {(id(shared._parameters), "bias"), (id(model["b"]._parameters), "bias")}


def test_which_steps_cast_together():
    cpu = torch.device("cpu")
    for precision, cast in (("fp32", False), ("bf16", True)):
        model, criterion, config = built("boxes", "--precision", precision)
        step = build_step(model, criterion, config, cpu, pytest.fail)
        assert isinstance(step.call, CastWeights) == cast
        assert step.outputs(batch())["pred_logits"].requires_grad
