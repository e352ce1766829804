"""COCO-format detection data: images on disk and one json of annotations.

Source: facebookresearch/detr, datasets/coco.py and datasets/__init__.py.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from detr_fast.data.categories import Categories
from detr_fast.data.transforms import Img, can_draw, image_size, make_coco_transforms

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision 0.29 announces that it will go; then PIL decodes everything
    decode_jpeg = None

_JPEG_MAGIC = [0xFF, 0xD8]


class ImageReadError(OSError):
    """An image could not be read. ``path`` and ``image_id`` say which one.

    Both are None when the error comes out of a loader's worker, which carries the message alone.
    """

    def __init__(self, message: str, path: str | None = None, image_id: int | None = None):
        super().__init__(message)
        self.path = path
        self.image_id = image_id

    def __reduce__(self):
        return type(self), (str(self), self.path, self.image_id)


class MissingImageError(ImageReadError, FileNotFoundError):
    """The annotations name an image file that does not exist."""


class CorruptImageError(ImageReadError):
    """An image file is truncated, or is not an image."""


def load_image(path: str | os.PathLike, image_id: int | None = None) -> Image.Image:
    """Reads an image file completely, as RGB. Grey, palette and CMYK images are converted; EXIF rotation is ignored,
    as in the original.

    Raises:
        MissingImageError: no such file.
        CorruptImageError: truncated, not an image, or too large for PIL's limit on decompressed size.
    """
    which = f"image {path}" if image_id is None else f"image {path} (image id {image_id})"
    try:
        with open(path, "rb") as file:
            return Image.open(file).convert("RGB")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise MissingImageError(f"{which} does not exist", str(path), image_id) from error
    except PermissionError as error:
        raise ImageReadError(f"{which} cannot be opened: {error.strerror}", str(path), image_id) from error
    except MemoryError:
        raise
    except Exception as error:  # what a decoder raises on damaged data differs from format to format
        why = "the file is no image" if isinstance(error, UnidentifiedImageError) else error
        raise CorruptImageError(f"{which} cannot be decoded: {why}", str(path), image_id) from error


def load_image_tensor(path: str | os.PathLike, image_id: int | None = None) -> torch.Tensor:
    """As ``load_image``, the same pixels as a uint8 tensor [3, H, W] whose memory is [H, W, 3].

    JPEG files are decoded by torchvision, which gives PIL's pixels in less time; what it does not take, and every other
    format, PIL decodes.

    Raises:
        MissingImageError, CorruptImageError: as ``load_image``.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
        if decode_jpeg is not None and data[:2].tolist() == _JPEG_MAGIC:
            image = decode_jpeg(torch.from_numpy(data), ImageReadMode.UNCHANGED)
            if len(image) in (1, 3):  # grey or RGB; CMYK is converted as PIL does it
                return image.expand(3, -1, -1)
    except (OSError, RuntimeError):
        pass  # PIL has the last word on what cannot be read, and names it
    return torch.from_numpy(np.array(load_image(path, image_id))).permute(2, 0, 1)


def read_annotations(ann_file: str | os.PathLike) -> dict[str, Any]:
    """Reads a COCO json and checks that it has the lists ``images``, ``annotations`` and ``categories``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not json, or one of the lists is missing, malformed or (categories) empty.
    """
    content = read_json(ann_file)
    check_content(content, ann_file)
    return content


