"""Folders as other tools write them: the same data in each layout gives the same targets; nothing is lost silently."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from detr_fast.cli import main
from detr_fast.config import Config
from detr_fast.data import make_shapes_dataset
from detr_fast.data.layouts import find_layout, finding
from detr_fast.tasks import task_of
from detr_fast.tasks.boxes import Boxes
from detr_fast.tasks.paths import with_data
from tests.data.layout_writers import WRITERS, coco_sets, voc_xml, write_roboflow, write_voc, write_yolo
from tests.inference.tiny_models import checkpoint_of
from tests.training.conftest import TINY


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DETR_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """Shapes; some images have none."""
    return make_shapes_dataset(
        tmp_path_factory.mktemp("coco"), num_train=11, num_val=5, image_size=(40, 56), empty_fraction=0.3, seed=5
    )


def targets(folder):
    """Set → the targets of its images, in order, as training and evaluation see them."""
    config = with_data(Config(data=folder))
    found = {}
    for name in ("train", "val"):
        dataset = task_of(config).build_dataset(name, config)
        dataset._transforms = None
        found[name] = [target for _, target in dataset]
    return found, dataset.categories


@pytest.mark.parametrize("layout", ["roboflow", "yolo", "yolo without yaml", "yolo polygons", "voc"])
def test_all_layouts_give_the_same_targets(coco, tmp_path, layout):
    options = {"yolo without yaml": {"yaml": False}, "yolo polygons": {"polygons": True}}.get(layout, {})
    folder = WRITERS[layout.split()[0]](coco, tmp_path / "data", **options)
    expected, categories = targets(coco)
    found, own = targets(folder)
    assert own == categories and own.names == ("circle", "square", "triangle")
    assert sum(len(target["labels"]) == 0 for target in expected["train"]) >= 2
    for name in ("train", "val"):
        assert len(found[name]) == len(expected[name]) == {"train": 11, "val": 5}[name]
        for a, b in zip(found[name], expected[name], strict=True):
            assert torch.equal(a["labels"], b["labels"]) and torch.equal(a["orig_size"], b["orig_size"])
            torch.testing.assert_close(a["boxes"], b["boxes"], rtol=0, atol=1e-3)
            if layout in ("roboflow", "yolo polygons"):
                torch.testing.assert_close(a["area"], b["area"], rtol=1e-4, atol=0.05)


@pytest.mark.parametrize("layout", ["coco", *WRITERS])
def test_the_command_line_checks_trains_and_evaluates_each_layout(coco, tmp_path, capsys, layout):
    folder = coco if layout == "coco" else WRITERS[layout](coco, tmp_path / "data")
    data, run = ["--data", str(folder)], tmp_path / "run"
    assert main(["check-data", *data]) == 0
    out = capsys.readouterr().out
    assert "train: 11 images" in out and "val: 5 images" in out and "circle" in out
    flags = [*TINY, "--epochs", "1", "--max_steps", "1", "--sample_images", "0", "--output_dir", str(run)]
    assert main(["train", *data, *flags]) == 0
    assert "train: 11 images" in capsys.readouterr().out
    evaluation = ["--batch_size", "1", "--num_workers", "0", "--device", "cpu"]
    assert main(["eval", "--weights", str(run), *data, *evaluation]) == 0
    assert capsys.readouterr().out.count("Average") == 12


def test_lines_say_what_was_found_and_decided(coco, tmp_path, cache):
    layout = find_layout(write_roboflow(coco, tmp_path / "data"))
    assert layout.name == "Roboflow's COCO"
    content = coco_sets(coco)["train"][1]
    counts = {
        c["name"]: sum(a["category_id"] == c["id"] for a in content["annotations"]) for c in content["categories"]
    }
    empty = 11 - len({a["image_id"] for a in content["annotations"]})
    objects = f"{sum(counts.values())} objects: " + ", ".join(f"{name} {n}" for name, n in counts.items())
    assert f"train: 11 images ({empty} without objects), {objects}" in layout.lines
    assert any("category 0 ('shapes') is left out: Roboflow's placeholder" in line for line in layout.lines)
    assert layout.splits["train"].annotations.is_relative_to(cache)


def test_a_category_0_that_has_objects_stays(coco, tmp_path):
    folder = write_roboflow(coco, tmp_path / "data")
    file = folder / "valid" / "_annotations.coco.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 0
    file.write_text(json.dumps(content))
    layout = find_layout(folder)
    ids = [c["id"] for c in json.loads(layout.splits["train"].annotations.read_text())["categories"]]
    assert ids == [0, 1, 2, 3] and not any("placeholder" in line for line in layout.lines)


def test_cocos_own_files_are_used_as_they_are(coco, cache):
    layout = find_layout(coco)
    assert layout.name == "COCO"
    assert layout.splits["val"].annotations == coco / "annotations" / "instances_val2017.json"
    assert layout.splits["val"].images == coco / "val2017"
    assert not list(cache.rglob("*.json"))


def test_coco_with_other_names(coco, tmp_path):
    shutil.copytree(coco / "train2017", tmp_path / "own" / "images" / "train")
    shutil.copytree(coco / "val2017", tmp_path / "own" / "images" / "val")
    shutil.copy(coco / "annotations" / "instances_train2017.json", tmp_path / "own" / "my_train.json")
    shutil.copy(coco / "annotations" / "instances_val2017.json", tmp_path / "own" / "my_val.json")
    (tmp_path / "own" / "package.json").write_text("{}")
    layout = find_layout(tmp_path / "own")
    assert layout.splits["train"].images == tmp_path / "own" / "images" / "train"
    assert layout.splits["val"].annotations == tmp_path / "own" / "my_val.json"


def test_a_tenth_is_held_out_where_nothing_validates(coco, tmp_path):
    shutil.copytree(coco / "train2017", tmp_path / "own" / "images")
    shutil.copy(coco / "annotations" / "instances_train2017.json", tmp_path / "own" / "result.json")
    layout = find_layout(tmp_path / "own")
    assert any("no validation set: 2 of the 11 training images validate instead" in line for line in layout.lines)
    train, val = (json.loads(layout.splits[name].annotations.read_text()) for name in ("train", "val"))
    names = [{image["file_name"] for image in each["images"]} for each in (train, val)]
    assert len(names[0]) == 9 and len(names[1]) == 2 and not names[0] & names[1]
    whole = coco_sets(coco)["train"][1]
    assert len(train["annotations"]) + len(val["annotations"]) == len(whole["annotations"])
    for each in (train, val):
        assert {a["image_id"] for a in each["annotations"]} <= {image["id"] for image in each["images"]}
    again = find_layout(tmp_path / "own")
    assert json.loads(again.splits["val"].annotations.read_text()) == val


def test_the_test_set_is_left_alone_beside_training_images_and_evaluated_where_it_is_alone(coco, tmp_path):
    folder = write_roboflow(coco, tmp_path / "data")
    (folder / "valid").rename(folder / "test")
    layout = find_layout(folder)
    assert any("5 images of the test set are not used" in line for line in layout.lines)
    assert any("2 of the 11 training images validate" in line for line in layout.lines)
    shutil.rmtree(folder / "train")
    layout = find_layout(folder)
    assert set(layout.splits) == {"val"} and any("val: the test set" in line for line in layout.lines)


# YOLO


def yolo_with(coco, folder, line):
    """A copy of the data whose first label file has another first line; returns folder and that file."""
    write_yolo(coco, folder, yaml=False)
    file = next(file for file in sorted((folder / "labels" / "train").glob("*.txt")) if file.read_text())
    file.write_text(line + "\n")
    return file


@pytest.mark.parametrize(
    "line, message",
    [
        ("3 0.5 0.5 0.1 0.1", "class 3; expected one of 0 to 2"),
        ("-1 0.5 0.5 0.1 0.1", "class -1; expected one of 0 to 2"),
        ("0.5 0.5 0.5 0.1 0.1", "class 0.5; expected"),
        ("0 0.5 0.5 0.1", "4 numbers; expected 5"),
        ("0 0.5 0.5 0.1 0.1 0.9", "6 numbers; expected 5"),
        ("0 12 30 8 8", "expected shares of the image's width and height, in 0..1"),
        ("0 nan 0.5 0.1 0.1", "in 0..1"),
        ("circle 0.5 0.5 0.1 0.1", "expected numbers"),
    ],
)
def test_malformed_labels_are_refused_with_file_and_line(coco, tmp_path, line, message):
    file = yolo_with(coco, tmp_path / "data", line)
    with pytest.raises(ValueError, match="expected") as caught:
        find_layout(tmp_path / "data")
    assert f"{file}:1" in str(caught.value) and message in str(caught.value)


def test_a_label_file_that_is_not_utf_8_is_named(coco, tmp_path):
    file = yolo_with(coco, tmp_path / "data", "0 0.5 0.5 0.1 0.1")
    file.write_text("0 0.5 0.5 0.1 0.1", encoding="utf-16")
    with pytest.raises(ValueError, match=f"{file.name} cannot be read: .* expected UTF-8"):
        find_layout(tmp_path / "data")


def test_missing_label_files_are_images_without_objects_and_others_are_counted(coco, tmp_path):
    folder = write_yolo(coco, tmp_path / "data", yaml=False)
    labels = sorted((folder / "labels" / "train").glob("*.txt"))
    labels[0].rename(labels[0].with_name("stray.txt"))
    layout = find_layout(folder)
    missing = 11 - (len(labels) - 1)
    assert any(f"train: {missing} images have no label file" in line for line in layout.lines)
    assert any("train: 1 label files have no image" in line and "stray.txt" in line for line in layout.lines)
    shutil.rmtree(folder / "labels" / "val")
    (folder / "labels" / "val").mkdir()
    with pytest.raises(FileNotFoundError, match="none of the 5 images has a label file"):
        find_layout(folder)


def test_yolo_without_names_is_refused(coco, tmp_path):
    folder = write_yolo(coco, tmp_path / "data", yaml=False)
    (folder / "classes.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"nothing says what the classes are called; expected names in"):
        find_layout(folder)


def test_images_that_cannot_be_read_are_named(coco, tmp_path):
    folder = write_yolo(coco, tmp_path / "data", yaml=False)
    broken = sorted((folder / "images" / "train").iterdir())[2]
    broken.write_bytes(b"no image")
    with pytest.raises(ValueError, match="images that cannot be read: .*" + broken.name):
        find_layout(folder)


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_labels_are_of_the_image_as_it_is_shown(tmp_path, suffix):
    """A photo that its EXIF orientation turns: the labels' shares are of the turned width and height."""
    for folder in ("images", "labels"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a", "b"):
        Image.new("RGB", (60, 40)).save(tmp_path / "data" / "images" / f"{name}{suffix}", exif=exif)
        (tmp_path / "data" / "labels" / f"{name}.txt").write_text("0 0.5 0.25 0.5 0.5\n")
    (tmp_path / "data" / "classes.txt").write_text("thing\n")
    config = with_data(Config(data=tmp_path / "data"))
    dataset = task_of(config).build_dataset("val", config)
    dataset._transforms = None
    image, target = dataset[0]
    assert image.size == (40, 60) and target["boxes"].tolist() == [[10, 0, 30, 30]]


@pytest.mark.parametrize(
    "orientation, size, is_said", [(1, (60, 40), 0), (3, (60, 40), 1), (6, (60, 40), 0), (6, (9, 9), 1)]
)
def test_turns_that_keep_the_size_and_shared_labels_are_said(tmp_path, orientation, size, is_said):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "a.png", "b.jpg"):
        Image.new("RGB", size).save(tmp_path / "images" / name, exif=exif)
        (tmp_path / "labels" / name).with_suffix(".txt").write_text("0 0.5 0.5 0.5 0.5\n")
    (tmp_path / "classes.txt").write_text("thing\n")
    lines = "\n".join(find_layout(tmp_path).lines)
    assert lines.count(f"train: 3 images, the first {tmp_path}/images/a.jpg, are mirrored or turned") == is_said
    assert f"train: 1 label files are of more than one image, the first: {tmp_path}/labels/a.txt" in lines


