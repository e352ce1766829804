"""COCO-format detection data: images on disk and one json of annotations.

Source: facebookresearch/detr, datasets/coco.py and datasets/__init__.py.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torchvision
from PIL import Image

from detr_fast.data import columns
from detr_fast.data.annotations import read_annotations
from detr_fast.data.categories import Categories
from detr_fast.data.columns import OddAnnotations
from detr_fast.data.images import header_sizes, load_image, load_image_tensor, missing_files
from detr_fast.data.store import SAMPLED, Listed, Store, open_store
from detr_fast.data.transforms import Img, can_draw, image_size
from detr_fast.data.validation import Findings, stated_size, validate
from detr_fast.distributed import say

if TYPE_CHECKING:
    from pycocotools.coco import COCO


class CocoDetection(torchvision.datasets.CocoDetection):
    """Images and targets of a COCO json, as the original gives them.

    An item is (image, target). Without transforms the image is a PIL image in RGB. target, with N objects:
    ``boxes`` float32 [N, 4] (x0, y0, x1, y1 in pixels; after ``Normalize`` cx, cy, w, h in 0..1), ``labels`` int64 [N],
    ``image_id`` int64 [1], ``area`` float32 [N] and ``iscrowd`` int64 [N], ``orig_size`` and ``size`` int64 [2]
    (height, width of the file and of the image as it is returned), ``masks`` [N, H, W] with ``return_masks``,
    ``keypoints`` float32 [N, K, 3] where the annotations have them (in pixels of the file, whatever the transforms do).

    Crowd regions are left out, boxes are clamped to the image and kept only if something of them is left. An image
    without objects is kept, with an empty target of the same dtypes.

    Args:
        img_folder: folder to which the json's ``file_name`` are relative.
        ann_file: COCO json.
        transforms: called as ``transforms(image, target)``; see ``make_coco_transforms``. Or None.
        return_masks: decode segmentations.
        categories: the classes that labels refer to, for instance the training set's or a checkpoint's. None: those of
            ``ann_file``, ids used as labels.
        tensor_images: images are uint8 tensors [3, H, W] from the start, in place of PIL images: decoding and resizing
            take a third of the time (see ``detr_fast.data.transforms`` for how close the pixels are).
        cache_dir: where the columns of a large json are kept, see ``detr_fast.data.store``.

    Attributes:
        coco: the ``pycocotools`` object, made of the json when it is first asked for; ids: the images' ids, ascending;
        categories; class_names: label → name.

    Raises:
        FileNotFoundError: no such folder or json.
        ValueError: a malformed json or annotation, repeated ids, an annotation with an unknown category, or a category
            whose name differs from the one in ``categories``.
        MissingImageError, CorruptImageError: on reading an item.
    """

    _read = staticmethod(read_annotations)
    _lines = False

    def __init__(
        self,
        img_folder: str | os.PathLike,
        ann_file: str | os.PathLike,
        transforms: Callable | None,
        return_masks: bool = False,
        *,
        categories: Categories | None = None,
        tensor_images: bool = False,
        cache_dir: str | os.PathLike | None = None,
    ):
        if not Path(img_folder).is_dir():
            raise FileNotFoundError(f"image folder {img_folder} does not exist")
        # torchvision's own constructor would read the file again and print.
        super(torchvision.datasets.CocoDetection, self).__init__(img_folder)
        self.ann_file = ann_file
        self.return_masks = return_masks
        self._store: Store
        try:
            self._store, self.categories, found = open_store(
                ann_file, img_folder, lines=self._lines, categories=categories, masks=return_masks, cache_dir=cache_dir
            )
        except OddAnnotations:
            content, self.categories, found = self._read_whole(categories)
            self._store = Listed(content)
        for line in found.lines(ann_file):
            say(line)
        self.prepare = ConvertCocoPolysToMask(return_masks)
        self._transforms = transforms
        self._load = load_image_tensor if tensor_images else load_image

    def _read_whole(self, categories: Categories | None) -> tuple[dict[str, Any], Categories, Findings]:
        """The json's content, judged and mended."""
        content = self._read(self.ann_file)
        if not content["categories"]:
            raise ValueError(f"{self.ann_file}: there are no categories")
        categories = Categories.from_coco(content["categories"]) if categories is None else categories
        sizes = _file_sizes(self.root, content["images"])
        found = validate(content, categories, sizes, masks=self.return_masks, lines=self._lines)
        found.raise_errors(self.ann_file)
        for image in content["images"]:
            if image["id"] in sizes:
                image["width"], image["height"] = sizes[image["id"]]
        return content, categories, found

    @cached_property
    def coco(self) -> COCO:
        try:
            from pycocotools.coco import COCO
        except ImportError as error:
            raise ImportError("dataset.coco is pycocotools' object (pip install pycocotools)") from error
        coco = COCO()
        is_held = isinstance(self._store, Listed)
        coco.dataset = self._store.content if is_held else self._read_whole(self.categories)[0]
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
        return coco

    @cached_property
    def ids(self) -> list[int]:
        return self._store.image_ids()

    def __getstate__(self) -> dict[str, Any]:
        # Another process makes these itself, if it needs them.
        return {name: value for name, value in self.__dict__.items() if name not in ("coco", "ids")}

    def __len__(self) -> int:
        return len(self._store)

    @property
    def img_folder(self) -> str:
        """The folder of the images."""
        return self.root

    @property
    def class_names(self) -> dict[int, str]:
        """label → name."""
        return self.categories.label_names

    def __getitem__(self, index: int):
        image_id = self._store.image_id(index)
        image = self._load(self._path(index), image_id, size=self._store.size(index))
        annotations = self._store.annotations(index, segmentations=getattr(self.prepare, "return_masks", True))
        image, target = self.prepare(image, {"image_id": image_id, "annotations": annotations})
        if self.categories.contiguous:
            labels = [self.categories.label_of[i] for i in target["labels"].tolist()]
            target["labels"] = torch.tensor(labels, dtype=torch.int64)
        if self._transforms is not None:
            image, target = self._transforms(image, target)
        return image, target

    def image_size(self, index: int) -> tuple[int, int]:
        """(width, height) of an image in pixels as the annotations state it; where they do not, from the file's header.

        Raises:
            MissingImageError, CorruptImageError: the file has to be asked and cannot be read.
        """
        stated = self._store.size(index)
        if stated is not None:
            return stated
        path = self._path(index)
        try:
            with Image.open(path) as image:
                return image.size
        except OSError:
            return load_image(path, self._store.image_id(index)).size  # names what is wrong

    def file_name(self, index: int) -> str:
        """The json's ``file_name`` of an image."""
        return self._store.file_name(index)

    def named(self) -> Iterator[dict[str, Any]]:
        """Every image's "id" and "file_name"."""
        for index in range(len(self)):
            yield {"id": self._store.image_id(index), "file_name": self._store.file_name(index)}

    @property
    def can_plan(self) -> bool:
        """Whether ``planned_size`` works: the transforms draw from an image's size alone."""
        return can_draw(self._transforms)

    def planned_size(self, index: int) -> tuple[int, int]:
        """(height, width) that ``self[index]`` would have, were it asked for with the random generators as they are.

        Nothing is read: the transforms' draws are made from the annotated size. They advance the generators.
        """
        size = self.image_size(index)
        width, height = size if self._transforms is None else self._transforms.draw(size)[1]
        return height, width

    def check_files(self) -> None:
        """Lists the folders of the images.

        Raises:
            MissingImageError: one of the files does not exist.
        """
        paths = {self._path(index): index for index in range(len(self))}
        for path in missing_files(paths):
            # Names what is wrong, and the file that is probably meant.
            load_image(path, self._store.image_id(paths[path]))

    def _path(self, index: int) -> str:
        return os.path.join(self.root, self._store.file_name(index))


