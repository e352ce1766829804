"""Flags, schedule, logs and pictures, one by one."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from detr_fast import config
from detr_fast.tasks import task_of
from detr_fast.tasks.pictures import best_detections, colour_of, draw_detections
from detr_fast.training.log import Metrics, RunLog, read_log
from detr_fast.training.optim import build_optimizer, build_scheduler, load_optimizer

# Name → default of every flag of the original's main.py, but for --device (cuda there, auto here).
ORIGINAL = {
    "lr": 1e-4, "lr_backbone": 1e-5, "batch_size": 2, "weight_decay": 1e-4, "epochs": 300, "lr_drop": 200,
    "clip_max_norm": 0.1, "frozen_weights": None, "backbone": "resnet50", "dilation": False,
    "position_embedding": "sine", "enc_layers": 6, "dec_layers": 6, "dim_feedforward": 2048, "hidden_dim": 256,
    "dropout": 0.1, "nheads": 8, "num_queries": 100, "pre_norm": False, "masks": False, "aux_loss": True,
    "set_cost_class": 1, "set_cost_bbox": 5, "set_cost_giou": 2, "mask_loss_coef": 1, "dice_loss_coef": 1,
    "bbox_loss_coef": 5, "giou_loss_coef": 2, "eos_coef": 0.1, "dataset_file": "coco", "coco_path": None,
    "coco_panoptic_path": None, "remove_difficult": False, "output_dir": "", "seed": 42, "resume": "",
    "start_epoch": 0, "eval": False, "num_workers": 2, "world_size": 1, "dist_url": "env://",
}  # fmt: skip


def parse(*argv):
    return config.Config.from_arguments(argv)


def test_flags_have_the_originals_names_and_defaults():
    args = vars(config.get_args_parser().parse_args([]))
    assert {name: args[name] for name in ORIGINAL} == ORIGINAL
    assert {name: parse("--preset", "original").to_dict()[name] for name in ORIGINAL} == ORIGINAL
    chosen = {"batch_size": None, "num_workers": None}  # for the machine, see test_chosen.py
    assert {name: parse().to_dict()[name] for name in ORIGINAL} == ORIGINAL | chosen


def test_dashes_and_underscores_are_alike():
    argv = ["--batch-size", "7", "--coco-path=a-b/--c", "--no-aux-loss", "x-y"]
    assert config.normalise_options(argv) == ["--batch_size", "7", "--coco_path=a-b/--c", "--no_aux_loss", "x-y"]


def test_given_flags_are_told_from_defaults():
    args, given = config.parse_with_given(config.get_args_parser(), ["--lr", "1e-4", "--no_aux_loss"])
    assert given == {"lr", "aux_loss"} and args.lr == 1e-4 and args.epochs == 300


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--frozen_weights", "a.pth"], "--frozen_weights"),
        (["--dataset_file", "coco_panoptic"], "coco_panoptic"),
        (["--coco_panoptic_path", "p"], "--coco_panoptic_path"),
        (["--mask_loss_coef", "2"], "--mask_loss_coef"),
        (["--remove_difficult"], "--remove_difficult"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
        (["--lr", "-1"], "--lr must be finite and not negative"),
        (["--dropout", "1"], "--dropout"),
        (["--hidden_dim", "100"], "divisible by --nheads"),
        (["--tensorboard", "--output_dir", "none"], "--output_dir, which is none"),
        (["--resume", "auto"], "--resume auto"),
        (["--sample_images", "5", "--output_dir", "none"], "--output_dir, which is none"),
        (["--start_epoch", "300"], "nothing to train"),
    ],
)
def test_flags_that_cannot_be_honoured_are_refused(argv, message):
    with pytest.raises(config.UsageError, match=message):
        task_of(parse(*argv))
        config.check_for_training(parse(*argv))


def test_no_pictures_and_nothing_saved_go_together():
    config.check_for_training(parse("--sample_images", "0", "--output_dir", "none"))


def test_device_is_chosen_or_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert config.choose_device("auto") == "cpu"
    for name, precision, message in (
        ("cuda", "fp32", "no GPU"),
        ("tpu", "fp32", "'tpu'"),
        ("meta", "fp32", "'meta'"),
        ("cpu", "fp16", "fp16 needs a GPU"),
    ):
        with pytest.raises(config.UsageError, match=message):
            config.choose_device(name, precision)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Linear(2, 2)
        self.head = torch.nn.Linear(2, 1)
        self.backbone.bias.requires_grad_(False)


def rates(args, steps, steps_per_epoch):
    optimizer = build_optimizer(Model(), args)
    scheduler = build_scheduler(optimizer, args, steps_per_epoch)
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen


def test_backbone_has_its_own_rate_and_frozen_parameters_are_left_out():
    model = Model()
    optimizer = build_optimizer(model, parse("--lr", "0.1", "--lr_backbone", "0.01"))
    head, backbone = optimizer.param_groups
    assert head["lr"] == 0.1 and {id(p) for p in head["params"]} == {id(p) for p in model.head.parameters()}
    assert backbone["lr"] == 0.01 and backbone["params"] == [model.backbone.weight]


def test_step_schedule_drops_to_a_tenth():
    seen = rates(parse("--lr", "1", "--lr_backbone", "0.5", "--lr_drop", "2"), 5, 10)
    assert [round(lr, 6) for lr, _ in seen] == [1, 1, 0.1, 0.1, 0.01]
    assert [round(lr, 6) for _, lr in seen] == [0.5, 0.5, 0.05, 0.05, 0.005]


def test_cosine_schedule_warms_up_and_ends_at_zero():
    args = parse("--lr", "1", "--lr_schedule", "cosine", "--warmup_steps", "4", "--epochs", "2")
    seen = [lr for lr, _ in rates(args, 13, 6)]
    assert seen[:4] == [0.25, 0.5, 0.75, 1.0]
    assert seen[4] == 1.0 and seen[8] == pytest.approx(0.5) and seen[12] == pytest.approx(0.0)


def test_warmed_up_step_schedule_still_drops():
    args = parse("--lr", "1", "--warmup_steps", "2", "--lr_drop", "1")
    assert [round(lr, 6) for lr, _ in rates(args, 7, 3)] == [0.5, 1, 1, 0.1, 0.1, 0.1, 0.01]


def test_optimiser_state_that_was_not_fused_loads():
    model, args = Model(), parse()
    plain = torch.optim.AdamW([{"params": list(model.head.parameters())}, {"params": [model.backbone.weight]}], lr=0.3)
    model.head(model.backbone(torch.ones(1, 2))).sum().backward()
    plain.step()
    fused = build_optimizer(model, args)
    load_optimizer(fused, plain.state_dict())
    assert fused.param_groups[0]["fused"] and fused.param_groups[0]["lr"] == 0.3
    state = fused.state[model.head.weight]
    assert torch.equal(state["exp_avg"], plain.state[model.head.weight]["exp_avg"]) and state["step"] == 1
    fused.step()
    assert fused.state[model.head.weight]["step"] == 2


def test_metrics_average_over_all_steps_and_show_the_latest():
    metrics = Metrics()
    for value in (1.0, 3.0):
        metrics.update({"loss": torch.tensor(value)})
    assert metrics.latest() == {"loss": 2.0}
    metrics.update({"loss": torch.tensor(8.0)})
    assert metrics.latest() == {"loss": 8.0}
    assert metrics.averages(torch.device("cpu")) == {"loss": 4.0}
    with pytest.raises(ValueError, match="other"):
        metrics.update({"other": torch.tensor(1.0)})


def test_log_of_a_resumed_run_has_each_epoch_once(tmp_path):
    log = RunLog(tmp_path, 0)
    for epoch in range(3):
        log.append({"train_loss": float(epoch), "epoch": epoch})
    resumed = RunLog(tmp_path, 2)
    resumed.append({"train_loss": 9.0, "test_coco_eval_bbox": list(range(12)), "epoch": 2})
    assert [row["train_loss"] for row in read_log(tmp_path)] == [0.0, 1.0, 9.0]
    header, *_, last = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header.startswith("epoch,train_loss,test_coco_eval_bbox_AP,test_coco_eval_bbox_AP50")
    assert last.startswith("2,9.0,0,1,2")


def test_log_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / "log.txt").write_text(json.dumps({"epoch": 0}) + "\nhello\n")
    with pytest.raises(ValueError, match="line 2"):
        RunLog(tmp_path, 1)


def test_boxes_are_drawn_where_they_are_in_the_label_s_colour():
    image = Image.new("RGB", (500, 400), "black")
    picture = draw_detections(image, [(100, 150, 300, 350)], [3], {3: "cat"}, [0.9])
    assert picture.size == image.size
    for point in ((100, 250), (300, 250), (200, 150), (200, 350)):
        assert picture.getpixel(point) == colour_of(3)
    assert picture.getpixel((200, 250)) == picture.getpixel((50, 350)) == (0, 0, 0)
    assert image.getcolors() == [(500 * 400, (0, 0, 0))]  # a copy is drawn on


def test_captions_stay_inside_and_small_images_are_enlarged():
    image = Image.new("RGB", (60, 50), "black")
    picture = draw_detections(image, [(-5, -5, 70, 10), (55, 45, 60, 50)], [1, 2], {}, [0.5, 0.8])
    assert picture.size == (480, 400)
    assert picture.crop((300, 300, 480, 400)).getbbox() is not None


def test_names_are_written_or_replaced_by_numbers():
    pytest.importorskip("matplotlib")  # has a font with more than ASCII
    image, box = Image.new("RGB", (480, 100)), [(10, 40, 200, 90)]
    number, umlaut, unknown = (
        np.asarray(draw_detections(image, box, [7], names)) for names in ({}, {7: "Würfel"}, {7: "\U0010fffe"})
    )
    assert (unknown == number).all() and (umlaut != number).any()


def test_best_detections_are_sorted_and_cut():
    result = {
        "scores": torch.tensor([0.2, 0.9, 0.5]),
        "labels": torch.tensor([1, 2, 3]),
        "boxes": torch.arange(12.0).reshape(3, 4),
    }
    boxes, labels, scores = best_detections(result, 0.5)
    assert labels == [2, 3] and boxes[0] == [4, 5, 6, 7] and scores == pytest.approx([0.9, 0.5])
    assert best_detections(result, 0.95)[1] == []
    assert best_detections(result, 0.95, at_least=2)[1] == [2, 3]


def test_colours_differ():
    assert len({colour_of(label) for label in range(91)}) > 80
