"""A COCO json as numpy columns, read a few megabytes at a time.

The file is gone through twice: once for where its lists and their entries end, which numpy finds, and once to decode
the entries, a few thousand at a time. So no more than one such piece is ever held as Python objects. Pieces of a large
file are decoded by several processes, which send arrays.

Only what is as it should be becomes columns. Whatever else there is, `OddAnnotations` is raised, and the file is read
whole and judged by `detr_fast.data.validation`, whose messages name it. What a panoptic json has beside images is read
by `detr_fast.data.segments`.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain, compress
from operator import itemgetter, methodcaller
from typing import Any

import numpy as np

from detr_fast.data.annotations import add_line_boxes, check_content, file_name_problem, refuse_two_lists
from detr_fast.data.validation import LARGEST, judge_polygons, polygon_problem, rle_problem, stated_size

try:
    import orjson
except ImportError:  # json takes three times as long
    orjson = None

_BLOCK = 4 << 20  # bytes of json that are decoded at a time
_SCANNED = 256 << 10  # bytes that are searched for brackets at a time: with what is made of them, they fit in a cache
_MARKS = bytes(byte in b'"[]{}' for byte in range(256))  # for `bytes.translate`: 1 for a bracket or quote
_LONGEST_REST = 64 << 20  # bytes of what is neither an image nor an annotation
_SHARED = 32 << 20  # bytes of a list that is worth several processes
_MOST_PROCESSES = 8  # more wait for the one that takes what they send

# How a segmentation is kept.
NO_SEGMENTATION, POLYGONS, COMPRESSED, RUNS = range(4)


# Entries → columns by name.
Convert = Callable[[list[dict]], dict[str, np.ndarray]]

# What reading and converting raise at entries of an unexpected form.
_ODD = (KeyError, TypeError, ValueError, OverflowError, AttributeError, RecursionError)


class OddAnnotations(Exception):
    """Something is wrong, or unusual, that the columns do not take."""


@dataclass
class Columns:
    """What a file has, one row for each image and annotation.

    Images are in the order of their ids, annotations in that of their images and, of one image, in the file's.

    Attributes:
        arrays: by name. Of N images: "image_ids" int64 [N], "image_positions" int64 [N] (in the file's list), "stated"
            int64 [N, 2] (width, height; 0 where none is stated), "names" uint8 and "name_ends" int64 [N + 1], "offsets"
            int64 [N + 1] (an image's first annotation). Of M annotations: "ids", "category_ids", "positions" int64 [M],
            "boxes" float64 [M, 4], "areas" float64 [M], "crowd" uint8 [M]; with lines "lines" float64 [M, 4]. With
            segmentations "kinds" uint8 [M], "shapes" int64 [M] (first ring, or number of the run-length encoding),
            "rings" int32 [M] (how many), "reach" float64 [M] (the largest coordinate), "ring_ends" int64 [R + 1],
            "rle_sizes" int64 [K, 2] (height, width), "rle_ends" int64 [K + 1], "rle_data" uint8. With keypoints
            "point_starts" int64 and "point_counts" int32 [M] (-1: none), "points" float64.
        meta: what json can hold: "categories", the list as it stands; "counts", of the annotations by category;
            "pieces", where in the file images and annotations stand; "twice", file names listed more than once.
    """

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


def read_columns(path: str | os.PathLike, keep_polygons: Callable[[np.ndarray], None], *, lines: bool) -> Columns:
    """Reads a json of boxes or lines.

    Args:
        path: of the json.
        keep_polygons: gets the coordinates of all polygons, float64, as they come; "ring_ends" says where each ends.
        lines: the annotations are of lines; boxes are made from them.

    Raises:
        OddAnnotations: see there.
        OSError: the file cannot be read.
    """
    with reading():
        pieces, rest = layout(path)
        content = {"images": [], "annotations": [], **rest}
        (add_line_boxes if lines else check_content)(content, path)
        images = read_images(path, pieces["images"], lambda entry: stated_size(entry) or (0, 0))
        annotations = _Annotations(keep_polygons, lines)
        for found in converted(path, pieces["annotations"], lambda entries: _piece(entries, lines)):
            annotations.add(found)
        columns = Columns(meta={"categories": rest["categories"], "pieces": pieces})
        columns.arrays, columns.meta["twice"] = images
        annotations.finish(columns)
    return columns


@contextmanager
def reading() -> Iterator[None]:
    """While a json is read: no garbage collection, and what odd entries raise becomes OddAnnotations."""
    collects = gc.isenabled()
    gc.disable()  # nothing here refers to itself, and each collection would look at every entry
    try:
        yield
    except _ODD as error:
        raise OddAnnotations(str(error)) from error
    finally:
        if collects:
            gc.enable()


def read_categories(path: str | os.PathLike) -> list[dict]:
    """The categories of a json, without its images and annotations, which are not looked at.

    Raises:
        OddAnnotations: see there.
    """
    try:
        rest = layout(path)[1]
        check_content({"images": [], "annotations": [], "categories": rest["categories"]}, path)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise OddAnnotations(str(error)) from error
    return rest["categories"]


def entry_at(path: str | os.PathLike, pieces: list[list[int]], position: int) -> dict:
    """The entry of a list as it stands in the file. ``pieces``: of the list, from "pieces"."""
    firsts = [first for first, _, _ in pieces]
    piece = int(np.searchsorted(firsts, position, side="right")) - 1
    with open(path, "rb") as file:
        text = _text(file, *pieces[piece][1:]).removeprefix(b",")
    return json.loads(b"[" + text + b"]")[position - firsts[piece]]


# Where things stand


def layout(path: str | os.PathLike) -> tuple[dict[str, list[list[int]]], dict[str, Any]]:
    """Where images and annotations stand, and all that is in the file beside them.

    Returns:
        key → [[0, first byte, last byte + 1], …] of the two lists, cut between entries (the number of each piece's
        first entry is filled in later), and the other values by key.
    """
    rest, cuts = bytearray(), []
    depth, in_string, opened = 0, False, False
    with open(path, "rb", buffering=0) as file:
        base = 0
        while block := _block(file):
            data = np.frombuffer(block, dtype=np.uint8)
            marks = np.flatnonzero(np.frombuffer(block.translate(_MARKS), dtype=bool))
            quotes = data[marks] == ord('"')
            if b"\\" in block:
                escaped = np.array([_is_escaped(block, at) for at in marks[quotes].tolist()], dtype=bool)
                keep = np.ones(len(marks), dtype=bool)
                keep[np.flatnonzero(quotes)[escaped]] = False
                marks, quotes = marks[keep], quotes[keep]
            inside = (np.cumsum(quotes) + in_string) % 2 == 1
            # [ and {, ] and } differ in one bit alone.
            steps = np.where((data[marks] | 0x20) == ord("{"), 1, -1)
            steps[quotes | inside] = 0
            depths = depth + np.cumsum(steps)
            # Of a list in the top object: what opens it (depth 2 from then on) and what closes it.
            edges = marks[((steps == 1) & (depths == 2)) | ((steps == -1) & (depths == 1))].tolist()
            ends = marks[(steps == -1) & (depths == 2)]
            done = 0
            for at in edges:
                if block[at : at + 1] == b"[":
                    rest += block[done : at + 1] + str(len(cuts)).encode()
                    cuts.append([base + at + 1])
                    opened = True
                elif opened:
                    cuts[-1].append(base + at)
                    done, opened = at, False
            if not opened:
                rest += block[done:]
            elif len(ends) and base + int(ends[-1]) >= cuts[-1][-1] + _BLOCK - len(block):
                cuts[-1].append(base + int(ends[-1]) + 1)
            if len(rest) > _LONGEST_REST:
                raise OddAnnotations("too much beside images and annotations")
            depth = int(depths[-1]) if len(depths) else depth
            in_string = bool(inside[-1]) if len(inside) else in_string
            base += len(block)
    pieces, others = {}, {}
    content = json.loads(bytes(rest), object_pairs_hook=refuse_two_lists)
    if not isinstance(content, dict):
        raise OddAnnotations("no object")
    with open(path, "rb") as file:
        for key, value in content.items():
            if not isinstance(value, list):
                others[key] = value
                continue
            (number,) = value
            found = [[0, *pair] for pair in zip(cuts[number][:-1], cuts[number][1:], strict=True)]
            if key in ("images", "annotations"):
                pieces[key] = found
            else:
                others[key] = json.loads(b"[" + _text(file, found[0][1], found[-1][2]) + b"]")
    return pieces, others


def _block(file) -> bytes:
    """The next bytes, not ended by a backslash, which belongs to what comes after it."""
    block = file.read(min(_BLOCK, _SCANNED))
    while block.endswith(b"\\") and (more := file.read(1)):
        block += more
    return block


def _is_escaped(block: bytes, at: int) -> bool:
    first = at
    while first and block[first - 1] == ord("\\"):
        first -= 1
    return (at - first) % 2 == 1


def _text(file, start: int, end: int) -> bytes:
    """What stands there, without the space around it."""
    file.seek(start)
    return file.read(end - start).strip()


def decoded(path: str | os.PathLike, pieces: list[list[int]]) -> Iterator[list]:
    """The entries of each piece; fills in the number of its first one."""
    count = 0
    with open(path, "rb") as file:
        for number, piece in enumerate(pieces):
            entries = _entries(file, pieces, number)
            piece[0] = count
            count += len(entries)
            yield entries


def _entries(file, pieces: list[list[int]], number: int) -> list:
    """The entries of one piece."""
    text = _text(file, *pieces[number][1:])
    if number and text:
        if not text.startswith(b",") or not text[1:].strip():
            raise OddAnnotations("commas")
        text = text[1:]
    elif number and number < len(pieces) - 1:
        raise OddAnnotations("commas")
    return _loads(b"[" + text + b"]")


def _loads(text: bytes) -> Any:
    if orjson is not None:
        return orjson.loads(text)
    return json.loads(text, parse_constant=_refuse)


def _refuse(name: str) -> None:
    raise ValueError(name)


# Images


def read_images(
    path: str | os.PathLike, pieces: list[list[int]], size_of: Callable[[dict], tuple[int, int]]
) -> tuple[dict[str, np.ndarray], list]:
    """The columns of the images, see `Columns`, and its "twice". ``size_of``: gives (width, height) of an entry."""
    ids, names, sizes = [], [], []
    for entries in decoded(path, pieces):
        ids += [entry["id"] for entry in entries]
        names += [entry["file_name"] for entry in entries]
        sizes += list(map(size_of, entries))
    check_names(names)
    image_ids = integers(ids)
    order = np.argsort(image_ids, kind="stable")
    image_ids = image_ids[order]
    require(np.diff(image_ids) > 0)
    several = [[name, n] for name, n in Counter(names).items() if n > 1] if len(set(names)) < len(names) else []
    text, lengths = encoded([names[n] for n in order.tolist()])
    return {
        "image_ids": image_ids,
        "image_positions": order,
        "stated": np.array(sizes, dtype=np.int64).reshape(-1, 2)[order],
        "names": text,
        "name_ends": ends_of(lengths),
    }, [len(several), *several[:1]]


def check_names(names: Sequence) -> None:
    """Raises OddAnnotations unless each is the name of a file."""
    if any(file_name_problem(name) is not None for name in names):
        raise OddAnnotations("file_name")


def encoded(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """All names in one: uint8, and int64 [N], the length of each."""
    texts = [name.encode(errors="surrogatepass") for name in names]  # json can hold half of a surrogate pair
    return np.frombuffer(b"".join(texts), dtype=np.uint8), np.array(list(map(len, texts)), dtype=np.int64)


# Annotations


def converted(path: str | os.PathLike, pieces: list[list[int]], convert: Convert) -> Iterator[dict[str, np.ndarray]]:
    """The columns of each piece, in order; fills in the number of its first entry.

    Args:
        path: of the json.
        pieces: of a list, see `layout`.
        convert: gets the entries of a piece, and gives its columns, "image_ids" [entries] among them.
    """
    size = pieces[-1][2] - pieces[0][1] if pieces else 0
    processes = min(_num_processes(), len(pieces)) if size >= _SHARED else 1
    count = 0
    with open(path, "rb") as file, _Workers(path, pieces, convert, processes) as workers:
        for number, piece in enumerate(pieces):
            found = workers.received(number)
            if found is None:
                found = convert(_entries(file, pieces, number))
            piece[0] = count
            count += len(found["image_ids"])
            yield found


def _num_processes() -> int:
    """How many may work at a time; 1 where this process must not be forked."""
    torch = sys.modules.get("torch")
    if (
        sys.platform != "linux"
        or multiprocessing.current_process().daemon
        or threading.active_count() > 1
        or (torch is not None and torch.cuda.is_initialized())
    ):
        return 1
    return min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)


class _Workers:
    """Forked processes; of N, each converts every N-th piece and sends its arrays through a pipe. None if N is 1."""

    def __init__(self, path: str | os.PathLike, pieces: list[list[int]], convert: Convert, processes: int):
        self._workers = []
        context = multiprocessing.get_context("fork") if processes > 1 else None
        for first in range(processes if context else 0):
            ours, theirs = context.Pipe(duplex=False)
            inherited = [connection for _, connection in self._workers] + [ours]
            arguments = (path, pieces, range(first, len(pieces), processes), convert, theirs, inherited)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that its end is noticed
            self._workers.append((process, ours))

    def received(self, number: int) -> dict[str, np.ndarray] | None:
        """The columns of a piece, asked for one after another. None: there is nobody who converts it.

        Raises:
            OddAnnotations: see there.
        """
        if not self._workers:
            return None
        connection = self._workers[number % len(self._workers)][1]
        try:
            listed = connection.recv()
            if isinstance(listed, str):
                raise OddAnnotations(listed)
            return {name: np.frombuffer(connection.recv_bytes(), dtype).reshape(shape) for name, dtype, shape in listed}
        except (EOFError, OSError):  # it was killed, perhaps for want of memory
            return None

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_) -> None:
        for process, connection in self._workers:
            connection.close()
            process.kill()  # not terminate: what this process does at SIGTERM has been inherited
            process.join()
            process.close()


def _work(path, pieces: list[list[int]], shares: range, convert: Convert, connection, inherited: list) -> None:
    """What a worker does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for end in inherited:
        end.close()  # a pipe that nobody reads any more breaks, and this process ends
    with open(path, "rb") as file, suppress(BrokenPipeError):
        for number in shares:
            try:
                found = convert(_entries(file, pieces, number))
            except (OddAnnotations, OSError, *_ODD) as error:
                connection.send(str(error))
                return
            found = {name: np.ascontiguousarray(values) for name, values in found.items()}
            connection.send([(name, values.dtype.name, values.shape) for name, values in found.items()])
            for values in found.values():
                connection.send_bytes(values.reshape(-1).view(np.uint8))


def _piece(entries: list[dict], lines: bool) -> dict[str, np.ndarray]:
    """The columns of some annotations; "shapes" and "point_starts" count from the first of them."""
    fields = map(itemgetter("id", "image_id", "category_id", "line" if lines else "bbox"), entries)
    ids, image_ids, category_ids, rows = zip(*fields, strict=True) if entries else ((), (), (), ())
    found = {"ids": integers(ids), "image_ids": integers(image_ids), "category_ids": integers(category_ids)}
    boxes = _rows(rows, 4)
    require(np.abs(boxes) < LARGEST)
    if lines:
        found["lines"] = boxes
        first, extent = boxes[:, :2], boxes[:, 2:]
        boxes = np.hstack((np.minimum(first, first + extent), np.abs(extent)))
    crowd = list(map(methodcaller("get", "iscrowd", 0), entries))
    only(crowd, int)
    if not set(crowd) <= {0, 1}:
        raise OddAnnotations("iscrowd")
    found |= {"boxes": boxes, "crowd": np.array(crowd, dtype=np.uint8), "areas": _areas(entries, boxes)}
    return found | _segmentations(entries) | _keypoints(entries)


def _segmentations(entries: list[dict]) -> dict[str, np.ndarray]:
    count = len(entries)
    kinds, shapes = np.zeros(count, dtype=np.uint8), np.zeros(count, dtype=np.int64)
    rings = np.zeros(count, dtype=np.int32)
    segmentations = list(map(methodcaller("get", "segmentation", _ABSENT), entries))
    types = list(map(type, segmentations))
    if not set(types) <= {list, dict, _Absent}:
        raise OddAnnotations("segmentation")
    is_list = np.fromiter((kind is list for kind in types), dtype=bool, count=count)
    lists = list(compress(segmentations, is_list))
    parts = list(chain.from_iterable(lists))
    only(parts, list)
    numbers = array("d")
    for ring in parts:
        numbers.fromlist(ring)  # TypeError: something else than numbers
    values, lengths = np.frombuffer(numbers, dtype=np.float64), np.array(list(map(len, parts)), dtype=np.int64)
    kinds[is_list] = POLYGONS
    rings[is_list] = list(map(len, lists))
    require(rings[is_list] > 0)
    shapes[is_list] = (np.cumsum(rings) - rings)[is_list]
    reach = np.zeros(count)
    if len(lengths):
        low, high, bad = judge_polygons(values, lengths)
        for ring in np.flatnonzero(bad & (lengths >= 6)).tolist():
            # The quick bound on its length is exceeded; the length itself may not be.
            end = int(lengths[: ring + 1].sum())
            bad[ring] = polygon_problem(values[end - lengths[ring] : end].tolist(), None) is not None
        require(~bad)
        reach[is_list] = np.maximum.reduceat(np.maximum(-low, high), shapes[is_list])
        np.maximum(reach, 0, out=reach)
    rle_sizes, rle_data = [], []
    for row, kind in enumerate(types):
        if kind is not dict:
            continue
        encoding = segmentations[row]
        if rle_problem(encoding, None) is not None:
            raise OddAnnotations("run-length encoding")
        counts = encoding["counts"]
        kinds[row], shapes[row] = (COMPRESSED if isinstance(counts, str) else RUNS), len(rle_sizes)
        rle_sizes.append(encoding["size"])
        rle_data.append(counts.encode() if isinstance(counts, str) else np.array(counts, np.int64).tobytes())
    return {
        "kinds": kinds,
        "shapes": shapes,
        "rings": rings,
        "reach": reach,
        "ring_lengths": lengths,
        "polygons": values,
        "rle_sizes": np.array(rle_sizes, dtype=np.int64).reshape(-1, 2),
        "rle_lengths": np.array(list(map(len, rle_data)), dtype=np.int64),
        "rle_data": np.frombuffer(b"".join(rle_data), dtype=np.uint8),
    }


class _Absent:
    """The type of what an annotation has that has no segmentation."""


_ABSENT = _Absent()


def _keypoints(entries: list[dict]) -> dict[str, np.ndarray]:
    having = [(row, entry["keypoints"]) for row, entry in enumerate(entries) if "keypoints" in entry]
    counts = np.full(len(entries), -1, dtype=np.int32)
    lists = [points for _, points in having]
    only(lists, list)
    numbers = list(chain.from_iterable(lists))
    only(numbers, int, float)
    counts[[row for row, _ in having]] = [len(points) for points in lists]
    require((counts % 3 == 0) | (counts == -1))
    points = np.array(numbers, dtype=np.float64)
    require(np.abs(points) < LARGEST)
    used = np.maximum(counts, 0)
    return {"point_counts": counts, "point_starts": np.cumsum(used) - used, "points": points}


class _Annotations:
    """Collects the columns of the pieces."""

    def __init__(self, keep_polygons: Callable[[np.ndarray], None], lines: bool):
        self.keep_polygons = keep_polygons
        self.lines = lines
        self.parts: dict[str, list[np.ndarray]] = {}
        self.num_rings = self.num_rles = self.num_points = 0
        self.has_segmentations = self.has_keypoints = False

    def add(self, found: dict[str, np.ndarray]) -> None:
        """Takes what `_piece` has made."""
        kinds = found["kinds"]
        before = np.array([0, self.num_rings, self.num_rles, self.num_rles])  # by kind
        found["shapes"] = found["shapes"] + before[kinds]
        found["point_starts"] = found["point_starts"] + self.num_points
        self.num_rings += len(found["ring_lengths"])
        self.num_rles += len(found["rle_lengths"])
        self.num_points += len(found["points"])
        self.has_segmentations |= bool((kinds != NO_SEGMENTATION).any())
        self.has_keypoints |= bool((found["point_counts"] >= 0).any())
        polygons = found.pop("polygons")
        if len(polygons):
            self.keep_polygons(polygons)
        for name, values in found.items():
            self.parts.setdefault(name, []).append(values)

    def finish(self, columns: Columns) -> None:
        """Adds the arrays of all annotations, in their order."""
        arrays = columns.arrays
        if not self.parts:
            self.add(_piece([], self.lines))
        images = self._taken("image_ids")
        index = np.searchsorted(arrays["image_ids"], images)
        require(index < len(arrays["image_ids"]))
        require(arrays["image_ids"][index] == images)
        ids = np.sort(np.concatenate(self.parts["ids"]))
        require(np.diff(ids) > 0)
        order = np.argsort(index, kind="stable")
        arrays["offsets"] = ends_of(np.bincount(index, minlength=len(arrays["image_ids"])))
        arrays["positions"] = order
        ring_lengths, rle_lengths = self._taken("ring_lengths"), self._taken("rle_lengths")
        alone = ["points", "rle_sizes", "rle_data"]  # not one row for each annotation
        skipped = [] if self.has_segmentations else ["kinds", "shapes", "rings", "reach", "rle_sizes", "rle_data"]
        skipped += [] if self.has_keypoints else ["point_counts", "point_starts", "points"]
        for name in list(self.parts):
            values = self._taken(name)
            if name not in skipped:
                arrays[name] = values if name in alone else values[order]
        if self.has_segmentations:
            arrays["ring_ends"], arrays["rle_ends"] = ends_of(ring_lengths), ends_of(rle_lengths)
        used, counts = np.unique(arrays["category_ids"], return_counts=True)
        columns.meta["counts"] = list(zip(used.tolist(), counts.tolist(), strict=True))
        columns.meta["has_id_0"] = bool(len(ids) and (ids == 0).any())
        objects = arrays["crowd"] == 0
        without = objects if not self.has_segmentations else objects & (arrays["kinds"] == NO_SEGMENTATION)
        columns.meta["without_segmentation"] = bool(without.any())

    def _taken(self, name: str) -> np.ndarray:
        return np.concatenate(self.parts.pop(name))


def _areas(entries: list[dict], boxes: np.ndarray) -> np.ndarray:
    missing = [row for row, entry in enumerate(entries) if "area" not in entry]
    values = [entry.get("area", 0) for entry in entries]
    only(values, int, float)
    areas = np.array(values, dtype=np.float64)
    require((areas >= 0) & (areas < LARGEST))
    if missing:
        made = np.maximum(boxes[missing, 2:], 0).prod(axis=1)
        require(made < 1 << 53)  # as exact as with integers
        areas[missing] = made
    return areas


def integers(values: Sequence) -> np.ndarray:
    """int64. Raises OddAnnotations or OverflowError unless all values are integers of at most 63 bits."""
    only(values, int)
    return np.array(values, dtype=np.int64)


def _rows(rows: list, width: int) -> np.ndarray:
    only(rows, list)
    if not set(map(len, rows)) <= {width}:
        raise OddAnnotations("length")
    numbers = list(chain.from_iterable(rows))
    only(numbers, int, float)
    return np.array(numbers, dtype=np.float64).reshape(-1, width)


def only(values: Iterable, *types: type) -> None:
    """Raises OddAnnotations unless all values are of these very types: True is no int."""
    if not set(map(type, values)) <= set(types):
        raise OddAnnotations("type")


def require(good: np.ndarray) -> None:
    """Raises OddAnnotations unless all of it is true."""
    if not good.all():
        raise OddAnnotations("value")


def ends_of(lengths) -> np.ndarray:
    """int64 [N + 1]: where each part starts, and where the last one ends."""
    ends = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=ends[1:])
    return ends