@pytest.mark.parametrize("names", ["[circle, square, triangle]", "{0: circle, 1: square, 2: triangle}"])
@pytest.mark.parametrize("kind", ["folders", "lists", "roboflow"])
def test_what_a_data_yaml_may_say(coco, tmp_path, names, kind):
    folder = write_yolo(coco, tmp_path / "data", yaml=False)
    sets = {"folders": ("images/train", ["images/val"]), "lists": ("train.txt", "val.txt")}.get(kind)
    for name in ("train", "val"):
        images = sorted((folder / "images" / name).iterdir())
        (folder / f"{name}.txt").write_text("".join(f"./images/{name}/{image.name}\n" for image in images))
    if kind == "roboflow":
        for name, theirs in (("train", "train"), ("val", "valid")):
            (folder / theirs).mkdir()
            (folder / "images" / name).rename(folder / theirs / "images")
            (folder / "labels" / name).rename(folder / theirs / "labels")
        sets = ("../train/images", "../valid/images")
    text = f"train: {sets[0]}\nval: {sets[1]}\ntest: ../test/images\nnames: {names}\n"
    (folder / "data.yaml").write_text("path: /somewhere/else\n" + text)
    for given in (folder, folder / "data.yaml"):
        layout = find_layout(given)
        assert [
            len(json.loads(layout.splits[name].annotations.read_text())["images"]) for name in ("train", "val")
        ] == [
            11,
            5,
        ]


