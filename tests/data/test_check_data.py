"""`check-data`, training and evaluation with files outside their folder, panoptic data, and damaged images."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import detr_fast
from detr_fast.cli import main
from detr_fast.criterion import id2rgb
from detr_fast.data import check_coco, check_panoptic, make_shapes_dataset
from detr_fast.data.panoptic import CocoPanoptic
from tests.inference.tiny_models import TINY, checkpoint_of

FLAGS = [flag for name, value in TINY.items() for flag in (f"--{name}", str(value))]
FLAGS += ["--batch_size", "2", "--num_workers", "0", "--max_steps", "1", "--epochs", "1"]


@pytest.fixture
def data(tmp_path):
    """Two copies of one file, ann.json of three images, and their folder."""
    make_shapes_dataset(tmp_path / "made", num_train=3, num_val=1, image_size=64)
    shutil.copytree(tmp_path / "made" / "train2017", tmp_path / "images")
    content = json.loads((tmp_path / "made" / "annotations" / "instances_train2017.json").read_text())
    (tmp_path / "ann.json").write_text(json.dumps(content))
    return tmp_path


def rename(folder, change):
    """Moves the first image's file out of the folder and names it so; returns that name."""
    content = json.loads((folder / "ann.json").read_text())
    name = content["images"][0]["file_name"]
    shutil.move(folder / "images" / name, folder / name)
    content["images"][0]["file_name"] = change(folder, name)
    (folder / "ann.json").write_text(json.dumps(content))
    return content["images"][0]["file_name"]


def own(folder, *sets):
    flags = [
        (f"--{name}_{kind}", str(folder / path))
        for name in sets
        for kind, path in (("ann", "ann.json"), ("images", "images"))
    ]
    return [part for pair in flags for part in pair]


@pytest.mark.parametrize(
    "flag, change",
    [
        pytest.param("--allow_outside", lambda folder, name: f"../{name}", id="up"),
        pytest.param("--allow-outside", lambda folder, name: f"{folder}/{name}", id="absolute", marks=pytest.mark.slow),
    ],
)
def test_files_outside_their_folder_are_refused_unless_allowed(data, capsys, change, flag):
    name = rename(data, change)
    message = (
        f"image id 1 has file_name {name!r}, which leads out of the folder {data}/images; "
        "--allow_outside takes such names"
    )
    assert main(["check-data", *own(data, "train")]) == 1
    assert f"ERROR: image outside the folder (1)\n  {message}\n1 error\n" in capsys.readouterr().out
    train = ["train", *own(data, "train", "val"), *FLAGS, "--output_dir", str(data / "out")]
    assert main(train) == 2
    assert capsys.readouterr().err == f"detr-fast: error: {data}/ann.json: {message}\n"
    assert main([*train, flag]) == 0 and main(["check-data", *own(data, "train"), flag]) == 0
    evaluate = ["eval", "--weights", str(data / "out"), *own(data, "val"), "--device", "cpu", "--num_workers", "0"]
    capsys.readouterr()
    assert main(evaluate) == 2 and message in capsys.readouterr().err
    assert main([*evaluate, flag]) == 0


def test_links_out_of_the_folder_are_taken(data):
    name = rename(data, lambda folder, name: name)
    (data / "images" / name).symlink_to(data / name)
    assert check_coco(data / "images", data / "ann.json").ok
    content = json.loads((data / "ann.json").read_text())
    content["images"][0]["file_name"] = f"sub/../{name}"  # leaves nothing
    (data / "images" / "sub").mkdir()
    (data / "ann.json").write_text(json.dumps(content))
    assert check_coco(data / "images", data / "ann.json").ok


def test_fix_does_not_look_outside(data, capsys):
    name = rename(data, lambda folder, name: f"../{name}")
    content = json.loads((data / "ann.json").read_text())
    del content["images"][0]["width"]
    (data / "ann.json").write_text(json.dumps(content))
    assert main(["check-data", *own(data, "train"), "--fix", str(data / "out.json")]) == 1
    first = json.loads((data / "out.json").read_text())["images"][0]
    assert first["file_name"] == name and "width" not in first


