"""Runs that are stopped, killed or out of space in the middle of an epoch end as if nothing had happened."""

import builtins
import errno
import itertools
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from test_run import ENVIRONMENT, equal_states, rows

from detr_fast.cli import main
from detr_fast.config import Config
from detr_fast.errors import UsageError
from detr_fast.training import checkpoint as checkpoints
from detr_fast.training import engine, trainer
from detr_fast.training.checkpoint import read_checkpoint, save_checkpoint
from detr_fast.training.folder import LOCK, check_space, locked

# Four batches in an epoch, two optimiser steps; sums of the metrics in groups of three; a schedule per step.
FLAGS = [
    "--epochs", "2", "--dropout", "0.2", "--sample_images", "0", "--ema_decay", "0.5", "--accumulate_steps", "2",
    "--print_freq", "3", "--warmup_steps", "3", "--lr_drop", "1", "--batch_size", "1",
]  # fmt: skip
STATE = ("model", "optimizer", "lr_scheduler", "epoch", "steps", "best", "rng", "ema", "categories", "inside")
NAMES = ("checkpoint.pth", "checkpoint_best.pth", "checkpoint0000.pth", "checkpoint0001.pth")
TIMING = {"train_time", "train_data"}


@pytest.fixture(scope="module")
def flags(tiny_flags):
    return [*tiny_flags, *FLAGS]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """The output of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole")
    assert main(["train", *flags, "--output_dir", str(output)]) == 0
    return output


def assert_equal_runs(one, other, names=NAMES):
    for name in names:
        a, b = read_checkpoint(one / name), read_checkpoint(other / name)
        for key in STATE:
            assert equal_states(a[key], b[key]), f"{name}: {key}"
    logs = [[{k: v for k, v in row.items() if k not in TIMING} for row in rows(output)] for output in (one, other)]
    assert logs[0] == logs[1]
    assert not list(other.rglob("*.tmp")) and not (other / LOCK).exists()


def signal_at(monkeypatch, step, number=signal.SIGTERM):
    """Sends this process a signal during an optimiser step of the run."""
    count, real = itertools.count(1), engine._optimizer_step

    def step_and_signal(*args):
        if next(count) == step:
            os.kill(os.getpid(), number)
        return real(*args)

    monkeypatch.setattr(engine, "_optimizer_step", step_and_signal)


@pytest.mark.parametrize("step", [1, 4, 11])
def test_signal_finishes_the_step_and_the_resumed_run_equals_the_whole(
    flags, whole, tmp_path, monkeypatch, capsys, step
):
    argv = ["train", *flags, "--output_dir", str(tmp_path)]
    number = {1: signal.SIGTERM, 4: signal.SIGINT, 11: signal.SIGHUP}[step]
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with monkeypatch.context() as context:
        signal_at(context, step, number)
        assert main(argv) == 128 + number
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before
    said = capsys.readouterr().err
    assert f"{signal.Signals(number).name} in epoch" in said and f"after step {step};" in said
    assert "--resume auto" in said
    stopped = read_checkpoint(tmp_path / "checkpoint.pth")
    assert stopped["steps"] == step and stopped["inside"]["batches"] == 8 if step == 4 else True
    assert main([*argv, "--resume", "auto"]) == 0
    names = NAMES if step < 5 else NAMES[:2] + NAMES[3:]
    assert_equal_runs(whole, tmp_path, NAMES if step < 5 else names)


def test_signal_in_an_evaluation_ends_it(flags, whole, tmp_path, monkeypatch):
    argv = ["train", *flags, "--output_dir", str(tmp_path)]
    with monkeypatch.context() as context:
        real = trainer.Interruption.while_evaluating
        count = itertools.count()

        def signalled(self):
            if next(count) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self)

        context.setattr(trainer.Interruption, "while_evaluating", signalled)
        assert main(argv) == 143
    assert rows(tmp_path) == []
    assert main([*argv, "--resume", "auto"]) == 0
    assert_equal_runs(whole, tmp_path)
