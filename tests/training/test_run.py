"""Whole runs through the command line: what they leave behind, resuming after SIGKILL, two processes."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from detr_fast.cli import main
from detr_fast.training.checkpoint import read_checkpoint

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def rows(output):
    return [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]


def equal_states(a, b):
    """Nested dicts and lists with equal numbers, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_states(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal_states, a, b))
    return a == b


def test_run_leaves_all_its_files(trained):
    log = rows(trained)
    assert [row["epoch"] for row in log] == [0, 1]
    originals = {"train_loss", "train_loss_ce", "train_loss_bbox_unscaled", "train_class_error", "train_lr"}
    originals |= {"test_loss", "test_loss_giou", "test_cardinality_error_unscaled", "n_parameters"}
    assert originals <= set(log[0]) and len(log[0]["test_coco_eval_bbox"]) == 12
    with open(trained / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert float(table[1]["test_coco_eval_bbox_AP50"]) == log[1]["test_coco_eval_bbox"][1]
    assert float(table[0]["train_loss"]) == log[0]["train_loss"]
    for picture in ("samples/epoch0000.png", "samples/epoch0001.png", "curves.png"):
        with Image.open(trained / picture) as image:
            assert len(image.convert("L").resize((64, 64)).getcolors(4096)) > 10  # not a blank sheet
    evaluation = torch.load(trained / "eval" / "latest.pth", weights_only=True)
    assert evaluation["precision"].shape[:2] == (10, 101)
    assert evaluation["stats"] == log[1]["test_coco_eval_bbox"]


def test_checkpoint_has_the_originals_keys_and_describes_itself(trained):
    checkpoint = torch.load(trained / "checkpoint.pth", weights_only=True)
    assert {"model", "optimizer", "lr_scheduler", "epoch", "args"} <= set(checkpoint)
    assert checkpoint["epoch"] == 1 and checkpoint["args"]["hidden_dim"] == 32
    assert checkpoint["categories"]["names"] == ["circle", "square", "triangle"]
    assert (trained / "checkpoint_best.pth").is_file()


def test_killed_and_resumed_equals_uninterrupted(tiny_flags, tmp_path):
    flags = [*tiny_flags, "--epochs", "4", "--eval_every", "2", "--dropout", "0.2", "--sample_images", "0"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(["train", *flags, "--output_dir", str(whole)]) == 0

    command = [sys.executable, "-m", "detr_fast", "train", *flags, "--output_dir", str(killed)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, cwd=tmp_path) as process:
        deadline = time.monotonic() + 120
        while not (killed / "checkpoint.pth").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert read_checkpoint(killed / "checkpoint.pth")["epoch"] < 3

    assert main(["train", *flags, "--output_dir", str(killed), "--resume", "auto"]) == 0
    one, other = read_checkpoint(whole / "checkpoint.pth"), read_checkpoint(killed / "checkpoint.pth")
    for key in ("model", "optimizer", "lr_scheduler", "epoch", "steps", "best", "rng"):
        assert equal_states(one[key], other[key]), key
    timing = {"train_time", "train_data"}
    for a, b in zip(rows(whole), rows(killed), strict=True):
        assert {k: v for k, v in a.items() if k not in timing} == {k: v for k, v in b.items() if k not in timing}


def test_resumed_before_its_evaluation_is_evaluated_first(trained, tiny_flags, tmp_path):
    checkpoint = read_checkpoint(trained / "checkpoint.pth")
    # As it is on disk while the evaluation of the last epoch runs.
    checkpoint["unevaluated"] = {"loss": 1.5}
    checkpoint["best"] = None
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    flags = [*tiny_flags, "--epochs", "2", "--output_dir", str(tmp_path)]
    assert main(["train", *flags, "--resume", "auto"]) == 0
    (row,) = rows(tmp_path)
    assert row["epoch"] == 1 and row["train_loss"] == 1.5
    assert row["test_coco_eval_bbox"] == rows(trained)[1]["test_coco_eval_bbox"]
    assert read_checkpoint(tmp_path / "checkpoint.pth")["unevaluated"] is None


def test_resume_auto_without_a_checkpoint_starts_anew(tiny_flags, tmp_path, capsys):
    flags = [*tiny_flags, "--epochs", "1", "--max_steps", "1", "--output_dir", str(tmp_path / "new")]
    assert main(["train", *flags, "--resume", "auto", "--tensorboard", "--ema_decay", "0.9"]) == 0
    assert "starting anew" in capsys.readouterr().out
    assert list((tmp_path / "new" / "tensorboard").iterdir())
    assert read_checkpoint(tmp_path / "new" / "checkpoint.pth")["ema"]["updates"] == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (["--nheads", "4"], "--nheads was 2 and is 4"),
        (["--num_queries", "7"], "--num_queries was 5 and is 7"),
    ],
)
def test_resume_refuses_another_model(trained, tiny_flags, capsys, change, message):
    flags = [*tiny_flags, "--epochs", "3", "--resume", str(trained / "checkpoint.pth"), *change]
    assert main(["train", *flags]) == 2
    assert message in capsys.readouterr().err


