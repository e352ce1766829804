"""The annotations of a data set: numpy columns that all processes share, in a file beside the json.

A large json is read once (see ``detr_fast.data.columns``). Its columns are kept in a cache file that every process maps
into memory: opening it takes no time, the kernel keeps one copy for all ranks and workers, and as no Python object is
made of what is not asked for, workers copy nothing. The file is used as long as size, time and checksums fit; it is
written under another name and then renamed. Of processes that start together one makes it, and the others wait. It
holds numbers and json, nothing that is executed.

A file with something odd in it is held as Python objects instead, mended by ``detr_fast.data.validation``. Panoptic
jsons, whose columns are kept in the same way, are read by ``detr_fast.data.segments``.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from detr_fast.data.categories import Categories
from detr_fast.data.columns import (
    COMPRESSED,
    NO_SEGMENTATION,
    POLYGONS,
    Columns,
    OddAnnotations,
    entry_at,
    read_columns,
)
from detr_fast.data.images import header_sizes
from detr_fast.data.validation import Findings, compare_categories, judge_boxes, stated_size, warn_of_equal_names

try:
    import fcntl
except ImportError:  # Windows: processes that start together all read the json
    fcntl = None

VERSION = 1
SMALLEST = 8 << 20  # bytes of a json that is worth a cache file
_MAGIC = b"detrfast"
_FOOTER = struct.Struct("<QQI8s")  # where the directory starts, its bytes, its crc32, _MAGIC
_DTYPES = {"uint8", "int32", "int64", "float64"}
_PAGE = 4096
_WHOLE = 1 << 20  # bytes up to which an array's checksum is of all of it; beyond, of pages spread over it
SAMPLED = 1000  # files whose size is compared with the json's before training


T = TypeVar("T")
S = TypeVar("S", bound="MappedImages")


class Store(Protocol):
    """What a data set asks. An index counts the images in the order of their ids."""

    def __len__(self) -> int: ...

    def image_id(self, index: int) -> int: ...

    def image_ids(self) -> list[int]:
        """Of all images, ascending."""
        ...

    def file_name(self, index: int) -> str: ...

    def size(self, index: int) -> tuple[int, int] | None:
        """(width, height) in pixels, None where neither json nor file states it."""
        ...

    def annotations(self, index: int, *, segmentations: bool = True) -> list[dict]:
        """The annotations of an image, as pycocotools has them: the fields that training reads."""
        ...


class Listed:
    """A `Store` of the json's own objects."""

    def __init__(self, content: dict[str, Any]):
        self.content = content
        self._images = sorted(content["images"], key=lambda image: image["id"])
        self._annotations: dict[int, list[dict]] = {image["id"]: [] for image in self._images}
        for entry in content["annotations"]:
            self._annotations[entry["image_id"]].append(entry)

    def __len__(self) -> int:
        return len(self._images)

    def image_id(self, index: int) -> int:
        return self._images[index]["id"]

    def image_ids(self) -> list[int]:
        return [image["id"] for image in self._images]

    def file_name(self, index: int) -> str:
        return self._images[index]["file_name"]

    def size(self, index: int) -> tuple[int, int] | None:
        return stated_size(self._images[index])

    def annotations(self, index: int, *, segmentations: bool = True) -> list[dict]:
        return self._annotations[self._images[index]["id"]]


