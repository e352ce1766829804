"""Self-attention and its backward copy no activations: queries, keys and values, and their gradients, stay packed."""

import copy
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from detr_fast.layers import MultiheadAttention
from detr_fast.models import TransformerDecoderLayer, TransformerEncoderLayer

COPIES = ("clone", "stack", "cat", "_to_copy", "copy_", "contiguous", "select_backward", "slice_backward")


class Copies(TorchDispatchMode):
    """Counts the ops that copy at least as many numbers as `size`."""

    def __init__(self, size):
        super().__init__()
        self.size, self.counts = size, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.name().split("::")[1].split(".")[0]
        if name in COPIES and out.numel() >= self.size:
            self.counts[name] += 1
        return out


def _batch_first_memory(batch, length, width):
    return torch.randn(batch, length, width).transpose(0, 1).requires_grad_()


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("kind", [TransformerEncoderLayer, TransformerDecoderLayer])
def test_a_layer_copies_no_activations(kind, pre_norm):
    batch, length, width = 2, 90, 16  # more tokens than the weights are long
    layer = kind(width, 4, 24, 0.1, "relu", pre_norm)
    src, pos = _batch_first_memory(batch, length, width), _batch_first_memory(batch, length, width)
    with Copies(batch * length * width) as copies:
        if kind is TransformerEncoderLayer:
            out = layer(src, pos=pos)
        else:
            out = layer(src, _batch_first_memory(batch, length, width), pos=pos, query_pos=pos)
        torch.autograd.backward(out, torch.randn(batch, length, width).transpose(0, 1))
    assert not copies.counts


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["qqq", "qqv", "qkk", "qkv"])
def test_attention_copies_no_activations_and_the_numbers_are_those_of_separate_inputs(kind, batch_first):
    module = MultiheadAttention(16, 4, dropout=0.2, batch_first=batch_first)
    shape = (2, 90, 16) if batch_first else (90, 2, 16)
    inputs = {name: torch.randn(shape, requires_grad=True) for name in kind}
    cotangent = torch.randn(2, 90, 16) if batch_first else torch.randn(2, 90, 16).transpose(0, 1)
    results = []
    for separate in (False, True):
        twin = copy.deepcopy(module)
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        given = [leaves[name] for name in kind]
        if separate:
            given = [x.view_as(x) for x in given]
        torch.manual_seed(1)
        with Copies(2 * 90 * 16) as copies:
            out = twin(*given, need_weights=False)[0]
            out.backward(cotangent)
        assert not copies.counts or not batch_first
        results.append([out, *(x.grad for x in leaves.values()), *(p.grad for p in twin.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
