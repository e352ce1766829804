"""The targets of a batch in one buffer, made by a loader's worker and moved in one copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data._utils.pin_memory import pin_memory

_ALIGNMENT = 16  # bytes, of a tensor in the buffer
_LARGEST = 2**16  # bytes of a tensor that is packed; larger ones, such as masks, travel by themselves

_INDEX = "\0index"  # in the place of a key: offsets [B + 1] and the image of each object


class _Place(NamedTuple):
    """A tensor of the buffer."""

    start: int  # in bytes
    end: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    lengths: list[int] | None = None  # of the images' shares, which are concatenated; None: they are stacked


class TargetBatch(Sequence):
    """The targets of B images: a sequence of B dicts, whose tensors lie in one buffer.

    It reads like the list of dicts that it is made of. The dicts are made when the first of them is asked for, of views
    of the buffer; a value that is changed in place is changed in the buffer, too. What is put into a dict in the place
    of a value counts wherever the targets go, but costs the saving: they are packed anew, or read one by one.

    Packed are the keys that all dicts have, with plain CPU tensors that differ in their first dimension at most. What
    else is in the dicts stays as it is.

    Args:
        targets: dicts.
    """

    def __init__(self, targets: Sequence[Mapping[str, Any]]):
        self.buffer: Tensor
        self.rest: list[dict[str, Any]]  # what is not packed, for each image
        self._keys = [tuple(target) for target in targets]
        self._dicts: list[dict[str, Any]] | None = None
        self._given: list[dict[str, tuple[Any, Any]]] | None = None
        packed = _columns(targets)
        self.rest = [{key: value for key, value in target.items() if key not in packed} for target in targets]

        # Where each image's objects are, for the criterion.
        labels = packed.get("labels", [])
        self._sizes = [len(value) for value in labels] if labels and labels[0].dim() else []
        image = [i for i, size in enumerate(self._sizes) for _ in range(size)]
        tensors: dict[str, tuple[Tensor, list[int] | None]] = {
            _INDEX: (torch.tensor([0, *accumulate(self._sizes), *image]), None)
        }
        for key, values in packed.items():
            if values[0].dim():
                tensors[key] = torch.cat(values), [len(value) for value in values]
            else:
                tensors[key] = torch.stack(values), None
        self._places: dict[str, _Place] = {}
        end = 0
        for key, (tensor, lengths) in tensors.items():
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + tensor.nbytes
            self._places[key] = _Place(start, end, tensor.dtype, tuple(tensor.shape), lengths)
        self.buffer = torch.zeros(end, dtype=torch.uint8)
        for key, (tensor, _) in tensors.items():
            self._tensor(key).copy_(tensor)

    @staticmethod
    def of(targets: Sequence) -> Sequence:
        """The targets packed; or as they are, if they are no dicts or have nothing that can be packed."""
        if all(type(target) is dict for target in targets) and _columns(targets):
            return TargetBatch(targets)
        return targets

    def __len__(self) -> int:
        return len(self.rest)

    def __getitem__(self, index):
        return self._all()[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._all())

    def __repr__(self) -> str:
        return f"TargetBatch({self._all()!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Without the dicts: a worker sends the buffer alone."""
        return {**vars(self.repacked()), "_dicts": None, "_given": None}

    @property
    def device(self) -> torch.device:
        """Where the buffer is."""
        return self.buffer.device

    def pin_memory(self) -> TargetBatch:
        """The buffer in page-locked memory. ``DataLoader(pin_memory=True)`` calls it."""
        batch = self.repacked()
        return batch.replaced(batch.buffer.pin_memory(), pin_memory(batch.rest))

    def replaced(self, buffer: Tensor, rest: list[dict[str, Any]]) -> TargetBatch:
        """The same targets in another buffer, with other copies of what is not packed."""
        batch = object.__new__(type(self))
        batch.__dict__.update(vars(self), buffer=buffer, rest=rest, _dicts=None, _given=None)
        return batch

    def repacked(self) -> TargetBatch:
        """Itself; anew, if a dict has got other values."""
        return self if self._is_as_packed() else TargetBatch(self._all())

    def has_objects(self, geometry: str) -> bool:
        """Whether "labels" [n], integer, and `geometry` [n, 4], floating point, of all images are as they were packed.

        Then `objects` gives them without a look at the dicts.
        """
        labels, boxes = self._places.get("labels"), self._places.get(geometry)
        return (
            labels is not None
            and boxes is not None
            and len(labels.shape) == 1
            and boxes.shape == (*labels.shape, 4)
            and boxes.lengths == labels.lengths
            and boxes.dtype.is_floating_point
            and not (labels.dtype.is_floating_point or labels.dtype == torch.bool)
            and self._is_as_packed()
        )

    def has_labels(self) -> bool:
        """Whether "labels" [n, ...] of all images are as they were packed, so that `sizes` are theirs."""
        return "labels" in self._places and self._places["labels"].lengths is not None and self._is_as_packed()

    def sizes(self) -> list[int]:
        """Number of labels of each image."""
        return list(self._sizes)

    def objects(self, geometry: str, buffer: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Labels [T], `geometry` [T, 4], image of each object [T] and offsets [B + 1] in a copy of the buffer."""
        offsets, image = self._tensor(_INDEX, buffer).split([len(self) + 1, sum(self._sizes)])
        return self._tensor("labels", buffer), self._tensor(geometry, buffer), image, offsets

    def labels(self) -> Tensor:
        """Of all images, one after another."""
        return self._tensor("labels")

    def _tensor(self, key: str, buffer: Tensor | None = None) -> Tensor:
        place = self._places[key]
        return (self.buffer if buffer is None else buffer)[place.start : place.end].view(place.dtype).view(place.shape)

    def _all(self) -> list[dict[str, Any]]:
        if self._dicts is None:
            columns = {}
            for key, place in self._places.items():
                if key != _INDEX:
                    tensor = self._tensor(key)
                    columns[key] = tensor.unbind() if place.lengths is None else tensor.split(place.lengths)
            self._dicts = [
                {key: columns[key][i] if key in columns else rest[key] for key in keys}
                for i, (keys, rest) in enumerate(zip(self._keys, self.rest, strict=True))
            ]
            self._given = [{key: (value, _memory(value)) for key, value in t.items()} for t in self._dicts]
        return self._dicts

    def _is_as_packed(self) -> bool:
        """Whether all dicts that were given out still hold the values that they came with."""
        return (
            self._dicts is None
            or self._given is None
            or all(
                now.keys() == given.keys()
                and all(now[key] is value and _memory(value) == memory for key, (value, memory) in given.items())
                for now, given in zip(self._dicts, self._given, strict=True)
            )
        )


def _memory(value: Any) -> tuple | None:
    """What changes where a tensor gets values other than by writing into it: ``.data =``, ``resize_``."""
    if type(value) is not Tensor or value.layout != torch.strided:
        return None
    return value.data_ptr(), value.shape, value.dtype


def _columns(targets: Sequence[Mapping[str, Any]]) -> dict[str, list[Tensor]]:
    """By key the values that are packed, one for each image."""
    columns: dict[str, list[Tensor]] = {}
    for key in targets[0] if len(targets) else ():
        values: list[Any] = [target.get(key) for target in targets]
        if _can_be_packed(values):
            columns[key] = values
    return columns


def _can_be_packed(values: Sequence) -> bool:
    first = values[0]
    return type(first) is Tensor and all(
        type(value) is Tensor
        and value.device.type == "cpu"
        and value.layout == torch.strided
        and not (value.requires_grad or value.is_complex() or value.is_quantized)
        and value.nbytes <= _LARGEST
        and (value.dtype, value.dim(), value.shape[1:]) == (first.dtype, first.dim(), first.shape[1:])
        for value in values
    )
