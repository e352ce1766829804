"""Collate functions for data that is not all there: they drop the samples that could not be read.

The detection collate is the one that tutorials of YOLO-like detectors show, the other a wrapper around PyTorch's own.
Both take what `SkipUnreadable` gives for a file that is missing or corrupt, None, out of the batch; with all of a batch
gone they return None, which `EpochLoader` passes over. So every good sample is delivered, and once:

    loader = EpochLoader(
        SkipUnreadable(dataset), 8, shuffle=True, num_workers=4, collate_fn=DetectionCollate(416, multiscale=True)
    )

With several processes a batch that is passed over in one of them leaves it with fewer steps than the others; training
with DistributedDataParallel then needs data that `check_coco` finds complete.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate, get_worker_info


class SkipUnreadable(Dataset):
    """A dataset that gives None, and a warning, for a sample whose reading fails.

    Args:
        dataset: map-style.
        errors: what counts as unreadable; anything else is raised. The default covers missing files and what PIL and
            `CocoDetection` raise on damaged ones.
    """

    def __init__(self, dataset: Dataset, errors: tuple[type[Exception], ...] = (OSError, SyntaxError)):
        self.dataset = dataset
        self.errors = errors

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int):
        try:
            return self.dataset[index]
        except self.errors as error:
            warnings.warn(f"sample {index} is left out: {error}", stacklevel=2)
            return None


class DropMissing:
    """Collates what is left of a batch without the samples that are None.

    Args:
        collate: called with the samples that are left. Default: ``torch.utils.data.default_collate``.

    Returns (called with a list of samples):
        What ``collate`` returns; None where no sample is left.
    """

    def __init__(self, collate: Callable = default_collate):
        self.collate = collate

    def __call__(self, samples: Sequence):
        left = [sample for sample in samples if sample is not None]
        return self.collate(left) if left else None


class DetectionCollate:
    """Collates detection samples into one square batch of images and one table of boxes.

    Samples that are None are dropped. Every box gets the index of its image in the batch that is left. Images are
    resized to the batch's size without regard to their proportions, which keeps boxes in 0..1 right.

    With ``multiscale`` every tenth batch chooses a new size for itself and those after it, from
    ``range(min_size, max_size + 1, step)``: batches 1 to 9 have ``image_size``, 10 to 19 another one, and so on through
    the epochs. The size is a function of the batch's number and ``seed`` alone, so it is the same in all processes and
    with any number of workers (a worker that counted its own batches would change the size at the wrong ones); the
    number comes from `EpochLoader`.

    Args:
        image_size: side in pixels.
        multiscale: change the size every ``every`` batches.
        min_size, max_size: sides to choose from. None: three steps below and above ``image_size``.
        step: between sides, in pixels.
        every: batches between changes.
        mode: "nearest", or "bilinear" (antialiased).
        seed: not negative; of the sizes.

    A sample is (…, image, boxes):
        image: [C, H, W] tensor; all of a batch with the same C and dtype.
        boxes: float [N, 5], class and cx, cy, w, h in 0..1; or [N, 6] with a first column that is overwritten; or a
            target dict with "labels" [N] and "boxes" [N, 4], as `CocoDetection` gives it; or None for no boxes.
        Whatever stands before, a path for instance, is passed on as a tuple.

    Returns (called with a list of samples):
        (…, images [B, C, S, S], boxes float32 [M, 6]: index of the image in 0..B-1, class, cx, cy, w, h); or None where
        no sample is left.

    Raises:
        ValueError: a number outside its range; on a batch: boxes of another shape, images of different channels, or
            ``multiscale`` in a worker of a loader that does not number its batches.
        TypeError: on a batch: a sample that is not as above.
    """

    def __init__(
        self,
        image_size: int = 416,
        *,
        multiscale: bool = False,
        min_size: int | None = None,
        max_size: int | None = None,
        step: int = 32,
        every: int = 10,
        mode: str = "nearest",
        seed: int = 0,
    ):
        min_size = max(step, image_size - 3 * step) if min_size is None else min_size
        max_size = image_size + 3 * step if max_size is None else max_size
        if not 1 <= min_size <= max_size or min(image_size, step, every) < 1 or seed < 0:
            raise ValueError(
                "expected image_size, min_size <= max_size, step and every of at least 1 and seed of at least 0, got "
                f"{image_size}, {min_size}, {max_size}, {step}, {every}, {seed}"
            )
        if mode not in ("nearest", "bilinear"):
            raise ValueError(f"mode must be 'nearest' or 'bilinear', got {mode!r}")
        self.image_size = image_size
        self.multiscale = multiscale
        self.sizes = range(min_size, max_size + 1, step)
        self.every = every
        self.mode = mode
        self.seed = seed
        self._count = 0

    def size_of(self, number: int) -> int:
        """The side in pixels of a batch, by its number, counted from 0."""
        change = (number + 1) // self.every
        if not self.multiscale or change == 0:
            return self.image_size
        return self.sizes[int(np.random.default_rng((self.seed, change)).integers(len(self.sizes)))]

    def __call__(self, samples: Sequence) -> tuple | None:
        size = self.size_of(self._number(samples))
        samples = [sample for sample in samples if sample is not None]
        if not samples:
            return None
        for sample in samples:
            if not isinstance(sample, (tuple, list)) or len(sample) < 2 or not isinstance(sample[-2], torch.Tensor):
                raise TypeError(f"expected samples (…, image tensor, boxes), got {_describe(sample)}")
        *rest, images, boxes = zip(*samples, strict=True)
        channels = {tuple(image.shape[:-2]) for image in images}
        if len(channels) > 1 or len(next(iter(channels))) != 1:
            raise ValueError(f"expected images [C, H, W] of one C, got {[tuple(image.shape) for image in images]}")
        rows = [_numbered(index, _rows(item)) for index, item in enumerate(boxes)]
        return (*rest, torch.stack([self._resized(image, size) for image in images]), torch.cat(rows))

    def _number(self, samples: Sequence) -> int:
        number = getattr(samples, "number", None)
        if number is None and self.multiscale:
            if get_worker_info() is not None:
                raise ValueError(
                    "multiscale in worker processes needs batches that know their number: load them with "
                    "detr_fast.data.EpochLoader, or set num_workers=0"
                )
            number, self._count = self._count, self._count + 1
        return number or 0

    def _resized(self, image: torch.Tensor, size: int) -> torch.Tensor:
        if self.mode == "nearest":
            return torch.nn.functional.interpolate(image[None], (size, size), mode="nearest")[0]
        return torch.nn.functional.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0]


def _rows(boxes) -> torch.Tensor:
    """float32 [N, 5]: class, cx, cy, w, h."""
    if boxes is None:
        return torch.zeros((0, 5))
    if isinstance(boxes, dict):
        if not {"labels", "boxes"} <= boxes.keys():
            raise TypeError(f"expected a target with labels and boxes, got one with {sorted(boxes)}")
        return torch.cat([boxes["labels"][:, None].float(), boxes["boxes"].float().reshape(-1, 4)], dim=1)
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    if boxes.numel() == 0:
        return torch.zeros((0, 5))
    if boxes.ndim != 2 or boxes.shape[1] not in (5, 6):
        raise ValueError(f"expected boxes [N, 5] (class, cx, cy, w, h) or [N, 6], got shape {tuple(boxes.shape)}")
    return boxes[:, -5:]


def _numbered(index: int, rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.full((len(rows), 1), float(index)), rows], dim=1)


def _describe(sample) -> str:
    if isinstance(sample, (tuple, list)):
        return f"({', '.join(type(item).__name__ for item in sample)})"
    return f"a {type(sample).__name__}"
