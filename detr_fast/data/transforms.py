"""Augmentations of an image together with its target, with the original's numbers.

Until ``ToTensor`` an image is a PIL image, or a uint8 tensor [3, H, W] (see below), and ``target["boxes"]`` is float32
[N, 4], x0, y0, x1, y1 in pixels; ``Normalize`` turns the boxes into cx, cy, w, h in 0..1 of the image as it then is.
Draws come from Python's ``random`` (flip, select, sizes) and from torch's CPU generator (crop position), in the
original's order: the same seeds give the same pictures.

The draws depend on the image's size alone. ``draw(size)`` makes them for an image that nobody has read: it consumes
the generators exactly as the call with that image does, and tells the size that comes out. That is how batches of
alike sizes are planned (see ``detr_fast.data.grouping``).

Tensor images are resized by torch's antialiased bilinear kernel on uint8, several times faster than PIL. Of the values
of COCO's training images 0.1 % then differ from PIL's, by 1 or at most 2 grey levels of 255; all draws, sizes and
targets are the same.

``target["lines"]``, float32 [N, 4], x1, y1, x2, y2, goes the same way; see ``detr_fast.data.lines``.

A target may be None everywhere (prediction). Keypoints pass through untouched, as in the original.

Source: facebookresearch/detr, datasets/transforms.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image

from detr_fast.geometry.boxes import box_xyxy_to_cxcywh
from detr_fast.geometry.lines import crop_lines, hflip_lines, vflip_lines

Target = dict[str, Any] | None
Img = Image.Image | torch.Tensor
Size = tuple[int, int]  # (width, height), PIL's order

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def image_size(image: Img) -> Size:
    """(width, height) of a PIL image or of a tensor [C, H, W]."""
    return image.size if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])


def crop(image: Img, target: Target, region: tuple[int, int, int, int]) -> tuple[Img, Target]:
    """Cuts out ``region`` = (top, left, height, width) in pixels.

    Boxes are moved and clamped to the region, ``area`` becomes the area of what is left of the box, and objects of
    which nothing is left are removed (judged by boxes, or by masks where there are no boxes).
    """
    top, left, height, width = region
    cropped = F.crop(image, top, left, height, width)
    if target is None:
        return cropped, None

    target = dict(target, size=torch.tensor([height, width]))
    fields = [name for name in ("labels", "area", "iscrowd", "boxes", "masks") if name in target]
    if "masks" in target:
        target["masks"] = target["masks"][:, top : top + height, left : left + width]
    if "boxes" in target:
        corners = (target["boxes"] - torch.tensor([left, top, left, top])).reshape(-1, 2, 2)
        corners = torch.min(corners, torch.tensor([width, height], dtype=torch.float32)).clamp(min=0)
        target["boxes"] = corners.reshape(-1, 4)
        target["area"] = (corners[:, 1] - corners[:, 0]).prod(dim=1)
        keep = (corners[:, 1] > corners[:, 0]).all(dim=1)
        fields = sorted({*fields, "area"})
    elif "masks" in target:
        keep = target["masks"].flatten(1).any(dim=1)
    elif "lines" in target:
        target["lines"], keep = crop_lines(target["lines"], top, left, height, width)
        fields.append("lines")
    else:
        return cropped, target
    for name in fields:
        target[name] = target[name][keep]
    return cropped, target


def hflip(image: Img, target: Target) -> tuple[Img, Target]:
    """Mirrors left and right."""
    flipped = F.hflip(image)
    if target is None:
        return flipped, None
    target = dict(target)
    if "boxes" in target:
        width, _ = image_size(image)
        x0, y0, x1, y1 = target["boxes"].unbind(dim=1)
        target["boxes"] = torch.stack([width - x1, y0, width - x0, y1], dim=1)
    if "lines" in target:
        target["lines"] = hflip_lines(target["lines"], image_size(image)[0])
    if "masks" in target:
        target["masks"] = target["masks"].flip(-1)
    return flipped, target


def vflip(image: Img, target: Target) -> tuple[Img, Target]:
    """Mirrors top and bottom an image with lines.

    Raises:
        ValueError: the target has boxes or masks, which no augmentation here mirrors that way.
    """
    if target is not None and not {"boxes", "masks"}.isdisjoint(target):
        raise ValueError(f"vflip takes targets with lines, got one with {sorted(target)}")
    flipped = F.vflip(image)
    if target is None:
        return flipped, None
    return flipped, dict(target, lines=vflip_lines(target["lines"], image_size(image)[1]))


def resized_size(image_size: Size, size: int, max_size: int | None = None) -> tuple[int, int]:
    """(height, width) of an image of ``image_size`` = (width, height) whose short side is resized to ``size``.

    Where the long side would exceed ``max_size``, the short side is chosen smaller (rounded) and the long side follows
    from it, truncated: the result can be a pixel off ``max_size``, as in the original.
    """
    width, height = image_size
    short, long = float(min(width, height)), float(max(width, height))
    if max_size is not None and long / short * size > max_size:
        # A strip so thin that nothing of its short side would be left keeps one pixel.
        size = max(1, round(max_size * short / long))
    if min(width, height) == size:
        return height, width
    if width < height:
        return int(size * height / width), size
    return size, int(size * width / height)


def resize(image: Img, target: Target, size: int | Sequence[int], max_size: int | None = None) -> tuple[Img, Target]:
    """Resizes to a short side ``size`` (see ``resized_size``), or to exactly ``size`` = (width, height).

    Boxes and ``area`` are rescaled by the ratios that were really applied, masks by nearest neighbour.
    """
    if isinstance(size, (list, tuple)):
        height, width = size[1], size[0]
    else:
        height, width = resized_size(image_size(image), size, max_size)
    resized = (
        _resized_tensor(image, height, width) if isinstance(image, torch.Tensor) else F.resize(image, [height, width])
    )
    if target is None:
        return resized, None

    old_width, old_height = image_size(image)
    ratio_x, ratio_y = width / old_width, height / old_height
    target = dict(target, size=torch.tensor([height, width]))
    if "boxes" in target:
        target["boxes"] = target["boxes"] * torch.tensor([ratio_x, ratio_y, ratio_x, ratio_y])
    if "lines" in target:
        target["lines"] = target["lines"] * torch.tensor([ratio_x, ratio_y, ratio_x, ratio_y])
    if "area" in target:
        target["area"] = target["area"] * (ratio_x * ratio_y)
    if "masks" in target:
        masks = target["masks"][:, None].float()
        target["masks"] = torch.nn.functional.interpolate(masks, size=(height, width), mode="nearest")[:, 0] > 0.5
    return resized, target


def _resized_tensor(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    if image.shape[-2:] == (height, width):
        return image
    # Channels last is the memory order of decoded images, and the one that the kernel for uint8 is fast in.
    batch = image[None].contiguous(memory_format=torch.channels_last)
    return torch.nn.functional.interpolate(batch, (height, width), mode="bilinear", antialias=True)[0]


def pad(image: Img, target: Target, padding: tuple[int, int]) -> tuple[Img, Target]:
    """Adds ``padding`` = (x, y) black pixels at the right and at the bottom."""
    padded = F.pad(image, [0, 0, padding[0], padding[1]])
    if target is None:
        return padded, None
    width, height = image_size(padded)
    target = dict(target, size=torch.tensor([height, width]))
    if "masks" in target:
        target["masks"] = torch.nn.functional.pad(target["masks"], (0, padding[0], 0, padding[1]))
    return padded, target


Step = Callable[[Img, Target], tuple[Img, Target]]


class SizeTransform:
    """A transform whose draws, and whose resulting size, depend on the image's size and not on its pixels."""

    def draw(self, size: Size) -> tuple[list[Step], Size]:
        """Draws for an image of ``size`` = (width, height).

        Returns:
            What is to be done, functions (image, target) → (image, target) in this order, and the (width, height) that
            comes out.
        """
        raise NotImplementedError

    def __call__(self, image: Img, target: Target = None) -> tuple[Img, Target]:
        steps, _ = self.draw(image_size(image))
        for step in steps:
            image, target = step(image, target)
        return image, target


