"""Annotation files as people have them: one field of a good one changed, and what becomes of it.

`check_coco` and the data set must agree: what one calls an error the other refuses with the same words, what one calls
a warning the other says once. What is taken can be read, masks and all, and evaluated.
"""

import copy
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from detr_fast.cli import main
from detr_fast.data import (
    CocoDetection,
    CorruptImageError,
    LineDetection,
    MissingImageError,
    check_coco,
    load_image,
    load_image_tensor,
    mend_file,
    read_panoptic,
)
from detr_fast.data.images import ImageReadError, probable_file
from detr_fast.data.validation import _compressed_total, refuse_outside
from detr_fast.evaluation import CocoEvaluator

coco_mask = pytest.importorskip("pycocotools.mask")

WIDTH, HEIGHT = 96, 72
NAN, INF = float("nan"), float("inf")
COMPRESSED = coco_mask.encode(np.asfortranarray(np.eye(HEIGHT, WIDTH, dtype=np.uint8)))["counts"].decode()


def good(count: int) -> dict:
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "plate"}]}
    for i in range(count):
        content["images"].append({"id": i + 1, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT})
        for k in range(2):
            x, y, w, h = 5 + 40 * k + i, 10 + 3 * i, 30, 25
            content["annotations"].append({
                "id": 2 * i + k + 1, "image_id": i + 1, "category_id": k + 1, "bbox": [x, y, w, h], "area": w * h,
                "iscrowd": 0, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            })  # fmt: skip
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 120, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def of(key, *values, entries="annotations", every=False):
    """Cases that set a field of the first entry, or of every one; a function gets the entry."""

    def change(value):
        def set_field(content):
            for entry in content[entries][: None if every else 1]:
                entry[key] = value(entry) if callable(value) else value

        return set_field

    names = ["a function" if callable(value) else repr(value).replace("0" * 40, "…")[-70:] for value in values]
    where = f"every {entries}.{key}" if every else f"{entries}.{key}"
    return [(f"{where} = {name}", change(value)) for name, value in zip(names, values, strict=True)]


def without(key, entries="annotations"):
    return [(f"{entries} without {key}", lambda content: [entry.pop(key) for entry in content[entries]])]


def rle(counts, size=(HEIGHT, WIDTH)):
    return {"size": list(size) if isinstance(size, tuple) else size, "counts": counts}


def pairs(entry):
    polygon = entry["segmentation"][0]
    return [[polygon[i : i + 2] for i in range(0, len(polygon), 2)]]


def renumber_categories(shift):
    def change(content):
        for key, entries in (("id", content["categories"]), ("category_id", content["annotations"])):
            for entry in entries:
                entry[key] += shift

    return change


