"""What can be wrong with annotations: one set of rules, for training, evaluation and `check-data`.

An error is what training would fail on or learn the wrong thing from; a warning is what it deals with by a rule. Both
name the annotation, what it has and what was expected. A good file costs a few microseconds per annotation: numbers are
judged as arrays, and only what stands out is looked at singly.
"""

from __future__ import annotations

import math
import os
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from detr_fast.data.annotations import annotation_problem, is_integer, is_number
from detr_fast.data.categories import Categories
from detr_fast.data.images import leaves_folder

_SLACK = 1.0  # pixels that a box may reach beyond its image: rounding, not a mistake
LARGEST = 1e15  # of a number that stands for pixels
_NUMBERS = {int, float}
_CHUNK = 20_000  # annotations whose polygons are judged at a time
# pycocotools walks along a polygon in fifths of a pixel and keeps every step, 16 bytes each.
_LONGEST_POLYGON = 1_000_000  # pixels
_LARGEST_MASK = 1 << 28  # pixels, where the image's size is not known

Size = tuple[int, int]


@dataclass
class Findings:
    """Kind → messages, of errors and of warnings.

    Attributes:
        broken: positions in the list ``annotations`` of those with an error.
    """

    errors: dict[str, list[str]] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    broken: set[int] = field(default_factory=set)

    def error(self, kind: str, message: str, position: int | None = None) -> None:
        """Notes an error; ``position``: of the annotation that has it."""
        self.errors.setdefault(kind, []).append(message)
        if position is not None:
            self.broken.add(position)

    def warn(self, kind: str, message: str) -> None:
        """Notes a warning."""
        self.warnings.setdefault(kind, []).append(message)

    def joined(self, other: Findings) -> Findings:
        """Those of both, these first."""
        both = Findings(broken=self.broken | other.broken)
        for mine in (self, other):
            for kind, messages in mine.errors.items():
                both.errors.setdefault(kind, []).extend(messages)
            for kind, messages in mine.warnings.items():
                both.warnings.setdefault(kind, []).extend(messages)
        return both

    def raise_errors(self, ann_file) -> None:
        """Raises ValueError with the first error, and says how many more there are."""
        messages = [message for messages in self.errors.values() for message in messages]
        if messages:
            more = f" (and {len(messages) - 1} more; check-data lists them)" if len(messages) > 1 else ""
            raise ValueError(f"{ann_file}: {messages[0]}{more}")

    def lines(self, ann_file) -> Iterator[str]:
        """A line for each kind of warning: how many, and the first."""
        for kind, messages in self.warnings.items():
            yield f"{ann_file}: warning: {kind} ({len(messages)}), the first: {messages[0]}"


def outside_problem(folder: str | os.PathLike, image: Mapping) -> str | None:
    """What is wrong with an image's ``file_name`` if it leads out of the folder of the images, else None."""
    name = image["file_name"]
    if not leaves_folder(folder, name):
        return None
    number = image["image_id"] if "segments_info" in image else image["id"]
    return (
        f"image id {number} has file_name {name!r:.200}, which leads out of the folder {folder}; --allow_outside takes "
        "such names"
    )


def refuse_outside(folder: str | os.PathLike, images: Iterable[Mapping], ann_file) -> None:
    """Raises ValueError, naming the first, if a ``file_name`` of the images leads out of their folder."""
    for image in images:
        problem = outside_problem(folder, image)
        if problem is not None:
            raise ValueError(f"{ann_file}: {problem}")


def stated_size(image: Mapping) -> Size | None:
    """(width, height) in pixels that a json states for an image, None where it states none that can be true."""
    width, height = image.get("width"), image.get("height")
    # PIL reads no image of more pixels than twice its limit.
    largest = 2 * (Image.MAX_IMAGE_PIXELS or _LARGEST_MASK)
    if is_integer(width) and is_integer(height) and min(width, height) > 0 and width * height <= largest:
        return width, height
    return None