def _random_crop(size: Size, height: int, width: int) -> tuple[list[Step], Size]:
    # get_params reads nothing but the shape: the image needs no memory.
    region = T.RandomCrop.get_params(torch.empty((0, size[1], size[0])), (height, width))
    return [partial(crop, region=region)], (width, height)


class RandomCrop(SizeTransform):
    """Crops to ``size`` = (height, width) at a random place."""

    def __init__(self, size: Sequence[int]):
        self.size = size

    def draw(self, size):
        return _random_crop(size, *self.size)


class RandomSizeCrop(SizeTransform):
    """Crops to a random width and height in ``min_size..max_size`` pixels, at a random place.

    A side shorter than ``min_size`` is kept whole (the original raises).
    """

    def __init__(self, min_size: int, max_size: int):
        self.min_size = min_size
        self.max_size = max_size

    def draw(self, size):
        width, height = (random.randint(min(self.min_size, side), min(side, self.max_size)) for side in size)
        return _random_crop(size, height, width)


class CenterCrop(SizeTransform):
    """Crops to ``size`` = (height, width) around the middle."""

    def __init__(self, size: Sequence[int]):
        self.size = size

    def draw(self, size):
        height, width = self.size
        top = int(round((size[1] - height) / 2.0))
        left = int(round((size[0] - width) / 2.0))
        return [partial(crop, region=(top, left, height, width))], (width, height)