ALL = WIDTH * HEIGHT
BIG = 1 << 63
TAKEN = [
    ("as it is", lambda content: None),
    *of("area", 5, 0, 2.5, 1e9),
    *without("area"),
    *without("iscrowd"),
    *of("id", -5, BIG - 1),
    *of("segmentation", rle([10, 5, ALL - 15]), rle([0, ALL]), rle([ALL]), rle(COMPRESSED), [rle([3, ALL - 3])]),
    *of("segmentation", [[-20, 5, 200, 5, 200, 300]], [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]], [[1] * 6]),
    *of("keypoints", [9, 9, 2] * 3, [], [1.5, 2, 0]),
    *of("bbox", [0, 0, WIDTH, HEIGHT], [1.5, 2.5, 3.25, 4.0], [-0.5, 0, 10, 10]),
    *of("unknown", None, NAN, "x"),
    *of("num_keypoints", None, "3", NAN),
    ("image without annotations", lambda content: content.update(annotations=content["annotations"][2:])),
    ("large ids of images", lambda c: [e.update({k: BIG - 1 - e[k]}) for k, es in (("id", c["images"]),
     ("image_id", c["annotations"])) for e in es]),
    ("negative ids of images", lambda c: [e.update({k: -e[k]}) for k, es in (("id", c["images"]),
     ("image_id", c["annotations"])) for e in es]),
    ("category 0", renumber_categories(-1)),
    *of("supercategory", None, 5, entries="categories"),
    *without("name", "categories"),
    *of("name", None, entries="categories"),
    ("info and licenses", lambda content: content.update(info=None, licenses="none")),
]  # fmt: skip
WARNED = [
    *of("area", None, "750", NAN, INF, -1, -INF, 1e300, [750], {}, True, 10**400),
    *of("iscrowd", "0", "1", None, True, False, 0.0, 1.0, "true", " 0 "),
    *of("iscrowd", "0", every=True),
    *of("area", None, every=True),
    *of("segmentation", [], None, [[]], [[], []], [[5, 10, 35, 35]], [[5, 10]], [[5, 10], [1, 1, 9, 1, 9, 9]]),
    *of("keypoints", None),
    *of("bbox", [5, 5, 0, 5], [5, 5, -3, 5], [200, 5, 5, 5], [60, 5, 60, 5], [0.1, 0.1, 1e6, 1e6]),
    *of("bbox", [0.1, 0.2, 0.3, 0.4], every=True),
    *of("bbox", lambda e: [e["bbox"][0], e["bbox"][1], e["bbox"][0] + 45, e["bbox"][1] + 45], every=True),
    *of("id", 0),
    *of("width", None, "96", 0, -96, NAN, INF, 96.5, 10**9, 10**30, [96], 50, HEIGHT, entries="images"),
    *of("height", None, "72", 0, -72, True, 50, entries="images"),
    *without("width", "images"),
    *without("height", "images"),
    ("swapped sizes", lambda c: [i.update(width=i["height"], height=i["width"]) for i in c["images"]]),
    ("sizes missing", lambda c: [i.pop(k) for i in c["images"] for k in ("width", "height")]),
    *of("file_name", "1.png", entries="images"),
    ("a category without annotations", lambda c: c["categories"].append({"id": 7, "name": "fork"})),
]
REFUSED = [
    *of("id", "1", None, 1.0, 1.5, NAN, BIG, -BIG - 1, True, [1], {}, 2),
    *of("image_id", "1", None, 1.0, NAN, 77, -1, BIG, True, [1], {}, ""),
    *of("image_id", lambda entry: str(entry["image_id"]), every=True),
    *of("category_id", "1", None, 1.0, NAN, 77, -1, 10**30, True, [1], {}, "cup"),
    *[case for key in ("id", "image_id", "category_id", "bbox") for case in without(key)],
    *of("bbox", None, "5,5,9,9", [], [1, 2, 3], [1, 2, 3, 4, 5], {}, 5, [1, 2, None, 4], ["1", "2", "3", "4"]),
    *of("bbox", [NAN] * 4, [1, 2, INF, 4], [1, -INF, 3, 4], [True, 1, 2, 3], [[1], 2, 3, 4], [10**400, 1, 5, 5]),
    *of("iscrowd", 2, -1, "yes", "", NAN, [0], {}, 0.5),
    *of("segmentation", rle([10, 5]), rle([ALL + 1]), rle([]), rle([-1, ALL + 1]), rle([1.5, ALL]), rle(None)),
    *of("segmentation", rle(["1", ALL - 1]), rle([NAN]), rle({}), rle(5), rle(""), rle("???"), rle("\xff")),
    *of("segmentation", rle("oooooo")),
    *of("segmentation", rle(COMPRESSED[:-2]), rle(COMPRESSED + "1"), {"size": [HEIGHT, WIDTH]}, {"counts": [ALL]}, {}),
    *of("segmentation", rle([ALL], None), rle([ALL], (WIDTH, HEIGHT)), rle([ALL], ("72", "96")), rle([0], (0, 0))),
    *of("segmentation", rle([10**12], (10**6, 10**6)), rle([ALL], [HEIGHT]), rle([ALL], [72.0, 96.0])),
    *of("segmentation", rle([0] * 3 * ALL + [ALL]), [rle(COMPRESSED)], [rle([ALL]), [1, 2, 3, 4, 5, 6]]),
    *of("segmentation", pairs, "polygon", 5, True, NAN, [1, 2, 3, 4, 5, 6], [None], ["x"], [[1, 2, 3, 4, 5, 6], 7]),
    *of("segmentation", [[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5, 6, 7]], [[1, 2, 3, 4, 5, None]], [["1"] * 6], [[NAN] * 6]),
    *of("segmentation", [[10, 10], [50, 10], [50, 50], [10, 50]]),
    *of("segmentation", [[1, 2, 3, 4, 5, INF]], [[{"x": 1, "y": 2}] * 3], [[[1, 2, 3, 4, 5, 6]]]),
    *of("segmentation", [[-160.0, -220.0, 2.0e8, 3.5e8, 226.0, 236.0, 272.0, 384.0]], [[1, 2, 1e300, 4, 5, 6]]),
    *of("segmentation", [[0, 0, 1900, 1900] * 3000], [[1, 2, 10**400, 4, 5, 6]], [[1, 2, 3, -1e7, 5, 6]]),
    *without("segmentation"),
    *of("keypoints", "9,9,2", [9, 9], [9, 9, None], [9, 9, "2"], [NAN, 9, 2], [INF, 9, 2], [[9, 9, 2]], {}, 5),
    *of("id", "1", None, 1.0, NAN, BIG, 2, True, [1], entries="images"),
    *of("file_name", None, 5, "", " ", "a\0.png", [], "absent.png", "../nowhere/0.png", entries="images"),
    *of("id", "1", None, 1.0, -1, BIG, 2, True, [], entries="categories"),
    *of("name", [], {}, True, 1.5, entries="categories"),
    ("negative categories", renumber_categories(-3)),
    *[(f"{key}={value!r}", lambda c, key=key, value=value: c.update({key: value}))
      for key in ("images", "annotations", "categories") for value in (None, {}, "x", [None], [5], [[]])],
    *[(f"no {key}", lambda c, key=key: c.pop(key)) for key in ("images", "annotations", "categories")],
]  # fmt: skip
CASES = {
    f"{verdict}: {name}": (verdict, change)
    for verdict, cases in (("taken", TAKEN), ("warned", WARNED), ("refused", REFUSED))
    for name, change in cases
}