def test_images_beside_the_folder_of_the_yaml_are_found(coco, tmp_path):
    folder = write_yolo(coco, tmp_path / "data")
    (folder / "settings").mkdir()
    text = (folder / "data.yaml").read_text().replace("path: .", "path: ''").replace("images/", "../images/")
    (folder / "settings" / "data.yaml").write_text(text)
    split = find_layout(folder / "settings" / "data.yaml").splits["train"]
    names = [image["file_name"] for image in json.loads(split.annotations.read_text())["images"]]
    assert split.images == folder and names[0] == "images/train/000000000001.jpg"


@pytest.mark.parametrize(
    "text, message",
    [
        ("train: images/train\nnames: [a, b]\nnc: 3\n", "nc is 3, but there are 2 names"),
        ("train: images/train\nnames: {a: 0}\n", "expected a list, or index: name"),
        ("train: elsewhere\nnames: [a]\n", "nothing where it says that images are"),
        ("train: [\n", "cannot be read"),
    ],
)
def test_a_malformed_data_yaml_is_refused(coco, tmp_path, text, message):
    folder = write_yolo(coco, tmp_path / "data", yaml=False)
    (folder / "data.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_layout(folder / "data.yaml")


# Pascal VOC


def write_flat(coco, folder, origin=1, **changes):
    """An xml beside each image, in one folder."""
    images, content = coco_sets(coco)["train"]
    shutil.copytree(images, folder)
    names = {entry["id"]: entry["name"] for entry in content["categories"]}
    for image in content["images"]:
        objects = [{**entry, **changes} for entry in content["annotations"] if entry["image_id"] == image["id"]]
        (folder / Path(image["file_name"]).with_suffix(".xml")).write_text(voc_xml(image, objects, names, origin))
    return content


def contents(layout):
    return [json.loads(split.annotations.read_text()) for split in layout.splits.values()]


def test_difficult_objects_are_kept_as_what_evaluation_ignores(coco, tmp_path):
    whole = write_flat(coco, tmp_path / "flat", difficult=1)
    layout = find_layout(tmp_path / "flat")
    annotations = [entry for content in contents(layout) for entry in content["annotations"]]
    assert len(annotations) == len(whole["annotations"]) and all(entry["iscrowd"] == 1 for entry in annotations)
    assert any(f"{len(annotations)} objects are marked as difficult" in line for line in layout.lines)


def test_boxes_that_begin_at_0_are_not_shifted(coco, tmp_path):
    whole = write_flat(coco, tmp_path / "flat", origin=0, bbox=[0, 0, 7.5, 6])
    layout = find_layout(tmp_path / "flat")
    assert any("read as 0-based" in line for line in layout.lines)
    boxes = [entry["bbox"] for content in contents(layout) for entry in content["annotations"]]
    assert boxes == [[0, 0, 7.5, 6]] * len(whole["annotations"])


def test_parts_of_an_object_are_not_its_box(coco, tmp_path):
    write_flat(coco, tmp_path / "flat")
    file = next(file for file in sorted((tmp_path / "flat").glob("*.xml")) if "<object>" in file.read_text())
    part = "<part><name>corner</name><bndbox><xmin>3</xmin><ymin>3</ymin><xmax>4</xmax><ymax>4</ymax></bndbox></part>"
    before = contents(find_layout(tmp_path / "flat"))
    file.write_text(file.read_text().replace("<object>", f"<object>{part}"))
    assert contents(find_layout(tmp_path / "flat")) == before


def test_folders_below_are_read_too(coco, tmp_path):
    write_flat(coco, tmp_path / "flat")
    before = contents(find_layout(tmp_path / "flat"))
    (tmp_path / "flat" / "first").mkdir()
    for file in (tmp_path / "flat").glob("00000000000[1-4].*"):
        file.rename(file.parent / "first" / file.name)
    after = contents(find_layout(tmp_path / "flat"))
    assert sum(len(c["annotations"]) for c in after) == sum(len(c["annotations"]) for c in before)
    assert {image["file_name"] for c in after for image in c["images"]} >= {
        "first/000000000004.jpg",
        "000000000005.jpg",
    }


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("</object>", "", "cannot be read"),
        ("<name>", "<nome>", "cannot be read"),
        ("<xmin>", "<xmin>x", "has bndbox .* expected a name and xmin, ymin, xmax, ymax"),
    ],
)
def test_a_malformed_xml_is_refused_by_name(coco, tmp_path, old, new, message):
    write_voc(coco, tmp_path / "voc")
    file = next(file for file in sorted((tmp_path / "voc" / "Annotations").iterdir()) if "<object>" in file.read_text())
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as caught:
        find_layout(tmp_path / "voc")
    assert str(file) in str(caught.value)


