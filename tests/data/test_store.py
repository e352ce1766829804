"""Annotations as columns: the same items and the same words as from the json's own objects, in and out of the cache."""

import copy
import fcntl
import json
import mmap
import multiprocessing
import os
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast.data import CocoDetection, LineDetection, columns, store
from detr_fast.data.annotations import read_annotations, read_lines
from detr_fast.data.categories import Categories
from detr_fast.data.coco import read_categories
from detr_fast.data.columns import OddAnnotations
from detr_fast.data.validation import validate

WIDTH, HEIGHT = 60, 40
RUNS = {"size": [HEIGHT, WIDTH], "counts": [100, 50, HEIGHT * WIDTH - 150]}
TEXT = {"size": [HEIGHT, WIDTH], "counts": "0P[2"}  # one run, of all pixels


def content() -> dict:
    """Everything that columns take, and every warning that they know, in an order that is not that of the ids."""
    polygon = [1.25, 2, 30.5, 2.75, 30, 20, 5.1, 25]
    image = {"width": WIDTH, "height": HEIGHT, "extra": {"a": ['}, {"', "\\"]}}
    images = [{"id": i, "file_name": name, **image} for i, name in ((7, "c.png"), (-3, "ä/b.png"), (5, "a.png"))]
    images += [{"id": 9, "file_name": "a.png", "height": HEIGHT}, {"id": 8, "file_name": "e.png", **image}]
    annotation = {"category_id": 3, "iscrowd": 0, "area": 12.5, "bbox": [1, 2.5, 30, 20], "note": 'a "quoted" \\" ]},{'}
    annotations = [
        {**annotation, "id": 4, "image_id": 7, "segmentation": [polygon, [1, 1, 9, 1, 9, 9]]},
        {**annotation, "id": 3, "image_id": -3, "segmentation": RUNS, "keypoints": [9, 9.5, 2]},
        {**annotation, "id": 0, "image_id": 7, "segmentation": [[v + 3 for v in polygon]], "keypoints": []},
        {**annotation, "id": 11, "image_id": 7, "iscrowd": 1, "segmentation": TEXT},
        {**annotation, "id": 12, "image_id": 9, "area": 7, "bbox": [50, 5, 30, 3], "segmentation": [polygon]},
        {**annotation, "id": 13, "image_id": -3, "bbox": [5, 5, 0, 5], "segmentation": TEXT},
        {**annotation, "id": 14, "image_id": 5, "bbox": [200, 5, 3, 5], "segmentation": [polygon]},
    ]
    del annotations[0]["area"], annotations[2]["iscrowd"]
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    return {"info": {"x": [[1], "]"]}, "images": images, "annotations": annotations, "categories": categories, "z": []}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "ä").mkdir()
    for name in ("c.png", "ä/b.png", "a.png"):
        Image.new("RGB", (WIDTH, HEIGHT), "grey").save(tmp_path / name)
    Image.new("RGB", (HEIGHT, WIDTH)).save(tmp_path / "e.png")
    return tmp_path


def written(folder, data) -> str:
    path = folder / "ann.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("block", [1, 50, 300, 1 << 20])
@pytest.mark.parametrize("library", ["orjson", "json"])
def test_same_annotations_and_warnings_as_of_the_whole_file(folder, monkeypatch, block, library):
    monkeypatch.setattr(columns, "_BLOCK", block)
    if library == "json":
        monkeypatch.setattr(columns, "orjson", None)
    path = written(folder, content())
    got, categories, found = store.open_store(path, folder, masks=True)
    whole = read_annotations(path)
    sizes = {i: (WIDTH, HEIGHT) for i in (7, -3, 5, 9)} | {8: (HEIGHT, WIDTH)}
    expected = validate(whole, Categories.from_coco(whole["categories"]), sizes, masks=True)
    assert not expected.errors and list(found.lines(path)) == list(expected.lines(path)) and len(expected.warnings) == 8
    for image in whole["images"]:
        image["width"], image["height"] = sizes[image["id"]]
    listed = store.Listed(whole)
    read = {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "segmentation", "keypoints"}
    assert got.image_ids() == listed.image_ids() == [-3, 5, 7, 8, 9] and len(got) == len(listed)
    for index in range(len(got)):
        assert got.image_id(index) == listed.image_id(index) and got.size(index) == listed.size(index)
        assert got.file_name(index) == listed.file_name(index)
        assert got.annotations(index) == [
            {key: value for key, value in entry.items() if key in read} for entry in listed.annotations(index)
        ]