def read_all(dataset) -> None:
    """Every item, and the evaluation of masks with the truth as the prediction."""
    evaluator = CocoEvaluator(dataset.coco, ["bbox", "segm"])
    results = {}
    for index in range(len(dataset)):
        _, target = dataset[index]
        assert all(torch.isfinite(value.float()).all() for value in target.values())
        assert len(target["boxes"]) == len(target["masks"]) == len(target["area"])
        results[int(target["image_id"])] = {
            "boxes": target["boxes"], "labels": target["labels"], "scores": torch.ones(len(target["boxes"])),
            "masks": target["masks"][:, None].bool(),
        }  # fmt: skip
    evaluator.update(results)
    evaluator.synchronize_between_processes()
    evaluator.accumulate()


def opened(images, ann_file, **options):
    """What training does before its first step."""
    dataset = CocoDetection(images, ann_file, None, True, **options)
    if not dataset.ids:
        raise ValueError(f"{ann_file}: there are no images")
    refuse_outside(images, dataset.coco.imgs.values(), ann_file)
    dataset.check_files()
    return dataset


def test_no_case_hides_another():
    assert len(CASES) == len(TAKEN) + len(WARNED) + len(REFUSED) >= 120


@pytest.mark.parametrize("case", CASES)
def test_check_and_training_agree(case, folder, tmp_path, capsys):
    verdict, change = CASES[case]
    content = good(3)
    change(content)
    ann_file = tmp_path / "ann.json"
    ann_file.write_text(json.dumps(content))
    report = check_coco(folder, ann_file)
    messages = [message for messages in report.errors.values() for message in messages]
    masks_alone = case.endswith("without segmentation")  # nothing is wrong with it for boxes
    assert report.ok == (verdict != "refused" or masks_alone), str(report)
    if verdict == "refused":
        with pytest.raises((ValueError, ImageReadError)) as caught:
            opened(folder, ann_file)
        assert masks_alone or any(message in str(caught.value) for message in messages), str(caught.value)
        assert "ann.json" in str(caught.value) or isinstance(caught.value, ImageReadError)
        return
    capsys.readouterr()
    dataset = opened(folder, ann_file)
    said = capsys.readouterr().out
    assert bool(report.warnings) == (verdict == "warned") and said.count("\n") == len(report.warnings), said
    assert all(f"warning: {kind} ({len(found)})" in said for kind, found in report.warnings.items())
    read_all(dataset)


