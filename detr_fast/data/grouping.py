"""Batches of images that the transforms make alike in size, so that little of a batch is padding.

The augmentation decides an image's final size, so grouping by the files' own shapes helps little. Here the augmentation
of every image of a large window is drawn first, from its annotated width and height (nothing is read); the window is
cut into batches of alike sizes; and the batches are shuffled. Later the worker, seeded by the same (seed, epoch,
index), makes the very same draws. So in every epoch each image is, bit for bit, what it would be in plain random order,
and the augmentation's distribution is unchanged; only which images share a batch differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler, Subset

from detr_fast.data.seeding import generator_for, kept_generators, seed_generators

WINDOW = 4096  # images of a process: at batch 16, 97 % of the pixels of COCO's batches are valid

PlannedSizes = Callable[[int, Sequence[int]], Sequence[tuple[int, int]]]


class SizeGroupedBatchSampler(Sampler):
    """Batches of indices, grouped by the size that each image will have; every image once per epoch.

    An epoch is a random order of all images, a function of (seed, epoch), dealt to the processes in turn. Each process
    plans and groups its own images, window by window, so no process does another's work and none has to be asked. The
    batches of a window are shuffled in the same way in all processes after having been sorted by size, so that the
    processes' batches of a step are alike in size, too, and none waits long for another.

    With ``drop_last`` the images that do not fill a batch in every process are left out, other ones in every epoch.
    Without it they form a last, smaller batch; then, where they cannot be dealt out evenly, up to ``num_replicas - 1``
    images come twice, as in ``DistributedSampler``: all processes always have equally many batches of equal lengths.

    Args:
        num_images: of the dataset.
        planned_sizes: (epoch, indices) → the (height, width) that each image will have in that epoch.
        batch_size: images per process and step.
        drop_last: see above.
        seed: not negative, the same in all processes.
        num_replicas, rank: number of processes, and which one this is.
        window: images of a process that are grouped at a time, rounded to whole batches. Larger means less padding.

    Attributes:
        epoch: of the next iteration.

    Raises:
        ValueError: a number outside its range.
    """

    def __init__(
        self,
        num_images: int,
        planned_sizes: PlannedSizes,
        batch_size: int,
        *,
        drop_last: bool = True,
        seed: int = 42,
        num_replicas: int = 1,
        rank: int = 0,
        window: int = WINDOW,
    ):
        if min(num_images, batch_size, window, num_replicas) < 1 or seed < 0 or not 0 <= rank < num_replicas:
            raise ValueError(
                "expected num_images, batch_size, window and num_replicas of at least 1, a seed of at least 0 and a "
                f"rank in 0..num_replicas - 1, got {num_images}, {batch_size}, {window}, {num_replicas}, {seed}, {rank}"
            )
        self.num_images = num_images
        self.planned_sizes = planned_sizes
        self.batch_size = batch_size
        self.seed = seed
        self.num_replicas = num_replicas
        self.rank = rank
        self.window = max(1, window // batch_size) * batch_size
        self.epoch = 0
        if drop_last:
            self.num_samples = num_images // (batch_size * num_replicas) * batch_size
        else:
            self.num_samples = -(-num_images // num_replicas)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-self.num_samples // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch
        order = torch.randperm(self.num_images, generator=generator_for(self.seed, epoch)).numpy()
        own = np.resize(order, self.num_samples * self.num_replicas)[self.rank :: self.num_replicas]
        shuffle = np.random.default_rng((self.seed, epoch))
        full = self.num_samples // self.batch_size * self.batch_size
        planned: list[tuple[int, int]] = []
        for start in range(0, full, self.window):
            window = own[start : min(start + self.window, full)]
            upcoming = own[start + len(window) : min(start + len(window) + self.window, full)]
            planned += self.planned_sizes(epoch, window[len(planned) :].tolist())
            batches = window[group_by_size(np.array(planned), self.batch_size)]
            planned = []
            for batch in shuffle.permutation(len(batches)):
                # A little of the next window is planned with every batch: no step waits for a whole window.
                more = upcoming[len(planned) : len(planned) + self.batch_size]
                planned += self.planned_sizes(epoch, more.tolist())
                yield batches[batch].tolist()
        if full < self.num_samples:
            yield own[full:].tolist()


class SizeSortedSampler(Sampler):
    """All images in the order of the sizes that they will have, the highest first, of equal height the widest: for
    evaluation, where neighbours share a batch. If memory does not suffice, that shows at once.

    Of several processes each gets every ``num_replicas``-th image, so that their batches are alike in size, too; as in
    ``DistributedSampler``, up to ``num_replicas - 1`` images come twice, so that all get as many.

    Args:
        num_images, planned_sizes, num_replicas, rank: see `SizeGroupedBatchSampler`; the sizes are those of epoch 0.
    """

    def __init__(self, num_images: int, planned_sizes: PlannedSizes, *, num_replicas: int = 1, rank: int = 0):
        self.num_images = num_images
        self.planned_sizes = planned_sizes
        self.num_replicas = num_replicas
        self.rank = rank
        self._order: list[int] | None = None

    def __len__(self) -> int:
        return -(-self.num_images // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        if self._order is None:
            sizes = np.array(self.planned_sizes(0, range(self.num_images)))
            order = np.lexsort((-sizes[:, 1], -sizes[:, 0]))  # stable
            self._order = np.resize(order, len(self) * self.num_replicas)[self.rank :: self.num_replicas].tolist()
        return iter(self._order)


def group_by_size(sizes: np.ndarray, batch_size: int) -> np.ndarray:
    """Cuts images into batches with little padding: halves them again and again, by height or by width.

    Of the two ways to halve a group of batches the one is taken whose halves, each padded to its own largest height
    and width, have fewer pixels.

    Args:
        sizes: [N, 2] heights and widths; N a positive multiple of ``batch_size``.
        batch_size: images per batch.

    Returns:
        [N / batch_size, batch_size] positions in ``sizes``; the batches ascend in padded pixels.

    Raises:
        ValueError: another shape of ``sizes``.
    """
    if sizes.ndim != 2 or sizes.shape[1] != 2 or len(sizes) == 0 or len(sizes) % batch_size:
        raise ValueError(f"sizes must be [N, 2] with N a positive multiple of {batch_size}, got shape {sizes.shape}")
    batches: list[np.ndarray] = []
    groups = [np.arange(len(sizes))]
    while groups:
        group = groups.pop()
        if len(group) == batch_size:
            batches.append(group)
            continue
        half = len(group) // batch_size // 2 * batch_size
        ways = [group[np.argsort(sizes[group, axis], kind="stable")] for axis in (0, 1)]
        best = min(ways, key=lambda way: _padded_pixels(sizes[way[:half]]) + _padded_pixels(sizes[way[half:]]))
        groups += [best[:half], best[half:]]
    return np.stack(sorted(batches, key=lambda batch: _padded_pixels(sizes[batch])))


def _padded_pixels(sizes: np.ndarray) -> int:
    return len(sizes) * int(sizes[:, 0].max()) * int(sizes[:, 1].max())


class SizePlanner:
    """The sizes that a dataset's images will have, by the draws that `SeededDataset` will make for them.

    Args:
        dataset: has ``planned_size(index)``, as `CocoDetection`; or a ``torch.utils.data.Subset`` of such a one.
        seed: of the loader.
    """

    def __init__(self, dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __call__(self, epoch: int, indices: Sequence[int]) -> list[tuple[int, int]]:
        """(height, width) of each image in that epoch. The process's random generators are left as they were."""
        sizes = []
        with kept_generators():
            for index in indices:
                seed_generators(self.seed, epoch, index)
                sizes.append(_planned_size(self.dataset, index))
        return sizes


