"""Reduced precision from the loader to the loss."""

import pytest
import torch

from detr_fast.config import get_args_parser
from detr_fast.data import build_dataset, make_shapes_dataset
from detr_fast.models import build_model
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
        args = get_args_parser().parse_args([*TINY, "--coco_path", str(data), "--precision", precision])
        dataset = build_dataset("val", args, uint8=True)
        args.num_classes, args.distributed = dataset.categories.num_classes, False
        torch.manual_seed(0)
        model, criterion, _ = build_model(args)
        loader = loader_for(dataset, args, train=False)
        dtypes[precision] = {samples.to("cpu").tensors.dtype for samples, _ in loader}
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        losses[precision] = train_one_epoch(
            model, criterion, loader, optimizer, torch.device("cpu"), 0, precision=precision, print_freq=100
        )["loss"]
    assert dtypes == {"fp32": {torch.float32}, "bf16": {torch.bfloat16}}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05) and losses["bf16"] != losses["fp32"]
