import pytest
import torch
from torch import nn

from detr_fast.layers import MLP


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_mlp_matches_sequential(num_layers):
    mlp = MLP(5, 7, 4, num_layers)
    layers = [layer for linear in mlp.layers for layer in (linear, nn.ReLU())][:-1]
    x = torch.randn(2, 3, 5)
    assert torch.equal(mlp(x), nn.Sequential(*layers)(x))
    assert mlp(x).shape == (2, 3, 4)
    assert list(mlp.state_dict())[::2] == [f"layers.{i}.weight" for i in range(num_layers)]


def test_mlp_rejects_no_layers():
    with pytest.raises(ValueError, match="num_layers is 0"):
        MLP(5, 7, 4, 0)
