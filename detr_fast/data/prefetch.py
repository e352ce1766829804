"""The next batch travels to the GPU while this one is computed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from detr_fast.data.loader import PackedBatch
from detr_fast.nested_tensor import NestedTensor


class Prefetcher:
    """Goes through a loader's batches and yields them on ``device``, ready to be used on its current stream.

    On a GPU the next batch is copied on a stream of its own while the current one is in use; from pinned memory
    (``DataLoader(pin_memory=True)``) the CPU does not wait for it. `PackedBatch`es are normalised and padded there, on
    the current stream. On a CPU nothing is read ahead.

    Args:
        batches: with a length if ``len`` is to work. A batch is a tuple, list or dict of tensors, `NestedTensor`s,
            `PackedBatch`es and of such tuples, lists and dicts; whatever else is in it is passed on as it is.
        device: where to.
    """

    def __init__(self, batches: Iterable, device: torch.device | str):
        self.batches = batches
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator:
        if self.device.type != "cuda":
            for batch in self.batches:
                yield _padded(_copied(batch, self.device))
            return
        stream = torch.cuda.Stream(self.device)
        ahead = None
        for batch in self.batches:
            with torch.cuda.stream(stream):
                copied = _copied(batch, self.device)
                done = stream.record_event()
            if ahead is not None:
                yield self._ready(*ahead)
            ahead = copied, done
        if ahead is not None:
            yield self._ready(*ahead)

    def _ready(self, batch, done: torch.cuda.Event):
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        _map(batch, lambda tensor: tensor.record_stream(current))
        return _padded(batch)


def _copied(batch, device: torch.device):
    def copy(part):
        return part.copied_to(device, True) if isinstance(part, PackedBatch) else part.to(device, non_blocking=True)

    return _map(batch, copy)


def _padded(batch):
    return _map(batch, lambda part: part.padded() if isinstance(part, PackedBatch) else part)


def _map(part: Any, function):
    """``function`` of all tensors and batches of images in nested tuples, lists and dicts."""
    if isinstance(part, (torch.Tensor, NestedTensor, PackedBatch)):
        return function(part)
    if isinstance(part, Mapping):
        return {key: _map(value, function) for key, value in part.items()}
    if isinstance(part, (tuple, list)):
        return type(part)(_map(value, function) for value in part)
    return part
