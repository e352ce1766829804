"""Annotation files with fields changed: check-data and the data set agree, and give the right targets or refuse.

Nothing else is raised, nothing hangs (an alarm) or fills the memory (a limit on the process).
"""

import contextlib
import copy
import json
import math
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from fuzzing import fuzz
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from detr_fast.criterion import id2rgb
from detr_fast.data import CocoDetection, CocoPanoptic, check_coco, check_panoptic, mend_file
from detr_fast.data.images import ImageReadError
from detr_fast.data.validation import refuse_outside

WIDTH, HEIGHT = 40, 30
SECONDS = 20
MEMORY = 2 << 30  # bytes more than before

numbers = st.one_of(
    st.integers(-50, 200),
    st.floats(-50, 200),
    st.sampled_from([0, 1, -1, 2**31, 2**63, -(2**63) - 1, 10**400, 1e300, 1e-300, math.nan, math.inf, -math.inf]),
)
odd = st.one_of(
    numbers,
    st.none(),
    st.booleans(),
    st.text(max_size=4),
    st.sampled_from(["1", "0", " 1 ", "true", "NaN", "1.png", "../1.png", "/etc/passwd", "a\0b", "\ud800.png"]),
    st.just("x" * 5000),
    st.lists(numbers, max_size=9),
    st.lists(st.lists(numbers, max_size=9), max_size=3),
    st.dictionaries(st.sampled_from(["size", "counts", "id"]), numbers | st.lists(numbers, max_size=4), max_size=2),
    st.fixed_dictionaries({
        "size": st.sampled_from([[HEIGHT, WIDTH], [WIDTH, HEIGHT], [10**6, 10**6], [0, 0]]),
        "counts": st.lists(st.integers(-5, 1300), max_size=6) | st.text(max_size=8)
        | st.sampled_from([[HEIGHT * WIDTH], [100, 200, 900], [0, 0, 0, 1200]]),
    }),
)  # fmt: skip
fields = {
    "images": ["id", "file_name", "width", "height", "license"],
    "annotations": ["id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "keypoints"],
    "categories": ["id", "name", "supercategory"],
}
kinds = st.sampled_from(["set", "set", "part", "drop", "twice"])
edits = st.lists(
    st.one_of([
        st.tuples(
            st.just(key), st.integers(0, 3), st.sampled_from(names), kinds, odd, st.integers(0, 7),
        )
        for key, names in fields.items()
    ]),
    min_size=1,
    max_size=3,
)  # fmt: skip


def changed(content, edits):
    content = copy.deepcopy(content)
    for key, place, name, kind, value, part in edits:
        entry = content[key][place % len(content[key])]
        if kind == "drop":
            entry.pop(name, None)
        elif kind == "twice":
            content[key].append(copy.deepcopy(entry))
        elif kind == "part" and isinstance(entry.get(name), list) and entry[name]:
            target = entry[name]
            if isinstance(target[0], list) and target[0]:
                target = target[0]
            target[part % len(target)] = value
        else:
            entry[name] = value
    return content


def good():
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "plate"}]}
    for i in (1, 2):
        content["images"].append({"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT})
        for k in (1, 2):
            x, y, w, h = 3 * i, 2 * k, 12, 10
            content["annotations"].append({
                "id": 2 * i + k, "image_id": i, "category_id": k, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]], "keypoints": [x, y, 2],
            })  # fmt: skip
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    ids = np.full((HEIGHT, WIDTH), 9)
    ids[5:15, 4:20] = 70000
    for name in ("images", "png"):
        (folder / name).mkdir()
    for i in (1, 2):
        Image.new("RGB", (WIDTH, HEIGHT), (90, 20 * i, 9)).save(folder / "images" / f"{i}.png")
        Image.fromarray(id2rgb(ids)).save(folder / "png" / f"{i}.png")
    return folder


