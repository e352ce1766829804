"""The next batch travels to the GPU while this one is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from detr_fast.criterion.target_batch import TargetBatch
from detr_fast.data.packed import PackedBatch
from detr_fast.nested_tensor import NestedTensor, is_nested_tensor

_SMALL = 2**16  # bytes; tensors up to this size travel together
_ALIGNMENT = 16  # bytes, of a tensor in the buffer that they share


class Prefetcher:
    """Goes through a loader's batches and yields them on ``device``, ready to be used on its current stream.

    On a GPU the next batch is copied on a stream of its own while the current one is in use; from pinned memory
    (``DataLoader(pin_memory=True)``) the CPU does not wait for it. The images of a `PackedBatch` are one copy, and so
    are all the small tensors of the targets together, which a `TargetBatch` holds in one buffer already;
    `PackedBatch`es are normalised and padded on arrival. On a CPU nothing is read ahead.

    Args:
        batches: with a length if ``len`` is to work. A batch is a tuple, list or dict of tensors, `NestedTensor`s,
            `PackedBatch`es, `TargetBatch`es and of such tuples, lists and dicts; whatever else is in it is passed on as
            it is.
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
                yield _map(batch, lambda part: part.to(self.device))
            return
        stream = torch.cuda.Stream(self.device)
        ahead = None
        for batch in self.batches:
            with torch.cuda.stream(stream):
                copied = copy_batch(batch, self.device)
                done = stream.record_event()
            if ahead is not None:
                yield self._ready(*ahead)
            ahead = copied, done
        if ahead is not None:
            yield self._ready(*ahead)

    def _ready(self, batch, done: torch.cuda.Event):
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        # What was allocated on the copying stream must not be reused there before the current one is through with it.
        _map(batch, lambda part: part.record_stream(current))
        return _map(batch, lambda part: part.padded() if isinstance(part, PackedBatch) else part)


def copy_batch(batch: Any, device: torch.device) -> Any:
    """A batch on ``device``, without waiting where its memory is pinned; small tensors on the CPU in one copy.

    Returns:
        The batch in the same nesting, with `PackedBatch`es copied and not yet padded.
    """
    small: list[Tensor] = []
    _map(batch, lambda part: small.append(part) if _is_small(part) else None)
    copies = iter(_copied_together(small, device))

    def copied(part):
        if _is_small(part):
            return next(copies)
        return part.copied_to(device, True) if isinstance(part, PackedBatch) else part.to(device, non_blocking=True)

    return _map(batch, copied)


def _is_small(part) -> bool:
    return isinstance(part, Tensor) and part.device.type == "cpu" and part.nbytes <= _SMALL


def _copied_together(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    if len(tensors) <= 1:
        return [(t.pin_memory() if device.type == "cuda" else t).to(device, non_blocking=True) for t in tensors]
    places, end = [], 0
    for tensor in tensors:
        places.append(slice(end, end + tensor.nbytes))
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for tensor, place in zip(tensors, places, strict=True):
        buffer[place].view(tensor.dtype).view(tensor.shape).copy_(tensor)
    buffer = buffer.to(device, non_blocking=True)
    return [buffer[place].view(tensor.dtype).view(tensor.shape) for tensor, place in zip(tensors, places, strict=True)]


def _map(part: Any, function: Callable) -> Any:
    """``function`` of all tensors and batches of images in nested tuples, lists and dicts."""
    if isinstance(part, (Tensor, NestedTensor, PackedBatch)):
        return function(part)
    if isinstance(part, TargetBatch):
        part = part.repacked()
        return part.replaced(function(part.buffer), _map(part.rest, function))
    if is_nested_tensor(part):  # another's, which may not know how to copy without waiting
        return function(NestedTensor(part.tensors, part.mask))
    if isinstance(part, Mapping):
        return {key: _map(value, function) for key, value in part.items()}
    if isinstance(part, (tuple, list)):
        values = [_map(value, function) for value in part]
        return type(part)(*values) if hasattr(part, "_fields") else type(part)(values)
    return part