def test_items_are_equal_bit_for_bit(folder, monkeypatch):
    pytest.importorskip("pycocotools")
    path = written(folder, content())
    mapped = CocoDetection(folder, path, None, True, cache_dir=folder)
    assert isinstance(mapped._store, store.Mapped)
    monkeypatch.setattr("detr_fast.data.coco.open_store", refuse)
    listed = CocoDetection(folder, path, None, True)
    assert isinstance(listed._store, store.Listed) and mapped.ids == listed.ids
    for index in range(len(listed)):
        (image, target), (other, expected) = mapped[index], listed[index]
        assert np.array_equal(image, other) and target.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(target[name], value) and target[name].dtype == value.dtype, name
    assert mapped.coco.dataset == listed.coco.dataset and mapped.coco is mapped.coco


def refuse(*_, **__):
    raise OddAnnotations


def test_lines_are_equal(folder, monkeypatch):
    data = content()
    data["categories"] = [{"id": "3", "name": "line"}]
    for entry in data["annotations"]:
        x, y, w, h = entry.pop("bbox")
        entry["line"] = [x + w, y, -w, h]
    path = written(folder, data)
    mapped = LineDetection(folder, path, None)
    assert isinstance(mapped._store, store.Mapped)
    monkeypatch.setattr("detr_fast.data.coco.open_store", refuse)
    listed = LineDetection(folder, path, None)
    whole = read_lines(path)
    assert [a["bbox"] for a in mapped._store.annotations(2)] == [
        a["bbox"] for a in whole["annotations"] if a["image_id"] == 7
    ]
    for index in range(len(listed)):
        for name, value in listed[index][1].items():
            assert torch.equal(mapped[index][1][name], value), name


@pytest.mark.parametrize("block", [1, 64, 1 << 20])
def test_a_cut_file_is_refused_wherever_it_is_cut(folder, monkeypatch, block):
    monkeypatch.setattr(columns, "_BLOCK", block)
    data = content()
    data["images"], data["annotations"] = data["images"][:1], data["annotations"][:1]
    path = written(folder, data)
    text = (folder / "ann.json").read_text()
    store.open_store(path, folder)
    for end in range(0, len(text), 7 if block == 1 else 1):
        (folder / "ann.json").write_text(text[:end])
        with pytest.raises(OddAnnotations):
            store.open_store(path, folder)


@pytest.mark.parametrize(
    "old, new",
    [
        ("}, {", "} {"),
        ("}, {", "},, {"),
        ("}], ", "},], "),
        ("}, {", "}; {"),
        ("}, {", "]}, {"),
        ("12.5", "NaN"),
        ("12.5", "01"),
        ('"z": []', '"z": [1,]'),
    ],
)
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_no_json_is_refused(folder, monkeypatch, block, old, new):
    monkeypatch.setattr(columns, "_BLOCK", block)
    path = written(folder, content())
    text = (folder / "ann.json").read_text().replace('}, {\\"', "")  # in a text it may stand
    assert old in text
    for at in (text.index(old), text.rindex(old)):
        (folder / "ann.json").write_text(text[:at] + new + text[at + len(old) :])
        with pytest.raises(OddAnnotations):
            store.open_store(path, folder)


@pytest.fixture
def cached(folder, monkeypatch):
    """The json, whose cache file is kept although it is small, and the function that opens it."""
    monkeypatch.setattr(store, "SMALLEST", 0)
    path = written(folder, content())
    return path, lambda **options: store.open_store(path, folder, **options)[0]


def caches(folder) -> list:
    return sorted(path for path in folder.iterdir() if "detr_fast" in path.name)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="the system keeps pages as it likes")
def test_a_process_keeps_no_page_of_what_it_has_read(cached):
    """Else a worker holds, in time, the whole cache: a file system may map megabytes for one number."""
    _, opened = cached
    mapped = opened()

    def held() -> int:
        blocks = Path("/proc/self/smaps").read_text().split("VmFlags")
        (own,) = [block for block in blocks if mapped.cache in block]
        return int(own.split("Rss:")[1].split()[0])

    mapped.image_id(0)
    assert held() > 0
    assert mapped.annotations(2) and held() == 0


def test_the_cache_is_used_until_the_json_changes(folder, cached, monkeypatch):
    path, opened = cached
    first = opened()
    (file,) = caches(folder)
    with monkeypatch.context() as patched:
        patched.setattr(store, "read_columns", lambda *_, **__: pytest.fail("the json was read"))
        again = opened()
        assert all(again.annotations(i) == first.annotations(i) for i in range(5)) and again.sizes.tolist() == [
            [WIDTH, HEIGHT], [WIDTH, HEIGHT], [WIDTH, HEIGHT], [HEIGHT, WIDTH], [WIDTH, HEIGHT]]  # fmt: skip
        assert not again.arrays["boxes"].flags.writeable
    data = content()
    data["annotations"][0]["bbox"] = [2, 2, 9, 9]
    written(folder, data)
    assert opened().annotations(2)[0]["bbox"] == [2, 2, 9, 9] and first.annotations(2)[0]["bbox"] == [1, 2.5, 30, 20]
    assert caches(folder) == [file]


