"""COCO-format panoptic data: every pixel belongs to a segment, of things or of stuff.

Source: facebookresearch/detr, datasets/coco_panoptic.py; the COCO panoptic format.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from detr_fast.data.annotations import read_panoptic
from detr_fast.data.categories import Categories
from detr_fast.data.images import load_image, load_image_tensor, load_segment_ids
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

    Attributes:
        coco: the json as a dict, its images and annotations in the order of the image ids. categories: things and
        stuff; thing_classes: the labels of things; ann_folder, ann_file, img_folder: as given.

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
    ):
        for folder in (img_folder, ann_folder):
            if not Path(folder).is_dir():
                raise FileNotFoundError(f"folder {folder} does not exist")
        self.coco = read_panoptic(ann_file)
        self.categories = Categories.from_coco(self.coco["categories"])
        self.thing_classes = [c["id"] for c in self.coco["categories"] if c.get("isthing", 1)]
        self.img_folder, self.ann_folder, self.ann_file = img_folder, ann_folder, ann_file
        self.transforms = transforms
        self.return_masks = return_masks
        self._load = load_image_tensor if tensor_images else load_image

    def __len__(self) -> int:
        return len(self.coco["images"])

    @property
    def class_names(self) -> dict[int, str]:
        """label → name."""
        return self.categories.label_names

    def __getitem__(self, index: int):
        entry = self.coco["images"][index]
        image = self._load(os.path.join(self.img_folder, entry["file_name"]), entry["id"])
        width, height = image.size if isinstance(image, Image.Image) else (image.shape[-1], image.shape[-2])
        size = torch.tensor([height, width])
        target = {"image_id": torch.tensor([entry["id"]])}
        if "annotations" in self.coco:
            target.update(self._segments(self.coco["annotations"][index], height, width))
        target.update(size=size, orig_size=size.clone())
        if self.transforms is not None:
            image, target = self.transforms(image, target)
        return image, target

    def _segments(self, annotation: dict, height: int, width: int) -> dict[str, torch.Tensor]:
        path = os.path.join(self.ann_folder, annotation["file_name"])
        pixels = load_segment_ids(path)
        if pixels.shape != (height, width):
            raise ValueError(f"{path} has {pixels.shape[1]}x{pixels.shape[0]} pixels, its image {width}x{height}")
        segments = annotation["segments_info"]
        ids = np.array([segment["id"] for segment in segments], dtype=np.int64)
        masks = torch.from_numpy(pixels == ids[:, None, None])
        absent = (~masks.flatten(1).any(dim=1)).nonzero().flatten().tolist()
        if absent:
            raise ValueError(f"{path} has no pixel of segment {ids[absent[0]]}, which {self.ann_file} lists")
        target = {"masks": masks.to(torch.uint8)} if self.return_masks else {}
        target["labels"] = torch.tensor([segment["category_id"] for segment in segments], dtype=torch.int64)
        target["boxes"] = masks_to_boxes(masks)
        for name in ("iscrowd", "area"):
            target[name] = torch.tensor([segment[name] for segment in segments], dtype=torch.int64)
        return target

    def file_name(self, index: int) -> str:
        """The json's ``file_name`` of an image."""
        return self.coco["images"][index]["file_name"]

    def get_height_and_width(self, index: int) -> tuple[int, int]:
        """(height, width) of an image in pixels, from the json."""
        entry = self.coco["images"][index]
        return entry["height"], entry["width"]

    def image_size(self, index: int) -> tuple[int, int]:
        """(width, height) of an image in pixels, from the json."""
        return self.get_height_and_width(index)[::-1]

    @property
    def can_plan(self) -> bool:
        """Whether ``planned_size`` works: the transforms draw from an image's size alone."""
        return can_draw(self.transforms)

    def planned_size(self, index: int) -> tuple[int, int]:
        """(height, width) that ``self[index]`` would have, see ``CocoDetection.planned_size``."""
        size = self.image_size(index)
        width, height = size if self.transforms is None else self.transforms.draw(size)[1]
        return height, width
