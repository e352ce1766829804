"""COCO-format panoptic data: every pixel belongs to a segment, of things or of stuff.

Source: facebookresearch/detr, datasets/coco_panoptic.py; the COCO panoptic format.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from detr_fast.data.annotations import read_panoptic
from detr_fast.data.categories import Categories
from detr_fast.data.images import load_image, load_image_tensor, load_segment_ids
from detr_fast.data.segments import open_segments
from detr_fast.data.transforms import can_draw
from detr_fast.geometry.boxes import masks_to_boxes


class CocoPanoptic(Dataset):
    """Images and segments of a COCO panoptic json, as the original gives them.

    An item is (image, target). Without transforms the image is a PIL image in RGB. target, with N segments: ``masks``
    uint8 [N, H, W] with ``return_masks`` (bool after a resize), ``labels`` int64 [N] (category ids), ``boxes`` float32
    [N, 4] (first and last column and row of the mask: x0, y0, x1, y1 in pixels; after ``Normalize`` cx, cy, w, h in
    0..1), ``area`` and ``iscrowd`` [N], ``image_id`` int64 [1], ``orig_size`` and ``size`` int64 [2] (height, width of
    the file and of the image as it is returned). Crowd segments are kept. A json without annotations (a test set) gives
    targets of the last three alone.

    Args:
        img_folder: folder of the images.
        ann_folder: folder of the PNG files with the segments' ids.
        ann_file: COCO panoptic json.
        transforms: called as ``transforms(image, target)``; see ``make_coco_transforms``. Or None.
        return_masks: put the masks into the targets.
        tensor_images: decode to uint8 tensors instead of PIL images, see ``CocoDetection``.
        cache_dir: where the columns of a large json are kept, see ``detr_fast.data.store``.

    Attributes:
        store: the annotations as columns, a ``MappedSegments``. coco: the json as a dict, its images and annotations in
        the order of the image ids, read when it is first asked for. categories: things and stuff; thing_classes: the
        labels of things; ann_folder, ann_file, img_folder: as given.

    Raises:
        FileNotFoundError: no such folder or json.
        ValueError: a malformed json; images and annotations that do not belong together; on reading an item, a PNG
            without one of its segments or of another size than the image.
        MissingImageError, CorruptImageError: on reading an item.
    """

    def __init__(
        self,
        img_folder: str | os.PathLike,
        ann_folder: str | os.PathLike,
        ann_file: str | os.PathLike,
        transforms: Callable | None = None,
        return_masks: bool = True,
        *,
        tensor_images: bool = False,
        cache_dir: str | os.PathLike | None = None,
    ):
        for folder in (img_folder, ann_folder):
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"folder {folder} does not exist")
        self.store = open_segments(ann_file, cache_dir=cache_dir)
        categories = self.store.meta["categories"]
        self.categories = Categories.from_coco(categories)
        self.thing_classes = [c["id"] for c in categories if c.get("isthing", 1)]
        self.img_folder, self.ann_folder, self.ann_file = img_folder, ann_folder, ann_file
        self.transforms = transforms
        self.return_masks = return_masks
        self._load = load_image_tensor if tensor_images else load_image

    @cached_property
    def coco(self) -> dict[str, Any]:
        return read_panoptic(self.ann_file)

    def __getstate__(self) -> dict[str, Any]:
        # Another process reads it itself, if it needs it.
        return {name: value for name, value in self.__dict__.items() if name != "coco"}

    def __len__(self) -> int:
        return len(self.store)

    def _at(self, index: int) -> int:
        """As a list's index: from the end where it is negative. Raises IndexError where there is no such image."""
        return range(len(self))[index]

    @property
    def class_names(self) -> dict[int, str]:
        """label → name."""
        return self.categories.label_names

    def __getitem__(self, index: int):
        index = self._at(index)
        image_id = self.store.image_id(index)
        image = self._load(os.path.join(self.img_folder, self.store.file_name(index)), image_id)
        width, height = image.size if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])
        size = torch.tensor([height, width])
        target = {"image_id": torch.tensor([image_id])}
        if self.store.has_annotations:
            target.update(self._segments(index, height, width))
        target.update(size=size, orig_size=size.clone())
        if self.transforms is not None:
            image, target = self.transforms(image, target)
        return image, target

    def _segments(self, index: int, height: int, width: int) -> dict[str, torch.Tensor]:
        path = os.path.join(self.ann_folder, self.store.png_name(index))
        pixels = load_segment_ids(path)
        if pixels.shape != (height, width):
            raise ValueError(f"{path} has {pixels.shape[1]}x{pixels.shape[0]} pixels, its image {width}x{height}")
        segments = self.store.segments(index)
        ids = segments["id"]
        masks = torch.from_numpy(pixels == ids[:, None, None])
        absent = (~masks.flatten(1).any(dim=1)).nonzero().flatten().tolist()
        if absent:
            raise ValueError(f"{path} has no pixel of segment {ids[absent[0]]}, which {self.ann_file} lists")
        target = {"masks": masks.to(torch.uint8)} if self.return_masks else {}
        target["labels"] = torch.from_numpy(segments["category_id"])
        target["boxes"] = masks_to_boxes(masks)
        for name in ("iscrowd", "area"):
            target[name] = torch.from_numpy(segments[name])
        return target

    def file_name(self, index: int) -> str:
        """The json's ``file_name`` of an image."""
        return self.store.file_name(self._at(index))

    def named(self) -> Iterator[dict[str, Any]]:
        """Every image's "id" and "file_name"."""
        for index in range(len(self)):
            yield {"id": self.store.image_id(index), "file_name": self.store.file_name(index)}

    def named_segments(self) -> Iterator[dict[str, Any]]:
        """The "id" of every image and the "file_name" of its PNG; nothing where there are no annotations."""
        for index in range(len(self) if self.store.has_annotations else 0):
            yield {"id": self.store.image_id(index), "file_name": self.store.png_name(index)}

    def get_height_and_width(self, index: int) -> tuple[int, int]:
        """(height, width) of an image in pixels, from the json."""
        return self.image_size(index)[::-1]

    def image_size(self, index: int) -> tuple[int, int]:
        """(width, height) of an image in pixels, from the json."""
        width, height = self.store.sizes[self._at(index)].tolist()
        return width, height

    @property
    def can_plan(self) -> bool:
        """Whether ``planned_size`` works: the transforms draw from an image's size alone."""
        return can_draw(self.transforms)

    def planned_size(self, index: int) -> tuple[int, int]:
        """(height, width) that ``self[index]`` would have, see ``CocoDetection.planned_size``."""
        size = self.image_size(index)
        width, height = size if self.transforms is None else self.transforms.draw(size)[1]
        return height, width