def can_plan(dataset) -> bool:
    """Whether `SizePlanner` takes the dataset."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return hasattr(dataset, "planned_size") and getattr(dataset, "can_plan", True)


def _planned_size(dataset, index: int) -> tuple[int, int]:
    while isinstance(dataset, Subset):
        dataset, index = dataset.dataset, dataset.indices[index]
    return dataset.planned_size(index)


def padded_sizes(sizes: np.ndarray, divisor: int = 1) -> np.ndarray:
    """[batches, 2] heights and widths of batches of images [batches, B, 2], rounded up to multiples of `divisor`."""
    return -(-np.asarray(sizes, dtype=np.int64).max(axis=1) // divisor) * divisor


def valid_shares(sizes: np.ndarray, stride: int = 32, divisor: int = 1) -> dict[str, float]:
    """How much of padded batches is not padding.

    Args:
        sizes: [batches, B, 2] heights and widths of the images.
        divisor: heights and widths of batches are multiples of it.
        stride: of the backbone; a feature map's cell is valid where the mask's nearest pixel is.

    Returns:
        Shares in 0..1 of all batches together: "pixels"; "tokens", cells of the feature maps; "pairs", of queries and
        keys of self-attention with both valid.
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    batch_size = sizes.shape[1]
    padded = padded_sizes(sizes, divisor)
    cells = -(-padded // stride)
    # Nearest: cell c reads the pixel floor(c · padded / cells); valid are those below the image's own size.
    valid = (-(-sizes * cells[:, None] // padded[:, None])).prod(axis=2)  # [batches, B]
    total = cells.prod(axis=1)  # [batches]
    return {
        "pixels": float(sizes.prod(axis=2).sum() / (padded.prod(axis=1).sum() * batch_size)),
        "tokens": float(valid.sum() / (total.sum() * batch_size)),
        "pairs": float((valid**2).sum() / ((total**2).sum() * batch_size)),
    }
