"""An exponential moving average of a model's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ModelEma:
    """Averages of a model's parameters; buffers (batch norm's statistics) are copied as they are.

    Args:
        model: the model whose values it starts from.
        decay: share of the average that stays at each update, in 0..1. During the first updates n it is at most
            (1 + n) / (10 + n), so that the average forgets the random start.

    Raises:
        ValueError: a decay outside of 0..1.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"the EMA's decay must be at least 0 and below 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self.values = {name: value.detach().clone() for name, value in model.state_dict().items()}
        trained = {name for name, _ in model.named_parameters()}
        self._averaged = [n for n, v in self.values.items() if n in trained and v.is_floating_point()]
        self._copied = [n for n in self.values if n not in set(self._averaged)]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes the model's values in, after an optimiser step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = model.state_dict()
        torch._foreach_lerp_(
            [self.values[name] for name in self._averaged], [current[name] for name in self._averaged], 1 - decay
        )
        self._copy_buffers(current)

    @torch.no_grad()
    def copy_buffers(self, model: nn.Module) -> None:
        """Takes the model's buffers."""
        self._copy_buffers(model.state_dict())

    def _copy_buffers(self, current: Mapping[str, Tensor]) -> None:
        if self._copied:
            torch._foreach_copy_([self.values[name] for name in self._copied], [current[name] for name in self._copied])

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model has the averaged values; afterwards its own again."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.values)
        try:
            yield
        finally:
            model.load_state_dict(own)

    def state_dict(self) -> dict:
        """For a checkpoint."""
        return {"values": self.values, "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, dict[str, Tensor] | int]) -> None:
        """What `state_dict` returned."""
        self.updates = state["updates"]
        for name, value in self.values.items():
            value.copy_(state["values"][name])