def test_what_validates_is_not_trained_with(coco, tmp_path):
    """A list of all images, for training, beside that of the ones to validate; its lines end in a mark or not."""
    lists = write_voc(coco, tmp_path / "voc") / "ImageSets" / "Main"
    train, val = ((lists / f"{name}.txt").read_text() for name in ("train", "val"))
    (lists / "train.txt").unlink()
    (lists / "trainval.txt").write_text((train + val).replace("\n", "  1\n"))
    layout = find_layout(tmp_path / "voc")
    assert [len(content["images"]) for content in contents(layout)] == [11, 5]
    assert not any("in train and in val" in line for line in layout.lines)


def test_images_that_are_in_both_sets_are_said(coco, tmp_path):
    folder = write_yolo(coco, tmp_path / "data")
    (folder / "data.yaml").write_text("train: images\nval: images/val\nnames: [circle, square, triangle]\n")
    layout = find_layout(folder)
    assert any("5 images are in train and in val, the first: " in line for line in layout.lines)


def test_a_list_that_names_an_absent_image_is_refused(coco, tmp_path):
    folder = write_voc(coco, tmp_path / "voc")
    next(iter((folder / "JPEGImages").glob("val_*"))).unlink()
    with pytest.raises(FileNotFoundError, match="val.txt names 'val_0000.*there is no such image"):
        find_layout(folder)


