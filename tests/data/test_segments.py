"""Panoptic annotations as columns: the same items and the same words as of the json's own objects, and one cache."""

import json
import mmap
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.criterion import id2rgb
from detr_fast.data import CocoDetection, CocoPanoptic, columns, read_panoptic, segments, store
from detr_fast.data.columns import OddAnnotations
from detr_fast.evaluation import PanopticEvaluator
from detr_fast.geometry.boxes import masks_to_boxes

WIDTH, HEIGHT = 8, 6
IDS = [300, 70000, 0]  # two rows of pixels of each, in every picture


def content() -> dict:
    """Images and annotations in two orders that are not that of the ids; texts with brackets, quotes and umlauts."""
    extra = {"note": 'a "quoted" \\" ]},{', "more": {"a": ["}, {", "\\"]}}
    size = {"width": WIDTH, "height": HEIGHT}
    images = [{"id": i, "file_name": f"{name}.png", **size, **extra} for i, name in ((7, "c"), (-3, "ä/b"), (5, "a"))]
    listed = [
        {"id": 300, "category_id": 1, "area": 15, "iscrowd": 0, "bbox": [0, 0, 8, 2], **extra},
        {"id": 70000, "category_id": 120, "area": 1 << 40, "iscrowd": 1, "bbox": [0, 2, 8, 2]},
        {"id": 0, "category_id": 1, "iscrowd": 0, "area": 0},
    ]
    annotations = [
        {"image_id": 5, "file_name": "a.png", "segments_info": [], "id": "not used"},
        {"image_id": 7, "file_name": "c.png", "segments_info": listed[::-1]},
        {"segments_info": [*listed[:2], listed[0]], "file_name": "ä/b.png", "image_id": -3},  # one of them twice
    ]
    categories = [
        {"id": 120, "name": "sky", "isthing": 0, "color": [1, 2, 3]},
        {"id": 1, "name": "dog", "isthing": 1},
        {"id": 3, "name": "cat"},
    ]
    return {"info": {}, "images": images, "licenses": [{}], "annotations": annotations, "categories": categories}


@pytest.fixture
def folder(tmp_path):
    pixels = np.repeat(np.array(IDS), 2)[:, None].repeat(WIDTH, axis=1)
    for name in ("c", "ä/b", "a"):
        for kind, picture in (("images", np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8)), ("png", id2rgb(pixels))):
            path = tmp_path / kind / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    return tmp_path


def written(folder, data) -> str:
    path = folder / "ann.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


def made(folder, **options) -> CocoPanoptic:
    return CocoPanoptic(folder / "images", folder / "png", folder / "ann.json", **options)


def expected_target(annotation: dict, image: dict) -> dict[str, torch.Tensor]:
    """What the json's objects give for an image of `folder`."""
    listed = annotation["segments_info"]
    pixels = np.repeat(np.array(IDS), 2)[:, None].repeat(WIDTH, axis=1)
    masks = torch.from_numpy(pixels == np.array([s["id"] for s in listed], dtype=np.int64)[:, None, None])
    target = {"image_id": torch.tensor([image["id"]]), "masks": masks.to(torch.uint8)}
    target["labels"] = torch.tensor([s["category_id"] for s in listed], dtype=torch.int64)
    target["boxes"] = masks_to_boxes(masks)
    for name in ("iscrowd", "area"):
        target[name] = torch.tensor([s[name] for s in listed], dtype=torch.int64)
    return target | dict.fromkeys(("size", "orig_size"), torch.tensor([HEIGHT, WIDTH]))