class MappedImages:
    """The images among the columns of a json; a data set's `Store` has the annotations, too.

    Args:
        arrays, meta: the columns, see `Columns`: of the images "image_ids", "stated", "names" and "name_ends".
        ann_file: the json, from which messages are made.
        cache, key, mapping: the file that the arrays are mapped from, what it was made of, and its map; None: they are
            in memory.
    """

    def __init__(
        self,
        arrays: dict[str, np.ndarray],
        meta: dict[str, Any],
        ann_file: str,
        cache: str | None = None,
        key: dict[str, Any] | None = None,
        mapping: mmap.mmap | None = None,
    ):
        self.arrays, self.meta, self.ann_file = arrays, meta, ann_file
        self.cache, self.key, self.mapping = cache, key, mapping
        self.sizes = arrays["stated"]

    def __reduce__(self):
        # Another process maps the file itself.
        if self.cache is None:
            return _unpickled, (type(self), self.arrays, self.meta, self.ann_file, self.sizes)
        own = None if self.sizes is self.arrays["stated"] else self.sizes
        return _mapped_again, (type(self), self.cache, self.key, self.ann_file, own)

    def __len__(self) -> int:
        return len(self.arrays["image_ids"])

    def image_id(self, index: int) -> int:
        return int(self.arrays["image_ids"][index])

    def image_ids(self) -> list[int]:
        return self.arrays["image_ids"].tolist()

    def file_name(self, index: int) -> str:
        return self._text("name", index)

    def size(self, index: int) -> tuple[int, int] | None:
        width, height = self.sizes[index].tolist()
        return (width, height) if width else None

    def _text(self, column: str, index: int) -> str:
        """One of the texts in ``<column>s``, which end where ``<column>_ends`` says."""
        start, end = self.arrays[f"{column}_ends"][index : index + 2]
        return self.arrays[f"{column}s"][start:end].tobytes().decode(errors="surrogatepass")

    def _release(self) -> None:
        """Lets go of the pages that have been read.

        Else every process would hold, in time, all pages that it has ever looked at: a file system may map megabytes
        for one number. The kernel keeps them.
        """
        if self.mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)