def validate(
    content: dict, categories: Categories, sizes: Mapping[int, Size], *, masks: bool = False, lines: bool = False
) -> Findings:
    """Judges the lists of a COCO json that ``read_annotations`` has read.

    In place, ``iscrowd`` becomes 0 or 1, ``area`` a number, and segmentations lose what no mask can be made from: an
    ``area`` that is none comes from the box, an empty segmentation becomes an empty run-length encoding.

    Args:
        content: the json.
        categories: the classes that labels refer to: the file's own, or the training set's.
        sizes: image id → (width, height) as files state it; where an image is not in it, the json's count.
        masks: every object needs a segmentation.
        lines: the annotations are of lines, and their boxes are made from them.
    """
    found = Findings()
    own = Categories.from_coco(content["categories"])
    if own != categories:
        used = {entry["category_id"] for entry in content["annotations"] if is_integer(entry.get("category_id"))}
        compare_categories(own, categories, used, found)
    _check_sizes(content["images"], sizes, found)
    image_sizes = {image["id"]: sizes.get(image["id"]) or stated_size(image) for image in content["images"]}
    for key in ("images", "annotations"):
        ids = [entry["id"] for entry in content[key] if type(entry.get("id")) is int]
        if len(set(ids)) < len(ids):
            for i, n in Counter(ids).items():
                if n > 1:
                    found.error("repeated id", f"id {i} occurs {n} times in '{key}'")
    files = Counter(entry["file_name"] for entry in content["images"])
    if len(files) < len(content["images"]):
        for name, n in files.items():
            if n > 1:
                found.warn("file listed more than once", f"{name} ({n} times)")

    usable = []  # positions
    for position, entry in enumerate(content["annotations"]):
        if _is_plain(entry, categories.label_of, image_sizes) or _has_no_problem(
            position, entry, categories, image_sizes, found
        ):
            usable.append(position)
    annotations = content["annotations"]
    usable = _check_boxes(annotations, usable, image_sizes, found, lines)
    _check_fields(annotations, usable, found)
    _check_segmentations(annotations, usable, image_sizes, found)
    _check_keypoints(annotations, usable, found)
    for position in usable if masks else ():
        entry = annotations[position]
        if "segmentation" not in entry and not entry["iscrowd"]:
            message = f"annotation {entry['id']!r} has no segmentation, but masks are asked for"
            found.error("no segmentation", message, position)
    if not lines and any(annotations[position]["id"] == 0 for position in usable):
        found.warn("annotation id 0", "pycocotools takes a match with it for none; number from 1")
    counts = Counter(annotations[position]["category_id"] for position in usable)
    for i, name in zip(own.ids, own.names, strict=True):
        if not counts[i] and i in categories.label_of:  # of the others compare_categories speaks
            found.warn("category without annotations", f"{i} ({name})")
    warn_of_equal_names(own, counts, found)
    return found


def warn_of_equal_names(own: Categories, counts: Mapping[int, int], found: Findings) -> None:
    """Finds classes that have objects and, but for case and spaces, one name. ``counts``: of annotations, by id."""
    first: dict[str, tuple[int, str]] = {}
    for i, name in zip(own.ids, own.names, strict=True):
        if counts.get(i):
            other, other_name = first.setdefault(_folded(name), (i, name))
            if other != i:
                found.warn("classes of one name", f"{other} ({other_name}) and {i} ({name}) stay two classes")


def compare_categories(own: Categories, given: Categories, used: Collection[int], found: Findings) -> None:
    """Finds where a file's categories differ from the classes given: by id, by name, or by the name's case.

    ``used``: the category ids of the file's annotations.
    """
    expected = dict(zip(given.ids, given.names, strict=True))
    if own.ids == given.ids and own.names == given.names:
        return
    id_of = {_folded(name): i for i, name in expected.items()}
    for i, name in zip(own.ids, own.names, strict=True):
        there = expected.get(i)
        if there == name:
            continue
        elsewhere = id_of.get(_folded(name))
        hint = f"; {expected[elsewhere]!r} has id {elsewhere} there" if elsewhere not in (None, i) else ""
        if there is not None:
            if _folded(there) == _folded(name):
                hint = " (they differ in case or spaces alone)"
            found.error("category differs", f"category {i} is {name!r} here, but {there!r} in the classes given{hint}")
        elif i in used:
            found.error("unknown category", f"category {i} ({name!r}) is not among the classes given{hint}")
        else:
            found.warn("category without annotations", f"{i} ({name}), which is not among the classes given{hint}")
    for i, name in expected.items():
        if i not in own.ids:
            found.warn("class that is not in this file", f"{i} ({name})")