def check_against_objects(dataset: CocoPanoptic, whole: dict) -> None:
    """``whole``: what ``read_panoptic`` gives."""
    assert len(dataset) == len(whole["images"]) and list(dataset.named()) == [
        {"id": image["id"], "file_name": image["file_name"]} for image in whole["images"]
    ]
    assert list(dataset.named_segments()) == [
        {"id": entry["image_id"], "file_name": entry["file_name"]} for entry in whole.get("annotations", [])
    ]
    assert dataset.store.meta["categories"] == whole["categories"]
    assert dataset.thing_classes == [c["id"] for c in whole["categories"] if c.get("isthing", 1)]
    for index, image in enumerate(whole["images"]):
        assert dataset.file_name(index) == image["file_name"]
        assert dataset.get_height_and_width(index) == (image["height"], image["width"])
        assert dataset.image_size(index) == dataset.planned_size(index)[::-1] == (image["width"], image["height"])
        if "annotations" not in whole:
            continue
        entry = whole["annotations"][index]
        assert dataset.store.annotation(index) == {
            "image_id": entry["image_id"],
            "file_name": entry["file_name"],
            "segments_info": [
                {
                    **{key: segment[key] for key in ("id", "category_id", "iscrowd")},
                    "area": int(segment["area"]),  # as a tensor of integers takes it
                }
                for segment in entry["segments_info"]
            ],
        }


@pytest.mark.parametrize("block", [1, 50, 300, 1 << 20])
@pytest.mark.parametrize("library", ["orjson", "json"])
@pytest.mark.parametrize("processes", [1, 3])
def test_items_are_equal_bit_for_bit(folder, monkeypatch, block, library, processes):
    monkeypatch.setattr(columns, "_BLOCK", block)
    monkeypatch.setattr(columns, "_SHARED", 0)
    monkeypatch.setattr(columns, "_num_processes", lambda: processes)
    if library == "json":
        monkeypatch.setattr(columns, "orjson", None)
    monkeypatch.setattr(segments, "read_panoptic", lambda _: pytest.fail("the json was read whole"))
    path = written(folder, content())
    dataset, whole = made(folder), read_panoptic(path)
    check_against_objects(dataset, whole)
    assert dataset.store.image_ids() == [-3, 5, 7] and dataset.class_names == {120: "sky", 1: "dog", 3: "cat"}
    for index, (image, entry) in enumerate(zip(whole["images"], whole["annotations"], strict=True)):
        target, expected = dataset[index][1], expected_target(entry, image)
        assert target.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(target[name], value) and target[name].dtype == value.dtype, name
            assert target[name].is_contiguous() and target[name].clone().zero_().eq(0).all()
    assert "coco" not in vars(dataset)
    assert dataset.coco == whole and dataset.coco is dataset.coco
    last = dataset[-1][1]  # as a list's index
    assert all(torch.equal(last[name], value) for name, value in dataset[2][1].items())
    assert torch.utils.data.Subset(dataset, [2, 0])[1][1]["image_id"].tolist() == [-3]
    for index in (3, -4):
        with pytest.raises(IndexError):
            dataset[index]


UNUSUAL = {  # allowed, and rare: by the columns or, where "whole", by way of the json's own objects
    "crowd as true": ("columns", lambda c: c["annotations"][1]["segments_info"][0].update(iscrowd=True)),
    "crowd as a float": ("columns", lambda c: c["annotations"][1]["segments_info"][0].update(iscrowd=1.0)),
    "fractions of area": ("columns", lambda c: c["annotations"][1]["segments_info"][0].update(area=12.75)),
    "a large area": ("columns", lambda c: c["annotations"][1]["segments_info"][0].update(area=(1 << 62) + 1)),
    "both": ("columns", lambda c: [s.update(area=a) for s, a in zip(
        c["annotations"][1]["segments_info"], ((1 << 62) + 1, 0.5, 1e3), strict=True)]),
    "nan where nobody looks": ("whole", lambda c: c["images"][0].update(more=float("nan"))),
    "half a surrogate pair": ("whole", lambda c: c["images"][0].update(file_name="\ud800.png")),
    "half a pair in a png": ("whole", lambda c: c["annotations"][0].update(file_name="\ud800.png")),
    "a wide image": ("whole", lambda c: c["images"][0].update(width=10**30)),
    "a size in an annotation": ("whole", lambda c: c["annotations"][0].update(width=5)),
    "an image_id in an image": ("whole", lambda c: c["images"][0].update(image_id=5)),
    "no annotations": ("columns", lambda c: c.pop("annotations")),
    "no annotations, an id twice": ("whole", lambda c: (c.pop("annotations"), c["images"].append(c["images"][0]))),
    "no images": ("columns", lambda c: c.update(images=[], annotations=[])),
}  # fmt: skip


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_taken_as_it_was(folder, monkeypatch, name):
    monkeypatch.setattr(store, "SMALLEST", 0)
    way, change = UNUSUAL[name]
    data = content()
    change(data)
    path = written(folder, data)
    if way == "whole":
        with pytest.raises(OddAnnotations):
            segments.read_segments(path)
    else:
        segments.read_segments(path)
    dataset, whole = made(folder), read_panoptic(path)
    check_against_objects(dataset, whole)
    if name in ("fractions of area", "both", "crowd as a float"):
        expected = expected_target(dataset.coco["annotations"][2], dataset.coco["images"][2])
        assert all(torch.equal(dataset[2][1][key], value) for key, value in expected.items())
    if name == "no annotations":
        assert sorted(dataset[0][1]) == ["image_id", "orig_size", "size"]
    assert len(caches(folder)) == (way == "columns")
    for again in (made(folder), pickle.loads(pickle.dumps(dataset))):
        check_against_objects(again, whole)


