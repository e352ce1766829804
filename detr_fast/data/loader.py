"""From a dataset to batches: samplers and workers.

How seeds and order come about is told in `detr_fast.data.seeding`, how batches of alike sizes do in
`detr_fast.data.grouping`.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)

from detr_fast.data.grouping import SizeGroupedBatchSampler, SizePlanner, SizeSortedSampler, can_plan
from detr_fast.data.packed import PackedCollate
from detr_fast.data.seeding import EpochBatchSampler, EpochSampler, SeededDataset
from detr_fast.data.workers import check_shared_memory, explain, start_worker
from detr_fast.nested_tensor import collate_fn

_PREFETCHED = 2  # batches that each process makes ahead, as DataLoader's default


class EpochLoader(DataLoader):
    """A ``DataLoader`` whose order and draws are a function of (seed, epoch), with any number of workers.

    It takes ``DataLoader``'s arguments with their meaning and defaults, and every sampler: `EpochSampler` says what it
    does with them. ``loader.dataset.dataset`` is the dataset that was given. Every iteration is the next epoch, unless
    ``set_epoch`` says which. A batch that the collate function gives up as None (nothing in it could be read) is passed
    over.

    Args:
        dataset: map-style.
        batch_size, shuffle, sampler, batch_sampler, num_workers, collate_fn, pin_memory, drop_last, timeout,
            worker_init_fn, multiprocessing_context: as ``DataLoader``.
        seed: not negative; the same in all processes.
        prefetch_factor, persistent_workers: as ``DataLoader``.
        options: ``pin_memory_device``, ``in_order``: as ``DataLoader``.

    Attributes:
        waits_since: ``time.monotonic()`` when the batch that is awaited was asked for; None while none is.

    Raises:
        ValueError: a combination of options that excludes itself, or a number outside its range.
        TimeoutError: while iterating, no batch came within `timeout` seconds; names its images.
        OSError: while iterating, a process was killed, or shared memory or open files did not suffice.
        TypeError: a dataset that is not map-style, an option that there is not.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Iterable | None = None,
        batch_sampler: Iterable | None = None,
        num_workers: int = 0,
        collate_fn: Callable | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context=None,
        *,
        seed: int = 42,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        **options: Any,
    ):
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        _check_dataset(dataset)
        _check_order(batch_size, shuffle, sampler, batch_sampler, drop_last)
        _check_workers(num_workers, timeout, multiprocessing_context, prefetch_factor, persistent_workers)
        if batch_sampler is None:
            if sampler is None:
                sampler = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
            if batch_size is not None:
                batch_sampler = BatchSampler(sampler, batch_size, drop_last)
        if batch_sampler is None:
            order = {"batch_size": None, "sampler": EpochSampler(sampler, seed)}
        else:
            order = {"batch_sampler": EpochBatchSampler(batch_sampler, seed)}
        self.epoch_sampler = order.get("batch_sampler", order.get("sampler"))
        self.waits_since: float | None = None
        super().__init__(
            SeededDataset(dataset, seed),
            **order,
            num_workers=num_workers,
            collate_fn=collate_fn,
            pin_memory=pin_memory,
            timeout=timeout,
            worker_init_fn=worker_init_fn,
            multiprocessing_context=multiprocessing_context,
            # The loader draws a number per epoch; from the global generator it would shift the model's dropout.
            generator=torch.Generator().manual_seed(seed),
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            **options,
        )

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Chooses order and augmentation of the next iteration, and the batch of that epoch with which it begins.

        Batches from `first` on are, bit for bit, those of an iteration that begins with batch 0.
        """
        self.epoch_sampler.set_epoch(epoch, first)

    def _get_iterator(self):
        if not self.num_workers:
            return super()._get_iterator()
        given = self.worker_init_fn
        method = (self.multiprocessing_context or multiprocessing).get_start_method()
        self.worker_init_fn = partial(start_worker, given, method == "spawn")
        try:
            return super()._get_iterator()
        finally:
            self.worker_init_fn = given

    def __iter__(self) -> Iterator:
        batches = super().__iter__()
        asked_for = self.epoch_sampler.asked_for
        self.set_epoch(self.epoch_sampler.epoch + 1)
        return self._batches(batches, asked_for)

    def _batches(self, batches: Iterator, asked_for: deque) -> Iterator:
        while True:
            self.waits_since = time.monotonic()
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                explain(error, self.num_workers)
                if "DataLoader timed out" not in str(error):
                    raise
                names = "files that are not known here (in_order=False)"
                if getattr(self, "in_order", True):
                    # Batches come in the order in which they were asked for: the oldest is the one awaited.
                    keys = asked_for[0] if isinstance(asked_for[0], list) else [asked_for[0]]
                    names = ", ".join(_name_of(self.dataset.dataset, key[1]) for key in keys)
                _end_workers(batches)  # Python would wait at its end for one that hangs
                raise TimeoutError(
                    f"a loader process has given no batch for {self.timeout:g} seconds; it is to read {names}. Look at "
                    "these files and at the storage they are on, or allow it more time (timeout, --loader_timeout)"
                ) from error
            finally:
                self.waits_since = None
            asked_for.popleft()
            if batch is not None:
                yield batch

    def close(self) -> None:
        """Ends the worker processes that live on between epochs, also those that hang or ignore signals."""
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            _end_workers(iterator)


def _end_workers(iterator) -> None:
    iterator._shutdown_workers()  # asks them, and waits a few seconds for each
    for worker in iterator._workers:
        if worker.is_alive():
            worker.kill()


def _name_of(dataset, index: int) -> str:
    """The file of a sample, or its index where the dataset does not say."""
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    try:
        return str(dataset.file_name(index))
    except (AttributeError, KeyError, TypeError):
        return f"sample {index}"


def _check_dataset(dataset) -> None:
    if isinstance(dataset, IterableDataset) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TypeError(f"expected a map-style dataset (__getitem__ and __len__), got a {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError("the dataset is empty")


def _check_order(batch_size, shuffle, sampler, batch_sampler, drop_last) -> None:
    if batch_sampler is not None:
        given = {"batch_size": batch_size != 1, "shuffle": shuffle, "sampler": sampler is not None,
                 "drop_last": drop_last}  # fmt: skip
        names = ", ".join(name for name, is_given in given.items() if is_given)
        if names:
            raise ValueError(f"batch_sampler decides which samples make a batch; it excludes {names}")
        return
    if batch_size is None and drop_last:
        raise ValueError("batch_size=None means single samples; it excludes drop_last")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, or None, got {batch_size}")
    if sampler is not None and shuffle:
        raise ValueError("sampler decides about the order; it excludes shuffle")
    if isinstance(sampler, WeightedRandomSampler) and not sampler.replacement:
        possible = int((sampler.weights > 0).sum())
        if sampler.num_samples > possible:
            raise ValueError(
                f"a weighted sampler without replacement cannot draw {sampler.num_samples} samples: only {possible} "
                "have a positive weight"
            )


def _check_workers(num_workers, timeout, multiprocessing_context, prefetch_factor, persistent_workers) -> None:
    if num_workers < 0 or timeout < 0:
        raise ValueError(f"num_workers and timeout must be at least 0, got {num_workers} and {timeout}")
    if prefetch_factor is not None and prefetch_factor < 1:
        raise ValueError(f"prefetch_factor must be at least 1, or None, got {prefetch_factor}")
    if num_workers == 0:
        given = {"timeout": timeout, "multiprocessing_context": multiprocessing_context is not None,
                 "prefetch_factor": prefetch_factor is not None, "persistent_workers": persistent_workers}  # fmt: skip
        names = ", ".join(name for name, is_given in given.items() if is_given)
        if names:
            raise ValueError(f"{names}: only with worker processes; set num_workers to at least 1")


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
    group_by_size: bool | None = None,
    timeout: float = 0,
) -> EpochLoader:
    """The loader for training or validation.

    Training: images of alike size share a batch (`SizeGroupedBatchSampler`), or in the original's order: a
    ``RandomSampler``, or a ``DistributedSampler`` with shuffling. The last incomplete batch is dropped, as in the
    original. Validation: sorted by size (`SizeSortedSampler`), or in the original's order: a ``SequentialSampler``, or
    a ``DistributedSampler`` without shuffling. Nothing is dropped; images may be repeated so that all processes get as
    many.

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
        group_by_size: batches of images of alike size after augmentation. False: the original's order. None: where
            the dataset can plan sizes, as `CocoDetection` with our transforms can.
        timeout: seconds to wait for a worker's batch; 0: as long as it takes.

    Raises:
        ValueError: an empty dataset, a batch size below 1, a negative seed, a dataset too small for a single batch
            where incomplete ones are dropped, ``group_by_size`` with a dataset that cannot plan, or shared memory that
            holds no batch.
    """
    drop_last = train if drop_last is None else drop_last
    if len(dataset) == 0:
        raise ValueError("the dataset has no images")
    if batch_size < 1 or seed < 0:
        raise ValueError(f"batch_size must be at least 1 and seed at least 0, got {batch_size} and {seed}")
    if group_by_size and not can_plan(dataset):
        raise ValueError(
            f"group_by_size needs a dataset with planned_size(index), such as CocoDetection with transforms that have "
            f"draw(size); got a {type(dataset).__name__}"
        )
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)
    grouped = can_plan(dataset) if group_by_size is None else group_by_size
    if train and grouped:
        batch_sampler = SizeGroupedBatchSampler(
            len(dataset), SizePlanner(dataset, seed), batch_size,
            drop_last=drop_last, seed=seed, num_replicas=world_size, rank=rank,
        )  # fmt: skip
    else:
        if grouped:
            sampler = SizeSortedSampler(len(dataset), SizePlanner(dataset, seed), num_replicas=world_size, rank=rank)
        elif distributed:
            sampler = DistributedSampler(dataset, shuffle=train, seed=seed)
        else:
            sampler = RandomSampler(dataset) if train else SequentialSampler(dataset)
        batch_sampler = BatchSampler(sampler, batch_size, drop_last)
    if len(batch_sampler) == 0:
        per_process = len(dataset) // world_size
        raise ValueError(
            f"{per_process} images per process give no complete batch of {batch_size}; choose a batch size of at most "
            f"{per_process}"
        )
    if num_workers and can_plan(dataset):
        some = range(0, len(dataset), -(-len(dataset) // 64))
        pixels = sum(height * width for height, width in SizePlanner(dataset, seed)(0, some)) / len(some)
        value = 3 if isinstance(collate_fn, PackedCollate) else 12  # bytes: uint8 or float32
        check_shared_memory(int(batch_size * pixels * value), num_workers * _PREFETCHED)
    return EpochLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate_fn,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        timeout=timeout if num_workers else 0,
        persistent_workers=num_workers > 0,
        prefetch_factor=_PREFETCHED if num_workers else None,
        seed=seed,
    )
