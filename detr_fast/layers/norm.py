"""Batch norms with the original's state dict: frozen, as the original's, or trainable.

Neither keeps `num_batches_tracked`, so that the same state dict loads with strict=True into both.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine parameters are constants (buffers): y = x * scale + bias per channel.

    float32 is computed as the original does, in the same order. A float16 or bfloat16 input is computed in float32 and
    rounded once to its own dtype (the original's float32 buffers would promote it).

    Args:
        n: number of channels.

    Source: facebookresearch/detr, models/backbone.py, FrozenBatchNorm2d.
    """

    def __init__(self, n: int):
        super().__init__()
        self.register_buffer("weight", torch.ones(n))
        self.register_buffer("bias", torch.zeros(n))
        self.register_buffer("running_mean", torch.zeros(n))
        self.register_buffer("running_var", torch.ones(n))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """[B, n, H, W] → [B, n, H, W], in x's dtype."""
        if x.dtype in (torch.float16, torch.bfloat16):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=EPS)
        scale = self.weight * (self.running_var + EPS).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + bias[:, None, None]

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={EPS}"


class BatchNorm2d(nn.BatchNorm2d):
    """Trainable batch norm with the state dict of `FrozenBatchNorm2d`.

    Args:
        n: number of channels.
    """

    def __init__(self, n: int):
        super().__init__(n, eps=EPS)
        self.num_batches_tracked = None

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "num_batches_tracked", None)
        # Skips nn.BatchNorm2d's version, which adds num_batches_tracked to a state dict without it.
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)


def frozen_affines(norms: Sequence[FrozenBatchNorm2d]) -> list[tuple[Tensor, Tensor]]:
    """Scale and bias [C] of each norm, in float32 or float64, computed for all norms at once (few launches)."""
    sizes = [len(norm.weight) for norm in norms]
    dtype = torch.promote_types(norms[0].weight.dtype, torch.float32)
    weight, bias, mean, var = (
        torch.cat([norm._buffers[name] for norm in norms]).to(dtype)  # an attribute takes a microsecond to find
        for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = weight * (var + EPS).rsqrt()
    bias = torch.addcmul(bias, mean, scale, value=-1)
    return list(zip(scale.split(sizes), bias.split(sizes), strict=True))