NAN, BIG = float("nan"), 10**30
ODD = [
    *(("images", "id", value) for value in ("1", None, NAN, BIG, 7, True, [1])),
    *(("images", "width", value) for value in (None, "96", 0, NAN, -1, True, 1.0, 1 << 64)),
    *(("images", "file_name", value) for value in (None, 5, "", " ", "a\0")),
    *(("images", "image_id", value) for value in ("5", None)),
    *(("images", "segments_info", value) for value in (5, [])),
    *(("annotations", "image_id", value) for value in ("1", None, 7, 2, BIG, [1])),
    *(("annotations", "segments_info", value) for value in (None, {}, [None], ["x"], "", [[]])),
    *(("annotations", "file_name", value) for value in (None, 3, "")),
    *(("annotations", "width", value) for value in (None, 0)),
    *(("categories", "id", value) for value in (-1, "1", None, NAN, 3, BIG)),
    *(("categories", "name", value) for value in ([], True, None)),
    *(("segments", "id", value) for value in ("5", None, -1, 1 << 24, NAN, 1.0, True, BIG)),
    *(("segments", "category_id", value) for value in ("1", None, 7, [1], {}, 1.0, True, BIG)),
    *(("segments", "iscrowd", value) for value in ("0", None, 2, NAN, [], -1)),
    *(("segments", "area", value) for value in ("9", None, NAN, float("inf"), -1, -0.5, BIG, 2.0**63, 1 << 63, True)),
]


@pytest.mark.parametrize("where, key, value", ODD, ids=str)
@pytest.mark.parametrize("library", ["orjson", "json"])
def test_the_same_words_about_what_is_odd(folder, monkeypatch, library, where, key, value):
    if library == "json":
        monkeypatch.setattr(columns, "orjson", None)
    for change in ("set", "drop"):
        data = content()
        entries = data["annotations"][1]["segments_info"] if where == "segments" else data[where]
        if change == "set":
            entries[1][key] = value
        else:
            entries[1].pop(key, None)
        path = written(folder, data)
        try:
            whole = read_panoptic(path)
        except ValueError as error:
            with pytest.raises(ValueError, match=f"^{re.escape(str(error))}$"):
                made(folder)
        else:
            check_against_objects(made(folder), whole)


@pytest.mark.parametrize("data", [
    [], 5, {}, {"images": []}, {"images": [], "categories": []}, {"images": {}, "categories": [{"id": 1}]},
    {"images": [], "annotations": {}, "categories": [{"id": 1}]}, {"images": [5], "categories": [{"id": 1}]},
    {"images": [], "annotations": [5], "categories": [{"id": 1}]}, {"images": [], "categories": 5},
], ids=str)  # fmt: skip
def test_the_same_words_about_other_jsons(folder, data):
    path = written(folder, data)
    with pytest.raises(ValueError) as expected:
        read_panoptic(path)
    with pytest.raises(ValueError, match=f"^{re.escape(str(expected.value))}$"):
        made(folder)


