"""Seeds and order: every random draw of loading is a function of (seed, epoch, index of the sample).

The augmentation of a sample depends neither on the worker that made it nor on their number, and epoch e of a resumed
run has the batches and pictures of epoch e of a run that was never interrupted. The epoch travels with the index, so
that workers that live on from epoch to epoch have it, too; so does the number of the batch, for collate functions that
depend on it.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import Dataset, DistributedSampler, Sampler, get_worker_info


def seed_generators(*entropy: int) -> None:
    """Seeds Python's, numpy's and torch's CPU generator from non-negative numbers."""
    python, numpy, torch_cpu = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(python))
    np.random.seed(int(numpy))
    # Not torch.manual_seed: without workers this is the training process, whose CUDA generator must not be touched.
    torch.default_generator.manual_seed(int(torch_cpu))


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Restores Python's, numpy's and torch's CPU generator afterwards."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


@contextlib.contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """`seed_generators`, and `kept_generators` around it."""
    with kept_generators():
        seed_generators(*entropy)
        yield


def generator_for(*entropy: int) -> torch.Generator:
    """A CPU generator seeded from non-negative numbers."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


class NumberedBatch(list):
    """A batch's keys or samples, and the batch's number.

    Attributes:
        number: 0 for the first batch of epoch 0; it runs on from epoch to epoch.
    """

    def __init__(self, items: Iterable = (), number: int = 0):
        super().__init__(items)
        self.number = number


class SeededDataset(Dataset):
    """Wraps a dataset whose items are asked for by (epoch, index) and drawn with seeds made of (seed, epoch, index).

    A key (epoch, index, n) asks for the n-th repetition of an index within its epoch, which gets draws of its own.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, ...]):
        if get_worker_info() is not None:  # nobody else draws in a worker: there is nothing to restore
            seed_generators(self.seed, *key)
            return self.dataset[key[1]]
        with seeded(self.seed, *key):
            return self.dataset[key[1]]

    def __getitems__(self, keys: NumberedBatch) -> NumberedBatch:
        """All samples of a batch (the loader's workers call it): what the collate function gets, with its number."""
        return NumberedBatch([self[key] for key in keys], keys.number)


class EpochSampler(Sampler):
    """Wraps a sampler so that its order depends on (seed, epoch) alone; its indices become keys (epoch, index).

    Args:
        sampler: a sampler or a list of indices. Where it, or a sampler inside it, has ``set_epoch``, that is called;
            otherwise its ``generator``, if it has one and none was given by the user, is seeded anew for every epoch.
        seed: not negative.

    Attributes:
        epoch: of the next iteration.
        first: how many keys (of an `EpochBatchSampler`: batches) the next iteration leaves out at its beginning.
        asked_for: what the latest iteration has given; whoever receives the samples takes it out again.
    """

    def __init__(self, sampler: Iterable, seed: int):
        self.sampler = sampler
        self.seed = seed
        self.epoch = self.first = 0
        self.asked_for: deque = deque()
        self._seedable = [s for s in _chain(sampler) if getattr(s, "generator", 0) is None]

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Chooses the epoch of the next iteration, and where in it it begins."""
        self.epoch, self.first = epoch, first

    def __iter__(self) -> Iterator:
        # The epoch as it is now, not as it is when the first key is asked for. What is left out is drawn nevertheless:
        # the rest is what it would have been.
        keys = itertools.islice(self._keys(self.epoch), self.first, None)
        self.asked_for = deque()
        return self._noted(keys, self.asked_for)

    @staticmethod
    def _noted(keys: Iterator, asked_for: deque) -> Iterator:
        for key in keys:
            asked_for.append(key)
            yield key

    def _keys(self, epoch: int) -> Iterator:
        self._start(epoch)
        seen = Counter()
        for index in self.sampler:
            yield _key(epoch, index, seen)

    def _start(self, epoch: int) -> None:
        for sampler in _chain(self.sampler):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        for sampler in self._seedable:
            sampler.generator = generator_for(self.seed, epoch)


class EpochBatchSampler(EpochSampler):
    """An `EpochSampler` of batches: ``sampler`` gives lists of indices, which become `NumberedBatch`es of keys."""

    def _keys(self, epoch: int) -> Iterator[NumberedBatch]:
        self._start(epoch)
        seen = Counter()
        try:
            first = epoch * len(self)
        except TypeError:  # a sampler without a length: numbers start again with every epoch
            first = 0
        for number, batch in enumerate(self.sampler, first):
            yield NumberedBatch([_key(epoch, index, seen) for index in batch], number)


def _key(epoch: int, index: int, seen: Counter) -> tuple[int, ...]:
    index = int(index)
    repetition = seen[index]
    seen[index] += 1
    return (epoch, index, repetition) if repetition else (epoch, index)


def _chain(sampler) -> Iterator:
    """A sampler and those inside it."""
    while sampler is not None:
        yield sampler
        sampler = getattr(sampler, "sampler", None)


class UnpaddedDistributedSampler(DistributedSampler):
    """A ``DistributedSampler`` that gives every sample to exactly one process: none is repeated, none dropped.

    The processes' counts differ by at most one. For evaluation, and wherever a sample must not count twice;
    DistributedDataParallel, whose processes must make equally many steps, wants ``DistributedSampler`` itself.

    Args:
        dataset, num_replicas, rank, shuffle, seed: as ``DistributedSampler``.
    """

    def __init__(self, dataset, num_replicas: int | None = None, rank: int | None = None, shuffle=True, seed: int = 0):
        super().__init__(dataset, num_replicas, rank, shuffle, seed)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        indices = torch.arange(len(self.dataset))
        if self.shuffle:
            indices = torch.randperm(len(self.dataset), generator=generator_for(self.seed, self.epoch))
        return iter(indices[self.rank :: self.num_replicas].tolist())
