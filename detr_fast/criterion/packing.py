"""Targets of a batch packed into single tensors, and the pairs that a matching makes of them.

Everything here has a size that the host knows, so that nothing waits for the GPU.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from detr_fast.criterion.target_batch import TargetBatch

Targets = Sequence[Mapping[str, Tensor]]
Indices = list[tuple[Tensor, Tensor]]


class PackedTargets(NamedTuple):
    """The targets of B images one after another, T in all.

    Attributes:
        labels: [T] int64.
        boxes: [T, 4], cx, cy, w, h in 0..1 (or lines, x1, y1, x2, y2), in the targets' dtype.
        image: [T] int64, the image of each target.
        offsets: [B + 1] int64, where each image's targets start.
        sizes: number of targets of each image, known to the host.
    """

    labels: Tensor
    boxes: Tensor
    image: Tensor
    offsets: Tensor
    sizes: list[int]


class Pairs(NamedTuple):
    """Matched queries and targets of L layers, P in each.

    Attributes:
        query: [L, P] int64, image * Q + query.
        target: [L, P] int64, place among the packed targets.
    """

    query: Tensor
    target: Tensor


def pack_targets(targets: Targets, device: torch.device, geometry: str = "boxes") -> PackedTargets:
    """Pack "labels" and `geometry` of all images on `device`.

    From the CPU to a GPU all goes in one copy that does not wait; of targets that are on the device already, only
    the sizes are copied. Of a `TargetBatch` they are views, and nothing is copied on its device.

    Args:
        targets: dicts with "labels" [n] integer and "boxes" [n, 4] floating point; all on `device` or all on the CPU.
        device: where the predictions are.
        geometry: the key whose value stands in the place of the boxes, such as "lines".
    """
    if isinstance(targets, TargetBatch) and targets.has_objects(geometry):
        [buffer] = [targets.buffer] if targets.device == device else copy_at_once((targets.buffer,), device)
        labels, boxes, image, offsets = targets.objects(geometry, buffer)
        return PackedTargets(labels.long(), boxes, image, offsets, targets.sizes())
    sizes = sizes_of(targets)
    offsets = torch.tensor([0, *accumulate(sizes)])
    image = torch.tensor([i for i, n in enumerate(sizes) for _ in range(n)], dtype=torch.int64)
    labels = torch.cat([t["labels"] for t in targets]).long()
    boxes = torch.cat([t[geometry] for t in targets])
    if labels.device == device:
        offsets, image = copy_at_once((offsets, image), device)
    else:
        offsets, image, labels, boxes = copy_at_once((offsets, image, labels, boxes), device)
    return PackedTargets(labels, boxes, image, offsets, sizes)


def sizes_of(targets: Targets) -> list[int]:
    """The number of targets of each image; no tensor is read."""
    if isinstance(targets, TargetBatch) and targets.has_labels():
        return targets.sizes()
    return [len(t["labels"]) for t in targets]


def copy_at_once(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Contiguous CPU tensors on `device`, by one copy from pinned memory that does not wait.

    Each tensor's size in bytes must be a multiple of 8, so that the next one is aligned.
    """
    if device.type == "cpu":
        return list(tensors)
    parts = [t.flatten().view(torch.uint8) for t in tensors]
    buffer = torch.cat(parts)
    if device.type == "cuda":
        buffer = buffer.pin_memory()
    copies = buffer.to(device, non_blocking=True).split([len(p) for p in parts])
    return [c.view(t.dtype).view(t.shape) for c, t in zip(copies, tensors, strict=True)]


def pairs_from_queries(query: Tensor, packed: PackedTargets, num_queries: int) -> Pairs:
    """Pairs from the query of each target, -1 = none, [L, T].

    The number of pairs is that of a complete assignment, min(Q, n) in every image. If a query is missing for it, as
    where an assignment failed, query 0 stands in.
    """
    layers, total = query.shape
    target = torch.arange(total, device=query.device).expand(layers, total)
    complete = sum(min(n, num_queries) for n in packed.sizes)
    if complete < total:
        # Those with a query come first.
        target = (query < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :complete]
        query = query.gather(1, target)
    return Pairs(packed.image[target] * num_queries + query.clamp(min=0), target)


def pairs_from_indices(indices: Indices, packed: PackedTargets, num_queries: int) -> Pairs:
    """Pairs of one layer, [1, P], from (prediction, target) indices of each image."""
    device = packed.labels.device
    image = torch.tensor([b for b, (i, _) in enumerate(indices) for _ in range(len(i))], dtype=torch.int64)
    [image] = copy_at_once((image,), device)
    query = image * num_queries + torch.cat([i for i, _ in indices]).to(device, non_blocking=True)
    target = packed.offsets[image] + torch.cat([j for _, j in indices]).to(device, non_blocking=True)
    return Pairs(query[None], target[None])
