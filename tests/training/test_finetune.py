"""Training from trained weights: what they bring along, when it stops, where it is saved."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import detr_fast
from detr_fast.cli import main
from detr_fast.config import PRESETS, Config
from detr_fast.errors import InterruptedRun
from detr_fast.models.hub import published
from detr_fast.tasks import task_of
from detr_fast.training.checkpoint import read_checkpoint
from detr_fast.training.setup import start
from detr_fast.training.trainer import Trainer, train
from tests.inference.tiny_models import checkpoint_of
from tests.training.test_run import equal_states, rows

QUICK = ["--device", "cpu", "--num_workers", "0", "--epochs", "1", "--max_steps", "1", "--sample_images", "0"]
OWN = {"backbone": "resnet18", "backbone_level": 1, "hidden_dim": 32, "enc_layers": 1, "num_queries": 5}


def tiny(**settings):
    return checkpoint_of(backbone_level=1, **{"image_size": 48, **settings})


@pytest.fixture(autouse=True)
def quickly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("detr_fast.training.trainer.draw_curves", lambda folder: True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A small model stands in for the published one, where torch.hub keeps it: bare weights, with COCO's classes."""
    place = tmp_path / "hub" / "checkpoints" / published()["detr_resnet50"].rsplit("/", 1)[1]
    place.parent.mkdir(parents=True)
    torch.save({"model": tiny(num_classes=91)["model"]}, place)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def refusal(capsys, *argv):
    assert main(list(argv)) == 2
    return capsys.readouterr().err