class RandomHorizontalFlip(SizeTransform):
    """Mirrors left and right with probability ``p``."""

    def __init__(self, p: float = 0.5):
        self.p = p

    def draw(self, size):
        return ([hflip] if random.random() < self.p else []), size


class RandomVerticalFlip(RandomHorizontalFlip):
    """Mirrors top and bottom with probability ``p``; of targets with lines."""

    def draw(self, size):
        return ([vflip] if random.random() < self.p else []), size


class RandomResize(SizeTransform):
    """Resizes the short side to one of ``sizes``, the long side to at most ``max_size`` (see ``resize``)."""

    def __init__(self, sizes: Sequence[int], max_size: int | None = None):
        if not isinstance(sizes, (list, tuple)) or not sizes:
            raise TypeError(f"sizes must be a non-empty list or tuple, got {sizes!r}")
        self.sizes = sizes
        self.max_size = max_size

    def draw(self, size):
        height, width = resized_size(size, random.choice(self.sizes), self.max_size)
        return [partial(resize, size=(width, height))], (width, height)


class RandomPad(SizeTransform):
    """Adds 0..``max_pad`` black pixels at the right and at the bottom."""

    def __init__(self, max_pad: int):
        self.max_pad = max_pad

    def draw(self, size):
        x = random.randint(0, self.max_pad)
        y = random.randint(0, self.max_pad)
        return [partial(pad, padding=(x, y))], (size[0] + x, size[1] + y)


class RandomSelect(SizeTransform):
    """Applies ``transforms1`` with probability ``p``, otherwise ``transforms2``."""

    def __init__(self, transforms1: SizeTransform, transforms2: SizeTransform, p: float = 0.5):
        self.transforms1 = transforms1
        self.transforms2 = transforms2
        self.p = p

    def draw(self, size):
        return self._select().draw(size)

    def __call__(self, image, target=None):
        return self._select()(image, target)

    def _select(self):
        return self.transforms1 if random.random() < self.p else self.transforms2


class ToTensor:
    """PIL or uint8 image to float32 [3, H, W] in 0..1, or to uint8 [3, H, W] with ``uint8=True``."""

    def __init__(self, *, uint8: bool = False):
        self.uint8 = uint8

    def __call__(self, image, target=None):
        if isinstance(image, torch.Tensor):
            return (image if self.uint8 else F.convert_image_dtype(image, torch.float32)), target
        return (F.pil_to_tensor(image) if self.uint8 else F.to_tensor(image)), target

    def draw(self, size: Size) -> tuple[list[Step], Size]:
        """Nothing to draw, and the size stays; see ``SizeTransform.draw``."""
        return [self], size


class ImageOnly:
    """A transform of the image alone, which keeps its size; the target is left alone."""

    def __init__(self, transform: Callable[[Img], Img]):
        self.transform = transform

    def __call__(self, image, target=None):
        return self.transform(image), target

    def draw(self, size: Size) -> tuple[list[Step], Size]:
        """Draws when it is applied, and the size stays; see ``SizeTransform.draw``."""
        return [self], size


class RandomErasing(ImageOnly):
    """``torchvision.transforms.RandomErasing`` of the image tensor; the target is left alone."""

    def __init__(self, *args, **kwargs):
        super().__init__(T.RandomErasing(*args, **kwargs))