class Mapped(MappedImages):
    """A `Store` of columns, see `Columns`; "polygons" float64 is among the arrays where there are some."""

    def annotations(self, index: int, *, segmentations: bool = True) -> list[dict]:
        entries = self._entries(index, segmentations)
        self._release()
        return entries

    def _entries(self, index: int, segmentations: bool) -> list[dict]:
        arrays = self.arrays
        start, end = arrays["offsets"][index : index + 2].tolist()
        rows = slice(start, end)
        image_id = self.image_id(index)
        entries = [
            {"id": i, "image_id": image_id, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
            for i, category, box, area, crowd in zip(
                *(arrays[name][rows].tolist() for name in ("ids", "category_ids", "boxes", "areas", "crowd")),
                strict=True,
            )
        ]
        if "lines" in arrays:
            for entry, line in zip(entries, arrays["lines"][rows].tolist(), strict=True):
                entry["line"] = line
        if "kinds" in arrays and segmentations:
            for row, entry in enumerate(entries, start):
                if arrays["kinds"][row] != NO_SEGMENTATION:
                    entry["segmentation"] = self._segmentation(row)
        if "points" in arrays:
            counts, starts = arrays["point_counts"][rows].tolist(), arrays["point_starts"][rows].tolist()
            for entry, count, first in zip(entries, counts, starts, strict=True):
                if count >= 0:
                    entry["keypoints"] = arrays["points"][first : first + count].tolist()
        return entries

    def _segmentation(self, row: int) -> list[list[float]] | dict[str, Any]:
        arrays = self.arrays
        shape, kind = int(arrays["shapes"][row]), arrays["kinds"][row]
        if kind == POLYGONS:
            ends = arrays["ring_ends"][shape : shape + int(arrays["rings"][row]) + 1].tolist()
            values = arrays["polygons"][ends[0] : ends[-1]].tolist()
            return [values[a - ends[0] : b - ends[0]] for a, b in zip(ends, ends[1:], strict=False)]
        start, end = arrays["rle_ends"][shape : shape + 2]
        data = arrays["rle_data"][start:end].tobytes()
        counts = data.decode() if kind == COMPRESSED else np.frombuffer(data, dtype=np.int64).tolist()
        return {"size": arrays["rle_sizes"][shape].tolist(), "counts": counts}

    # What is to be said about the file

    def _read_sizes(self, folder: str | os.PathLike) -> dict[int, tuple[int, int]]:
        """Index → (width, height) as the files state it: of those that the json does not state, and of a sample of
        the others; of all, where one of the sample differs from the json."""
        stated, positions = self.arrays["stated"], self.arrays["image_positions"]
        step = -(-len(self) // SAMPLED) or 1
        first = (stated[:, 0] == 0) | (positions % step == 0)

        def read(rows: np.ndarray) -> dict[int, tuple[int, int]]:
            indices = rows.tolist()
            return header_sizes(
                {index: os.path.join(folder, self.file_name(index)) for index in indices},
                {index: tuple(stated[index].tolist()) if stated[index, 0] else None for index in indices},
            )

        sizes = read(np.flatnonzero(first))
        if any(stated[index, 0] and tuple(stated[index].tolist()) != size for index, size in sizes.items()):
            sizes |= read(np.flatnonzero(~first))
        return sizes

    def judge(self, folder: str | os.PathLike, categories: Categories, *, masks: bool) -> Findings:
        """Takes over the sizes of the files, and finds what ``validate`` would warn of.

        Raises:
            OddAnnotations: there is an error.
        """
        found = Findings()
        own = Categories.from_coco(self.meta["categories"])
        counts = dict(self.meta["counts"])
        if own != categories:
            compare_categories(own, categories, counts, found)
        if found.errors or not set(counts) <= set(categories.label_of) or (masks and self.meta["without_segmentation"]):
            raise OddAnnotations("categories or segmentations")
        read = self._read_sizes(folder)
        self._compare_sizes(read, found)
        several, *first = self.meta["twice"]
        if several:
            found.warnings["file listed more than once"] = _Counted(several, "{} ({} times)".format(*first[0]))
        crc = zlib.crc32(np.ascontiguousarray(self.sizes))
        if self.meta.get("judged", {}).get("sizes") != crc:
            self.meta["judged"] = {"sizes": crc, "warnings": self._judge_annotations()}
        for kind, count, message in self.meta["judged"]["warnings"]:
            found.warnings[kind] = _Counted(count, message)
        if self.meta["has_id_0"] and "lines" not in self.arrays:
            found.warn("annotation id 0", "pycocotools takes a match with it for none; number from 1")
        for i, name in zip(own.ids, own.names, strict=True):
            if i not in counts and i in categories.label_of:
                found.warn("category without annotations", f"{i} ({name})")
        warn_of_equal_names(own, counts, found)
        return found

    def _compare_sizes(self, read: dict[int, tuple[int, int]], found: Findings) -> None:
        stated, positions = self.arrays["stated"], self.arrays["image_positions"]
        differing = np.array([i for i, size in read.items() if tuple(stated[i].tolist()) != size], dtype=np.int64)
        if len(differing):
            self.sizes = stated.copy()
            self.sizes[differing] = [read[index] for index in differing.tolist()]
        unstated = np.flatnonzero(stated[:, 0] == 0)
        differing = differing[stated[differing, 0] != 0]
        messages = []
        if len(unstated):
            index = int(unstated[np.argmin(positions[unstated])])
            entry = entry_at(self.ann_file, self.meta["pieces"]["images"], int(positions[index]))
            given = f"{entry.get('width')!r:.40}x{entry.get('height')!r:.40}"
            size = self.size(index)
            told = f"the file has {size[0]}x{size[1]}" if size else "the file's counts"
            message = f"{self._which_image(index)} has width x height {given}; {told}"
            messages.append((index, "image size not stated (the file's counts)", len(unstated), message))
        if len(differing):
            index = int(differing[np.argmin(positions[differing])])
            (width, height), (own_width, own_height) = read[index], stated[index].tolist()
            swapped = " (width and height are swapped)" if (own_height, own_width) == (width, height) else ""
            told = f"is {width}x{height} pixels, the json says {own_width}x{own_height}{swapped}"
            message = f"{self._which_image(index)} {told}"
            messages.append((index, "image size (the file's counts)", len(differing), message))
        for _, kind, count, message in sorted(messages, key=lambda m: positions[m[0]]):
            found.warnings[kind] = _Counted(count, message)

    def _which_image(self, index: int) -> str:
        return f"image {self.file_name(index)} (image id {self.image_id(index)})"

    def _judge_annotations(self) -> list[tuple[str, int, str]]:
        """(kind, count, first message) of each kind of warning, with the images' sizes as they are now known."""
        arrays, lines = self.arrays, "lines" in self.arrays
        index = np.repeat(np.arange(len(self)), np.diff(arrays["offsets"]))
        known = self.sizes[:, 0] > 0
        if "kinds" in arrays:
            reach = np.where(known, 1000.0 + 10 * self.sizes.max(axis=1), 1e5)  # as `reach_of`
            encoded = arrays["kinds"] > POLYGONS
            sizes = arrays["rle_sizes"][arrays["shapes"][encoded]]
            fits = (sizes == self.sizes[index[encoded], ::-1]).all(axis=1) | ~known[index[encoded]]
            if not ((arrays["reach"] <= reach[index]).all() and fits.all()):
                raise OddAnnotations("segmentation")
        extent = np.where(known[:, None], self.sizes, np.inf)[index]
        boxes = arrays["boxes"]
        if not len(boxes):
            return []
        odd, looks = judge_boxes(boxes, extent, np.ones(len(boxes), dtype=bool), lines=lines)
        warnings = []
        for kind, rows, with_size in odd:
            if not len(rows):
                continue
            row = int(rows[np.argmin(arrays["positions"][rows])])
            entry = entry_at(self.ann_file, self.meta["pieces"]["annotations"], int(arrays["positions"][row]))
            what = f"line {entry['line']}" if lines else f"bbox {entry['bbox']}"
            message = f"annotation {entry['id']} (image {entry['image_id']}), {what:.200}"
            if with_size:
                width, height = self.size(int(index[row])) or ("?", "?")
                message += f", image {width}x{height}"
            warnings.append((kind, len(rows), message))
        return warnings + [(kind, 1, message) for kind, message in looks]


class _Counted(Sequence):
    """Messages of one kind, of which the first alone has been made."""

    def __init__(self, count: int, first: str):
        self._count, self._first = count, first

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        if index != 0:
            raise IndexError("only the first message is kept")
        return self._first


# Opening


def open_store(
    ann_file: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    lines: bool = False,
    categories: Categories | None = None,
    masks: bool = False,
    cache_dir: str | os.PathLike | None = None,
) -> tuple[Mapped, Categories, Findings]:
    """The columns of a json, from the cache or from the file itself, with the warnings about it.

    Args:
        ann_file: the json. folder: of the images. lines: the annotations are of lines.
        categories: the classes that labels refer to; None: the file's own. masks: every object needs a segmentation.
        cache_dir: where the cache file is kept. None: beside the json, or, where nothing can be written there, in
            ``$XDG_CACHE_HOME/detr_fast`` (``~/.cache/detr_fast``).

    Raises:
        OddAnnotations: there is an error, or something that columns do not take: the file is to be read whole.
    """

    def judged(store: Mapped) -> tuple[Categories, Findings]:
        own = Categories.from_coco(store.meta["categories"])
        known = own if categories is None else categories
        return known, store.judge(folder, known, masks=masks)

    def read(path: str, keep_polygons: Callable[[np.ndarray], None]) -> Columns:
        return read_columns(path, keep_polygons, lines=lines)

    store, (known, found) = opened(ann_file, Mapped, "lines" if lines else "boxes", read, judged, cache_dir=cache_dir)
    return store, known, found


def opened(
    ann_file: str | os.PathLike,
    store_type: type[S],
    kind: str,
    read: Callable[[str, Callable[[np.ndarray], None]], Columns],
    judged: Callable[[S], T],
    *,
    cache_dir: str | os.PathLike | None = None,
) -> tuple[S, T]:
    """A store of a json's columns, from the cache or from the file itself, and what is said about it.

    Args:
        ann_file: the json.
        store_type: the store's class.
        kind: of columns; each has a cache of its own.
        read: makes the columns of a path. Its second argument takes float64 arrays of what is too much to be collected
            in memory; together they become "polygons".
        judged: called with the store before the cache is written; may change its ``meta`` and ``sizes``.
        cache_dir: as `open_store`'s.

    Raises:
        OddAnnotations: by `read` or `judged`, or the file cannot be read.
    """
    path = os.path.abspath(ann_file)
    try:
        key = _key(path, kind)
        caches = _cache_files(path, kind, cache_dir) if key["size"] >= SMALLEST else []
        for cache in caches:
            store = _mapped(store_type, cache, key, path)
            if store is not None:
                return store, judged(store)
        writer = _Writer.at(caches)
        if writer is not None:
            with suppress(OSError), writer, _turn(path):  # OSError: such as a full disk
                store = _mapped(store_type, writer.cache, key, path)  # another may have made it meanwhile
                if store is not None:
                    return store, judged(store)
                columns = read(path, writer.append)
                store = store_type(columns.arrays, columns.meta, path)
                found = judged(store)
                return writer.finished(store, key), found
        polygons: list[np.ndarray] = []
        columns = read(path, polygons.append)
        if polygons:
            columns.arrays["polygons"] = np.concatenate(polygons)
        store = store_type(columns.arrays, columns.meta, path)
        return store, judged(store)
    except (OSError, ValueError) as error:
        raise OddAnnotations(str(error)) from error


@contextmanager
def _turn(path: str) -> Iterator[None]:
    """Waits for another process that makes a cache of the same json.

    The json itself is locked (advisory, for reading it does not matter): the kernel lets go of the lock when a process
    ends, however it ends. Those who have waited do not wait for each other: if there is still no cache, there will be
    none.
    """
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(file, fcntl.LOCK_SH)
        except (OSError, AttributeError):  # a file system or platform without locks
            pass
        yield


def _key(path: str, kind: str) -> dict[str, Any]:
    """What the cache must have been made of."""
    status = os.stat(path)
    return {
        "version": VERSION,
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "kind": kind,
        "largest_image": Image.MAX_IMAGE_PIXELS,
    }


def _cache_files(path: str, kind: str, cache_dir: str | os.PathLike | None) -> list[Path]:
    """Where the cache may be, the best place first."""
    digest = hashlib.sha256(f"{path}\0{kind}".encode(errors="surrogateescape")).hexdigest()[:12]
    name = f"{Path(path).stem}-{digest}.detr_fast"
    if cache_dir is not None:
        return [Path(cache_dir) / name]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [Path(path).parent / name, Path(home) / "detr_fast" / name]


class _Writer:
    """Writes a cache file: polygons as they come, then the other arrays, a directory and a footer."""

    def __init__(self, cache: Path):
        cache.parent.mkdir(parents=True, exist_ok=True)
        self.cache = cache
        self.path = cache.with_name(f".{cache.name}.{os.getpid()}.{os.urandom(4).hex()}")
        self.file = open(self.path, "xb")  # noqa: SIM115
        self.count = 0
        self.file.write(_MAGIC.ljust(64, b"\0"))

    @classmethod
    def at(cls, caches: Sequence[Path]) -> _Writer | None:
        """At the first place where something can be written."""
        for cache in caches:
            with suppress(OSError):
                return cls(cache)
        return None

    def append(self, polygons: np.ndarray) -> None:
        self.file.write(polygons.data)
        self.count += len(polygons)

    def finished(self, store: S, key: dict[str, Any]) -> S:
        """Puts the file in its place, unless the json has changed meanwhile; returns a store that is mapped from it.

        Raises:
            OSError: the file cannot be written.
        """
        entries: dict[str, dict[str, Any]] = {}
        if self.count:
            entries["polygons"] = {"dtype": "float64", "shape": [self.count], "offset": 64}
        for name, array in store.arrays.items():
            self.file.write(b"\0" * (-self.file.tell() % 64))
            entries[name] = {"dtype": array.dtype.name, "shape": list(array.shape), "offset": self.file.tell()}
            self.file.write(np.ascontiguousarray(array).data)
        self.file.flush()
        with open(self.path, "rb") as written:
            for entry in entries.values():
                entry["crc"] = _checksum(written, entry["offset"], _nbytes(entry))
        directory = json.dumps({"key": key, "arrays": entries, "meta": store.meta}).encode()
        start = self.file.tell()
        self.file.write(directory)
        self.file.write(_FOOTER.pack(start, len(directory), zlib.crc32(directory), _MAGIC))
        self.file.close()
        if _key(store.ann_file, key["kind"]) != key:
            raise OSError(f"{store.ann_file} has changed while it was read")
        os.replace(self.path, self.cache)
        mapped = _mapped(type(store), self.cache, key, store.ann_file)
        if mapped is None:
            raise OSError(f"{self.cache} is not what was written")
        if store.sizes is not store.arrays["stated"]:
            mapped.sizes = store.sizes
        return mapped

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_) -> None:
        """Removes what is unfinished."""
        self.file.close()
        with suppress(FileNotFoundError):
            self.path.unlink()


def _mapped(store_type: type[S], cache: str | os.PathLike, key: dict[str, Any], ann_file: str) -> S | None:
    """The store in a cache file; None where there is none, or one of something else, or a damaged one."""
    try:
        with open(cache, "rb") as file:
            end = file.seek(0, os.SEEK_END) - _FOOTER.size
            file.seek(end)
            start, length, crc, magic = _FOOTER.unpack(file.read(_FOOTER.size))
            if magic != _MAGIC or start + length != end:
                return None
            file.seek(start)
            text = file.read(length)
            directory = json.loads(text) if zlib.crc32(text) == crc else {}
            if not directory or directory["key"] != key:
                return None
            for entry in directory["arrays"].values():
                if entry["dtype"] not in _DTYPES or entry["offset"] + _nbytes(entry) > start:
                    return None
                if _checksum(file, entry["offset"], _nbytes(entry)) != entry["crc"]:
                    return None
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None
    arrays = {
        name: np.frombuffer(data, entry["dtype"], int(np.prod(entry["shape"])), entry["offset"]).reshape(entry["shape"])
        for name, entry in directory["arrays"].items()
    }
    return store_type(arrays, directory["meta"], ann_file, os.fspath(cache), key, data)


def _mapped_again(store_type: type[S], cache: str, key: dict[str, Any], ann_file: str, sizes: np.ndarray | None) -> S:
    store = _mapped(store_type, cache, key, ann_file)
    if store is None:
        raise OSError(f"{cache}, which another process reads annotations from, is gone, damaged or of another json")
    if sizes is not None:
        store.sizes = sizes
    return store


def _unpickled(store_type: type[S], arrays, meta, ann_file: str, sizes: np.ndarray) -> S:
    store = store_type(arrays, meta, ann_file)
    store.sizes = sizes
    return store


def _nbytes(entry: dict[str, Any]) -> int:
    return int(np.prod(entry["shape"])) * np.dtype(entry["dtype"]).itemsize


def _checksum(file, offset: int, length: int) -> int:
    """crc32 of an array's bytes; of a long one, of its first and last page and of 254 between them."""
    if length <= _WHOLE:
        starts, count = [offset], length
    else:
        starts, count = [offset + (length - _PAGE) * n // 255 for n in range(256)], _PAGE
    crc = 0
    for start in starts:
        file.seek(start)
        crc = zlib.crc32(file.read(count), crc)
    return crc
