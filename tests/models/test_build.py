from argparse import Namespace

import pytest
import torch

from detr_fast.layers import BatchNorm2d, PositionEmbeddingLearned, PositionEmbeddingSine
from detr_fast.models import build_model


def _args(**changes):
    args = dict(
        backbone="resnet18", backbone_weights="none", dilation=False, lr_backbone=1e-5, position_embedding="sine",
        hidden_dim=32, dropout=0.1, nheads=4, dim_feedforward=48, enc_layers=2, dec_layers=3, pre_norm=False,
        num_queries=6, aux_loss=True, masks=False, frozen_weights=None, dataset_file="coco", device="cpu",
        set_cost_class=1, set_cost_bbox=5, set_cost_giou=2, bbox_loss_coef=5, giou_loss_coef=2, eos_coef=0.1,
    )  # fmt: skip
    args.update(changes)
    return Namespace(**args)


def test_build_model_gives_model_criterion_and_postprocessors():
    model, criterion, postprocessors = build_model(_args())
    assert model.class_embed.out_features == 92 and model.num_queries == 6 and model.aux_loss
    assert model.transformer.d_model == 32 and len(model.transformer.decoder.layers) == 3
    assert model.transformer.encoder.layers[0].dropout.p == 0.1
    assert isinstance(model.backbone[1], PositionEmbeddingSine) and model.backbone[1].normalize
    assert isinstance(model.backbone[0].body.bn1, BatchNorm2d)
    last = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
    assert criterion.weight_dict == last | {f"{k}_{i}": v for i in (0, 1) for k, v in last.items()}
    assert list(postprocessors) == ["bbox"]


def test_built_parts_work_together():
    model, criterion, postprocessors = build_model(_args(num_classes=4))
    out = model([torch.randn(3, 64, 80), torch.randn(3, 50, 64)])
    targets = [
        {"labels": torch.tensor([1, 3]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.2, 0.3, 0.1, 0.1]])},
        {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)},
    ]
    losses = criterion(out, targets)
    assert set(criterion.weight_dict) <= set(losses)
    sum(losses[name] * weight for name, weight in criterion.weight_dict.items()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    results = postprocessors["bbox"](out, torch.tensor([[64, 80], [50, 64]]))
    assert results[0]["boxes"].shape == (6, 4)


def test_no_aux_loss_has_no_aux_weights():
    model, criterion, _ = build_model(_args(aux_loss=False))
    assert not model.aux_loss and set(criterion.weight_dict) == {"loss_ce", "loss_bbox", "loss_giou"}


@pytest.mark.parametrize("dataset, classes", [("coco", 91), ("coco_panoptic", 250), ("shapes", 20)])
def test_classes_by_dataset(dataset, classes):
    assert build_model(_args(dataset_file=dataset))[0].class_embed.out_features == classes + 1


def test_options_reach_the_backbone():
    model = build_model(_args(backbone_level=1, backbone_norm="group", position_embedding="learned", pre_norm=True))[0]
    assert isinstance(model.backbone[0].body.bn1, torch.nn.GroupNorm) and model.input_proj.in_channels == 128
    assert isinstance(model.backbone[1], PositionEmbeddingLearned)
    assert model.transformer.encoder.norm is not None


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(frozen_weights="detr.pth"), "expected masks to be set"),
        (dict(position_embedding="fourier"), "position_embedding is 'fourier'"),
        (dict(hidden_dim=33), "hidden_dim is 33"),
    ],
)
def test_rejects(changes, message):
    with pytest.raises(ValueError, match=message):
        build_model(_args(**changes))
