"""A handful of generated images and the flags of a model small enough to train in a test."""

import pytest

from detr_fast.data import make_shapes_dataset

TINY = [
    "--backbone", "resnet18", "--backbone_weights", "none", "--backbone_level", "1", "--hidden_dim", "32",
    "--nheads", "2", "--enc_layers", "1", "--dec_layers", "1", "--dim_feedforward", "32", "--num_queries", "5",
    "--image_size", "48", "--batch_size", "2", "--num_workers", "0", "--lr", "1e-3", "--lr_backbone", "1e-3",
    "--device", "cpu", "--print_freq", "1000", "--output_dir", "none",
]  # fmt: skip


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """A folder in COCO's layout with 8 training and 5 validation images."""
    return make_shapes_dataset(tmp_path_factory.mktemp("shapes"), num_train=8, num_val=5, image_size=48)


@pytest.fixture(scope="session")
def tiny_flags(shapes):
    """Flags of a training run on `shapes`, without epochs and output folder."""
    return ["--coco_path", str(shapes), *TINY]


@pytest.fixture(scope="session")
def trained(tiny_flags, tmp_path_factory):
    """The output folder of a finished run of two epochs."""
    from detr_fast.cli import main

    output = tmp_path_factory.mktemp("trained")
    assert main(["train", *tiny_flags, "--epochs", "2", "--output_dir", str(output)]) == 0
    return output
