"""Batches padded to a multiple: what a GPU trains on, and everybody who asks for it."""

import json

import numpy as np
import pytest

from detr_fast.cli import main
from detr_fast.config import Config
from detr_fast.data.grouping import padded_sizes, valid_shares
from detr_fast.tasks import task_of
from detr_fast.training.setup import loader_for, size_divisor


@pytest.mark.parametrize(
    "device, given, train, evaluation",
    [("cuda", None, 64, 1), ("cuda:1", None, 64, 1), ("cpu", None, 1, 1), ("cuda", 1, 1, 1), ("cpu", 32, 32, 32)],
)
def test_a_gpu_trains_on_multiples_of_64(device, given, train, evaluation):
    config = Config(device=device, size_divisor=given)
    assert (size_divisor(config, train=True), size_divisor(config, train=False)) == (train, evaluation)


@pytest.mark.parametrize("train", [True, False])
def test_the_loaders_pad_to_it_and_mask_what_they_pad(shapes, train):
    config = Config(coco_path=str(shapes), image_size=48, num_workers=0, size_divisor=32, device="cpu")
    task = task_of(config)
    dataset = task.build_dataset("train" if train else "val", config, uint8=True)
    for samples, targets in loader_for(task, dataset, config, train=train):
        batch = samples.to("cpu")
        assert all(side % 32 == 0 for side in batch.tensors.shape[-2:])
        for mask, target in zip(batch.mask, targets, strict=True):
            height, width = target["size"].tolist()
            assert not mask[:height, :width].any()
            assert (~mask).sum() == height * width


def test_a_run_says_it(tiny_flags, tmp_path, capsys):
    flags = [*tiny_flags, "--epochs", "1", "--max_steps", "1", "--output_dir", str(tmp_path), "--size_divisor", "32"]
    assert main(["train", *flags]) == 0
    assert "training batches are padded to multiples of 32 pixels (--size_divisor)" in capsys.readouterr().out
    assert json.loads((tmp_path / "log.txt").read_text())["train_padding"] > 0.1


def test_it_is_at_least_one(tiny_flags, capsys):
    assert main(["train", *tiny_flags, "--size_divisor", "0"]) != 0
    assert "--size_divisor must be at least 1, got 0" in capsys.readouterr().err


def test_shares_of_rounded_batches():
    sizes = np.array([[[30, 64], [64, 40]], [[65, 1], [2, 2]]])
    assert padded_sizes(sizes, 32).tolist() == [[64, 64], [96, 32]]
    assert padded_sizes(sizes).tolist() == [[64, 64], [65, 2]]
    valid = 30 * 64 + 64 * 40 + 65 + 4
    assert valid_shares(sizes, divisor=32)["pixels"] == pytest.approx(valid / (2 * (64 * 64 + 96 * 32)))