def test_weights_start_a_run_with_other_classes(trained, tiny_flags, shapes, tmp_path, capsys):
    annotations = json.loads((shapes / "annotations" / "instances_train2017.json").read_text())
    annotations["categories"].append({"id": 9, "name": "star"})
    (tmp_path / "own.json").write_text(json.dumps(annotations))
    own = tiny_flags[2:] + ["--train_ann", str(tmp_path / "own.json"), "--train_images", str(shapes / "train2017")]
    own += ["--val_ann", str(tmp_path / "own.json"), "--val_images", str(shapes / "train2017")]
    flags = [*own, "--epochs", "1", "--max_steps", "1", "--output_dir", str(tmp_path / "out"), "--num_queries", "6"]
    assert main(["train", *flags, "--weights", str(trained / "checkpoint.pth")]) == 0
    out = capsys.readouterr().out
    assert "query_embed.weight: [5, 32] there, [6, 32] here" in out
    checkpoint = read_checkpoint(tmp_path / "out" / "checkpoint.pth")
    assert checkpoint["categories"] == {
        "ids": [1, 2, 3, 9], "names": ["circle", "square", "triangle", "star"], "contiguous": True
    }  # fmt: skip
    before = read_checkpoint(trained / "checkpoint.pth")["model"]["input_proj.weight"]
    moved = (checkpoint["model"]["input_proj.weight"] - before).abs().max()
    assert 0 < moved <= 0.002  # one AdamW step of 1e-3


WORKER = """
import sys, torch, torch.distributed as dist
from detr_fast.config import Config
from detr_fast.training.setup import start
from detr_fast.training.trainer import Trainer
output, *flags = sys.argv[1:]
trainer = Trainer(*start(Config.from_arguments(flags + ["--output_dir", output])))
row = trainer.run()
state = {name: value.double() for name, value in trainer.model.state_dict().items()}
states, rows = [None, None], [None, None]
dist.all_gather_object(states, state)
dist.all_gather_object(rows, row)
if dist.get_rank() == 0:
    torch.save({"states": states, "rows": rows}, output + "/both.pth")
dist.destroy_process_group()
"""


def test_two_processes_agree_and_evaluate_as_one(tiny_flags, tmp_path, capsys):
    output = tmp_path / "two"
    output.mkdir()
    (tmp_path / "worker.py").write_text(WORKER)
    flags = [*tiny_flags, "--epochs", "2", "--accumulate_steps", "2", "--batch_size", "1", "--ema_decay", "0.5"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    command = [*torchrun, str(tmp_path / "worker.py"), str(output), *flags]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "backend gloo" in done.stdout

    both = torch.load(output / "both.pth", weights_only=True)
    assert equal_states(*both["states"])
    first, second = both["rows"]
    assert first["test_coco_eval_bbox"] == second["test_coco_eval_bbox"]
    assert first["train_loss"] == second["train_loss"]  # averaged over both
    checkpoint = read_checkpoint(output / "checkpoint.pth")
    assert checkpoint["steps"] == 4 and len(checkpoint["rng"]) == 2

    # One image per batch: the padding, and so the numbers, do not depend on who is in a batch with whom.
    capsys.readouterr()
    evaluate = ["eval", "--weights", str(output / "checkpoint.pth"), *tiny_flags[:2], "--batch_size", "1"]
    assert main([*evaluate, "--num_workers", "0", "--device", "cpu", "--output_dir", str(tmp_path / "eval")]) == 0
    assert capsys.readouterr().out.count("Average") == 12
    alone = torch.load(tmp_path / "eval" / "eval.pth", weights_only=True)["stats"]
    assert alone == first["test_coco_eval_bbox"]


def test_an_earlier_run_in_the_folder_is_said(tiny_flags, tmp_path, capsys):
    argv = ["train", *tiny_flags, "--epochs", "1", "--max_steps", "1", "--output_dir", str(tmp_path)]
    assert main(argv) == 0
    assert "has an earlier run" not in capsys.readouterr().out
    assert main([*argv, "--resume", "auto"]) == 0
    assert "has an earlier run" not in capsys.readouterr().out
    assert main(argv) == 0
    assert f"{tmp_path} has an earlier run, which this one replaces; --resume auto" in capsys.readouterr().out


def test_a_run_that_saves_nothing_says_so(tiny_flags, capsys):
    assert main(["train", *tiny_flags, "--epochs", "1", "--max_steps", "1"]) == 0
    assert "--output_dir none: nothing is saved" in capsys.readouterr().out