def read_categories(ann_file: str | os.PathLike) -> list[dict]:
    """The list ``categories`` of a COCO json; errors as of `read_annotations`, and ValueError where there are none."""
    try:
        categories = columns.read_categories(ann_file)
    except (OddAnnotations, OSError):
        categories = read_annotations(ann_file)["categories"]
    if not categories:
        raise ValueError(f"{ann_file}: there are no categories")
    return categories


def _file_sizes(folder: str | os.PathLike, images: Sequence[dict]) -> dict[int, tuple[int, int]]:
    """Image id → (width, height), from the headers of the files whose size the json does not state, and of a sample of
    the others; of all, where one of the sample differs from the json."""
    stated = {image["id"]: stated_size(image) for image in images}
    paths = {image["id"]: os.path.join(folder, image["file_name"]) for image in images}
    step = -(-len(images) // SAMPLED) or 1
    first = {i: path for n, (i, path) in enumerate(paths.items()) if stated[i] is None or n % step == 0}
    sizes = header_sizes(first, stated)
    if any(stated[i] not in (None, size) for i, size in sizes.items()):
        sizes |= header_sizes({i: path for i, path in paths.items() if i not in first}, stated)
    return sizes


def segmentation_to_mask(segmentation: list | dict, height: int, width: int) -> torch.Tensor:
    """uint8 [height, width], 1 inside, of polygons ([[x, y, x, y, …], …]) or of a run-length encoding.

    Raises:
        ImportError: pycocotools, whose rasteriser this is, is not installed.
    """
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise ImportError("masks need pycocotools (pip install pycocotools)") from error
    if isinstance(segmentation, dict):
        compressed = isinstance(segmentation["counts"], (str, bytes))
        rles = [segmentation if compressed else coco_mask.frPyObjects(segmentation, height, width)]
    elif segmentation:
        rles = coco_mask.frPyObjects(segmentation, height, width)
    else:
        return torch.zeros((height, width), dtype=torch.uint8)
    return torch.from_numpy(np.ascontiguousarray(coco_mask.decode(coco_mask.merge(rles))))


class ConvertCocoPolysToMask:
    """Turns (image, {"image_id", "annotations"}) into (image, target); see ``CocoDetection``."""

    def __init__(self, return_masks: bool = False):
        self.return_masks = return_masks

    def __call__(self, image: Img, target: dict[str, Any]) -> tuple[Img, dict[str, torch.Tensor]]:
        width, height = image_size(image)
        objects = [entry for entry in target["annotations"] if not entry.get("iscrowd", 0)]

        boxes = torch.tensor([entry["bbox"] for entry in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes[:, 0::2].clamp_(min=0, max=width)
        boxes[:, 1::2].clamp_(min=0, max=height)
        keep = (boxes[:, 3] > boxes[:, 1]) & (boxes[:, 2] > boxes[:, 0])

        size = torch.tensor([height, width])
        result = {
            "boxes": boxes[keep],
            "labels": torch.tensor([entry["category_id"] for entry in objects], dtype=torch.int64)[keep],
            "image_id": torch.tensor([target["image_id"]]),
            "area": torch.tensor([entry["area"] for entry in objects], dtype=torch.float32)[keep],
            "iscrowd": torch.zeros(int(keep.sum()), dtype=torch.int64),
            "orig_size": size,
            "size": size.clone(),
        }
        if self.return_masks:
            result["masks"] = self._masks(objects, keep, height, width)
        count = max((len(entry["keypoints"]) for entry in objects if "keypoints" in entry), default=None)
        if count is not None:
            # Objects without keypoints, or with fewer than another has, get invisible ones.
            rows = [entry.get("keypoints", []) for entry in objects]
            keypoints = torch.tensor([row + [0] * (count - len(row)) for row in rows], dtype=torch.float32)
            result["keypoints"] = keypoints.view(len(objects), count // 3, 3)[keep]
        return image, result

    @staticmethod
    def _masks(objects: Sequence[dict], keep: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """uint8 [N, height, width] of those objects that ``keep`` (bool) names, each written where it stays."""
        for entry in objects:
            if "segmentation" not in entry:
                raise ValueError(f"annotation {entry.get('id')!r} has no segmentation, but masks are asked for")
        kept = [objects[row] for row in keep.nonzero().flatten().tolist()]
        masks = torch.empty((len(kept), height, width), dtype=torch.uint8)
        for mask, entry in zip(masks, kept, strict=True):
            mask.copy_(segmentation_to_mask(entry["segmentation"], height, width))
        return masks


def get_coco_api_from_dataset(dataset) -> COCO | None:
    """The ``pycocotools`` object of a dataset, found through wrappers with a ``.dataset``, or None."""
    while not isinstance(dataset, torchvision.datasets.CocoDetection):
        if not hasattr(dataset, "dataset"):
            return None
        dataset = dataset.dataset
    return dataset.coco