# The classes of the model that is evaluated


def test_ids_of_a_model_are_taken_by_name(coco, tmp_path):
    """YOLO and VOC number classes by their order, which another folder's may not be."""
    folder = write_yolo(coco, tmp_path / "data", yaml=False)
    before = contents(find_layout(folder))
    (folder / "classes.txt").write_text("triangle\nsquare\ncircle\n")
    for file in (folder / "labels").rglob("*.txt"):
        lines = [line.split() for line in file.read_text().splitlines()]
        file.write_text("".join(" ".join([str(2 - int(first)), *rest]) + "\n" for first, *rest in lines))
    ids = {"circle": 1, "square": 2, "triangle": 3, "star": 4}
    after = contents(find_layout(folder, ids))
    assert [content["annotations"] for content in after] == [content["annotations"] for content in before]
    assert contents(find_layout(folder, {"circle": 1, "square": 2})) == contents(find_layout(folder)) != after


def test_published_weights_are_evaluated_by_cocos_names(coco, tmp_path, monkeypatch, capsys):
    """YOLO's class 0 of 2, "cat", is not COCO's category 1."""
    folder = write_yolo(coco, tmp_path / "data", yaml=False)
    (folder / "classes.txt").write_text("cat\ndog\nzebra\n")
    seen = []
    build = Boxes.build_dataset

    def noting(self, *args, **kwargs):
        seen.append(build(self, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(Boxes, "build_dataset", noting)
    weights = checkpoint_of(num_classes=91, backbone_level=1, image_size=48)
    del weights["categories"]
    torch.save(weights, tmp_path / "coco.pth")
    argv = ["eval", "--weights", str(tmp_path / "coco.pth"), "--data", str(folder), "--num_workers", "0"]
    assert main([*argv, "--device", "cpu"]) == 0
    labels = {int(label) for _, target in seen[0] for label in target["labels"]}
    assert labels == {17, 18, 24} and "zebra" in capsys.readouterr().out


# Folders


@pytest.mark.parametrize("layout", WRITERS)
def test_an_archive_unpacked_into_its_own_folder_is_found(coco, tmp_path, layout):
    inner = WRITERS[layout](coco, tmp_path / "data" / "Shapes.v1")
    (tmp_path / "data" / "__MACOSX").mkdir()
    next(inner.rglob("*.jpg")).with_name("._1.jpg").write_bytes(b"no image")
    outer, expected = find_layout(tmp_path / "data"), find_layout(inner)
    assert outer.splits["val"].images == expected.splits["val"].images and contents(outer) == contents(expected)


def test_a_yaml_of_a_test_set_alone_and_with_backslashes(coco, tmp_path):
    folder = write_yolo(coco, tmp_path / "data")
    (folder / "data.yaml").write_text("test: ..\\images\\val\nnames: [circle, square, triangle]\n")
    (layout,) = contents(find_layout(folder))
    assert len(layout["images"]) == 5


def test_a_file_name_that_is_too_long_is_an_image_that_is_not_there(tmp_path):
    images = [{"id": 1, "file_name": "a" * 300 + ".jpg", "width": 9, "height": 9}]
    (tmp_path / "x.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    with pytest.raises(FileNotFoundError, match="no folder with its images, such as 'aaa"):
        find_layout(tmp_path)


def test_unknown_and_ambiguous_folders_are_refused_with_what_is_there(coco, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.txt").write_text("sun")
    with pytest.raises(FileNotFoundError, match="no layout that is known. Looked for COCO: .* There is holiday.txt"):
        find_layout(tmp_path / "photos")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        find_layout(tmp_path / "absent")
    both = write_yolo(coco, tmp_path / "both", yaml=False)
    shutil.copytree(coco, both, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="labelled in more than one way: COCO and YOLO"):
        find_layout(both)
    assert main(["train", "--data", str(coco), "--coco_path", str(coco), "--device", "cpu"]) == 2
    assert "it does not go together with --coco_path" in capsys.readouterr().err


def test_a_json_that_says_the_same_is_not_written_again(tmp_path):
    file = tmp_path / "train.json"
    finding._write(file, {"images": [], "ä": 1.5})
    os.utime(file, ns=(1, 1))
    assert finding._write(file, {"images": [], "ä": 1.5}) == file and file.stat().st_mtime_ns == 1
    finding._write(file, {"images": [1]})
    assert json.loads(file.read_text()) == {"images": [1]} and file.stat().st_mtime_ns > 1
    file.write_bytes(b"\xff")
    finding._write(file, {"images": [1]})
    assert json.loads(file.read_text()) == {"images": [1]} and list(tmp_path.iterdir()) == [file]
