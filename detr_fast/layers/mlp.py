"""The perceptron that turns a decoder output into a box."""

import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.layers.linear import apply_linear


class MLP(nn.Module):
    """`num_layers` linear layers with a ReLU after each but the last.

    Args:
        input_dim: features of the input.
        hidden_dim: features between the layers.
        output_dim: features of the output.
        num_layers: number of linear layers, at least 1.

    Raises:
        ValueError: `num_layers` is less than 1.

    Source: facebookresearch/detr, models/detr.py, MLP.
    """

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}; expected at least 1")
        self.num_layers = num_layers
        dims = [input_dim] + [hidden_dim] * (num_layers - 1) + [output_dim]
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in zip(dims[:-1], dims[1:], strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """[..., input_dim] → [..., output_dim]."""
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(apply_linear(layer, x))
        return apply_linear(last, x)