def test_other_files_sizes_are_judged_anew(folder, cached):
    opened = cached[1]
    opened()
    Image.new("RGB", (20, 20)).save(folder / "c.png")
    with pytest.raises(OddAnnotations):  # a run-length encoding of another size
        opened()


@pytest.mark.parametrize("damage", ["truncated", "empty", "header", "directory", "boxes", "polygons", "footer"])
def test_a_damaged_cache_is_made_anew(folder, cached, damage):
    opened = cached[1]
    first = opened()
    expected = [first.annotations(i) for i in range(5)]
    (file,) = caches(folder)
    whole = file.read_bytes()
    file.unlink()  # it is mapped: another file takes its place
    at = {"header": -8, "directory": whole.rindex(b'"key"') + 30, "footer": -20}
    at |= {"boxes": whole.index(np.float64(2.5).tobytes()), "polygons": whole.index(np.float64(30.5).tobytes())}
    if damage in at:
        flipped = bytearray(whole)
        flipped[at[damage]] ^= 0xFF
        file.write_bytes(flipped)
    else:
        file.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"")
    again = opened()
    assert [again.annotations(i) for i in range(5)] == expected and file.read_bytes() == whole


def test_where_the_cache_is(folder, cached, tmp_path_factory, monkeypatch):
    opened = cached[1]
    elsewhere = tmp_path_factory.mktemp("cache")
    opened(cache_dir=elsewhere / "new")
    assert len(caches(elsewhere / "new")) == 1 and not caches(folder)
    # No place at all: in memory.
    (elsewhere / "file").touch()
    assert opened(cache_dir=elsewhere / "file").cache is None
    # Nothing can be written beside the json.
    monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere))
    writer = store._Writer.__init__

    def beside_is_read_only(self, cache):
        if cache.parent == folder:
            raise PermissionError
        writer(self, cache)

    monkeypatch.setattr(store._Writer, "__init__", beside_is_read_only)
    assert os.path.dirname(opened().cache) == str(elsewhere / "detr_fast") and not caches(folder)
    monkeypatch.setattr(store, "SMALLEST", 1 << 20)
    assert opened().cache is None


def test_a_full_disk_leaves_nothing(folder, cached, monkeypatch):
    opened = cached[1]

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(store._Writer, "append", full)
    assert opened().cache is None and not caches(folder)


def test_many_at_once(folder, cached):
    opened = cached[1]
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: opened(), range(8)))
    assert len(caches(folder)) == 1
    assert all(s.annotations(2) == stores[0].annotations(2) for s in stores)


def test_of_many_at_once_one_reads_the_json(folder, cached, monkeypatch):
    opened = cached[1]
    read, started = [], threading.Event()

    def reading(*args, **options):
        read.append(1)
        started.set()
        time.sleep(0.3)
        return columns.read_columns(*args, **options)

    monkeypatch.setattr(store, "read_columns", reading)
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(opened)
        started.wait()
        others = [pool.submit(opened) for _ in range(4)]
        assert all(other.result().cache == first.result().cache for other in others)
    assert len(read) == 1
    # The next one with a change waits for nobody: the lock is gone.
    (folder / "ann.json").write_text((folder / "ann.json").read_text() + " ")
    opened()
    assert len(read) == 2


def test_a_cache_that_was_made_just_before_the_turn_is_taken(folder, cached, monkeypatch):
    opened, mapped, looked = cached[1], store._mapped, []

    def late(*args):
        looked.append(1)
        if len(looked) == 1:
            monkeypatch.setattr(store, "_mapped", mapped)
            opened()  # another makes it between the first look and the turn
            monkeypatch.setattr(store, "read_columns", lambda *a, **k: pytest.fail("the json is read again"))
            return None
        return mapped(*args)

    monkeypatch.setattr(store, "_mapped", late)
    assert opened().cache is not None


def test_those_who_waited_for_nothing_read_the_json_themselves(folder, cached, monkeypatch):
    opened = cached[1]
    started, failed = threading.Event(), []

    def reading(*args, **options):
        if not started.is_set():
            started.set()
            time.sleep(0.2)
            failed.append(1)
            raise OddAnnotations
        return columns.read_columns(*args, **options)

    monkeypatch.setattr(store, "read_columns", reading)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(opened)
        started.wait()
        assert len(pool.submit(opened).result(timeout=10)) == 5 and failed
        with pytest.raises(OddAnnotations):
            first.result()


