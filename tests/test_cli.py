"""The command line as a user meets it: results on disk, exit codes, and errors in one line."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import detr_fast.demo
from detr_fast import cli
from detr_fast.cli import main
from detr_fast.training import engine

TINY = (
    "--backbone resnet18 --backbone_weights none --backbone_level 1 --hidden_dim 32 --nheads 2 --enc_layers 1 "
    "--dec_layers 1 --dim_feedforward 32 --num_queries 5 --image_size 48 --batch_size 2 --num_workers 0 --device cpu "
    "--output_dir none"
).split()


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """Six images with categories 5 (dot) and 9 (bar), which are labels 0 and 1."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "images").mkdir()
    images, annotations = [], []
    for number in range(6):
        size = (60, 48) if number % 2 else (48, 60)
        Image.new("RGB", size, (30 * number, 90, 60)).save(folder / "images" / f"{number}.jpg")
        images.append({"id": 100 + number, "file_name": f"{number}.jpg", "width": size[0], "height": size[1]})
        annotations.append(
            {"id": number + 1, "image_id": 100 + number, "category_id": (5, 9)[number % 2], "bbox": [5, 6, 20, 22]}
        )
    categories = [{"id": 9, "name": "bar"}, {"id": 5, "name": "dot"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "ann.json").write_text(json.dumps(content))
    return folder


def data_flags(own_data, *sets):
    return [
        flag
        for name in sets
        for flag in (f"--{name}-ann", str(own_data / "ann.json"), f"--{name}-images", str(own_data / "images"))
    ]


@pytest.fixture(scope="module")
def checkpoint(own_data, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    flags = ["--epochs", "1", *TINY, "--output-dir", str(output)]
    assert main(["train", *data_flags(own_data, "train", "val"), *flags]) == 0
    return output / "checkpoint.pth"


def error_of(capsys, *argv):
    assert main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("detr-fast: error: ") and err.count("\n") == 1
    return err


def test_eval_prints_cocos_numbers_and_those_of_each_class(own_data, checkpoint, capsys):
    flags = ["--num-workers", "0", "--device", "cpu"]
    assert main(["eval", "--checkpoint", str(checkpoint), *data_flags(own_data, "val"), *flags]) == 0
    out = capsys.readouterr().out
    assert out.count("Average Precision") == 6 and out.count("Average Recall") == 6
    assert "\ndot" in out and "\nbar" in out


def test_eval_writes_a_report_and_a_results_file_that_coco_reads(own_data, checkpoint, tmp_path, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    flags = ["--output-dir", str(tmp_path), "--num-workers", "0", "--device", "cpu", "--eval_backend", "pycocotools"]
    assert main(["eval", "--weights", str(checkpoint), *data_flags(own_data, "val"), *flags]) == 0
    assert str(tmp_path / "eval" / "report.html") in capsys.readouterr().out
    page = (tmp_path / "eval" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg") == 12 and ">dot<" in page
    content = json.loads((own_data / "ann.json").read_text())
    for entry in content["annotations"]:  # what pycocotools wants to be there
        entry.update(iscrowd=0, area=entry["bbox"][2] * entry["bbox"][3])
    (tmp_path / "ann.json").write_text(json.dumps(content))
    found = json.loads((tmp_path / "results.json").read_text())
    ids = {category["id"] for category in content["categories"]}
    assert {entry["category_id"] for entry in found} <= ids and not ids & {0, 1}  # ids, and no labels
    coco = COCO(str(tmp_path / "ann.json"))
    again = COCOeval(coco, coco.loadRes(str(tmp_path / "results.json")), "bbox")
    again.evaluate()
    again.accumulate()
    again.summarize()
    assert again.stats.tolist() == pytest.approx(torch.load(tmp_path / "eval.pth")["stats"], abs=1e-4)


def test_training_ends_with_a_report(checkpoint):
    assert ">dot<" in (checkpoint.parent / "eval" / "report.html").read_text(encoding="utf-8")


def test_completion_knows_commands_and_flags(capsys):
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh"):
        assert main(["--print-completion", shell]) == 0
        script = capsys.readouterr().out
        assert "check-data" in script and "--batch_size" in script


def test_completion_without_shtab_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert "pip install detr_fast[completion]" in error_of(capsys, "--print-completion", "bash")


def test_help_is_quick():
    """In CPU seconds; importing torch takes more."""
    command = [sys.executable, "-m", "detr_fast", "train", "--help"]
    before = os.times()
    subprocess.run(command, capture_output=True, check=True, cwd=Path(__file__).parents[1])
    after = os.times()
    seconds = after.children_user - before.children_user + after.children_system - before.children_system
    assert seconds < 0.3


def test_train_eval_is_eval(own_data, checkpoint, capsys):
    flags = ["--eval", "--resume", str(checkpoint), "--num_workers", "0", "--device", "cpu"]
    assert main(["train", *flags, *data_flags(own_data, "val")]) == 0
    assert capsys.readouterr().out.count("Average") == 12


def test_predict_writes_pictures_and_results_with_the_datas_ids(own_data, checkpoint, tmp_path):
    flags = ["--threshold", "0", "--output-dir", str(tmp_path), "--ann", str(own_data / "ann.json")]
    argv = ["predict", str(own_data / "images"), "--weights", str(checkpoint), *flags, "--device", "cpu"]
    assert main(argv) == 0
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert len(results) == 6 * 5
    assert {entry["image_id"] for entry in results} == set(range(100, 106))
    assert {entry["category_id"] for entry in results} <= {5, 9}
    described = {entry["id"]: entry for entry in json.loads((tmp_path / "images.json").read_text())}
    assert described[101]["file_name"] == "1.jpg" and described[101]["width"] == 60
    for number in range(6):
        with Image.open(tmp_path / f"{number}.jpg") as picture:
            assert picture.width > 48 and len(picture.getcolors(1 << 20)) > 100

    from pycocotools.coco import COCO

    loaded = COCO(str(own_data / "ann.json")).loadRes(str(tmp_path / "predictions.json"))
    assert len(loaded.anns) == 30


def test_predicted_boxes_are_the_models(own_data, checkpoint, tmp_path):
    from detr_fast.config import Config
    from detr_fast.data import CocoDetection, make_coco_transforms
    from detr_fast.inference.loading import load_for_inference

    assert main(["predict", str(own_data / "images" / "1.jpg"), "--weights", str(checkpoint), "--threshold", "0",
                 "--output_dir", str(tmp_path), "--device", "cpu"]) == 0  # fmt: skip
    results = json.loads((tmp_path / "predictions.json").read_text())
    loaded = load_for_inference(Config(device="cpu"), set(), str(checkpoint))
    model = loaded.model
    assert loaded.config.image_size == 48 and loaded.categories.names == ("dot", "bar")
    dataset = CocoDetection(own_data / "images", own_data / "ann.json", make_coco_transforms("val", scales=48))
    with torch.no_grad():
        out = model([dataset[1][0]])
    scores, labels = out["pred_logits"][0].softmax(-1)[:, :-1].max(-1)
    best = scores.argmax()
    assert results[0]["score"] == pytest.approx(scores[best].item(), abs=1e-4)
    assert results[0]["category_id"] == (5, 9)[labels[best]]
    cx, cy, w, h = out["pred_boxes"][0, best].tolist()
    expected = [(cx - w / 2) * 60, (cy - h / 2) * 48, w * 60, h * 48]
    assert results[0]["bbox"] == pytest.approx(expected, abs=0.05)
    assert results[0]["image_id"] == 1 and results[0]["file_name"] == "1.jpg"


def test_predict_never_overwrites_its_input(own_data, checkpoint, tmp_path, capsys):
    image = tmp_path / "0.jpg"
    before = (own_data / "images" / "0.jpg").read_bytes()
    image.write_bytes(before)
    argv = ["predict", str(image), "--weights", str(checkpoint), "--output_dir", str(tmp_path), "--device", "cpu"]
    assert "overwrite" in error_of(capsys, *argv)
    assert image.read_bytes() == before


def test_predict_reports_a_corrupt_image_and_goes_on(own_data, checkpoint, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    (folder / "fine.jpg").write_bytes((own_data / "images" / "0.jpg").read_bytes())
    argv = ["predict", str(folder), "--weights", str(checkpoint), "--output_dir", str(tmp_path / "out")]
    assert main([*argv, "--device", "cpu"]) == 1
    assert "broken.jpg" in capsys.readouterr().out
    assert [e["file_name"] for e in json.loads((tmp_path / "out" / "images.json").read_text())] == ["fine.jpg"]


@pytest.mark.parametrize("workers", ["0", "1"])
def test_corrupt_image_in_training_is_named(own_data, tmp_path, capsys, workers):
    folder = tmp_path / "images"
    folder.mkdir()
    for path in (own_data / "images").iterdir():
        (folder / path.name).write_bytes(path.read_bytes()[: 300 if path.name == "3.jpg" else None])
    ann = str(own_data / "ann.json")
    flags = ["--train_ann", ann, "--train_images", str(folder), "--val_ann", ann, "--val_images", str(folder)]
    message = error_of(capsys, "train", *flags, "--epochs", "1", *TINY, "--num_workers", workers)
    assert "3.jpg" in message and "image id 103" in message


def test_check_data_tells_good_from_bad(own_data, tmp_path, capsys):
    assert main(["check-data", *data_flags(own_data, "val")]) == 0
    content = json.loads((own_data / "ann.json").read_text())
    content["annotations"][0]["category_id"] = 77
    (tmp_path / "bad.json").write_text(json.dumps(content))
    capsys.readouterr()
    flags = ["--train_ann", str(tmp_path / "bad.json"), "--train_images", str(own_data / "images")]
    assert main(["check-data", *flags]) == 1
    assert "77" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["images", "categories"])
def test_data_without_images_or_classes_are_refused(own_data, tmp_path, capsys, key):
    content = json.loads((own_data / "ann.json").read_text())
    content.update({"annotations": [], key: []})
    (tmp_path / "annotations").mkdir()
    for name in ("train", "val"):
        (tmp_path / f"{name}2017").symlink_to(own_data / "images")
        (tmp_path / "annotations" / f"instances_{name}2017.json").write_text(json.dumps(content))
    assert main(["check-data", "--coco_path", str(tmp_path)]) == 1
    assert f"there are no {key}" in capsys.readouterr().out
    message = error_of(capsys, "train", "--coco_path", str(tmp_path), *TINY)
    assert f"instances_train2017.json: there are no {key}" in message


def test_file_name_that_is_no_text_is_refused(own_data, tmp_path, capsys):
    content = json.loads((own_data / "ann.json").read_text())
    content["images"][1]["file_name"] = 17
    (tmp_path / "bad.json").write_text(json.dumps(content))
    flags = ["--train_ann", str(tmp_path / "bad.json"), "--train_images", str(own_data / "images")]
    assert main(["check-data", *flags]) == 1
    assert "file_name 17" in capsys.readouterr().out


def test_training_refuses_an_unknown_category(own_data, tmp_path, capsys):
    content = json.loads((own_data / "ann.json").read_text())
    content["annotations"][2]["category_id"] = 77
    (tmp_path / "bad.json").write_text(json.dumps(content))
    flags = ["--train_ann", str(tmp_path / "bad.json"), "--train_images", str(own_data / "images")]
    message = error_of(capsys, "train", *flags, *data_flags(own_data, "val"), *TINY)
    assert "77" in message and "[5, 9]" in message


@pytest.mark.parametrize(
    "argv, parts",
    [
        (["fly"], ["unknown command 'fly'", "train, eval, predict"]),
        (["trian"], ["unknown command 'trian'", "did you mean train?"]),
        (["--print-completion", "fish"], ["bash or zsh", "fish"]),
        (["train", "--lr", "fast"], ["--lr", "'fast'"]),
        (["train", "--no_such_flag"], ["--no_such_flag"]),
        (["train", "--device", "cpu"], ["no train data: --train_ann and --train_images not given"]),
        (["train", "--device", "cpu", "--coco_path", "nowhere"], ["nowhere"]),
        (["train", "--frozen_weights", "x.pth", "--coco_path", "x"], ["--frozen_weights", "--masks"]),
        (["train", "--world_size", "4", "--device", "cpu"], ["torchrun --nproc-per-node 4"]),
        (["eval", "--coco_path", "x"], ["--weights"]),
        (["eval", "--weights", "absent.pth", "--coco_path", "x", "--device", "cpu"], ["absent.pth"]),
        (["predict", "nothing_here", "--weights", "absent.pth"], ["nothing_here"]),
        (["predict", "x.jpg", "--weights", "a.pth", "--threshold", "2"], ["--threshold", "2.0"]),
        (["check-data"], ["--coco_path"]),
        (["train", "--seed", "-1"], ["--seed", "-1"]),
        (["demo", "--device", "tpu"], ["tpu"]),
        (["demo", "--max_steps", "-3"], ["--max_steps", "-3"]),
    ],
    ids=lambda value: "-".join(value[:2]) if isinstance(value, list) else None,
)
def test_errors_are_one_line_that_says_what_came(argv, parts, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    message = error_of(capsys, *argv)
    assert all(part in message for part in parts), message


def test_python_m_detr_fast_shows_the_commands():
    done = subprocess.run(
        [sys.executable, "-m", "detr_fast", "--help"], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in ("train", "eval", "predict", "check-data", "demo"))


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"usage: detr-fast {command}" in capsys.readouterr().out


def test_demo_leaves_data_pictures_and_curves(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(detr_fast.demo._CPU_DATA, "num_train", 16)
    monkeypatch.setitem(detr_fast.demo._CPU_DATA, "num_val", 4)
    assert main(["demo", "--device", "cpu", "--max_steps", "1", "--output_dir", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    assert "AP50 " in out and str(tmp_path / "demo") in out
    for name in ("curves.png", "checkpoint.pth", "log.txt", "predictions/predictions.json", "samples/epoch0000.png"):
        assert (tmp_path / "demo" / name).is_file(), name
    assert len(list((tmp_path / "demo" / "data" / "train2017").glob("*.jpg"))) == 16


def test_an_interrupted_demo_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    """With the command that it has printed: it has no --resume of its own."""
    monkeypatch.setitem(detr_fast.demo._CPU_DATA, "num_train", 16)
    monkeypatch.setitem(detr_fast.demo._CPU_DATA, "num_val", 4)
    monkeypatch.setitem(detr_fast.demo._CPU, "epochs", 1)
    real = engine._optimizer_step

    def stop(*args):
        signal.raise_signal(signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as context:
        context.setattr(engine, "_optimizer_step", stop)
        assert main(["demo", "--device", "cpu", "--output_dir", str(tmp_path)]) == 128 + signal.SIGTERM
    out, said = capsys.readouterr()
    assert "after step 1; saved in" in said and "the command above, detr-fast train …, with --resume auto" in said
    command = next(line for line in out.splitlines() if line.startswith("detr-fast train "))
    assert main([*shlex.split(command)[1:], "--resume", "auto", "--device", "cpu"]) == 0
    assert "continuing" in capsys.readouterr().out


def test_real_images_train_and_predict(coco_mini, tmp_path, capsys):
    flags = ["--epochs", "1", "--max_steps", "2", "--output_dir", str(tmp_path / "run"), "--sample_images", "1"]
    assert main(["train", "--coco_path", str(coco_mini), *TINY, *flags, "--batch_size", "4"]) == 0
    images = sorted((coco_mini / "val2017").glob("*.jpg"))[:2]
    argv = ["predict", *map(str, images), "--weights", str(tmp_path / "run" / "checkpoint.pth"), "--threshold", "0"]
    assert main([*argv, "--output_dir", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert len(list((tmp_path / "out").glob("*.jpg"))) == 2
    categories = {e["category_id"] for e in json.loads((tmp_path / "out" / "predictions.json").read_text())}
    assert categories and max(categories) <= 90


def test_predict_draws_lines(tmp_path):
    from detr_fast.config import Config
    from detr_fast.data import make_line_transforms, make_lines_dataset
    from detr_fast.data.lines import LineDetection
    from detr_fast.inference.loading import load_for_inference

    data = make_lines_dataset(tmp_path / "data", num_train=2, num_val=2, image_size=48)
    flags = [*TINY, "--dataset_file", "lines", "--layer1_num", "1", "--epochs", "1", "--sample_images", "0"]
    assert main(["train", *flags, "--coco_path", str(data), "--output_dir", str(tmp_path / "run")]) == 0
    weights = str(tmp_path / "run" / "checkpoint.pth")
    argv = ["predict", str(data / "val2017"), "--weights", weights, "--device", "cpu", "--output_dir"]
    assert main([*argv, str(tmp_path / "all"), "--threshold", "0"]) == 0
    results = json.loads((tmp_path / "all" / "predictions.json").read_text())
    assert len(results) == 2 * 5 and {entry["category_id"] for entry in results} == {0}

    model = load_for_inference(Config(device="cpu"), set(), weights).model
    annotations = data / "annotations" / "lines_val2017.json"
    image, target = LineDetection(data / "val2017", annotations, make_line_transforms("val", scale=48))[0]
    with torch.no_grad():
        out = model([image])
    scores = out["pred_logits"][0].softmax(-1)[:, 0]
    height, width = target["orig_size"].tolist()
    x1, y1, x2, y2 = (out["pred_lines"][0, scores.argmax()] * torch.tensor([width, height] * 2)).tolist()
    assert results[0]["score"] == pytest.approx(scores.max().item(), abs=1e-4)
    assert results[0]["line"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=0.05)

    assert main([*argv, str(tmp_path / "none"), "--threshold", "1"]) == 0
    assert json.loads((tmp_path / "none" / "predictions.json").read_text()) == []
    drawn, plain = (Image.open(tmp_path / name / "00000000.jpg").tobytes() for name in ("all", "none"))
    assert len(drawn) == len(plain) and drawn != plain