def test_a_detector_evaluates_outside_if_allowed(data):
    import torch

    rename(data, lambda folder, name: f"../{name}")
    torch.save(checkpoint_of(num_classes=9), data / "model.pth")
    state = torch.load(data / "model.pth", weights_only=True)
    del state["categories"]
    torch.save(state, data / "model.pth")
    model = detr_fast.load(data / "model.pth", device="cpu")
    settings = {"val_ann": str(data / "ann.json"), "val_images": str(data / "images"), "num_workers": 0}
    with pytest.raises(ValueError, match="leads out of the folder"):
        model.evaluate(**settings)
    assert "coco_eval_bbox" in model.evaluate(**settings, allow_outside=True)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"<html>not found</html>"],
    ids=["truncated", "empty", "html"],
)  # fmt: skip
def test_training_on_a_damaged_image_names_it(data, capsys, damage, workers):
    (path,) = list((data / "images").iterdir())[:1]
    path.write_bytes(damage(path.read_bytes()))
    argv = ["train", *own(data, "train", "val"), *FLAGS, "--batch_size", "3", "--num_workers", str(workers)]
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"detr-fast: error: image {re.escape(str(path))} \(image id \d\) cannot be decoded: .*", line)
    report = check_coco(data / "images", data / "ann.json")
    assert list(report.errors) == ["corrupt image"] and line.removeprefix("detr-fast: error: ") in str(report)


