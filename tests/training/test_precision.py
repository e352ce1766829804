"""Reduced precision from the loader to the loss."""

from dataclasses import replace

import pytest
import torch

from detr_fast.config import Config
from detr_fast.data import make_shapes_dataset
from detr_fast.tasks import task_of
from detr_fast.training.engine import train_one_epoch
from detr_fast.training.setup import loader_for

TINY = [
    "--backbone", "resnet18", "--backbone_weights", "none", "--backbone_norm", "frozen", "--backbone_level", "1",
    "--hidden_dim", "32", "--nheads", "4", "--enc_layers", "1", "--dec_layers", "2", "--dim_feedforward", "16",
    "--num_queries", "5", "--dropout", "0", "--image_size", "32", "--batch_size", "2", "--num_workers", "0",
    "--device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_shapes_dataset(tmp_path_factory.mktemp("shapes"), num_train=2, num_val=4, image_size=(32, 48))


def test_bf16_trains_on_images_that_are_padded_into_bf16(data):
    """Autocast would round the same images to the same values."""
    losses, dtypes = {}, {}
    for precision in ("fp32", "bf16"):
        config = Config.from_arguments([*TINY, "--coco_path", str(data), "--precision", precision])
        task = task_of(config)
        dataset = task.build_dataset("val", config, uint8=True)
        torch.manual_seed(0)
        model, criterion, _ = task.build(replace(config, **task.classes(dataset)))
        loader = loader_for(task, dataset, config, train=False)
        dtypes[precision] = {samples.to("cpu").tensors.dtype for samples, _ in loader}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        losses[precision] = train_one_epoch(
            model, criterion, loader, optimizer, torch.device("cpu"), 0, precision=precision, print_freq=100
        )["loss"]
    assert dtypes == {"fp32": {torch.float32}, "bf16": {torch.bfloat16}}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05) and losses["bf16"] != losses["fp32"]
