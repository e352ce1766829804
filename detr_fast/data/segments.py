"""The annotations of a panoptic json as columns, kept and shared as those of boxes are (``detr_fast.data.store``)."""

from __future__ import annotations

import os
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np

from detr_fast.data.annotations import check_panoptic_content, read_panoptic
from detr_fast.data.columns import (
    Columns,
    OddAnnotations,
    check_names,
    converted,
    encoded,
    ends_of,
    integers,
    layout,
    only,
    read_images,
    reading,
    require,
)
from detr_fast.data.store import MappedImages, opened

# ``read_panoptic`` checks every key wherever it stands; where these are not expected, they are left to it.
_ODD_IN_IMAGES = frozenset({"image_id", "segments_info"})
_ODD_IN_ANNOTATIONS = frozenset({"width", "height"})


class MappedSegments(MappedImages):
    """The columns of a panoptic json; an index counts the images in the order of their ids.

    Beside the images' arrays, where there are annotations, for N images and M segments: "png_names" uint8 and
    "png_name_ends" int64 [N + 1], "offsets" int64 [N + 1] (an image's first segment), "ids" int32, "category_ids" and
    "areas" int64, and "crowd" uint8 [M]. ``meta`` has "categories", the list as it stands in the json.
    """

    @property
    def has_annotations(self) -> bool:
        """Whether the json has the list, be it an empty one."""
        return "offsets" in self.arrays

    def png_name(self, index: int) -> str:
        """The ``file_name`` of an image's annotation."""
        return self._text("png_name", index)

    def segments(self, index: int) -> dict[str, np.ndarray]:
        """ "id", "category_id", "iscrowd" and "area" of an image's segments, int64 [N] each, copied."""
        start, end = self.arrays["offsets"][index : index + 2].tolist()
        columns = {"id": "ids", "category_id": "category_ids", "iscrowd": "crowd", "area": "areas"}
        found = {key: self.arrays[name][start:end].astype(np.int64) for key, name in columns.items()}
        self._release()
        return found

    def annotation(self, index: int) -> dict[str, Any]:
        """An image's annotation as in the json: the fields that are read."""
        segments = {key: values.tolist() for key, values in self.segments(index).items()}
        rows = zip(*segments.values(), strict=True)
        return {
            "image_id": self.image_id(index),
            "file_name": self.png_name(index),
            "segments_info": [dict(zip(segments, row, strict=True)) for row in rows],
        }


def open_segments(ann_file: str | os.PathLike, *, cache_dir: str | os.PathLike | None = None) -> MappedSegments:
    """The columns of a panoptic json, from the cache or from the file itself.

    Args:
        ann_file: the json.
        cache_dir: where the cache file is kept, see ``open_store``.

    Raises:
        FileNotFoundError, ValueError: see ``read_panoptic``.
    """
    try:
        return opened(
            ann_file,
            MappedSegments,
            "panoptic",
            read=lambda path, _: read_segments(path),
            judged=lambda _: None,
            cache_dir=cache_dir,
        )[0]
    except OddAnnotations:
        # Either an error, which this names, or something that is allowed and rare.
        columns = columns_of(read_panoptic(ann_file))
        return MappedSegments(columns.arrays, columns.meta, os.path.abspath(ann_file))


def read_segments(path: str | os.PathLike) -> Columns:
    """Reads a panoptic json, a few megabytes at a time.

    Raises:
        OddAnnotations: see there.
        OSError: the file cannot be read.
    """
    with reading():
        pieces, rest = layout(path)
        check_panoptic_content({"images": [], **rest}, path)
        arrays, _ = read_images(path, pieces["images"], _size)
        del arrays["image_positions"]
        columns = Columns(arrays, {"categories": rest["categories"]})
        if "annotations" in pieces:
            _add(columns, list(converted(path, pieces["annotations"], _piece)))
    return columns


def columns_of(content: dict[str, Any]) -> Columns:
    """The columns of what ``read_panoptic`` has read."""
    images = content["images"]
    sizes = [(image["width"], image["height"]) for image in images]
    try:
        stated = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    except OverflowError:  # Python's integers have no end
        stated = np.array(sizes, dtype=object)
    names, lengths = encoded([image["file_name"] for image in images])
    ids = np.array([image["id"] for image in images], dtype=np.int64)
    arrays = {"image_ids": ids, "stated": stated, "names": names, "name_ends": ends_of(lengths)}
    columns = Columns(arrays, {"categories": content["categories"]})
    if "annotations" in content:
        _add(columns, [_converted(content["annotations"])])
    return columns


def _size(image: dict) -> tuple[int, int]:
    """(width, height)."""
    width, height = image["width"], image["height"]
    if type(width) is not int or type(height) is not int or min(width, height) < 1:
        raise OddAnnotations("width or height")
    if not _ODD_IN_IMAGES.isdisjoint(image):
        raise OddAnnotations("an annotation's key in an image")
    return width, height


def _piece(annotations: list[dict]) -> dict[str, np.ndarray]:
    found = _converted(annotations)
    if not all(map(_ODD_IN_ANNOTATIONS.isdisjoint, annotations)):
        raise OddAnnotations("an image's key in an annotation")
    return found


def _converted(annotations: list[dict]) -> dict[str, np.ndarray]:
    """The columns of some annotations, by the rules of ``read_panoptic``."""
    fields = map(itemgetter("image_id", "file_name", "segments_info"), annotations)
    image_ids, names, listed = zip(*fields, strict=True) if annotations else ((), (), ())
    check_names(names)
    only(listed, list)
    png_names, name_lengths = encoded(names)
    segments = map(itemgetter("id", "category_id", "iscrowd", "area"), chain.from_iterable(listed))
    ids, category_ids, crowd, areas = tuple(zip(*segments, strict=True)) or ((), (), (), ())
    only(areas, int, float)
    if not set(crowd) <= {0, 1} or min(areas, default=0) < 0:
        raise OddAnnotations("iscrowd or area")
    found = {
        "image_ids": integers(image_ids),
        "png_names": png_names,
        "name_lengths": name_lengths,
        "counts": np.array(list(map(len, listed)), dtype=np.int64),
        "ids": integers(ids),
        "category_ids": integers(category_ids),
        "areas": np.array(list(map(int, areas)), dtype=np.int64),
        "crowd": np.array(crowd, dtype=np.uint8),
    }
    require((found["ids"] >= 0) & (found["ids"] < 1 << 24))
    found["ids"] = found["ids"].astype(np.int32)
    return found


def _add(columns: Columns, parts: list[dict[str, np.ndarray]]) -> None:
    """Adds the arrays of all annotations, in the order of the images."""
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(found["image_ids"], kind="stable")
    if not np.array_equal(found["image_ids"][order], columns.arrays["image_ids"]):
        raise OddAnnotations("expected one annotation for each image")
    known = [category["id"] for category in columns.meta["categories"]]
    require(np.isin(found["category_ids"], known))
    letters, rows = _moved(found["name_lengths"], order), _moved(found["counts"], order)
    columns.arrays |= {
        "png_names": found["png_names"][letters],
        "png_name_ends": ends_of(found["name_lengths"][order]),
        "offsets": ends_of(found["counts"][order]),
        **{name: found[name][rows] for name in ("ids", "category_ids", "areas", "crowd")},
    }


def _moved(lengths: np.ndarray, order: np.ndarray) -> np.ndarray:
    """int64: where the elements of parts stand that have these lengths [N], if the parts are put in another order."""
    starts, taken = np.cumsum(lengths) - lengths, lengths[order]
    return np.arange(taken.sum()) + np.repeat(starts[order] - (np.cumsum(taken) - taken), taken)
