"""The whole model under torch.compile and torch.export: one graph for all batch and image sizes."""

import pytest
import torch
from test_detr import _flat, tiny_detr
from torch._dynamo.testing import CompileCounterWithBackend

from detr_fast.nested_tensor import NestedTensor

# Batch, height and width differ from each other, so that nothing is taken for equal.
SIZES = [(2, 96, 130), (3, 70, 101), (5, 160, 64), (4, 64, 64)]


def _samples(batch, height, width):
    mask = torch.zeros(batch, height, width, dtype=torch.bool)
    mask[0, height // 2 :] = True
    mask[-1, :, width - 20 :] = True
    return NestedTensor(torch.randn(batch, 3, height, width), mask)


def _step(function, model, samples, cotangents):
    """Outputs and gradients, with the same dropout each time."""
    model.zero_grad()
    torch.manual_seed(1)
    out = _flat(function(samples))
    torch.autograd.backward(out, [x[:, : out[0].shape[1]] for x in cotangents])
    return out, [parameter.grad.clone() for parameter in model.parameters()]


def test_compiles_once_for_all_sizes_and_matches_eager():
    """fullgraph forbids a graph break, the counter a recompile. Dropout is on: the seed must not break the graph."""
    torch._dynamo.reset()
    model = tiny_detr(level=0, layers=1, dropout=0.1)
    # Compiled, the backbone is not fused: rounding like its own, or another ReLU may be active.
    model.backbone[0].body.fused = False
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    cotangents = [torch.randn(1, 5, 6, 6), torch.randn(1, 5, 6, 4)]
    counts = []
    for size in SIZES:
        samples = _samples(*size)
        out, gradients = _step(compiled, model, samples, cotangents)
        counts.append(counter.frame_count)
        expected, expected_gradients = _step(model, model, samples, cotangents)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        for gradient, expected in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-4 * max(1.0, expected.abs().max().item()))
        again = _flat(compiled(samples))
        assert (again[0] - out[0]).abs().max() > 1e-4  # other dropout
    # Dynamo may call the backend more than once for the first compilation, when it specialises a float.
    assert counts == counts[:1] * len(SIZES)


@pytest.mark.parametrize("nested", [False, True])
@torch.no_grad()
def test_exports_with_dynamic_sizes(nested):
    model = tiny_detr(aux_loss=False, level=0, layers=1).eval()
    # A feature map of one row or column would need a graph of its own.
    batch = torch.export.Dim("batch", min=2, max=64)
    height, width = (torch.export.Dim(name, min=64, max=2048) for name in ("height", "width"))
    image_dims = {0: batch, 2: height, 3: width}
    dims = [image_dims, {0: batch, 1: height, 2: width}] if nested else image_dims

    def samples(*size):
        out = _samples(*size)
        return out if nested else out.tensors

    program = torch.export.export(model, (samples(2, 96, 130),), dynamic_shapes=(dims,))
    for size in SIZES[1:]:
        x = samples(*size)
        torch.testing.assert_close(_flat(program.module()(x)), _flat(model(x)), rtol=1e-4, atol=1e-5)