def _folded(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _check_sizes(images: list[dict], sizes: Mapping[int, Size], found: Findings) -> None:
    for image in images:
        stated, size = stated_size(image), sizes.get(image["id"])
        if stated is None:
            given = f"{image.get('width')!r:.40}x{image.get('height')!r:.40}"
            read = f"the file has {size[0]}x{size[1]}" if size else "the file's counts"
            found.warn(
                "image size not stated (the file's counts)",
                f"image {image['file_name']} (image id {image['id']}) has width x height {given}; {read}",
            )
        elif size is not None and stated != size:
            swapped = " (width and height are swapped)" if stated == size[::-1] else ""
            found.warn(
                "image size (the file's counts)",
                f"image {image['file_name']} (image id {image['id']}) is {size[0]}x{size[1]} pixels, "
                f"the json says {stated[0]}x{stated[1]}{swapped}",
            )


def _is_plain(entry: dict, known_ids: Mapping, image_sizes: Mapping) -> bool:
    """The common case in few steps: all ids are known integers and the box is a list of four numbers."""
    get = entry.get
    box, number, image_id, category_id = get("bbox"), get("id"), get("image_id"), get("category_id")
    return (
        type(box) is list
        and len(box) == 4
        and type(image_id) is int
        and type(category_id) is int
        and type(number) is int
        and -(1 << 63) <= number < 1 << 63
        and image_id in image_sizes
        and category_id in known_ids
        and _NUMBERS.issuperset(map(type, box))
    )


def _has_no_problem(position: int, entry: dict, categories: Categories, image_sizes: Mapping, found: Findings) -> bool:
    problem = annotation_problem(entry, categories.label_of)
    image_id = entry.get("image_id")
    if "image_id" in entry and not (is_integer(image_id) and image_id in image_sizes):
        hint = ""
        if not is_integer(image_id):
            hint = f"; a {_kind(image_id)}, the ids in 'images' are integers"
        message = f"annotation {entry.get('id')!r} has unknown image id {image_id!r:.60}{hint}"
        found.error("unknown image", message, position)
    if problem is not None:
        kind = "unknown category" if "unknown category" in problem else "malformed annotation"
        found.error(kind, problem, position)
    return position not in found.broken


def _kind(value) -> str:
    names = {str: "text", type(None): "null", bool: "truth value", float: "float", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


def _check_boxes(
    annotations: list[dict], positions: list[int], image_sizes: Mapping, found: Findings, lines: bool
) -> list[int]:
    """Judges the boxes; returns the positions of those that are finite."""
    if not positions:
        return positions
    boxes = _floats([annotations[position]["bbox"] for position in positions])
    unknown = (math.inf, math.inf)
    sizes = [image_sizes[annotations[position]["image_id"]] or unknown for position in positions]
    extent = np.array(sizes, dtype=np.float64).reshape(-1, 2)

    def which(row: int) -> str:
        entry = annotations[positions[row]]
        what = f"line {entry['line']}" if lines else f"bbox {entry['bbox']}"
        return f"annotation {entry['id']} (image {entry['image_id']}), {what:.200}"

    finite = (np.abs(boxes) < LARGEST).all(axis=1)
    for row in np.flatnonzero(~finite):
        found.error("line not finite" if lines else "box not finite", which(row), positions[row])
    boxes[~finite] = 0  # judged already
    odd, looks = judge_boxes(boxes, extent, finite, lines=lines)
    for kind, rows, with_size in odd:
        for row in rows:
            width, height = image_sizes[annotations[positions[row]]["image_id"]] or ("?", "?")
            found.warn(kind, which(row) + (f", image {width}x{height}" if with_size else ""))
    for kind, message in looks:
        found.warn(kind, message)
    return [position for position, good in zip(positions, finite, strict=True) if good]


def judge_boxes(
    boxes: np.ndarray, extent: np.ndarray, finite: np.ndarray, *, lines: bool
) -> tuple[list[tuple[str, np.ndarray, bool]], list[tuple[str, str]]]:
    """What is odd about boxes, or about the boxes around lines.

    Args:
        boxes: float64 [N, 4] x, y, width, height in pixels; extent: float64 [N, 2] width and height of their images,
            inf where not known; finite: bool [N], those to be judged.

    Returns:
        (kind, rows, whether the image's size belongs to the message) of each kind of warning about single boxes, and
        (kind, message) of those about all of them.
    """
    first, last = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    empty = (boxes[:, 2:] <= 0).any(axis=1) & finite & (not lines)
    # A level line on the border has no height.
    off = (first > extent) | (last < 0) if lines else (first >= extent) | (last <= 0)
    outside = off.any(axis=1) & finite & ~empty
    partly = ((first < -_SLACK) | (last > extent + _SLACK)).any(axis=1) & finite & ~empty & ~outside
    dealt = ("clamped", "clamped") if lines else ("dropped", "clamped")
    what = "line" if lines else "box"
    odd = [
        ("box without extent (dropped in training)", np.flatnonzero(empty), False),
        (f"{what} wholly outside its image ({dealt[0]} in training)", np.flatnonzero(outside), True),
        (f"{what} partly outside its image ({dealt[1]} in training)", np.flatnonzero(partly), True),
    ]
    judged = finite & ~empty
    if lines or not judged.any():
        return odd, []
    return odd, _guess_format(boxes[judged], extent[judged], float((outside | partly)[judged].mean()))


def _guess_format(boxes: np.ndarray, extent: np.ndarray, share_outside: float) -> list[tuple[str, str]]:
    if boxes.max() <= 1 and extent[np.isfinite(extent)].min(initial=np.inf) > 8:
        message = f"no number of the {len(boxes)} boxes is above 1, as if in shares of the image; expected pixels"
        return [("boxes look normalised", message)]
    if share_outside > 0.1 and (boxes[:, 2:] > boxes[:, :2]).all() and (boxes[:, 2:] <= extent + _SLACK).all():
        message = (
            f"read as [x, y, width, height], {share_outside:.0%} of the {len(boxes)} boxes leave their image; "
            "read as two corners, none does"
        )
        return [("boxes look like [x0, y0, x1, y1]", message)]
    return []


def _floats(rows: list[list]) -> np.ndarray:
    try:
        return np.array(rows, dtype=np.float64).reshape(-1, 4)
    except OverflowError:  # integers beyond a float's range
        return np.array([[_float(value) for value in row] for row in rows]).reshape(-1, 4)


def _float(value) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check_fields(annotations: list[dict], positions: list[int], found: Findings) -> None:
    """``iscrowd`` and ``area``, which pycocotools needs, too."""
    for position in positions:
        entry = annotations[position]
        crowd = entry.setdefault("iscrowd", 0)
        if type(crowd) is not int or not 0 <= crowd <= 1:
            understood = crowd_of(crowd)
            which = f"annotation {entry['id']} (image {entry['image_id']}) has iscrowd {crowd!r:.60}"
            if understood is None:
                found.error("iscrowd", f"{which}; expected 0 or 1", position)
                continue
            found.warn("iscrowd is not 0 or 1, but can be understood", f"{which}, taken as {understood}")
            entry["iscrowd"] = understood
        area = entry.get("area", 0)
        if "area" in entry and type(area) in _NUMBERS and 0 <= area < LARGEST:
            continue
        width, height = entry["bbox"][2:]
        if "area" in entry:
            found.warn(
                "area is no size (computed from the box)",
                f"annotation {entry['id']} (image {entry['image_id']}) has area {area!r:.60}",
            )
        entry["area"] = max(width, 0) * max(height, 0)


def crowd_of(value) -> int | None:
    """0 or 1 for what can only mean that, else None."""
    if value is None:
        return 0
    if isinstance(value, str):
        return {"0": 0, "1": 1, "false": 0, "true": 1}.get(value.strip().lower())
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return int(value)
    return None


def _check_keypoints(annotations: list[dict], positions: list[int], found: Findings) -> None:
    for position in positions:
        entry = annotations[position]
        if "keypoints" not in entry:
            continue
        points = entry["keypoints"]
        which = f"annotation {entry['id']} (image {entry['image_id']}) has keypoints {points!r:.60}"
        if points is None:
            found.warn("keypoints are null (taken for none)", which)
            del entry["keypoints"]
        elif not isinstance(points, list) or len(points) % 3 or not all(map(is_number, points)):
            found.error("keypoints", f"{which}; expected [x, y, visibility, …], finite numbers", position)
        elif any(abs(value) >= LARGEST for value in points):
            found.error("keypoints", f"{which}; expected pixels", position)


# Segmentations


def _check_segmentations(annotations: list[dict], positions: list[int], image_sizes: Mapping, found: Findings) -> None:
    having = [position for position in positions if "segmentation" in annotations[position]]
    for start in range(0, len(having), _CHUNK):
        chunk = having[start : start + _CHUNK]
        for position in _not_plain(annotations, chunk, image_sizes):
            _check_segmentation(position, annotations[position], image_sizes, found)


def _not_plain(annotations: list[dict], positions: list[int], image_sizes: Mapping) -> list[int]:
    """Those whose segmentation is not simply a list of polygons of a modest size, to be looked at singly."""
    odd, numbers = [], array("d")
    owner, lengths, reach = [], [], []
    for position in positions:
        segmentation = annotations[position]["segmentation"]
        if type(segmentation) is not list or not segmentation:
            odd.append(position)
            continue
        try:
            for polygon in segmentation:
                numbers.fromlist(polygon)
                lengths.append(len(polygon))
                owner.append(position)
        except (TypeError, OverflowError):  # no list, or of something else than numbers
            odd.append(position)
        size = image_sizes[annotations[position]["image_id"]]
        reach += [reach_of(size)] * (len(owner) - len(reach))
    if not owner:
        return odd
    low, high, bad = judge_polygons(np.frombuffer(numbers, dtype=np.float64), np.array(lengths))
    limits = np.array(reach)
    bad |= ~((low >= -limits) & (high <= limits))  # comparisons with NaN are false
    return sorted({*odd, *np.array(owner)[bad].tolist()})


def judge_polygons(values: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of polygons, one after another in ``values``, ``counts`` numbers each: the lowest and the highest number of each,
    and whether it is to be looked at singly, being none or perhaps too long."""
    bad = (counts < 6) | (counts % 2 != 0)
    low, high = np.zeros(len(counts)), np.zeros(len(counts))
    full = counts > 0
    if full.any():
        starts = (np.cumsum(counts) - counts)[full]
        low[full], high[full] = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
        with np.errstate(invalid="ignore"):
            bad |= ~((high - low) * counts < _LONGEST_POLYGON)
    return low, high, bad


def reach_of(size: Size | None) -> float:
    """How far from 0 a coordinate may be, in pixels: far enough for any slip of an annotator."""
    return 1e5 if size is None else 1000.0 + 10 * max(size)


def _check_segmentation(position: int, entry: dict, image_sizes: Mapping, found: Findings) -> None:
    size = image_sizes[entry["image_id"]]
    which = f"annotation {entry['id']} (image {entry['image_id']})"
    segmentation = entry["segmentation"]
    if isinstance(segmentation, list) and not (segmentation and all(isinstance(part, dict) for part in segmentation)):
        problem = next((p for p in (polygon_problem(polygon, size) for polygon in segmentation) if p), None)
        if problem is None and len(segmentation) > 2 and all(len(polygon) == 2 for polygon in segmentation):
            problem = f"{segmentation!r:.60}; expected a list of polygons [x, y, x, y, …], not a list of points"
        kept = [polygon for polygon in segmentation if isinstance(polygon, list) and len(polygon) >= 6]
        if problem is None and 0 < len(kept) < len(segmentation):
            found.warn(
                "polygon of fewer than three points (left out)", f"{which} has {len(segmentation) - len(kept)} of them"
            )
    elif segmentation is None:
        problem, kept = None, []
    else:
        parts = segmentation if isinstance(segmentation, list) else [segmentation]
        kept = segmentation
        problem = next((p for p in (rle_problem(part, size) for part in parts) if p), None)
        if (
            problem is None
            and isinstance(segmentation, list)
            and not all(isinstance(part["counts"], list) for part in parts)
        ):
            problem = "a list of compressed run-length encodings; expected one of them, or polygons"
    if problem is not None:
        found.error("segmentation", f"{which} has as segmentation {problem}", position)
    elif kept:
        entry["segmentation"] = kept
    else:
        found.warn("empty segmentation (an empty mask)", f"{which} has segmentation {segmentation!r:.80}")
        width, height = size or (0, 0)
        # pycocotools fails on an empty list.
        entry["segmentation"] = {"size": [height, width], "counts": [height * width]} if size else []


def polygon_problem(polygon, size: Size | None) -> str | None:
    expected = "expected a list of polygons [x, y, x, y, …]"
    if not isinstance(polygon, list):
        return f"a list with {polygon!r:.60}; {expected}"
    for value in polygon:
        if isinstance(value, (list, dict)):
            return f"a polygon with the point {value!r:.60}; {expected}, without brackets around the points"
        if not is_number(value):
            return f"a polygon with {value!r:.60}; {expected}, finite numbers"
    if len(polygon) % 2:
        return f"a polygon of {len(polygon)} numbers; {expected}, an even count"
    where = f"an image of {size[0]}x{size[1]} pixels" if size else "any image"
    if polygon and max(map(abs, polygon)) > reach_of(size):
        reach = f"from {_float(min(polygon)):.6g} to {_float(max(polygon)):.6g}"
        return f"a polygon that reaches {reach}; that is far from {where}"
    if len(polygon) < 6:
        return None
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    length = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()
    if length > _LONGEST_POLYGON:
        return f"a polygon that is {length:.6g} pixels long; too long for {where}"
    return None


def rle_problem(rle, size: Size | None) -> str | None:
    if not isinstance(rle, dict):
        return f"{rle!r:.60}; expected polygons [[x, y, x, y, …], …] or a run-length encoding {{size, counts}}"
    own, counts = rle.get("size"), rle.get("counts")
    if not isinstance(own, list) or len(own) != 2 or not all(is_integer(side) and side > 0 for side in own):
        return f"a run-length encoding of size {own!r:.60}; expected [height, width]"
    if size is not None and tuple(own) != (size[1], size[0]):
        return f"a run-length encoding of size [height, width] = {own}, but its image is {size[0]}x{size[1]} pixels"
    pixels = own[0] * own[1]
    if size is None and pixels > _LARGEST_MASK:
        return f"a run-length encoding of size {own}; too large for an image"
    if isinstance(counts, list):
        # Before all are looked at: no image needs more runs than it has pixels, and one of no pixels in front.
        if len(counts) > 2 * pixels + 2 or not all(is_integer(count) and count >= 0 for count in counts):
            return f"a run-length encoding with counts {counts!r:.60}; expected integers of at least 0"
        total = sum(counts)
    elif isinstance(counts, str):
        total = _compressed_total(counts)
        if total is None:
            return f"a run-length encoding with counts {counts!r:.60}; they are no compressed counts"
    else:
        return f"a run-length encoding with counts {counts!r:.60}; expected a list of integers or a text"
    if total != pixels:
        return f"a run-length encoding of {total} pixels; its size {own} has {pixels}"
    return None


def _compressed_total(text: str) -> int | None:
    """Sum of the counts of a compressed run-length encoding, or None if it is none.

    Six bits a character, from '0': five of the number, lowest first, and whether more follow; the sign is the highest
    bit of the last five. From the fourth number on, each is the difference from the last but one.
    """
    try:
        codes = np.frombuffer(text.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    last = np.flatnonzero((codes & 32) == 0)
    starts = np.concatenate(([0], last[:-1] + 1))
    if (last - starts).max() > 7:  # more than 40 bits: no image has so many pixels
        return None
    place = np.arange(len(codes)) - np.repeat(starts, last - starts + 1)
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    values -= ((codes[last] & 16) != 0) * (np.int64(1) << (5 * (last - starts + 1)))
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return int(values.sum()) if values.min() >= 0 else None