def test_a_cut_file_is_refused_wherever_it_is_cut(folder):
    data = content()
    path = written(folder, data)
    text = (folder / "ann.json").read_text()
    for end in range(0, len(text), 3):
        (folder / "ann.json").write_text(text[:end])
        with pytest.raises(OddAnnotations):
            segments.read_segments(path)
    os.remove(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        made(folder)


def held(value):
    """What an object holds, however deep."""
    yield value
    if isinstance(value, (CocoPanoptic, store.MappedImages)):
        value = vars(value)
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from held(part)


@pytest.mark.parametrize("way", ["columns", "whole"])
def test_no_object_is_kept_for_a_segment(folder, way):
    data = content()
    if way == "whole":
        data["images"][0]["more"] = NAN
    written(folder, data)
    dataset = made(folder)
    dataset[0], dataset.store.annotation(2)

    def of_segments() -> list:
        return [part for part in held(dataset) if isinstance(part, dict) and "category_id" in part]

    assert not of_segments() and max(len(part) for part in held(dataset) if isinstance(part, (list, tuple))) <= 3
    assert len(dataset.coco["images"]) == 3 and len(of_segments()) == 6  # which are found where they are


# The cache


@pytest.fixture
def cached(folder, monkeypatch):
    """The json, whose cache file is kept although it is small."""
    monkeypatch.setattr(store, "SMALLEST", 0)
    return written(folder, content())


def caches(folder) -> list:
    return sorted(path for path in folder.iterdir() if "detr_fast" in path.name)


def everything(dataset: CocoPanoptic) -> list:
    return [dataset.store.annotation(index) for index in range(len(dataset))] + dataset.store.sizes.tolist()


def test_the_cache_is_used_until_the_json_changes(folder, cached, monkeypatch):
    first = made(folder)
    (file,) = caches(folder)
    with monkeypatch.context() as patched:
        for name in ("read_segments", "read_panoptic"):
            patched.setattr(segments, name, lambda *_: pytest.fail("the json was read"))
        again = made(folder)
        assert again.store.cache == str(file) and everything(again) == everything(first)
        assert not again.store.arrays["ids"].flags.writeable and again.thing_classes == first.thing_classes == [1, 3]
        check_against_objects(again, read_panoptic(cached))
    again[0][1]["labels"].zero_()  # items are copies
    assert everything(again) == everything(first)
    data = content()
    data["annotations"][2]["segments_info"].pop()
    written(folder, data)
    assert len(made(folder)[0][1]["labels"]) == 2 and len(first[0][1]["labels"]) == 3
    assert caches(folder) == [file]


def test_each_kind_has_its_own_cache(folder, cached):
    data = content()
    for number, entry in enumerate(data["annotations"]):
        entry |= {"id": number, "category_id": 1, "bbox": [0, 0, 2, 2], "area": 4}
    written(folder, data)
    panoptic, boxes = made(folder), CocoDetection(folder / "images", cached, None)
    assert sorted((boxes._store.cache, panoptic.store.cache)) == list(map(str, caches(folder)))
    assert len(boxes[0][1]["labels"]) == 1 and len(panoptic[0][1]["labels"]) == 3


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="the system keeps pages as it likes")
def test_a_process_keeps_no_page_of_what_it_has_read(folder, cached):
    dataset = made(folder)

    def kept() -> int:
        blocks = Path("/proc/self/smaps").read_text().split("VmFlags")
        (own,) = [block for block in blocks if dataset.store.cache in block]
        return int(own.split("Rss:")[1].split()[0])

    assert dataset.file_name(0) and kept() > 0
    assert len(dataset[0][1]["labels"]) == 3 and kept() == 0


@pytest.mark.parametrize("damage", ["truncated", "empty", "header", "directory", "areas", "footer"])
def test_a_damaged_cache_is_made_anew(folder, cached, damage):
    expected = everything(made(folder))
    (file,) = caches(folder)
    whole = file.read_bytes()
    file.unlink()  # it is mapped: another file takes its place
    at = {"header": -8, "directory": whole.rindex(b'"key"') + 30, "footer": -20}
    at["areas"] = whole.index(np.int64(1 << 40).tobytes()) + 5
    if damage in at:
        flipped = bytearray(whole)
        flipped[at[damage]] ^= 0xFF
        file.write_bytes(flipped)
    else:
        file.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
    assert everything(made(folder)) == expected and file.read_bytes() == whole