SHARED = {  # name → (verdict, what the message says, change)
    "area_null": ("warned", "area None", of("area", None, every=True)),
    "crowd_as_text": ("warned", "iscrowd '0', taken as 0", of("iscrowd", "0", every=True)),
    "image_id_as_text": ("refused", "'1'; a text, the ids in 'images' are integers",
                         of("image_id", lambda entry: str(entry["image_id"]), every=True)),
    "box_nan": ("refused", "annotation 1 (image 1), bbox [nan", of("bbox", [NAN] * 4, every=True)),
    "category_id_negative": ("refused", "must not be negative", [("", renumber_categories(-3))]),
    "keypoints_in_some": ("taken", "", [("", lambda c: [a.update(keypoints=[9, 9, 2] * 3, num_keypoints=3)
                                                      for a in c["annotations"][::2]])]),
    "rle_without_size": ("refused", "annotation 1 (image 1) has as segmentation a run-length encoding of size None",
                         of("segmentation", {"counts": [10, 5, 6897]})),
    "rle_too_short": ("refused", "annotation 1 (image 1) has as segmentation a run-length encoding of 15 pixels",
                      of("segmentation", rle([10, 5]))),
    "segmentation_empty": ("warned", "annotation 1 (image 1) has segmentation []", of("segmentation", [])),
    "polygon_of_two_points": ("warned", "annotation 1 (image 1)", of("segmentation", [[5, 10, 35, 35]])),
    "polygon_of_pairs": ("refused", "[x, y, x, y, …]", of("segmentation", pairs)),
    "polygon_giant": ("refused", "reaches from -220 to 3.5e+08; that is far from an image of 96x72 pixels",
                      of("segmentation", [[-160.0, -220.0, 2.0e8, 3.5e8, 226.0, 236.0, 272.0, 384.0]])),
    "sizes_missing": ("warned", "the file has 96x72",
                      [("", lambda c: [i.pop(k) for i in c["images"] for k in ("width", "height")])]),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
def test_kinds_that_failed_once(name, folder, tmp_path, capsys):
    verdict, says, ((_, change),) = SHARED[name]
    content = good(3)
    change(content)
    ann_file = tmp_path / "ann.json"
    ann_file.write_text(json.dumps(content))
    report = check_coco(folder, ann_file)
    assert says in str(report) and report.ok == (verdict != "refused")
    if verdict == "refused":
        with pytest.raises(ValueError) as caught:
            opened(folder, ann_file)
        assert says in str(caught.value)
    else:
        dataset = opened(folder, ann_file)
        assert says in capsys.readouterr().out
        read_all(dataset)
        assert sum(len(dataset[i][1]["boxes"]) for i in range(3)) == 6  # nothing is lost
        assert [dataset[i][1]["area"].tolist() for i in range(3)] == [[750, 750]] * 3


def test_objects_without_keypoints_get_invisible_ones(folder, tmp_path):
    content = good(3)
    content["annotations"][1]["keypoints"] = [9, 8, 2, 7, 6, 1]
    (tmp_path / "ann.json").write_text(json.dumps(content))
    dataset = opened(folder, tmp_path / "ann.json")
    assert dataset[0][1]["keypoints"].tolist() == [[[0, 0, 0]] * 2, [[9, 8, 2], [7, 6, 1]]]
    assert "keypoints" not in dataset[1][1]


def write_pair(tmp_path, change):
    """Files of training and validation, the second one changed."""
    val = good(3)
    change(val)
    for name, content in (("train", good(3)), ("val", val)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path / "train.json", tmp_path / "val.json"


def swap_categories(content):
    content["categories"][0]["id"], content["categories"][1]["id"] = 2, 1


def new_class(content, used=True, name="fork"):
    content["categories"].append({"id": 3, "name": name})
    if used:
        content["annotations"][0]["category_id"] = 3


CLASSES = [
    ("error", "category 3 ('fork') is not among the classes given", new_class),
    ("error", "category 3 ('CUP') is not among the classes given; 'cup' has id 1 there",
     lambda content: new_class(content, name="CUP")),
    ("error", "category 1 is 'plate' here, but 'cup' in the classes given; 'plate' has id 2 there", swap_categories),
    ("error", "category 1 is 'Cup' here, but 'cup' in the classes given (they differ in case or spaces alone)",
     lambda content: content["categories"][0].update(name="Cup")),
    ("error", "category 0 ('cup') is not among the classes given; 'cup' has id 1 there", renumber_categories(-1)),
    ("error", "unknown category id '1'", lambda content: content["annotations"][0].update(category_id="1")),
    ("warning", "3 (fork), which is not among the classes given", lambda content: new_class(content, used=False)),
    ("warning", "1 (cup)", lambda content: content.update(
        categories=content["categories"][1:], annotations=content["annotations"][1::2])),
]  # fmt: skip


@pytest.mark.parametrize("level, says, change", CLASSES)
def test_classes_of_both_files_are_compared(level, says, change, folder, tmp_path, capsys):
    train, val = write_pair(tmp_path, change)
    flags = ["--train_ann", str(train), "--val_ann", str(val)]
    flags += ["--train_images", str(folder), "--val_images", str(folder)]
    assert main(["check-data", *flags]) == (1 if level == "error" else 0)
    assert says in capsys.readouterr().out
    categories = opened(folder, train).categories
    if level == "error":
        with pytest.raises(ValueError) as caught:
            opened(folder, val, categories=categories)
        assert says in str(caught.value)
    else:
        read_all(opened(folder, val, categories=categories))
        assert says in capsys.readouterr().out


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


@pytest.mark.parametrize("name, pixels, expected", [
    ("a.png", GREY.astype(np.uint16) * 257, GREY),
    ("a.tif", GREY.astype(np.uint16) * 257, GREY),
    ("a.tif", GREY.astype(np.int32), GREY),
    ("a.tif", GREY.astype(np.int32) * 257, GREY),
    ("a.tif", GREY.astype(np.float32), GREY),
    ("a.tif", GREY.astype(np.float32) / 255, GREY),
    ("a.tif", GREY.astype(np.float32) * 257, GREY),
    ("a.tif", GREY.astype(np.float32) - 7, None),
    ("a.tif", np.full((8, 8), NAN, dtype=np.float32), None),
    ("a.tif", np.full((8, 8), INF, dtype=np.float32), None),
    ("a.tif", np.full((8, 8), 10**6, dtype=np.int32), None),
])  # fmt: skip
def test_deep_images_are_scaled(tmp_path, name, pixels, expected):
    Image.fromarray(pixels).save(tmp_path / name)
    if expected is None:
        with pytest.raises(CorruptImageError, match=rf"{name}.* its pixels range from"):
            load_image(tmp_path / name)
        return
    for got in (np.asarray(load_image(tmp_path / name)), load_image_tensor(tmp_path / name).permute(1, 2, 0).numpy()):
        assert np.array_equal(got, np.repeat(expected[:, :, None], 3, axis=2))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "png" if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "tif"
    if mode == "PA":
        suffix = "png"
        image = Image.new("RGBA", (8, 6)).quantize()
    else:
        image = Image.new(mode, (8, 6))
    image.save(tmp_path / f"a.{suffix}")
    if mode == "YCbCr":
        try:
            Image.open(tmp_path / f"a.{suffix}").load()
        except OSError as error:  # in 10.1 to 12.0, not in 13.0
            pytest.skip(f"this Pillow cannot read the TIFF that it wrote: {error}")
    image = load_image(tmp_path / f"a.{suffix}")
    assert image.mode == "RGB" and image.size == (8, 6)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_turns_only_to_the_stated_size(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.effect_noise((32, 16), 50).save(tmp_path / f"a.{suffix}", exif=exif)
    path = tmp_path / f"a.{suffix}"
    plain = load_image(path)
    for load in (load_image, lambda *a, **k: Image.fromarray(load_image_tensor(*a, **k).permute(1, 2, 0).numpy())):
        assert plain.size == (32, 16) == load(path, size=(32, 16)).size == load(path, size=(99, 99)).size
        assert load(path, size=(16, 32)).size == ((16, 32) if orientation > 4 else (32, 16))
        assert np.array_equal(np.asarray(load(path)), np.asarray(plain))
    if orientation in (6, 8):
        turned = plain.transpose(Image.Transpose.ROTATE_270 if orientation == 6 else Image.Transpose.ROTATE_90)
        assert np.array_equal(np.asarray(load_image(path, size=(16, 32))), np.asarray(turned))
    content = {"images": [{"id": 1, "file_name": path.name, "width": 16, "height": 32}], "annotations": [],
               "categories": [{"id": 1}]}  # fmt: skip
    (tmp_path / "ann.json").write_text(json.dumps(content))
    dataset = CocoDetection(tmp_path, tmp_path / "ann.json", None)
    assert dataset.image_size(0) == dataset[0][0].size
    assert any("image size" in kind for kind in check_coco(tmp_path, tmp_path / "ann.json").warnings) == (
        orientation < 5
    )


@pytest.mark.parametrize(
    "name", ["sub\\0.png", "train\\sub\\0.png", "SUB/0.PNG", "sub/0.jpg", "images/train/sub/0.png", "Sub/0.JPEG"]
)
def test_missing_file_names_the_one_meant(tmp_path, name):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    Image.new("RGB", (8, 6)).save(tmp_path / "images" / "sub" / "0.png")
    content = {"images": [{"id": 1, "file_name": name}], "annotations": [], "categories": [{"id": 1}]}
    (tmp_path / "ann.json").write_text(json.dumps(content))
    meant = str(tmp_path / "images" / "sub" / "0.png")
    with pytest.raises(MissingImageError) as caught:
        opened(tmp_path / "images", tmp_path / "ann.json")
    assert f"does not exist; probably {meant} is meant" in str(caught.value)
    assert str(caught.value) in str(check_coco(tmp_path / "images", tmp_path / "ann.json"))


def test_fix_mends_what_needs_no_guess(folder, tmp_path, capsys):
    content = good(3)
    for image in content["images"]:
        image.update(id=str(image["id"]), file_name="train\\" + image["file_name"], width=None, height="7")
    for category in content["categories"]:
        category["id"] = float(category["id"])
    for entry in content["annotations"]:
        entry.update(image_id=str(entry["image_id"]), category_id=str(entry["category_id"]), area=None, iscrowd="0")
        entry.update(id=0, bbox=[str(value) for value in entry["bbox"]], segmentation=pairs(entry), keypoints=None)
    content["annotations"][0]["segmentation"].append([1, 2, 3, 4])
    (tmp_path / "bad.json").write_text(json.dumps(content))
    out = tmp_path / "out.json"
    flags = ["--train_images", str(folder), "--train_ann", str(tmp_path / "bad.json")]
    assert main(["check-data", *flags]) == 1 and "--fix" in capsys.readouterr().out
    assert main(["check-data", *flags, "--fix", str(out)]) == 0
    said = capsys.readouterr().out
    assert "pairs of points became one list" in said and "numbered anew" in said and "became those of the file" in said
    assert json.loads(out.read_text()) == good(3)
    assert mend_file(folder, out, tmp_path / "again.json") == []
    with pytest.raises(ValueError, match="not overwritten"):
        mend_file(folder, out, out)


def test_fix_guesses_nothing(folder, tmp_path):
    """What has more than one meaning stays, and stays an error."""
    content = good(3)
    content["annotations"][0].update(bbox=[NAN] * 4, iscrowd="maybe")
    content["annotations"][1].update(category_id="cup", segmentation=[[1, 2, 3, 4, 5]])
    content["annotations"][2].update(image_id="99")
    content["images"][2]["file_name"] = "2.jpg"  # there is a 2.png
    (tmp_path / "bad.json").write_text(json.dumps(content))
    mend_file(folder, tmp_path / "bad.json", tmp_path / "out.json")
    left = json.loads((tmp_path / "out.json").read_text())
    assert left["annotations"][1:] == content["annotations"][1:] and left["images"] == content["images"]
    assert set(check_coco(folder, tmp_path / "out.json").errors) == {
        "missing image", "unknown category", "unknown image", "box not finite",
    }  # fmt: skip


def test_fix_takes_a_list_of_points_for_one_polygon(folder, tmp_path):
    content = good(3)
    content["annotations"][0]["segmentation"] = pairs(content["annotations"][0])[0]
    (tmp_path / "bad.json").write_text(json.dumps(content))
    mend_file(folder, tmp_path / "bad.json", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == good(3)


def test_fix_gives_one_file_to_one_image_only(folder, tmp_path):
    """Without its folder a name may mean the files of several."""
    content = good(3)
    content["images"][0]["file_name"], content["images"][1]["file_name"] = "seq1/0.png", "seq2/0.png"
    (tmp_path / "bad.json").write_text(json.dumps(content))
    mend_file(folder, tmp_path / "bad.json", tmp_path / "out.json")
    left = json.loads((tmp_path / "out.json").read_text())
    assert [image["file_name"] for image in left["images"]][:2] == ["seq1/0.png", "seq2/0.png"]
    assert "missing image" in check_coco(folder, tmp_path / "out.json").errors


def test_fix_survives_numbers_beyond_a_float(folder, tmp_path):
    content = good(3)
    content["annotations"][0]["bbox"] = [1, 2, 10**400, 0.5]
    (tmp_path / "bad.json").write_text(json.dumps(content))
    mend_file(folder, tmp_path / "bad.json", tmp_path / "out.json")
    assert "box not finite" in check_coco(folder, tmp_path / "out.json").errors


@pytest.mark.parametrize("name, said", [(5000 * "x", "File name too long"), ("\ud800ä.png", "surrogates not allowed")])
def test_fix_survives_a_file_name_that_no_file_has(folder, tmp_path, name, said):
    content = good(3)
    content["images"][0]["file_name"] = name
    (tmp_path / "bad.json").write_text(json.dumps(content))
    mend_file(folder, tmp_path / "bad.json", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == content
    assert said in str(check_coco(folder, tmp_path / "out.json"))


def test_a_missing_area_is_never_negative(folder, tmp_path):
    content = good(3)
    del content["annotations"][0]["area"]
    content["annotations"][0]["bbox"] = [40, 40, -5, 5]
    (tmp_path / "ann.json").write_text(json.dumps(content))
    dataset = CocoDetection(folder, tmp_path / "ann.json", None)
    assert dataset.coco.anns[content["annotations"][0]["id"]]["area"] == 0


def test_many_wrong_names_in_a_large_folder_take_one_look_at_it(tmp_path, monkeypatch):
    for index in range(30):
        (tmp_path / f"{index}.jpg").touch()
    looks, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda folder: looks.append(folder) or listdir(folder))
    for index in range(30):
        assert probable_file(tmp_path / f"{index}.png") == str(tmp_path / f"{index}.jpg")
    assert len(looks) == 1


def test_an_odd_tag_of_a_deep_image_is_no_damage(tmp_path):
    pixels = Image.fromarray((np.arange(48).reshape(6, 8) * 1000).astype(np.uint16))
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[280] = 2  # MinSampleValue, as text
    tags[280] = "none"
    pixels.save(tmp_path / "deep.tif", tiffinfo=tags)
    assert load_image(tmp_path / "deep.tif").size == (8, 6)


LINE = {"id": 5, "image_id": 0, "category_id": 0}


@pytest.mark.parametrize(
    "line", [[NAN, 1, 2, 3], [1, INF, 2, 3], [True, 1, 2, 3], ["1", 1, 2, 3], None, "x", [], [1] * 5, [[1]] * 4]
)
def test_odd_lines(folder, tmp_path, line):
    content = {"images": [{"id": 0, "file_name": "0.png"}], "categories": [{"id": "0"}]}
    for value, is_good in ((line, False), ([1, 2, 30, 0], True)):
        (tmp_path / "ann.json").write_text(json.dumps(content | {"annotations": [LINE | {"line": value}]}))
        report = check_coco(folder, tmp_path / "ann.json")
        assert report.ok == is_good and "without extent" not in str(report)
        if is_good:
            LineDetection(folder, tmp_path / "ann.json", None)
        else:
            with pytest.raises(ValueError, match="annotation 5"):
                LineDetection(folder, tmp_path / "ann.json", None)


PANOPTIC = {
    "images": [{"id": 1, "file_name": "0.png", "width": WIDTH, "height": HEIGHT}],
    "annotations": [{"image_id": 1, "file_name": "0.png", "segments_info": [
        {"id": 5, "category_id": 1, "iscrowd": 0, "area": 9}]}],
    "categories": [{"id": 1, "name": "cup", "isthing": 1}],
}  # fmt: skip


@pytest.mark.parametrize("where, key, values", [
    ("images", "id", ["1", None, NAN, BIG, [1]]), ("images", "width", [None, "96", 0, NAN, -1]),
    ("images", "file_name", [None, 5, ""]), ("annotations", "image_id", ["1", None, 2, [1]]),
    ("annotations", "segments_info", [None, {}, [None], ["x"]]), ("annotations", "file_name", [None, 3, ""]),
    ("categories", "id", [-1, "1", None, NAN]), ("categories", "name", [[], True]),
    ("segments", "id", ["5", None, -1, 1 << 24, NAN]), ("segments", "category_id", ["1", None, 7, [1], {}]),
    ("segments", "iscrowd", ["0", None, 2, NAN]), ("segments", "area", ["9", None, NAN, INF, -1, 10**30]),
])  # fmt: skip
def test_odd_panoptic_files_are_refused(tmp_path, where, key, values):
    for value in values:
        content = copy.deepcopy(PANOPTIC)
        entries = content["annotations"][0]["segments_info"] if where == "segments" else content[where]
        entries[0][key] = value
        (tmp_path / "ann.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="ann.json"):
            read_panoptic(tmp_path / "ann.json")
    (tmp_path / "ann.json").write_text(json.dumps(PANOPTIC))
    read_panoptic(tmp_path / "ann.json")


def test_compressed_counts_are_summed_as_pycocotools_does():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random((int(rng.integers(1, 90)), int(rng.integers(1, 90)))) < rng.random()
        counts = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        assert _compressed_total(counts) == mask.size


def test_json_that_is_none(folder, tmp_path):
    for text in ("", "{", "[]", "null", "5", "[" * 100_000, "\0", '{"images": [}'):
        (tmp_path / "ann.json").write_text(text)
        with pytest.raises(ValueError, match="ann.json"):
            CocoDetection(folder, tmp_path / "ann.json", None)
        assert not check_coco(folder, tmp_path / "ann.json").ok


def test_json_alone_is_checked(tmp_path, capsys):
    content = good(3)
    (tmp_path / "ann.json").write_text(json.dumps(content))
    assert main(["check-data", "--train_ann", str(tmp_path / "ann.json")]) == 0
    assert "no image was read" in capsys.readouterr().out
    content["annotations"][0]["segmentation"] = rle([10, 5])
    (tmp_path / "ann.json").write_text(json.dumps(content))
    assert main(["check-data", "--train_ann", str(tmp_path / "ann.json")]) == 1
    assert main(["check-data", "--train_ann", str(tmp_path / "ann.json"), "--fix", str(tmp_path / "out.json")]) == 2
    assert main(["check-data", "--train_images", str(tmp_path)]) == 2