@pytest.fixture
def several(monkeypatch):
    """Three processes convert even a small json, a few entries at a time."""
    monkeypatch.setattr(columns, "_BLOCK", 300)
    monkeypatch.setattr(columns, "_SHARED", 0)
    monkeypatch.setattr(columns, "_num_processes", lambda: 3)


def read(path, **options):
    polygons = [np.zeros(0)]
    got = columns.read_columns(path, polygons.append, lines=False, **options)
    return {**got.arrays, "polygons": np.concatenate(polygons)}, got.meta


@pytest.mark.parametrize("end", [None, "killed"])
def test_several_processes_give_the_same_columns(folder, monkeypatch, several, end):
    data = content()
    data["annotations"] += [
        {**entry, "id": entry["id"] + 100 * n} for n in range(1, 9) for entry in data["annotations"]
    ]
    path = written(folder, data)
    arrays, meta = read(path)
    assert len(meta["pieces"]["annotations"]) > 12
    if end == "killed":  # in the middle of its work
        convert, here = columns._piece, os.getpid()

        def dies(entries, lines):
            if os.getpid() != here and any(entry["id"] == 404 for entry in entries):
                os.kill(os.getpid(), signal.SIGKILL)
            return convert(entries, lines)

        monkeypatch.setattr(columns, "_piece", dies)
        again, meta_again = read(path)
    else:
        monkeypatch.setattr(columns, "_num_processes", lambda: 1)
        again, meta_again = read(path)
    assert again.keys() == arrays.keys() and meta_again == meta
    for name, values in arrays.items():
        assert values.dtype == again[name].dtype and np.array_equal(values, again[name]), name
    assert not multiprocessing.active_children()


def test_several_processes_refuse_what_is_odd(folder, several):
    data = content()
    data["annotations"][-1]["bbox"] = [1, 2, 3]
    path = written(folder, data)
    with pytest.raises(OddAnnotations, match="length"):
        read(path)
    assert not multiprocessing.active_children()


def test_workers_end_with_the_process_that_forked_them(folder, cached, several):
    data = content()
    data["annotations"] = [{**data["annotations"][0], "id": n, "note": "x" * 3000} for n in range(3000)]
    path = written(folder, data)

    def stops(_):
        os.kill(os.getpid(), signal.SIGKILL)

    opening = multiprocessing.get_context("fork").Process(
        target=columns.read_columns, args=(path, stops), kwargs={"lines": False}
    )
    with store._turn(path):  # the lock is inherited by all of them
        opening.start()
        opening.join()
        assert opening.exitcode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    with open(path, "rb") as file:
        while time.monotonic() < deadline:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(0.05)
    pytest.fail("a worker is still there")


def test_no_process_is_forked_beside_threads(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert columns._num_processes() == (columns._MOST_PROCESSES if threading.active_count() == 1 else 1)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(columns._num_processes).result() == 1
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert columns._num_processes() == 1


def test_a_pickled_data_set_maps_the_file_itself(folder, cached):
    path = cached[0]
    data = CocoDetection(folder, path, None)
    assert data.ids and data._store.cache is not None
    text = pickle.dumps(data)
    assert len(text) < 3000
    copied = pickle.loads(text)
    assert copied.ids == data.ids and copied.image_size(3) == (HEIGHT, WIDTH)
    assert torch.equal(copied[2][1]["boxes"], data[2][1]["boxes"])
    # Whoever opens the changed json makes another cache, which this data set's workers must not take for theirs.
    os.utime(path, ns=(1, 1))
    assert CocoDetection(folder, path, None)._store.cache == data._store.cache
    with pytest.raises(OSError, match="gone, damaged or of another json"):
        pickle.loads(text)


def test_categories_alone(folder):
    data = content()
    data["annotations"][0]["bbox"] = None  # not looked at
    path = written(folder, data)
    assert read_categories(path) == data["categories"]
    data["categories"][0]["id"] = "7"
    written(folder, data)
    with pytest.raises(ValueError, match=r"categories\[0\] has id '7'"):
        read_categories(path)
    written(folder, {**data, "categories": []})
    with pytest.raises(ValueError, match="ann.json: there are no categories"):
        read_categories(path)
    for other in ([], [{"categories": []}], "text"):
        written(folder, other)
        with pytest.raises(ValueError, match="expected a COCO json object, got a"):
            read_categories(path)


def test_no_annotations_and_no_images(folder):
    data = copy.deepcopy(content())
    data["annotations"] = []
    path = written(folder, data)
    opened = store.open_store(path, folder, masks=True)[0]
    assert [opened.annotations(i) for i in range(5)] == [[]] * 5
    data["images"] = []
    written(folder, data)
    assert len(store.open_store(path, folder)[0]) == 0
