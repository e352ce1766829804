"""Callbacks: when they are called, and with what; Weights & Biases and MLflow: stand-ins, and real where installed."""

import sys
import time
import types

import pytest

from detr_fast.cli import main
from detr_fast.config import Config
from detr_fast.errors import CallbackError, UsageError
from detr_fast.training.callbacks import MLflowCallback, WandbCallback
from detr_fast.training.trainer import train
from tests.training.test_run import rows


class Recorder:
    def __init__(self):
        self.calls = []

    def on_start(self, config):
        self.calls.append(("start", config.num_classes))

    def on_epoch(self, row):
        self.calls.append(("epoch", dict(row)))

    def on_end(self):
        self.calls.append(("end",))


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr("detr_fast.training.trainer.draw_curves", lambda folder: True)


@pytest.fixture
def config(tiny_flags):
    return Config.from_arguments([*tiny_flags, "--epochs", "2", "--eval_every", "2"])


def test_a_callback_gets_the_configuration_each_row_and_the_end(tiny_flags, tmp_path):
    recorder = Recorder()
    config = Config.from_arguments([*tiny_flags, "--epochs", "2", "--eval_every", "2", "--output_dir", str(tmp_path)])
    train(config, callbacks=[recorder])
    assert [call[0] for call in recorder.calls] == ["start", "epoch", "epoch", "end"]
    assert recorder.calls[0][1] == 4
    assert [call[1] for call in recorder.calls[1:3]] == rows(tmp_path)
    assert "test_coco_eval_bbox" in recorder.calls[2][1] and "test_coco_eval_bbox" not in recorder.calls[1][1]


@pytest.mark.parametrize("method", ["on_start", "on_epoch", "on_end"])
def test_a_callback_that_fails_ends_the_run_by_its_name(config, method):
    def fail(*args):
        raise KeyError("quota")

    first, recorder = Recorder(), Recorder()
    setattr(recorder, method, fail)
    with pytest.raises(CallbackError, match=rf"Recorder.{method} failed: KeyError: 'quota'"):
        train(config, callbacks=[first, recorder])
    # The other one still hears of the end.
    assert first.calls[-1] == ("end",) and len(first.calls) == {"on_start": 2, "on_epoch": 3, "on_end": 4}[method]


def test_a_failed_run_ends_its_callbacks(config, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("broken")

    recorder = Recorder()
    monkeypatch.setattr("detr_fast.training.trainer.run_epoch", fail)
    with pytest.raises(ValueError, match="broken"):
        train(config, callbacks=[recorder])
    assert [call[0] for call in recorder.calls] == ["start", "end"]


def test_an_error_that_ends_the_run_is_not_hidden_by_a_callbacks(config, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ValueError("broken")

    recorder = Recorder()
    recorder.on_end = fail
    monkeypatch.setattr("detr_fast.training.trainer.run_epoch", fail)
    with pytest.raises(ValueError, match="^broken$"):
        train(config, callbacks=[recorder])
    assert "Recorder.on_end failed: ValueError: broken" in capsys.readouterr().out


def module(monkeypatch, name, functions):
    """A stand-in that notes its calls."""
    calls, stand_in = [], types.ModuleType(name)

    def noting(function):
        def call(*args, **kwargs):
            calls.append((function, args, kwargs))
            return stand_in  # `wandb.init` gives the run

        return call

    for function in functions:
        setattr(stand_in, function, noting(function))
    monkeypatch.setitem(sys.modules, name, stand_in)
    return calls


def test_wandb_is_told(tiny_flags, tmp_path, monkeypatch):
    calls = module(monkeypatch, "wandb", ["init", "log", "finish"])
    flags = [*tiny_flags, "--epochs", "1", "--sample_images", "0", "--output_dir", str(tmp_path)]
    assert main(["train", *flags, "--log_to", "wandb"]) == 0
    (_, _, init), (_, (numbers,), step), end = calls
    assert init["project"] == "detr_fast" and init["dir"] == str(tmp_path) and init["config"]["hidden_dim"] == 32
    (row,) = rows(tmp_path)
    assert step == {"step": 0} and numbers["train_loss"] == row["train_loss"]
    assert numbers["test_coco_eval_bbox_AP50"] == row["test_coco_eval_bbox"][1]
    assert end == ("finish", (), {})


def test_mlflow_is_told(config, monkeypatch):
    names = ["set_experiment", "start_run", "log_params", "log_metrics", "end_run"]
    calls = module(monkeypatch, "mlflow", names)
    train(config, callbacks=[MLflowCallback(experiment="shapes", run_name="first")])
    assert [call[0] for call in calls] == [*names[:3], "log_metrics", "log_metrics", "end_run"]
    assert calls[0][1] == ("shapes",) and calls[1][2] == {"run_name": "first"}
    assert calls[2][1][0]["hidden_dim"] == 32 and None not in calls[2][1][0].values()
    (numbers,), step = calls[4][1:]
    assert step == {"step": 1} and "test_coco_eval_bbox_AP" in numbers
    assert all(isinstance(value, float) for value in numbers.values())


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_refused_before_anything_is_read(tiny_flags, monkeypatch, capsys, name):
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["train", *tiny_flags, "--log_to", name, "--coco_path", "nowhere"]) == 2
    assert f"{name} is not installed; pip install 'detr_fast[{name}]'" in capsys.readouterr().err


def test_a_folder_of_earlier_runs_is_no_installed_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UsageError, match="wandb is not installed"):
        WandbCallback()
    sys.modules.pop("wandb", None)


@pytest.mark.slow
def test_wandb_itself(config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(config, callbacks=[WandbCallback(project="shapes", mode="offline", dir=str(tmp_path))])
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30  # its process writes a little later
    while not all(name in run.read_bytes() for name in (b"test_coco_eval_bbox_AP50", b"hidden_dim")):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
def test_mlflow_itself(config, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    train(config, callbacks=[MLflowCallback(experiment="shapes")])
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("shapes").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["hidden_dim"] == "32"
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert [entry.step for entry in history] == [0, 1]
    assert run.data.metrics["test_coco_eval_bbox_AP"] >= 0