def read_json(ann_file: str | os.PathLike) -> dict[str, Any]:
    """Reads a json object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not json, or not an object.
    """
    ann_file = Path(ann_file)
    if not ann_file.is_file():
        raise FileNotFoundError(f"annotation file {ann_file} does not exist")
    try:
        content = json.loads(ann_file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{ann_file} is not valid json: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{ann_file}: expected a COCO json object, got a {type(content).__name__}")
    return content


def check_content(content: dict[str, Any], ann_file: str | os.PathLike) -> None:
    """Raises ValueError, see ``read_annotations``, unless the content of ``ann_file`` has its lists."""
    for key, needed in (("images", ("id", "file_name")), ("annotations", ()), ("categories", ("id",))):
        entries = content.get(key)
        if not isinstance(entries, list):
            raise ValueError(f"{ann_file}: expected a list '{key}', the file has {sorted(content)}")
        for position, entry in enumerate(entries):
            if not isinstance(entry, dict) or any(name not in entry for name in needed):
                raise ValueError(
                    f"{ann_file}: {key}[{position}] must be an object with {list(needed)}, got {entry!r:.200}"
                )
            if needed and not _is_integer(entry["id"]):
                raise ValueError(f"{ann_file}: {key}[{position}] has id {entry['id']!r}; expected an integer")
            if key == "images" and not isinstance(entry["file_name"], str):
                raise ValueError(f"{ann_file}: {key}[{position}] has file_name {entry['file_name']!r}; expected a text")


def annotation_problem(annotation: dict, known_ids: Iterable[int]) -> str | None:
    """What keeps one annotation from being used, or None. ``known_ids``: the category ids there are."""
    which = f"annotation {annotation.get('id')!r}"
    missing = [key for key in ("id", "image_id", "category_id", "bbox") if key not in annotation]
    if missing:
        return f"{which} (image {annotation.get('image_id')!r}) has no {', '.join(missing)}"
    if not _is_integer(annotation["category_id"]) or annotation["category_id"] not in known_ids:
        return (
            f"{which} (image {annotation['image_id']!r}) has unknown category id {annotation['category_id']!r}; "
            f"known ids are {sorted(known_ids)}"
        )
    box = annotation["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(value, Real) for value in box):
        return f"{which} (image {annotation['image_id']!r}) has bbox {box!r}; expected [x, y, width, height]"
    return None


def _is_integer(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


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

    Attributes:
        coco: the ``pycocotools`` object; ids: the images' ids, ascending; categories; class_names: label → name.

    Raises:
        FileNotFoundError: no such folder or json.
        ValueError: a malformed json or annotation, repeated ids, an annotation with an unknown category, or a category
            whose name differs from the one in ``categories``.
        MissingImageError, CorruptImageError: on reading an item.
    """

    _read = staticmethod(read_annotations)

    def __init__(
        self,
        img_folder: str | os.PathLike,
        ann_file: str | os.PathLike,
        transforms: Callable | None,
        return_masks: bool = False,
        *,
        categories: Categories | None = None,
        tensor_images: bool = False,
    ):
        if not Path(img_folder).is_dir():
            raise FileNotFoundError(f"image folder {img_folder} does not exist")
        content = self._read(ann_file)
        if not content["categories"]:
            raise ValueError(f"{ann_file}: there are no categories")
        own = Categories.from_coco(content["categories"])
        self.categories = own if categories is None else categories
        _check_same_names(own, self.categories, ann_file)
        _check_annotations(content, self.categories, ann_file)

        # torchvision's own constructor would read the file again and print.
        super(torchvision.datasets.CocoDetection, self).__init__(img_folder)
        self.coco = COCO()
        self.coco.dataset = content
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco.createIndex()
        self.ids = sorted(self.coco.imgs)
        self.prepare = ConvertCocoPolysToMask(return_masks)
        self._transforms = transforms
        self._load = load_image_tensor if tensor_images else load_image

    @property
    def class_names(self) -> dict[int, str]:
        """label → name."""
        return self.categories.label_names

    def __getitem__(self, index: int):
        image_id = self.ids[index]
        image = self._load(self._path(image_id), image_id)
        annotations = self.coco.imgToAnns.get(image_id, [])
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
        image_id = self.ids[index]
        stated = [self.coco.imgs[image_id].get(name) for name in ("width", "height")]
        if all(_is_integer(side) and side > 0 for side in stated):
            return stated[0], stated[1]
        path = self._path(image_id)
        try:
            with Image.open(path) as image:
                return image.size
        except OSError:
            return load_image(path, image_id).size  # names what is wrong

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

    def _path(self, image_id: int) -> str:
        return os.path.join(self.root, self.coco.imgs[image_id]["file_name"])


def _check_same_names(own: Categories, categories: Categories, ann_file) -> None:
    expected = dict(zip(categories.ids, categories.names, strict=True))
    for category_id, name in zip(own.ids, own.names, strict=True):
        if expected.get(category_id, name) != name:
            raise ValueError(
                f"{ann_file}: category {category_id} is {name!r} here, but {expected[category_id]!r} in the classes "
                "given"
            )


def _check_annotations(content: dict, categories: Categories, ann_file) -> None:
    """Raises ValueError for what cannot be trained on; fills in ``iscrowd`` and ``area`` where they are missing."""
    known_ids = categories.label_of
    for key in ("images", "annotations"):
        seen = set()
        for entry in content[key]:
            if key == "annotations":
                problem = annotation_problem(entry, known_ids)
                if problem is not None:
                    raise ValueError(f"{ann_file}: {problem}")
                # pycocotools needs both.
                entry.setdefault("iscrowd", 0)
                entry.setdefault("area", entry["bbox"][2] * entry["bbox"][3])
            if entry["id"] in seen:
                raise ValueError(f"{ann_file}: id {entry['id']!r} occurs more than once in '{key}'")
            seen.add(entry["id"])


def segmentation_to_mask(segmentation: list | dict, height: int, width: int) -> torch.Tensor:
    """uint8 [height, width], 1 inside, of polygons ([[x, y, x, y, …], …]) or of a run-length encoding."""
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
            result["masks"] = self._masks(objects, height, width)[keep]
        if objects and "keypoints" in objects[0]:
            keypoints = torch.tensor([entry["keypoints"] for entry in objects], dtype=torch.float32)
            result["keypoints"] = keypoints.view(len(objects), -1, 3)[keep]
        return image, result

    @staticmethod
    def _masks(objects: Sequence[dict], height: int, width: int) -> torch.Tensor:
        masks = []
        for entry in objects:
            if "segmentation" not in entry:
                raise ValueError(f"annotation {entry.get('id')!r} has no segmentation, but masks are asked for")
            masks.append(segmentation_to_mask(entry["segmentation"], height, width))
        return torch.stack(masks) if masks else torch.zeros((0, height, width), dtype=torch.uint8)


def build_dataset(image_set: str, args, *, categories: Categories | None = None, uint8: bool = False):
    """The training or validation set that the command line names: a ``CocoDetection``.

    With ``args.dataset_file`` "coco_panoptic" it is a ``CocoPanoptic`` with classes of its own, see ``build_panoptic``;
    with "lines" a ``LineDetection``, whose ``coco_path`` has ``annotations/lines_{train,val}2017.json``.

    Args:
        image_set: "train" or "val".
        args: namespace with either ``coco_path``, a directory in COCO's layout (``train2017/``, ``val2017/``,
            ``annotations/instances_{train,val}2017.json``; category ids are the labels), or the four of own data,
            ``train_ann``, ``train_images``, ``val_ann``, ``val_images`` (labels are 0..K-1 in the order of the ids of
            ``train_ann``). Optional: ``masks``; ``image_size``, the short side at full size in pixels (default 800);
            ``max_size``, the longest side (default 1333, scaled with ``image_size``).
        categories: the classes, for instance a checkpoint's. None: from the annotations.
        uint8: see ``make_coco_transforms``. Training images are then also decoded and resized as uint8 tensors (see
            ``CocoDetection``); validation images keep PIL's pixels, on which the original's results stand.

    Raises:
        ValueError: an unknown ``image_set`` or ``dataset_file``, no data named, both ways at once, one half of a pair
            missing, or no images in the annotations.
        FileNotFoundError: what is named does not exist; the message lists everything that is missing.
    """
    dataset_file = getattr(args, "dataset_file", "coco")
    if dataset_file == "coco_panoptic":
        from detr_fast.data.panoptic import build_panoptic  # which builds on this module

        return build_panoptic(image_set, args, uint8=uint8)
    if dataset_file == "lines":
        from detr_fast.data.lines import build_lines  # which builds on this module

        return build_lines(image_set, args, categories=categories, uint8=uint8)
    if dataset_file != "coco":
        raise ValueError(f"dataset_file {dataset_file!r} is not supported; expected 'coco', 'coco_panoptic' or 'lines'")
    image_size = getattr(args, "image_size", None)
    transforms = make_coco_transforms(
        image_set, scales=image_size, max_size=getattr(args, "max_size", None), uint8=uint8
    )
    images, annotations = dataset_paths(image_set, args)
    if categories is None and not getattr(args, "coco_path", None):
        source = getattr(args, "train_ann", None) or annotations
        categories = Categories.from_coco(read_annotations(source)["categories"], contiguous=True)
    dataset = CocoDetection(
        images,
        annotations,
        transforms,
        bool(getattr(args, "masks", False)),
        categories=categories,
        tensor_images=uint8 and image_set == "train",
    )
    if not dataset.ids:
        raise ValueError(f"{annotations}: there are no images")
    return dataset


def dataset_paths(image_set: str, args, kind: str = "instances") -> tuple[Path, Path]:
    """(image folder, annotation file) of a set, both of which exist; ``coco_path`` has ``{kind}_train2017.json``."""
    root = getattr(args, "coco_path", None)
    own = {name: getattr(args, name, None) for name in ("train_ann", "train_images", "val_ann", "val_images")}
    if root and any(own.values()):
        raise ValueError(f"give either coco_path or {', '.join(own)}, not both")
    if root:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"coco_path {root} is not a directory")
        images, annotations = root / f"{image_set}2017", root / "annotations" / f"{kind}_{image_set}2017.json"
    else:
        images, annotations = own[f"{image_set}_images"], own[f"{image_set}_ann"]
        absent = [name for name in (f"{image_set}_ann", f"{image_set}_images") if not own[name]]
        if absent:
            raise ValueError(f"no {image_set} data: {' and '.join(absent)} not given; give them, or coco_path")
        images, annotations = Path(images), Path(annotations)
    missing = []
    if not images.is_dir():
        missing.append(f"image folder {images}")
    if not annotations.is_file():
        missing.append(f"annotation file {annotations}")
    if missing:
        layout = (
            f"; {root} should hold {{train,val}}2017/ and annotations/{kind}_{{train,val}}2017.json" if root else ""
        )
        raise FileNotFoundError(f"{image_set} data is incomplete, missing: {', '.join(missing)}{layout}")
    return images, annotations


def get_coco_api_from_dataset(dataset) -> COCO | None:
    """The ``pycocotools`` object of a dataset, found through wrappers with a ``.dataset``, or None."""
    while not isinstance(dataset, torchvision.datasets.CocoDetection):
        if not hasattr(dataset, "dataset"):
            return None
        dataset = dataset.dataset
    return dataset.coco
