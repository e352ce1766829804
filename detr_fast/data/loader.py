"""From a dataset to batches: samplers, seeds, workers, and the packed batch that goes to the GPU.

Every random draw is a function of (seed, epoch, index of the image): the augmentation of a sample depends neither on
the worker that made it nor on their number, and epoch e of a resumed run has the batches and pictures of epoch e of a
run that was never interrupted. The epoch travels with the index, so that workers that live on from epoch to epoch
have it, too.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, RandomSampler, SequentialSampler

from detr_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from detr_fast.nested_tensor import NestedTensor, collate_fn
from detr_fast.ops.pad_collate import pack_images, pad_collate_packed


class PackedBatch:
    """uint8 images of a batch in one flat buffer: what a worker sends, and what is copied to the GPU in one piece.

    It takes a NestedTensor's place in the training loop: ``.to(device)`` makes one.

    Args:
        buffer: uint8 [N] on the CPU.
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
        buffer = self.buffer.to(device, non_blocking=non_blocking)
        return NestedTensor(*pad_collate_packed(buffer, self.header, **self.options))


class PackedCollate:
    """Collates samples (uint8 image [3, H, W], target, …) into (PackedBatch, targets, …).

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
        return (PackedBatch(*pack_images(images), self.options), *rest)


@contextlib.contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Seeds Python's, numpy's and torch's CPU generator from non-negative numbers; restores all three afterwards."""
    python, numpy, torch_cpu = np.random.SeedSequence(entropy).generate_state(3)
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    random.seed(int(python))
    np.random.seed(int(numpy))
    # Not torch.manual_seed: without workers this is the training process, whose CUDA generator must not be touched.
    torch.default_generator.manual_seed(int(torch_cpu))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


class SeededDataset(Dataset):
    """Wraps a dataset whose items are asked for by (epoch, index) and drawn with seeds made of (seed, epoch, index)."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]):
        epoch, index = key
        with seeded(self.seed, epoch, index):
            return self.dataset[index]


class EpochBatchSampler(BatchSampler):
    """A ``BatchSampler`` whose order depends on (seed, epoch) alone; its batches are lists of (epoch, index)."""

    def __init__(self, sampler, batch_size: int, drop_last: bool, seed: int):
        super().__init__(sampler, batch_size, drop_last)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        if isinstance(self.sampler, DistributedSampler):
            self.sampler.set_epoch(epoch)
        elif isinstance(self.sampler, RandomSampler):
            self.sampler.generator.manual_seed(int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0]))
        for batch in super().__iter__():
            yield [(epoch, index) for index in batch]


class EpochLoader(DataLoader):
    """A ``DataLoader`` that is told the epoch. ``loader.dataset.dataset`` is the dataset that was given."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses order and augmentation of the next iteration; call it before every epoch."""
        self.batch_sampler.set_epoch(epoch)


def build_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    train: bool,
    num_workers: int = 0,
    distributed: bool = False,
    seed: int = 42,
    pin_memory: bool | None = None,
    drop_last: bool | None = None,
    collate_fn: Callable = collate_fn,
) -> EpochLoader:
    """A loader with the original's samplers.

    Training: ``RandomSampler``, or ``DistributedSampler`` with shuffling, in a ``BatchSampler`` that drops the last
    incomplete batch. Validation: ``SequentialSampler``, or ``DistributedSampler`` without shuffling (which repeats
    images so that all processes get as many), nothing dropped.

    Args:
        dataset: items (image, target).
        batch_size: images per process.
        train: shuffle, and drop the last incomplete batch.
        num_workers: worker processes; they live on between epochs. The batches do not depend on it.
        distributed: split the dataset over the processes of ``torch.distributed``, which must be initialised.
        seed: not negative, the same in all processes.
        pin_memory: None: if there is a CUDA GPU.
        drop_last: None: as ``train``.
        collate_fn: default ``detr_fast.collate_fn``: (NestedTensor, targets), padded in the worker.
            ``PackedCollate()``, with a dataset of uint8 images: padded and normalised on the training device.

    Raises:
        ValueError: an empty dataset, a batch size below 1, a negative seed, or a dataset too small for a single batch
            where incomplete ones are dropped.
    """
    drop_last = train if drop_last is None else drop_last
    if len(dataset) == 0:
        raise ValueError("the dataset has no images")
    if batch_size < 1 or seed < 0:
        raise ValueError(f"batch_size must be at least 1 and seed at least 0, got {batch_size} and {seed}")
    if distributed:
        sampler = DistributedSampler(dataset, shuffle=train, seed=seed)
    elif train:
        sampler = RandomSampler(dataset, generator=torch.Generator())
    else:
        sampler = SequentialSampler(dataset)
    batch_sampler = EpochBatchSampler(sampler, batch_size, drop_last, seed)
    if len(batch_sampler) == 0:
        raise ValueError(
            f"{len(sampler)} images per process give no complete batch of {batch_size}; choose a batch size of at most "
            f"{len(sampler)}"
        )
    return EpochLoader(
        SeededDataset(dataset, seed),
        batch_sampler=batch_sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        persistent_workers=num_workers > 0,
        # The loader draws a number per epoch; from the global generator it would shift the model's dropout.
        generator=torch.Generator().manual_seed(seed),
    )