def test_a_resumed_run_tells_its_whole_time(shapes, tmp_path, capsys):
    torch.save(tiny(), tmp_path / "tiny.pth")
    argv = ["train", "--data", str(shapes), "--weights", "tiny.pth", *QUICK, "--output_dir", "run"]
    assert main(argv) == 0
    assert re.search(r"^training took 0:00:\d\d$", capsys.readouterr().out, re.MULTILINE)
    state = read_checkpoint("run/checkpoint.pth")
    assert 0 < state["seconds"] < 60
    argv += ["--epochs", "2", "--max_steps", "2", "--resume", "auto"]
    torch.save({**state, "seconds": 7201.0}, "run/checkpoint.pth")
    assert main(argv) == 0
    said = r"^training took 2:00:\d\d, 0:00:\d\d of it since it was resumed$"
    assert re.search(said, capsys.readouterr().out, re.MULTILINE)
    assert read_checkpoint("run/checkpoint.pth")["seconds"] > 7201
    # A checkpoint of an earlier version does not say.
    del state["seconds"]
    torch.save(state, "run/checkpoint.pth")
    assert main(argv) == 0
    assert re.search(r"^training took 0:00:\d\d$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("kind", ["published", "run"])
def test_weights_bring_their_model_and_get_a_new_head(hub, shapes, tmp_path, capsys, kind):
    norm = {"published": "frozen", "run": "batch"}[kind]
    torch.save(tiny(backbone_norm=norm), tmp_path / "checkpoint.pth")
    source = {"published": "detr_resnet50", "run": str(tmp_path)}[kind]
    argv = ["train", "--data", str(shapes), "--weights", source, "--preset", "finetune", *QUICK]
    assert main([*argv, "--image_size", "48", "--output_dir", "run"]) == 0
    out = capsys.readouterr().out
    classes = {"published": 92, "run": 3}[kind]
    assert f"--weights: not taken, starts fresh: class_embed.weight: [{classes}, 32] there, [4, 32] here" in out
    assert f"--weights {source}: its settings: --backbone resnet18" in out
    assert "--preset finetune: --lr 5e-05" in out and "given: --epochs 1" in out
    args = read_checkpoint("run/checkpoint.pth")["args"]
    assert {name: args[name] for name in OWN} == OWN and args["backbone_norm"] == norm
    assert {name: args[name] for name in PRESETS["finetune"]} == PRESETS["finetune"] | {"epochs": 1}
    before, after = (
        tiny(num_classes=classes - 1, backbone_norm=norm)["model"],
        read_checkpoint("run/checkpoint.pth")["model"],
    )
    moved = (after["input_proj.weight"] - before["input_proj.weight"]).abs().max()
    assert moved <= 5e-5
    # The first layers of published weights stay; where batch norm was trained, they were trained from scratch.
    first = "backbone.0.body.layer1.0.conv1.weight"
    assert torch.equal(after[first], before[first]) == (kind == "published")


def test_the_image_size_of_the_weights_is_kept(shapes, tmp_path):
    torch.save(tiny(image_size=96), tmp_path / "tiny.pth")
    assert main(["train", "--data", str(shapes), "--weights", "tiny.pth", *QUICK, "--output_dir", "run"]) == 0
    assert read_checkpoint("run/checkpoint.pth")["args"]["image_size"] == 96


def test_a_flag_that_contradicts_the_weights_is_refused(shapes, tmp_path, capsys):
    torch.save(tiny(), tmp_path / "tiny.pth")
    argv = ["train", "--data", str(shapes), "--weights", "tiny.pth", *QUICK]
    message = refusal(capsys, *argv, "--enc_layers", "2", "--nheads", "4", "--num_queries", "7")
    assert "--enc_layers 2, it has 1" in message and "--nheads 4, it has 8" in message
    assert "num_queries" not in message  # replaced, and said


def test_a_published_name_without_a_network_says_what_to_do(shapes, tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", refuse)
    argv = ["train", "--data", str(shapes), *QUICK, "--weights"]
    message = refusal(capsys, *argv, "detr_resnet50")
    assert "no network" in message and "Download it elsewhere and put it at" in message
    assert "did you mean 'detr_resnet50'?" in refusal(capsys, *argv, "detr_resnet5")
    assert not list(Path("outputs").glob("*"))  # nothing is left of a run that was refused


def test_the_preset_asks_for_weights(shapes, capsys):
    assert "give --weights" in refusal(capsys, "train", "--data", str(shapes), "--preset", "finetune", *QUICK)


def test_resuming_describes_itself_and_reads_no_weights(shapes, tmp_path, capsys):
    torch.save(tiny(), tmp_path / "tiny.pth")
    argv = ["train", "--data", str(shapes), "--weights", "tiny.pth", "--preset", "finetune", *QUICK[:4]]
    argv += ["--sample_images", "0", "--output_dir", "run", "--resume", "auto"]
    assert main([*argv, "--epochs", "1"]) == 0
    Path("tiny.pth").unlink()
    capsys.readouterr()
    assert main([*argv, "--epochs", "2"]) == 0
    out = capsys.readouterr().out
    assert "--weights is not read again" in out and "continuing run/checkpoint.pth with epoch 1" in out
    assert [row["epoch"] for row in rows(Path("run"))] == [0, 1]


def test_one_line_of_python(shapes, tmp_path):
    torch.save(tiny(), tmp_path / "tiny.pth")
    settings = {"preset": "finetune", "epochs": 1, "max_steps": 1, "num_workers": 0, "sample_images": 0}
    model = detr_fast.load("tiny.pth", device="cpu").train("run", data=shapes, **settings)
    assert model.names == {1: "circle", 2: "square", 3: "triangle"}
    assert model.config.hidden_dim == 32 and read_checkpoint("run/checkpoint.pth")["args"]["lr"] == 5e-5


# Early stopping


def scores(monkeypatch, flags, values):
    """Evaluations give these scores, one after another."""
    given = iter(values)
    task = task_of(Config.from_arguments(flags))
    monkeypatch.setattr(type(task), "score", lambda self, stats: next(given) if "coco_eval_bbox" in stats else None)


def test_early_stop_ends_after_evaluations_without_improvement(tiny_flags, monkeypatch, capsys):
    flags = [*tiny_flags, "--epochs", "20", "--eval_every", "2", "--sample_images", "0", "--early_stop", "1"]
    scores(monkeypatch, [*flags, "--output_dir", "run"], [0.1, 0.3, 0.3])
    row = train(Config.from_arguments([*flags, "--output_dir", "run"]))
    out = capsys.readouterr().out
    assert (
        "stopped after epoch 5: 1 evaluations without a better score than 0.3000, which run/checkpoint_best.pth" in out
    )
    assert row["epoch"] == 5 and "test_coco_eval_bbox" in row
    assert read_checkpoint("run/checkpoint_best.pth")["epoch"] == 3
    assert Path("run/eval/report.html").is_file()


def test_early_stop_goes_on_counting_in_a_resumed_run(tiny_flags, monkeypatch, capsys):
    flags = [*tiny_flags, "--sample_images", "0", "--early_stop", "2", "--output_dir"]

    def run(*more):
        return train(Config.from_arguments([*flags, *more]))

    values = [0.2, 0.1, 0.1]
    scores(monkeypatch, [*flags, "whole"], values)
    run("whole", "--epochs", "20")
    scores(monkeypatch, [*flags, "two"], values)
    run("two", "--epochs", "2")
    run("two", "--epochs", "20", "--resume", "auto")
    one, two = read_checkpoint("whole/checkpoint.pth"), read_checkpoint("two/checkpoint.pth")
    assert one["epoch"] == two["epoch"] == 2 and one["stale"] == two["stale"] == 2
    assert equal_states(one["model"], two["model"])
    capsys.readouterr()
    assert run("two", "--epochs", "30", "--resume", "auto") == {}
    assert "was stopped by --early_stop after 3 epochs. To train on, give a larger one" in capsys.readouterr().out
    scores(monkeypatch, [*flags, "two"], [0.1])
    assert run("two", "--epochs", "30", "--resume", "auto", "--early_stop", "3")["epoch"] == 3


# Where it is saved


def test_none_saves_nothing_also_in_python(tiny_flags):
    config = Config.from_arguments([*tiny_flags, "--epochs", "1", "--max_steps", "1", "--output_dir", "none"])
    Trainer(*start(config)).run()
    assert not list(Path().iterdir())


def test_without_an_output_dir_a_folder_is_named_by_the_time(tiny_flags, capsys):
    flags = [*tiny_flags, "--epochs", "1", "--max_steps", "1", "--output_dir", ""]
    for _ in range(2):
        assert main(["train", *flags]) == 0
    said = re.findall(r"no --output_dir: everything is saved in (\S+)", capsys.readouterr().out)
    assert len(set(said)) == 2
    for folder in said:
        assert re.fullmatch(r"outputs/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_2)?", folder)
        assert Path(folder, "checkpoint.pth").is_file()
        assert read_checkpoint(f"{folder}/checkpoint.pth")["args"]["output_dir"] == folder


def test_a_stopped_run_says_how_to_go_on_from_a_folder_that_was_not_given(tiny_flags):
    class Stop:
        def on_start(self, config):
            signal.raise_signal(signal.SIGTERM)

        def on_end(self):
            pass

    flags = [*tiny_flags, "--epochs", "1"]
    with pytest.raises(InterruptedRun) as stopped:
        train(Config.from_arguments([*flags, "--output_dir", ""]), callbacks=[Stop()])
    said = str(stopped.value).partition("the same command with ")[2].split()
    assert said[0] == "--output_dir" and said[2:] == ["--resume", "auto"]
    assert main(["train", *flags, *said]) == 0
    assert [row["epoch"] for row in rows(Path(said[1]))] == [0]


@pytest.mark.slow
def test_processes_agree_on_the_folder(tiny_flags, tmp_path):
    pytest.importorskip("pycocotools.coco")  # the processes that are started need it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    flags = [*tiny_flags, "--epochs", "1", "--max_steps", "1", "--output_dir", ""]
    repository = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{repository}:{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(
        [*torchrun, "-m", "detr_fast", "train", *flags], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = (tmp_path / "outputs").iterdir()
    assert json.loads((folder / "log.txt").read_text())["epoch"] == 0
