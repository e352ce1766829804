"""Files that a hand, a half-finished copy or another tool left: each is taken as it is meant, or refused by name."""

import gzip
import json
import os
import random

import numpy as np
import pytest
from PIL import Image

from detr_fast.cli import main
from detr_fast.data import CocoDetection, check_coco
from detr_fast.inference.images import find_images

WIDTH, HEIGHT = 96, 72


@pytest.fixture
def content():
    images = [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2)]
    annotations = [
        {"id": n, "image_id": 1 + n % 2, "category_id": 1 + n % 2, "bbox": [n, n, 20, 10], "area": 200, "iscrowd": 0}
        for n in range(1, 5)
    ]
    categories = [{"id": 1, "name": "cup"}, {"id": 2, "name": "plate"}]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def images(tmp_path):
    (tmp_path / "images").mkdir()
    for i in (1, 2):
        pixels = np.random.default_rng(i).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return tmp_path / "images"


def verdicts(images, ann_file):
    """What check-data says of a file, and how many objects training would see; None where it refuses it."""
    report = check_coco(images, ann_file)
    try:
        dataset = CocoDetection(images, ann_file, None)
    except (ValueError, OSError) as error:
        assert not report.ok and str(ann_file) in str(error), str(error)
        return str(report), None
    assert report.ok, str(report)
    return str(report), sum(len(dataset[i][1]["boxes"]) for i in range(len(dataset)))


ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_every_unicode_encoding_is_taken(images, content, tmp_path, encoding, newline):
    (tmp_path / "a.json").write_bytes(json.dumps(content, indent=1).replace("\n", newline).encode(encoding))
    assert verdicts(images, tmp_path / "a.json")[1] == 4


WRITTEN = {  # name → (bytes from the json's text, what the message says)
    "gzip": (lambda text: gzip.compress(text.encode()), "is compressed (gzip); unpack it first"),
    "zip": (lambda text: b"PK\x03\x04" + text.encode(), "is compressed (zip); unpack it first"),
    "latin-1": (lambda text: text.replace("cup", "tasse é").encode("latin-1"), "is not valid json"),
    "trailing comma": (lambda text: (text[:-1] + ",}").encode(), "is not valid json"),
    "comment": (lambda text: b"// by hand\n" + text.encode(), "is not valid json"),
    "single quotes": (lambda text: text.replace('"', "'").encode(), "is not valid json"),
    "twice the document": (lambda text: 2 * text.encode(), "is not valid json"),
    "cut off": (lambda text: text[:-50].encode(), "is not valid json"),
    "zeros": (lambda text: bytes(len(text)), "is not valid json"),
    "empty": (lambda text: b"", "is not valid json"),
    "pointer of git lfs": (lambda text: b"version https://git-lfs.github.com/spec/v1\n", "is not valid json"),
    "deep": (lambda text: b"[" * 100_000, "is not valid json"),
    "number of 5000 digits": (lambda text: text.replace("200", "9" * 5000, 1).encode(), "is not valid json"),
    "json lines": (lambda text: b'{"id": 1}\n{"id": 2}\n', "is not valid json"),
    "detections": (lambda text: b'[{"image_id": 1, "bbox": [1, 2, 3, 4]}]', "expected a COCO json object, got a list"),
    "Label Studio": (lambda text: b'[{"id": 1, "annotations": []}]', "expected a COCO json object, got a list"),
    "labelme": (lambda text: b'{"version": "5", "shapes": []}', "expected a list 'images', the file has"),
    "FiftyOne": (lambda text: b'{"samples": []}', "expected a list 'images', the file has ['samples']"),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_no_coco_json_is_refused(images, content, tmp_path, name):
    change, says = WRITTEN[name]
    (tmp_path / "a.json").write_bytes(change(json.dumps(content)))
    report, objects = verdicts(images, tmp_path / "a.json")
    assert objects is None and says in report


@pytest.mark.parametrize("key", ["images", "annotations", "categories"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_list_that_stands_there_twice_is_refused(images, content, tmp_path, key, first):
    """Of merged files; json itself keeps the last one, here an empty one, without a word."""
    text = json.dumps(content)
    text = f'{{"{key}": [], {text[1:]}' if first else f'{text[:-1]}, "{key}": []}}'
    (tmp_path / "a.json").write_text(text)
    report, objects = verdicts(images, tmp_path / "a.json")
    assert objects is None and f"'{key}' stands there more than once" in report


@pytest.mark.parametrize("name", ["cup", "Cup", " cup"])
def test_classes_of_one_name_are_said(images, content, tmp_path, capsys, name):
    content["categories"][1]["name"] = name
    (tmp_path / "a.json").write_text(json.dumps(content))
    says = f"1 (cup) and 2 ({name}) stay two classes"
    assert says in str(check_coco(images, tmp_path / "a.json"))
    CocoDetection(images, tmp_path / "a.json", None)
    assert says in capsys.readouterr().out


def test_an_unused_class_may_have_anothers_name(images, content, tmp_path):
    """Roboflow writes such a class 0."""
    content["categories"].insert(0, {"id": 0, "name": "cup"})
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert "stay two classes" not in str(check_coco(images, tmp_path / "a.json"))


NAMES = [
    "\u00e9.png",
    "e\u0301.png",
    "日本 (1).png",
    "a b.png",
    "%20.png",
    "#1.png",
    "-v.png",
    "x" * 240 + ".png",
    "a'\".png",
    "*.png",
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:12])
def test_file_names_are_taken_as_they_are(images, content, tmp_path, name):
    os.rename(images / "1.png", images / name)
    content["images"][0]["file_name"] = name
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert verdicts(images, tmp_path / "a.json")[1] == 4


@pytest.mark.parametrize("listed, there", [("\u00e9.png", "e\u0301.png"), ("e\u0301.jpg", "\u00c9.png")])
def test_accents_written_otherwise_are_recognised(images, content, tmp_path, listed, there):
    """As macOS and others write them: two names that look the same."""
    os.rename(images / "1.png", images / there)
    content["images"][0]["file_name"] = listed
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert f"probably {images / there} is meant" in str(check_coco(images, tmp_path / "a.json"))


SPECIAL = {  # name → (makes it, what the message says)
    "loop": (lambda path: path.symlink_to(path), "cannot be decoded"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "does not exist"),
    "pipe": (lambda path: os.mkfifo(path), "it is a pipe, not a file"),
    "folder": (lambda path: path.mkdir(), "does not exist"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "cannot be decoded"),
    "empty": (lambda path: path.touch(), "the file is no image"),
    "web page": (lambda path: path.write_text("<html>404</html>"), "the file is no image"),
    "noise": (lambda path: path.write_bytes(random.Random(0).randbytes(5000)), "the file is no image"),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes and links")
@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_no_image_file_is_named(images, content, tmp_path, name):
    make, says = SPECIAL[name]
    (images / "1.png").unlink()
    make(images / "1.png")
    (tmp_path / "a.json").write_text(json.dumps(content))
    report = check_coco(images, tmp_path / "a.json")
    assert not report.ok and says in str(report) and "1.png" in str(report)
    dataset = CocoDetection(images, tmp_path / "a.json", None)
    with pytest.raises(OSError, match="1.png") as caught:
        dataset[0]
    assert says in str(caught.value)
    if name != "folder":  # `predict` does not drop it either
        assert [path.name for path, _ in find_images([str(images)])] == ["1.png", "2.png"]


def test_a_folder_in_place_of_a_json_is_said(images, capsys):
    assert main(["check-data", "--train_ann", str(images), "--train_images", str(images)]) == 1
    assert f"annotation file {images} is no file" in capsys.readouterr().out