@pytest.fixture(autouse=True, scope="module")
def limited_memory():
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def in_time():
    def late(*_):
        raise AssertionError(f"not done after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def crowd(entry):
    value = entry.get("iscrowd", 0)
    return value.strip().lower() in ("1", "true") if isinstance(value, str) else bool(value)


def expected_boxes(content, image_id):
    """Corners, clamped to the image, of the objects that have some area then."""
    boxes = []
    for entry in content["annotations"]:
        if entry["image_id"] == image_id and not crowd(entry):
            x, y, w, h = (np.float32(value) for value in entry["bbox"])
            box = [min(max(x, 0), WIDTH), min(max(y, 0), HEIGHT), min(max(x + w, 0), WIDTH), min(max(y + h, 0), HEIGHT)]
            if box[2] > box[0] and box[3] > box[1]:
                boxes.append((box, entry["category_id"]))
    return boxes


@fuzz(3000)
@given(edits=edits, masks=st.booleans())
def test_changed_annotations(folder, edits, masks):
    content, path = changed(good(), edits), folder / "ann.json"
    path.write_text(json.dumps(content))
    with in_time():
        report = check_coco(folder / "images", path, num_threads=1)
        str(report).encode()
        mend_file(folder / "images", path, folder / "mended.json")
        mended = check_coco(folder / "images", folder / "mended.json", num_threads=1)
        assert mended.ok or not report.ok, f"{mended}\n{report}"
        try:
            dataset = CocoDetection(folder / "images", path, None, masks)
            refuse_outside(folder / "images", dataset.coco.imgs.values(), path)
            dataset.check_files()
        except (ValueError, ImageReadError) as error:
            needs_masks = masks and "has no segmentation, but masks are asked for" in str(error)
            assert needs_masks or not report.ok, f"{error}\n{report}"
            assert "ann.json" in str(error) or isinstance(error, ImageReadError)
            return
        assert report.ok, str(report)
        for index, image_id in enumerate(dataset.ids):
            image, target = dataset[index]
            expected = expected_boxes(content, image_id)
            assert image.size == (WIDTH, HEIGHT) and dataset.image_size(index) == image.size
            assert target["labels"].tolist() == [label for _, label in expected]
            np.testing.assert_allclose(target["boxes"], np.reshape([box for box, _ in expected], (-1, 4)), rtol=1e-6)
            assert np.isfinite(target["area"]).all() and (target["area"] >= 0).all()
            if masks:
                assert target["masks"].shape == (len(expected), HEIGHT, WIDTH)
                assert set(target["masks"].unique().tolist()) <= {0, 1}


def good_panoptic():
    segments = [
        {"id": 9, "category_id": 1, "area": 9, "iscrowd": 0},
        {"id": 70000, "category_id": 2, "area": 5, "iscrowd": 0},
    ]
    return {
        "images": good()["images"],
        "annotations": [
            {"image_id": i, "file_name": f"{i}.png", "segments_info": copy.deepcopy(segments)} for i in (1, 2)
        ],
        "categories": good()["categories"],
    }


panoptic_edits = st.lists(
    st.tuples(
        st.sampled_from(["images", "annotations", "categories", "segments_info"]),
        st.integers(0, 1),
        st.sampled_from("id file_name width height image_id segments_info category_id area iscrowd".split()),
        st.sampled_from(["set", "drop", "twice"]),
        odd,
    ),
    min_size=1,
    max_size=2,
)  # fmt: skip


@fuzz(1500)
@given(edits=panoptic_edits)
def test_changed_panoptic_annotations(folder, edits):
    content, path = good_panoptic(), folder / "panoptic.json"
    for key, place, name, kind, value in edits:
        entries = content["annotations"][0].get(key) if key == "segments_info" else content[key]
        if not isinstance(entries, list) or not entries or not isinstance(entries[place % len(entries)], dict):
            continue
        entry = entries[place % len(entries)]
        if kind == "drop":
            entry.pop(name, None)
        elif kind == "twice":
            entries.append(copy.deepcopy(entry))
        else:
            entry[name] = value
    path.write_text(json.dumps(content))
    with in_time():
        report = check_panoptic(folder / "images", folder / "png", path, num_threads=1)
        str(report).encode()
        try:
            dataset = CocoPanoptic(folder / "images", folder / "png", path)
            refuse_outside(folder / "images", dataset.coco["images"], path)
            refuse_outside(folder / "png", dataset.coco.get("annotations", []), path)
            targets = [dataset[index][1] for index in range(len(dataset))]
        except (ValueError, ImageReadError) as error:
            assert not report.ok, f"{error}\n{report}"
            assert report.errors.get("annotation file", [str(error)]) == [str(error)]
            return
    for entry, target in zip(dataset.coco["annotations"], targets, strict=True):
        assert target["labels"].tolist() == [segment["category_id"] for segment in entry["segments_info"]]
        assert target["masks"].flatten(1).any(1).all()