def test_where_the_cache_is(folder, cached, tmp_path_factory, monkeypatch):
    elsewhere = tmp_path_factory.mktemp("cache")
    made(folder, cache_dir=elsewhere / "new")
    assert len(caches(elsewhere / "new")) == 1 and not caches(folder)
    (elsewhere / "file").touch()  # no place at all: in memory
    nowhere = made(folder, cache_dir=elsewhere / "file")
    assert nowhere.store.cache is None
    check_against_objects(nowhere, read_panoptic(cached))
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere))
    writer = store._Writer.__init__

    def beside_is_read_only(self, cache):
        if cache.parent == folder:
            raise PermissionError
        writer(self, cache)

    monkeypatch.setattr(store._Writer, "__init__", beside_is_read_only)
    assert os.path.dirname(made(folder).store.cache) == str(elsewhere / "detr_fast") and not caches(folder)
    monkeypatch.setattr(store, "SMALLEST", 1 << 20)
    assert made(folder).store.cache is None


def test_what_cannot_be_kept_leaves_nothing(folder, cached, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store._Writer, "finished", full)
        assert made(folder).store.cache is None and not caches(folder)
    data = content()
    data["images"][0]["more"] = NAN  # read whole
    written(folder, data)
    assert made(folder).store.cache is None and not caches(folder)


def test_of_many_at_once_one_reads_the_json(folder, cached, monkeypatch):
    read = []

    def reading(path):
        read.append(1)
        return columns_of_path(path)

    columns_of_path = segments.read_segments
    monkeypatch.setattr(segments, "read_segments", reading)
    with ThreadPoolExecutor(6) as pool:
        made_ones = list(pool.map(lambda _: made(folder), range(6)))
    assert len(read) == 1 and len(caches(folder)) == 1
    assert all(everything(one) == everything(made_ones[0]) for one in made_ones)


def test_a_pickled_data_set_maps_the_file_itself(folder, cached):
    dataset = made(folder)
    assert dataset.coco and len(text := pickle.dumps(dataset)) < 3000
    copied = pickle.loads(text)
    assert "coco" not in vars(copied) and everything(copied) == everything(dataset)
    assert all(torch.equal(copied[0][1][name], value) for name, value in dataset[0][1].items())
    os.utime(cached, ns=(1, 1))
    made(folder)  # of a json that has changed: its cache is another one
    with pytest.raises(OSError, match="gone, damaged or of another json"):
        pickle.loads(text)


def test_evaluation_takes_the_columns(folder, cached, monkeypatch):
    data = content()
    data["annotations"][0]["segments_info"] = [{"id": 300, "category_id": 1, "area": 16, "iscrowd": 0}]
    for entry in data["annotations"][1:]:
        entry["segments_info"] = [s for s in entry["segments_info"] if s["id"] == 300][:1]
    written(folder, data)
    dataset = made(folder)
    prediction = {
        "image_id": 5,
        "file_name": "5.png",
        "png_string": (folder / "png" / "a.png").read_bytes(),
        "segments_info": [{"id": 300, "category_id": 1}, {"id": 70000, "category_id": 120}],
    }
    found = []
    for options in ({}, {"annotations": dataset.store}):
        evaluator = PanopticEvaluator(cached, folder / "png", None, **options)
        evaluator.update([prediction])
        with pytest.raises(ValueError, match="image id 6 is not among the 3 annotated images"):
            evaluator.update([prediction | {"image_id": 6}])
        found.append(evaluator.summarize())
        for name in ("read_segments", "read_panoptic"):
            monkeypatch.setattr(segments, name, lambda *_: pytest.fail("the json was read"))
    assert found[0] == found[1] and found[0]["per_class"][1]["pq"] == 1 and "coco" not in vars(dataset)
    data.pop("annotations")
    monkeypatch.undo()
    written(folder, data)
    with pytest.raises(ValueError, match="has no annotations to compare with"):
        PanopticEvaluator(cached, folder / "png", None)
