"""Compilation by regions."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from detr_fast.models import TransformerEncoder, TransformerEncoderLayer
from detr_fast.training import regions
from detr_fast.training.regions import compile_regions


def _encoder():
    torch._dynamo.reset()
    return TransformerEncoder(TransformerEncoderLayer(8, 2, 16, 0.0), 2)


def _inputs(length, batch):
    mask = torch.zeros(batch, length, dtype=torch.bool)
    mask[:, -1] = True
    return torch.randn(length, batch, 8, requires_grad=True), {"src_key_padding_mask": mask}


def _step(model, x, options):
    out = model(x, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    return [out, *torch.autograd.grad(out, [x, *model.parameters()], cotangent)]


def test_regions_compile_once_for_all_sizes(monkeypatch):
    model = _encoder()
    expected, names = copy.deepcopy(model), list(model.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(regions, "_FallBack", lambda backend, say: counter)
    assert compile_regions(model, print) == ["layers.0", "layers.1"]
    counts = []
    for length, batch in ((7, 3), (12, 5), (30, 2), (21, 4)):
        x, options = _inputs(length, batch)
        torch.testing.assert_close(_step(model, x, options), _step(expected, x, options))
        counts.append(counter.frame_count)
    # Dynamo may need a second size to take all sizes for dynamic.
    assert counts[0] >= 1 and counts[1:] == counts[1:2] * 3
    assert list(model.state_dict()) == names


def test_failing_backend_is_told_once_and_falls_back():
    def broken(graph, inputs):
        raise OSError("no compiler\nat all")

    torch._dynamo.register_backend(broken, name="broken_for_test")
    model, lines = _encoder(), []
    expected = copy.deepcopy(model)
    compile_regions(model, lines.append, backend="broken_for_test")
    x, options = _inputs(7, 3)
    torch.testing.assert_close(_step(model, x, options), _step(expected, x, options))
    assert lines == ["--compile: broken_for_test failed, running uncompiled: OSError: no compiler"]


def test_nothing_to_compile_is_an_error():
    with pytest.raises(ValueError, match="nothing to compile: Linear has none of TransformerEncoderLayer"):
        compile_regions(nn.Linear(2, 2), print)


def test_a_restart_of_the_trace_is_no_failure():
    def restarts(graph, inputs):
        raise torch._dynamo.exc.TensorifyScalarRestartAnalysis

    torch._dynamo.register_backend(restarts, name="restarts_for_test")
    lines = []
    with pytest.raises(torch._dynamo.exc.RestartAnalysis):
        regions._FallBack("restarts_for_test", lines.append)(None, [])
    assert not lines
