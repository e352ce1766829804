"""Long runs in 16 bits, many queries and targets, images of extreme shapes: all numbers finite, or a clear error."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.amp import GradScaler

from detr_fast import HungarianMatcher, SetCriterion
from detr_fast.cli import main
from detr_fast.data import make_shapes_dataset
from detr_fast.ops import assign
from detr_fast.training.checkpoint import read_checkpoint
from detr_fast.training.engine import train_one_epoch


def all_finite(state):
    return all(torch.isfinite(value).all() for value in state.values() if value.is_floating_point())


@pytest.mark.slow
@pytest.mark.parametrize(
    "device, precision",
    [("cpu", "bf16"), *(pytest.param("cuda", precision, marks=pytest.mark.gpu) for precision in ("bf16", "fp16"))],
)
def test_two_thousand_steps_stay_finite(tiny_flags, tmp_path, device, precision):
    """A step that is not finite would end the run (in fp16 the loss scale is what gives way)."""
    data = make_shapes_dataset(tmp_path / "data", num_train=200, num_val=2, image_size=48)
    argv = ["train", *tiny_flags, "--coco_path", str(data), "--device", device, "--precision", precision]
    argv += ["--max_steps", "2000", "--epochs", "20", "--output_dir", str(tmp_path / "out")]
    argv += ["--eval_every", "1000", "--lr_drop", "1000", "--checkpoint_every", "0", "--sample_images", "0"]
    assert main(argv) == 0
    checkpoint = read_checkpoint(tmp_path / "out" / "checkpoint.pth")
    assert checkpoint["steps"] == 2000 and all_finite(checkpoint["model"])
    rows = [json.loads(line) for line in (tmp_path / "out" / "log.txt").read_text().splitlines()]
    assert all(np.isfinite(row["train_loss"]) for row in rows) and rows[-1]["train_loss"] < rows[0]["train_loss"]


@pytest.mark.gpu
def test_an_infinite_gradient_in_fp16_is_skipped():
    """The documented way: no weight moves, and the scale is halved."""

    class Explosive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, device="cuda"))

        def forward(self, samples):
            return {"y": samples.tensors.mean(dim=(1, 2, 3)) * self.weight}

    class Loss(torch.nn.Module):
        weight_dict = {"loss": 1.0}

        def forward(self, outputs, targets):
            return {"loss": outputs["y"].sum()}

    from detr_fast.nested_tensor import NestedTensor

    model, scaler = Explosive(), GradScaler("cuda", init_scale=2.0**127)
    samples = NestedTensor(torch.ones(1, 3, 4, 4) * 4, torch.zeros(1, 4, 4, dtype=torch.bool))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    train_one_epoch(
        model, Loss(), [(samples, [{}])], optimizer, torch.device("cuda"), 0, precision="fp16", scaler=scaler
    )
    assert model.weight.item() == 1 and scaler.get_scale() == 2.0**126


def many(queries, targets, classes=91, images=2):
    generator = torch.Generator().manual_seed(0)
    outputs = {
        "pred_logits": torch.randn(images, queries, classes + 1, generator=generator).requires_grad_(),
        "pred_boxes": torch.rand(images, queries, 4, generator=generator).mul(0.5).add(0.1).requires_grad_(),
    }
    found = [
        {
            "labels": torch.randint(0, classes, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.4 + 0.1,
        }
        for count in (targets, targets // 2)
    ]
    return outputs, found


def check_many(queries, targets):
    outputs, found = many(queries, targets)
    matcher = HungarianMatcher(cost_class=1, cost_bbox=5, cost_giou=2)
    criterion = SetCriterion(91, matcher, {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}, 0.1, ["labels", "boxes"])
    losses = criterion(outputs, found)
    sum(losses.values()).backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(torch.isfinite(value.grad).all() for value in outputs.values())
    for (rows, columns), target in zip(matcher(outputs, found), found, strict=True):
        assert len(set(rows.tolist())) == len(rows) == min(queries, len(target["labels"]))
        assert sorted(columns.tolist()) == list(range(len(rows))) or queries < targets


def test_a_thousand_queries_and_five_hundred_targets():
    check_many(1000, 500)


def test_more_targets_than_queries():
    check_many(300, 500)


@pytest.mark.slow
@pytest.mark.interpret
def test_a_thousand_queries_and_five_hundred_targets_interpreted():
    from scipy.optimize import linear_sum_assignment

    cost = torch.rand(1, 500, 1000, generator=torch.Generator().manual_seed(0))
    found, status = assign(cost, torch.tensor([0, 500]), 500)
    rows, columns = linear_sum_assignment(cost[0].numpy())
    assert (status == 0).all()
    chosen = cost[0, torch.arange(500), found[0]].double().sum().item()
    assert chosen == pytest.approx(cost[0, rows, columns].double().sum().item(), abs=1e-4)


MODEL = [
    "--backbone", "resnet18", "--backbone_weights", "none", "--hidden_dim", "32", "--nheads", "2", "--enc_layers", "1",
    "--dec_layers", "1", "--dim_feedforward", "32", "--num_queries", "5", "--num_workers", "0", "--device", "cpu",
    "--epochs", "1", "--print_freq", "1000", "--sample_images", "2", "--probe_memory", "on",
]  # fmt: skip


def data_of(folder, sizes):
    """Flags of a data set with an image of each size (width, height), with one object that fills it."""
    images, annotations = [], []
    (folder / "images").mkdir()
    for i, (width, height) in enumerate(sizes, 1):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        entry = {"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, width, height], "area": width * height}
        annotations.append({**entry, "iscrowd": 0})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}
    (folder / "ann.json").write_text(json.dumps(content))
    return [
        part
        for name in ("train", "val")
        for part in (f"--{name}_ann", f"{folder}/ann.json", f"--{name}_images", f"{folder}/images")
    ]


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([(1, 1)] * 2, id="1x1", marks=pytest.mark.slow),
        pytest.param([(1, 4000), (1, 3000)], id="1x4000", marks=pytest.mark.slow),
        pytest.param([(4000, 1), (3000, 1)], id="4000x1", marks=pytest.mark.slow),
        pytest.param([(1, 1), (1, 4000), (4000, 1), (30, 20)], id="mixed", marks=pytest.mark.slow),
    ],
)
def test_images_of_extreme_shapes_go_the_whole_way(tmp_path, sizes):
    data, output = data_of(tmp_path, sizes), tmp_path / "out"
    assert main(["train", *data, *MODEL, "--image_size", "64", "--batch_size", "2", "--output_dir", str(output)]) == 0
    assert all_finite(read_checkpoint(output / "checkpoint.pth")["model"])
    weights = ["--weights", str(output), "--device", "cpu", "--threshold", "0"]
    assert main(["predict", str(tmp_path / "images"), *weights, "--output_dir", str(tmp_path / "found")]) == 0
    found = json.loads((tmp_path / "found" / "predictions.json").read_text())
    assert len(found) == 5 * len(sizes) and all(np.isfinite(entry["bbox"]).all() for entry in found)


def test_batch_norm_of_a_single_value_is_explained(tmp_path, capsys):
    data = data_of(tmp_path, [(1, 1)] * 2)
    argv = ["train", *data, *MODEL, "--probe_memory", "off", "--image_size", "32", "--batch_size", "1"]
    assert main([*argv, "--output_dir", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "batch norm" in line and "1 image" in line and "20x20 pixels" in line and "--batch_size" in line
