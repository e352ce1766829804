"""COCO-format panoptic data: every pixel belongs to a segment, of things or of stuff.

Source: facebookresearch/detr, datasets/coco_panoptic.py; the COCO panoptic format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from detr_fast.data.categories import Categories
from detr_fast.data.coco import CorruptImageError, MissingImageError, load_image, load_image_tensor
from detr_fast.data.transforms import can_draw, make_coco_transforms
from detr_fast.geometry.boxes import masks_to_boxes
from detr_fast.geometry.segment_ids import rgb2id


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


def load_segment_ids(path: str | os.PathLike) -> np.ndarray:
    """int64 [H, W]: the segment id of every pixel of a panoptic PNG.

    Raises:
        MissingImageError: no such file. CorruptImageError: it cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            return rgb2id(np.asarray(file.convert("RGB")))
    except FileNotFoundError as error:
        raise MissingImageError(f"segments {path} do not exist", str(path)) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise CorruptImageError(f"segments {path} cannot be decoded: {error}", str(path)) from error


def read_panoptic(ann_file: str | os.PathLike) -> dict:
    """Reads a COCO panoptic json, checks it, and orders images and annotations by image id.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not json, a list or key is missing, or an image has no annotation or more than one.
    """
    ann_file = Path(ann_file)
    if not ann_file.is_file():
        raise FileNotFoundError(f"annotation file {ann_file} does not exist")
    try:
        content = json.loads(ann_file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{ann_file} is not valid json: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{ann_file}: expected a COCO panoptic json object, got a {type(content).__name__}")
    needed = {"images": ("id", "file_name", "height", "width"), "categories": ("id",)}
    if "annotations" in content:
        needed["annotations"] = ("image_id", "file_name", "segments_info")
    for key, names in needed.items():
        if not isinstance(content.get(key), list):
            raise ValueError(f"{ann_file}: expected a list '{key}', the file has {sorted(content)}")
        for position, entry in enumerate(content[key]):
            if not isinstance(entry, dict) or any(name not in entry for name in names):
                raise ValueError(f"{ann_file}: {key}[{position}] must be an object with {list(names)}")
    content["images"] = sorted(content["images"], key=lambda image: image["id"])
    if "annotations" not in content:
        return content
    content["annotations"] = sorted(content["annotations"], key=lambda annotation: annotation["image_id"])
    ids = [image["id"] for image in content["images"]]
    annotated = [annotation["image_id"] for annotation in content["annotations"]]
    if len(set(ids)) < len(ids) or ids != annotated:
        odd = sorted(set(ids) ^ set(annotated)) or sorted(ids)
        raise ValueError(
            f"{ann_file}: expected one annotation for each image, got {len(annotated)} for {len(ids)} images (see "
            f"image id {odd[0]})"
        )
    known = {category["id"] for category in content["categories"]}
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            missing = [name for name in ("id", "category_id", "iscrowd", "area") if name not in segment]
            if missing or segment["category_id"] not in known:
                what = f"has no {', '.join(missing)}" if missing else f"is of unknown category {segment['category_id']}"
                raise ValueError(f"{ann_file}: segment {segment.get('id')} of image {annotation['image_id']} {what}")
    return content


def build_panoptic(image_set: str, args, *, uint8: bool = False) -> CocoPanoptic:
    """The panoptic training or validation set that the command line names.

    Args:
        image_set: "train" or "val".
        args: namespace with ``coco_path`` (images in ``train2017/``, ``val2017/``), ``coco_panoptic_path``
            (``annotations/panoptic_{train,val}2017.json``, PNG files in ``panoptic_{train,val}2017/``) and ``masks``;
            optional ``image_size`` and ``max_size``, see ``build_dataset``.
        uint8: see ``make_coco_transforms``; training images are then tensors from the decoder on.

    Raises:
        ValueError: an unknown ``image_set``, or a path that is not given.
        FileNotFoundError: what is named does not exist; the message lists everything that is missing.
    """
    paths = {name: getattr(args, name, None) for name in ("coco_path", "coco_panoptic_path")}
    absent = [name for name, path in paths.items() if not path]
    if absent:
        raise ValueError(f"coco_panoptic data: {' and '.join(absent)} not given")
    transforms = make_coco_transforms(
        image_set,
        scales=getattr(args, "image_size", None),
        max_size=getattr(args, "max_size", None),
        uint8=uint8,
    )
    images = Path(paths["coco_path"]) / f"{image_set}2017"
    folder = Path(paths["coco_panoptic_path"]) / f"panoptic_{image_set}2017"
    ann_file = Path(paths["coco_panoptic_path"]) / "annotations" / f"panoptic_{image_set}2017.json"
    missing = [str(path) for path in (images, folder) if not path.is_dir()]
    missing += [] if ann_file.is_file() else [str(ann_file)]
    if missing:
        raise FileNotFoundError(f"{image_set} data is incomplete, missing: {', '.join(missing)}")
    return CocoPanoptic(
        images,
        folder,
        ann_file,
        transforms,
        bool(getattr(args, "masks", False)),
        tensor_images=uint8 and image_set == "train",
    )
