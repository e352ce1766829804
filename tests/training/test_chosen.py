"""What a run chooses by itself: presets, and what depends on the machine."""

import dataclasses
import os

import pytest
import torch

from detr_fast.cli import main
from detr_fast.config import PRESETS, Config, UsageError, say_preset, without_auto
from detr_fast.training import setup
from detr_fast.training.checkpoint import read_checkpoint

GIB = 2**30


def test_a_preset_sets_what_was_not_given():
    config = Config.from_arguments(["--preset", "original", "--batch_size", "4"])
    assert config.batch_size == 4
    assert {name: getattr(config, name) for name in PRESETS["original"]} == PRESETS["original"] | {"batch_size": 4}
    assert Config(preset="original", batch_size=4) == config
    assert Config.from_mapping({"preset": "original", "batch_size": 4}) == config


def test_a_given_flag_wins_though_its_value_is_the_default():
    assert Config.from_arguments(["--precision", "auto", "--preset", "original"]).precision == "auto"
    assert Config.from_arguments(["--batch_size", "auto", "--preset", "original"]).batch_size is None


def test_a_changed_copy_keeps_what_was_chosen():
    config = Config(preset="original", num_workers=3)
    assert dataclasses.replace(config, batch_size=8).num_workers == 3
    assert Config.from_mapping(config.to_dict()) == config


def test_an_unknown_preset_is_refused():
    with pytest.raises(UsageError, match="--preset is 'faster'; expected one of .*original"):
        Config(preset="faster")


def test_a_run_says_what_the_preset_sets_and_keeps_it(tiny_flags, tmp_path, capsys):
    flags = [*tiny_flags, "--preset", "original", "--max_steps", "1", "--epochs", "1", "--output_dir", str(tmp_path)]
    assert main(["train", *flags]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--preset")]
    assert line == (
        "--preset original: --precision fp32, --batch_size 2, --size_divisor 1, --group_by_size False, "
        "--compile False, --graphs False; given: --num_workers 0"
    )
    kept = read_checkpoint(tmp_path / "checkpoint.pth")["args"]
    assert kept["preset"] == "original" and kept["group_by_size"] is False and kept["batch_size"] == 2
    assert main(["train", *flags, "--epochs", "2", "--max_steps", "3", "--resume", "auto"]) == 0
    assert "--group_by_size" not in capsys.readouterr().out.replace(line, "")


def test_without_a_preset_nothing_is_said_of_one():
    assert say_preset(Config()) == ""


def test_on_a_cpu_everything_left_open_is_the_originals():
    config = without_auto(Config())
    assert (config.batch_size, config.num_workers, config.precision) == (2, 2, "fp32")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with so much memory, and a machine with so many cores, to choose for."""

    def choose(config, gib=80.0, cores=32, processes=1, bf16=True, earlier=()):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, int(gib * GIB)))
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        monkeypatch.setattr(setup, "get_world_size", lambda: processes)
        return setup.chosen_for_gpu(config, torch.device("cuda"), dict(earlier))

    return choose


def test_a_gpu_trains_in_bf16_with_workers_from_the_cores_and_a_batch_from_memory(gpu, capsys):
    config = gpu(Config())
    assert (config.precision, config.num_workers, config.batch_size, config.lr) == ("bf16", 8, 16, 1e-4)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and all(
        flag in line for flag, line in zip(("--precision", "--num_workers", "--lr"), said, strict=True)
    )
    assert gpu(Config(), bf16=False).precision == "fp32"
    assert gpu(Config(), cores=16, processes=8).num_workers == 1
    assert gpu(Config(), cores=1).num_workers == 1


def test_what_was_given_is_not_chosen(gpu, capsys):
    given = Config(precision="fp16", num_workers=0, batch_size=3)
    assert gpu(given) == given and capsys.readouterr().out == ""
    original = Config(preset="original")
    assert gpu(original) == original


def test_a_continued_run_keeps_precision_and_batch(gpu, capsys):
    earlier = {"precision": "fp32", "batch_size": 2, "num_workers": 2}
    config = gpu(Config(), earlier=earlier)
    assert (config.precision, config.batch_size, config.num_workers) == ("fp32", 2, 8)
    said = capsys.readouterr().out
    assert "precision: fp32, as before (--precision)" in said and "2 images per process, as before" in said
    assert gpu(Config(precision="bf16", batch_size=4), earlier=earlier).batch_size == 4


def test_the_batch_is_the_originals_over_the_processes_as_far_as_it_fits(gpu):
    assert gpu(Config(), processes=8).batch_size == 2
    assert gpu(Config(accumulate_steps=4)).batch_size == 4
    sizes = [gpu(Config(), gib=gib).batch_size for gib in (2, 8, 12, 16, 24, 80)]
    assert sizes == sorted(sizes) and sizes[0] == 1 and sizes[-1] == 16
    small = gpu(Config(), gib=12).batch_size
    assert gpu(Config(precision="fp32"), gib=12).batch_size < small
    assert gpu(Config(masks=True), gib=12).batch_size == 1
    assert gpu(Config(image_size=480), gib=12).batch_size > small
