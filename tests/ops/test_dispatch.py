"""In eager mode on a CPU the ops run without torch's library; under whatever traces them they are its ops."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from detr_fast.ops import assign, attention, matching_cost, pad_collate_packed, sine_position
from detr_fast.ops._dispatch import calls_plainly
from detr_fast.ops.folded_conv import folded_conv

HEADER = torch.tensor([[0, 3, 4, 5, 0]])
TARGETS = (torch.tensor([0, 1, 0]), torch.rand(3, 4), torch.tensor([0, 1, 3]))
X = torch.rand(2, 3, 4, 5)
OPS = {
    "assign": lambda: assign(torch.rand(1, 3, 6), torch.tensor([0, 1, 3]), 2),
    "attention": lambda: attention(X, X, X),
    "folded_conv": lambda: folded_conv(X, torch.ones(2, 3, 1, 1), torch.ones(2), None),
    "matching_cost": lambda: matching_cost(torch.rand(1, 2, 6, 3), torch.rand(1, 2, 6, 4), *TARGETS),
    "pad_collate_packed": lambda: pad_collate_packed(torch.zeros(60, dtype=torch.uint8), HEADER),
    "sine_position": lambda: sine_position(torch.zeros(2, 4, 5, dtype=torch.bool)),
}


class _Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPS)
def test_eager_mode_on_a_cpu_goes_without_the_library(name):
    with torch.profiler.profile() as profile:
        OPS[name]()
    called = {event.key for event in profile.key_averages()}
    assert called and f"detr_fast::{name}" not in called
    with _Names() as seen:
        OPS[name]()
    assert f"detr_fast::{name}" in seen.names


def test_a_transform_wants_the_library():
    seen = []
    torch.vmap(lambda x: (seen.append(calls_plainly(x)), x)[1])(torch.ones(2, 3))
    assert seen == [False] and calls_plainly(torch.ones(2, 3))