def test_the_verdict_comes_last(data, capsys):
    assert main(["check-data", *own(data, "train")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["ok", ""] and any(
        "  disc" in line or "  box" in line or re.match(r" +\d+  ", line) for line in lines
    )
    rename(data, lambda folder, name: f"../{name}")
    assert main(["check-data", *own(data, "train", "val")]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [f"{data}/ann.json: 1 error"] * 2


def test_ok_is_said_once_for_each_set(data, capsys):
    assert main(["check-data", *own(data, "train")]) == 0
    assert re.findall(r"\bok\b", capsys.readouterr().out) == ["ok"]
    assert main(["check-data", *own(data, "train", "val")]) == 0
    assert capsys.readouterr().out.splitlines().count(f"{data}/ann.json: ok") == 2
    assert main(["check-data", *own(data, "train", "val")]) == 0
    assert len(re.findall(r"\bok\b", capsys.readouterr().out)) == 2


# Several processes


@pytest.fixture
def many(data):
    """Fifty images, of which three cannot be read."""
    content = json.loads((data / "ann.json").read_text())
    image = content["images"][0]
    content["images"] = [{**image, "id": i, "file_name": f"{i}.png"} for i in range(1, 51)]
    for i in range(1, 51):
        shutil.copy(data / "images" / image["file_name"], data / "images" / f"{i}.png")
    for i, damage in ((40, b""), (7, b"text")):
        (data / "images" / f"{i}.png").write_bytes(damage)
    (data / "images" / "23.png").unlink()
    (data / "ann.json").write_text(json.dumps(content))
    return data


@pytest.mark.parametrize("workers", [2, None])
def test_processes_find_what_threads_find(many, workers):
    expected = check_coco(many / "images", many / "ann.json")
    got = check_coco(many / "images", many / "ann.json", num_workers=workers)
    assert got == expected and list(got.errors.items()) == list(expected.errors.items())
    assert [len(messages) for messages in got.errors.values()] == [2, 1] and str(got) == str(expected)


def test_processes_find_what_threads_find_in_panoptic_data(panoptic):
    folder, content = panoptic
    content["images"][0]["width"], content["images"][1]["file_name"] = 9, "none.png"
    set_png(folder, [[300] * 7] * 3 + [[5] * 7] * 3)
    (folder / "ann.json").write_text(json.dumps(content))
    reports = [
        check_panoptic(folder / "images", folder / "png", folder / "ann.json", num_workers=workers)
        for workers in (0, 2)
    ]
    assert reports[0] == reports[1] and str(reports[0]) == str(reports[1]) and len(reports[0].errors) == 3


def test_the_number_of_processes_is_stated(many, capsys):
    lines = []
    for workers in "012":
        assert main(["check-data", *own(many, "train"), "--num_workers", workers]) == 1
        lines.append(capsys.readouterr())
    assert lines[0] == lines[1] == lines[2] and lines[0].err == ""  # no bar, as this is no terminal
    assert main(["check-data", *own(many, "train"), "--num_workers", "-1"]) == 2
    assert "num_workers is -1; expected 0 or more" in capsys.readouterr().err


def killed_at_30(folder, task):
    if task[0] == "30.png":
        os.kill(os.getpid(), signal.SIGKILL)
    return 64, 64


def test_a_killed_process_is_an_error(many, capsys, monkeypatch):
    monkeypatch.setattr("detr_fast.data.check._decoded_size", killed_at_30)
    assert main(["check-data", *own(many, "train"), "--num_workers", "2"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and re.fullmatch(
        r"detr-fast: error: a process that decodes images was killed, perhaps for want of memory, when \d+ of 50 were "
        r"done; --num_workers states how many there are \(0: none, threads instead\)\n",
        said.err,
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar(many, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    assert main(["check-data", *own(many, "train"), "--num_workers", "2"]) == 1
    assert "images" in sys.stderr.getvalue() and "50" in sys.stderr.getvalue()
    assert sys.stderr.getvalue().endswith("\r") and "\r" not in capsys.readouterr().out


_SLOW = """
import os, sys, time
from detr_fast.cli import main
from detr_fast.data import check

def slow(folder, task):
    os.write(1, b"begun\\n")
    time.sleep(0.05)
    return 64, 64

check._decoded_size = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupted_check_leaves_no_process(many, number, code):
    argv = [sys.executable, "-c", _SLOW, "check-data", *own(many, "train"), "--num_workers", "2"]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "begun\n"
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: to all
    else:
        process.kill()  # the first process alone
    out, err = process.communicate(timeout=60)  # ends when nobody holds the pipes any more
    assert process.returncode == code and out.count("begun") < 48
    assert err == ("detr-fast: interrupted\n" if number == signal.SIGINT else "")


# Panoptic

CATEGORIES = [{"id": 1, "name": "dog", "isthing": 1}, {"id": 120, "name": "sky", "isthing": 0}]


def segment(i, category_id=1):
    return {"id": i, "category_id": category_id, "area": 4, "iscrowd": 0, "bbox": [0, 0, 1, 1]}


@pytest.fixture
def panoptic(tmp_path):
    for folder in ("images", "png"):
        (tmp_path / folder).mkdir()
    pixels = np.full((6, 8), 70000)
    pixels[1:4, 2:7] = 300
    pixels[5] = 0
    images, annotations = [], []
    for i in (1, 2):
        Image.new("RGB", (8, 6), (9, 9, 9)).save(tmp_path / "images" / f"{i}.png")
        Image.fromarray(id2rgb(pixels)).save(tmp_path / "png" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": 8, "height": 6})
        listed = [segment(300), segment(70000, 120)]
        annotations.append({"image_id": i, "file_name": f"{i}.png", "segments_info": listed})
    return tmp_path, {"images": images, "annotations": annotations, "categories": CATEGORIES}


def set_png(folder, ids):
    Image.fromarray(id2rgb(np.asarray(ids))).save(folder / "png" / "1.png")


ODD = {  # name → (change, error or warning, what it says)
    "no png": (lambda f, c: (f / "png" / "1.png").unlink(), "error", "missing segments"),
    "damaged png": (lambda f, c: (f / "png" / "1.png").write_bytes(b"\x89PNG"), "error", "corrupt segments"),
    "png of another size": (lambda f, c: set_png(f, [[300] * 7] * 3 + [[70000] * 7] * 3), "error", "size of segments"),
    "segment without pixels": (
        lambda f, c: c["annotations"][0]["segments_info"].append(segment(5)), "error", "no pixel of segment 5"),
    "repeated segment": (
        lambda f, c: c["annotations"][0]["segments_info"].append(segment(300)), "error", "listed 2 times"),
    "segment that is not listed": (
        lambda f, c: c["annotations"][0]["segments_info"].pop(), "warning", "1.png (image id 1): segment 70000"),
    "another size": (lambda f, c: c["images"][0].update(width=9), "warning", "8x6 pixels, the json says 9x6"),
    "no image": (lambda f, c: (f / "images" / "2.png").unlink(), "error", "missing image"),
    "damaged image": (lambda f, c: (f / "images" / "2.png").write_bytes(b""), "error", "corrupt image"),
    "image outside": (lambda f, c: c["images"][0].update(file_name="../1.png"), "error", "'../1.png', which leads out"),
    "png outside": (lambda f, c: c["annotations"][0].update(file_name="../png2/1.png"), "error", "which leads out"),
    "unknown category": (lambda f, c: c["annotations"][0]["segments_info"][0].update(category_id=7), "error",
                         "unknown category 7"),
    "id beyond 24 bits": (lambda f, c: c["annotations"][0]["segments_info"][0].update(id=1 << 24), "error",
                          "an id that no colour stands for"),
    "no segments_info": (lambda f, c: c["annotations"][0].pop("segments_info"), "error", "segments_info"),
    "no annotation of an image": (lambda f, c: c["annotations"].pop(), "error", "one annotation for each image"),
    "no images": (lambda f, c: c.update(images=[], annotations=[]), "error", "there are no images"),
    "no json": (lambda f, c: c.clear(), "error", "expected a list"),
}  # fmt: skip


def test_good_panoptic_data(panoptic):
    folder, content = panoptic
    (folder / "ann.json").write_text(json.dumps(content))
    report = check_panoptic(folder / "images", folder / "png", folder / "ann.json")
    assert report.ok and not report.warnings and report.class_counts == {"dog": 2, "sky": 2}
    assert (report.num_images, report.num_annotations, report.num_without_annotations) == (2, 4, 0)
    assert str(report).endswith("\nok")
    assert "folder of segments" in check_panoptic(folder / "images", folder / "none", folder / "ann.json").errors


@pytest.mark.parametrize("name", ODD)
def test_odd_panoptic_data(panoptic, name):
    folder, content = panoptic
    change, level, says = ODD[name]
    change(folder, content)
    (folder / "ann.json").write_text(json.dumps(content))
    report = check_panoptic(folder / "images", folder / "png", folder / "ann.json")
    assert report.ok == (level == "warning") and says in str(report)
    assert sum(map(len, (report.errors if level == "error" else report.warnings).values())) == 1, str(report)
    if level == "warning":  # what is warned of is read
        dataset = CocoPanoptic(folder / "images", folder / "png", folder / "ann.json")
        assert all(len(dataset[i][1]["labels"]) for i in range(2))


def test_panoptic_through_the_command_line(tmp_path, capsys):
    make_shapes_dataset(tmp_path, num_train=2, num_val=2, image_size=64, panoptic=True)
    flags = ["check-data", "--coco_path", str(tmp_path), "--coco_panoptic_path", str(tmp_path)]
    assert main(flags) == 0
    said = capsys.readouterr().out
    names = ["instances_val2017", "panoptic_train2017", "panoptic_val2017"]
    assert said.splitlines()[-3:] == [f"{tmp_path}/annotations/{name}.json: ok" for name in names]
    next((tmp_path / "panoptic_val2017").iterdir()).unlink()
    assert main(flags) == 1 and "missing segments" in capsys.readouterr().out
    assert main(["check-data", "--coco_panoptic_path", str(tmp_path)]) == 2
    assert main([*flags, "--fix", str(tmp_path / "x.json")]) == 2


def test_names_that_no_terminal_can_print(data, capsys):
    content = json.loads((data / "ann.json").read_text())
    content["images"][0]["file_name"] = "\ud800.png"
    content["categories"][0]["name"] = "\udfff"
    (data / "ann.json").write_text(json.dumps(content))
    assert main(["check-data", *own(data, "train")]) == 1
    assert "\\ud800.png" in capsys.readouterr().out
