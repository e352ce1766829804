"""Small models as the files that people have."""

import argparse

import pytest
import torch

from tests.inference.tiny_models import TINY, checkpoint_of


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """checkpoint.pth and, with other weights, checkpoint_best.pth."""
    folder = tmp_path_factory.mktemp("run")
    checkpoint = checkpoint_of()
    torch.save(checkpoint, folder / "checkpoint_best.pth")
    torch.save(
        {**checkpoint, "model": {k: v + 0.01 for k, v in checkpoint["model"].items()}}, folder / "checkpoint.pth"
    )
    return folder


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """A checkpoint as the original writes it: no categories, labels are COCO's ids, an argparse namespace."""
    path = tmp_path_factory.mktemp("original") / "checkpoint.pth"
    state = checkpoint_of(num_classes=91)
    args = {name: value for name, value in TINY.items() if name not in ("backbone_weights", "backbone_norm")}
    args = argparse.Namespace(**args, dataset_file="coco", masks=False, dilation=False, lr=1e-4)
    torch.save({"model": state["model"], "optimizer": {}, "lr_scheduler": {}, "epoch": 3, "args": args}, path)
    return path