class Normalize:
    """Normalises a float image [3, H, W] by ``mean`` and ``std``, boxes to cx, cy, w, h and lines to ends in 0..1.

    A uint8 image is left as it is: ``pad_collate`` normalises it on the training device, in the same pass as padding.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self.mean = mean
        self.std = std

    def __call__(self, image, target=None):
        if image.dtype != torch.uint8:
            image = F.normalize(image, mean=self.mean, std=self.std)
        if target is None:
            return image, None
        target = dict(target)
        height, width = image.shape[-2:]
        size = torch.tensor([width, height, width, height], dtype=torch.float32)
        if "boxes" in target:
            target["boxes"] = box_xyxy_to_cxcywh(target["boxes"]) / size
        if "lines" in target:
            target["lines"] = target["lines"] / size
        return image, target

    def draw(self, size: Size) -> tuple[list[Step], Size]:
        """Nothing to draw, and the size stays; see ``SizeTransform.draw``."""
        return [self], size


class Compose:
    """Applies ``transforms`` one after another."""

    def __init__(self, transforms: Sequence[Callable]):
        self.transforms = transforms

    def __call__(self, image, target=None):
        for transform in self.transforms:
            image, target = transform(image, target)
        return image, target

    def draw(self, size: Size) -> tuple[list[Step], Size]:
        """All transforms' draws, one after another; see ``SizeTransform.draw``.

        Raises:
            AttributeError: one of the transforms has no ``draw``.
        """
        steps: list[Step] = []
        for transform in self.transforms:
            more, size = transform.draw(size)
            steps += more
        return steps, size

    def __repr__(self):
        return "\n".join([f"{type(self).__name__}(", *(f"    {transform}" for transform in self.transforms), ")"])


def can_draw(transform: Callable | None) -> bool:
    """Whether a transform, with all those inside it, has ``draw``. None, no transform, draws nothing."""
    inner = [*getattr(transform, "transforms", ())]
    inner += [getattr(transform, name) for name in ("transforms1", "transforms2") if hasattr(transform, name)]
    return transform is None or (hasattr(transform, "draw") and all(map(can_draw, inner)))


# The original's numbers, for images whose largest short side is 800.
COCO_SCALES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
COCO_MAX_SIZE = 1333
COCO_CROP_SCALES = (400, 500, 600)
COCO_CROP_RANGE = (384, 600)


def make_coco_transforms(
    image_set: str,
    *,
    scales: int | Sequence[int] | None = None,
    max_size: int | None = None,
    crop_scales: Sequence[int] | None = None,
    crop_range: tuple[int, int] | None = None,
    uint8: bool = False,
) -> Compose:
    """The original's augmentation, or the same one at another size.

    train: flip; then, with equal chance, either resize, or resize to a short side of 400, 500 or 600, crop 384..600
    pixels and resize. val: resize to the largest scale.

    Args:
        image_set: "train" or "val".
        scales: short sides in pixels to draw from (val: the largest of them). None: 480 to 800 in steps of 32. One
            number: those eleven scaled so that it is the largest.
        max_size: longest side in pixels. None: 1333, scaled like the largest of ``scales`` to 800.
        crop_scales: short sides before the crop. None: 400, 500, 600, scaled likewise.
        crop_range: smallest and largest side of the crop. None: 384, 600, scaled likewise.
        uint8: leave the image uint8 [3, H, W] for ``pad_collate`` to normalise with IMAGENET_MEAN and IMAGENET_STD;
            boxes are normalised all the same.

    Raises:
        ValueError: another ``image_set``, or sizes that are not positive.

    Source: facebookresearch/detr, datasets/coco.py.
    """
    if image_set not in ("train", "val"):
        raise ValueError(f"image_set must be 'train' or 'val', got {image_set!r}")
    if scales is None:
        scales = COCO_SCALES
    elif isinstance(scales, int):
        scales = [round(scales * scale / COCO_SCALES[-1]) for scale in COCO_SCALES]
    scales = list(scales)
    if not scales or min(scales) < 1:
        raise ValueError(f"scales must be positive short sides in pixels, got {scales}")

    ratio = max(scales) / COCO_SCALES[-1]
    max_size = round(COCO_MAX_SIZE * ratio) if max_size is None else max_size
    crop_scales = [max(1, round(scale * ratio)) for scale in COCO_CROP_SCALES] if crop_scales is None else crop_scales
    crop_range = [max(1, round(side * ratio)) for side in COCO_CROP_RANGE] if crop_range is None else crop_range
    if max_size < max(scales):
        raise ValueError(f"max_size must be at least the largest scale {max(scales)}, got {max_size}")

    finish = [ToTensor(uint8=uint8), Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    if image_set == "val":
        return Compose([RandomResize([max(scales)], max_size=max_size), *finish])
    cropped = Compose([RandomResize(crop_scales), RandomSizeCrop(*crop_range), RandomResize(scales, max_size=max_size)])
    return Compose([RandomHorizontalFlip(), RandomSelect(RandomResize(scales, max_size=max_size), cropped), *finish])
