"""A batch of uint8 images in one buffer: what a worker sends, and what is copied to the GPU in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from detr_fast.criterion.target_batch import TargetBatch
from detr_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from detr_fast.nested_tensor import NestedTensor
from detr_fast.ops.pad_collate import pack_images, pad_collate_packed


class PackedBatch:
    """uint8 images of a batch in one flat buffer: what a worker sends, and what is copied to the GPU in one piece.

    It takes a NestedTensor's place in the training loop: ``.to(device)`` makes one.

    Args:
        buffer: uint8 [N].
        header: int64 [B, 5] on the CPU; see ``pad_collate_packed``.
        options: keyword arguments of ``pad_collate_packed`` for ``.to``.
    """

    def __init__(self, buffer: torch.Tensor, header: torch.Tensor, options: dict[str, Any]):
        self.buffer = buffer
        self.header = header
        self.options = options

    def __len__(self) -> int:
        return self.header.shape[0]

    def pin_memory(self) -> PackedBatch:
        """The buffer in page-locked memory. ``DataLoader(pin_memory=True)`` calls it."""
        return PackedBatch(self.buffer.pin_memory(), self.header, self.options)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> NestedTensor:
        """Copies the buffer to ``device`` and there normalises, pads and casts the images."""
        return self.copied_to(device, non_blocking).padded()

    def copied_to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same with its buffer on ``device``: the first half of ``to``."""
        return PackedBatch(self.buffer.to(device, non_blocking=non_blocking), self.header, self.options)

    def padded(self) -> NestedTensor:
        """The images normalised, padded and cast, on the buffer's device: the second half of ``to``."""
        tensors, mask = pad_collate_packed(self.buffer, self.header, **self.options)
        # Known from the header, which is on the CPU: nothing waits for the GPU.
        sizes = [row[2:4] for row in self.header.tolist()]
        return NestedTensor(tensors, mask, no_padding=all(size == list(tensors.shape[-2:]) for size in sizes))

    def padding(self) -> float:
        """The share of padded pixels of the batch that ``to`` makes, from the header alone."""
        _, _, heights, widths, _ = zip(*self.header.tolist(), strict=True)
        divisor = self.options.get("size_divisor", 1)
        height, width = (-(-max(sizes) // divisor) * divisor for sizes in (heights, widths))
        valid = sum(h * w for h, w in zip(heights, widths, strict=True))
        return 1 - valid / (len(heights) * height * width) if height * width else 0.0

    def record_stream(self, stream: torch.Stream) -> None:
        """Tells the allocator that ``stream`` uses the buffer (see ``torch.Tensor.record_stream``)."""
        self.buffer.record_stream(stream)


class PackedCollate:
    """Collates samples (uint8 image [3, H, W], target, …) into (PackedBatch, targets, …).

    targets is a sequence of the targets, for dicts of tensors a `TargetBatch`, which holds them in one buffer.

    Args:
        mean, std: per channel, or None for neither. Default: ImageNet's, as ``Normalize`` in ``make_coco_transforms``.
        dtype, channels_last, size_divisor: of the batch that ``PackedBatch.to`` makes; see ``pad_collate``.

    Raises (on a batch):
        ValueError: an empty batch, an image that is not 3-D.
        TypeError: an image that is not uint8 (``make_coco_transforms(…, uint8=True)`` makes them).
    """

    def __init__(
        self,
        *,
        mean: Sequence[float] | None = IMAGENET_MEAN,
        std: Sequence[float] | None = IMAGENET_STD,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
        size_divisor: int = 1,
    ):
        self.options = {
            "mean": mean,
            "std": std,
            "dtype": dtype,
            "channels_last": channels_last,
            "size_divisor": size_divisor,
        }

    def __call__(self, batch: Sequence[tuple]) -> tuple:
        if len(batch) == 0:
            raise ValueError("got an empty batch; expected samples (image, target, …)")
        images, *rest = zip(*batch, strict=True)
        rest[:1] = map(TargetBatch.of, rest[:1])
        return (PackedBatch(*pack_images(images), self.options), *rest)
