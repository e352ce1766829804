"""Flags that cannot be honoured are refused, or said to have no effect; help and defaults of all flags."""

import argparse
import json
import re

import pytest
import torch

from detr_fast import cli
from detr_fast.cli import main
from detr_fast.config import IDLE_IN_INFERENCE, flag_names, get_args_parser
from detr_fast.flags import parse_with_given
from detr_fast.training.checkpoint import read_checkpoint


def refusal(capsys, *argv):
    assert main(list(argv)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("detr-fast: error: ")
    return line


@pytest.mark.parametrize("value", ["inf", "nan", "-0.1", "-inf"])
@pytest.mark.parametrize("flag", ["lr", "lr_backbone", "weight_decay", "clip_max_norm", "eos_coef", "giou_loss_coef"])
def test_numbers_that_are_not_finite_or_negative_are_refused(tiny_flags, capsys, flag, value):
    message = refusal(capsys, "train", *tiny_flags, f"--{flag}={value}")
    assert f"--{flag} must be finite and not negative, got {float(value)}" in message


@pytest.mark.parametrize(
    "flags, stride", [([], 8), (["--backbone_level", "3"], 32), (["--backbone_level", "3", "--dilation"], 16)]
)
def test_images_smaller_than_a_cell_are_refused(tiny_flags, capsys, flags, stride):
    message = refusal(capsys, "train", *tiny_flags, *flags, "--image_size", str(stride - 1))
    assert f"--image_size must be at least {stride}" in message and f"got {stride - 1}" in message


def test_evaluation_and_prediction_refuse_images_smaller_than_the_models_cell(trained, shapes, capsys):
    weights = ["--weights", str(trained / "checkpoint.pth"), "--device", "cpu", "--image_size", "7"]
    for argv in (["eval", "--coco_path", str(shapes), *weights], ["predict", str(shapes / "val2017"), *weights]):
        assert "--image_size must be at least 8" in refusal(capsys, *argv)


def test_dist_url_needs_torchrun(tiny_flags, capsys):
    message = refusal(capsys, "train", *tiny_flags, "--dist_url", "tcp://10.0.0.1:23456")
    assert "--dist_url tcp://10.0.0.1:23456" in message and "torchrun --nproc-per-node" in message


@pytest.mark.parametrize("inside", ["", "/below"])
def test_output_dir_that_is_a_file_is_refused_before_anything_else(
    trained, tiny_flags, shapes, tmp_path, capsys, inside
):
    (tmp_path / "taken").write_text("something")
    output = ["--output_dir", f"{tmp_path}/taken{inside}"]
    weights = ["--weights", str(trained / "checkpoint.pth"), "--device", "cpu"]
    for argv in (
        ["train", *tiny_flags],
        ["eval", "--coco_path", str(shapes), *weights],
        ["predict", str(shapes / "val2017"), *weights],
        ["demo", "--device", "cpu"],
    ):
        message = refusal(capsys, *argv, *output)
        assert f"--output_dir {tmp_path}/taken{inside}: " in message and "expected a folder" in message
        assert inside or "there is a file of that name" in message
        assert "Errno" not in message


def test_evaluation_says_which_flags_have_no_effect(trained, shapes, capsys):
    data = ["--coco_path", str(shapes), "--num_workers", "0", "--device", "cpu"]
    idle = ["--dropout", "0.3", "--backbone_weights", "none", "--lr", "0.5", "--epochs", "3"]
    argv = ["train", "--eval", "--resume", str(trained / "checkpoint.pth"), *data, *idle]
    assert main(argv) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "has no effect" in line]
    assert [line.split()[0] for line in said] == ["--backbone_weights", "--dropout", "--epochs", "--lr"]


def test_prediction_says_which_flags_have_no_effect(trained, shapes, tmp_path, capsys):
    argv = ["predict", str(shapes / "val2017"), "--weights", str(trained / "checkpoint.pth"), "--device", "cpu"]
    assert main([*argv, "--output_dir", str(tmp_path), "--dropout", "0.3"]) == 0
    assert "--dropout has no effect here: dropout is for training" in capsys.readouterr().out


def test_flags_that_contradict_the_checkpoint_are_refused(trained, shapes, capsys):
    argv = ["eval", "--weights", str(trained / "checkpoint.pth"), "--coco_path", str(shapes), "--device", "cpu"]
    message = refusal(capsys, *argv, "--nheads", "4", "--pre_norm", "--num_queries", "5")
    assert "--nheads 4, it was trained with 2" in message and "--pre_norm True, it was trained with False" in message
    assert "num_queries" not in message  # as in the checkpoint
    assert "--dataset_file lines, it detects boxes" in refusal(capsys, *argv, "--dataset_file", "lines")


def test_bare_weights_that_do_not_fit_are_refused_with_shapes(trained, shapes, tmp_path, capsys):
    torch.save(read_checkpoint(trained / "checkpoint.pth")["model"], tmp_path / "bare.pth")
    model = "--backbone resnet18 --backbone_level 1 --hidden_dim 32 --nheads 2 --enc_layers 1 --dec_layers 1".split()
    model += ["--dim_feedforward", "32", "--num_queries", "7", "--image_size", "48"]
    argv = ["eval", "--weights", str(tmp_path / "bare.pth"), "--coco_path", str(shapes), "--device", "cpu", *model]
    assert "query_embed.weight is [5, 32] there and [7, 32] here" in refusal(capsys, *argv)


def test_eval_takes_one_checkpoint(tiny_flags, capsys):
    message = refusal(capsys, "train", *tiny_flags, "--eval", "--resume", "a.pth", "--weights", "b.pth")
    assert "'a.pth'" in message and "'b.pth'" in message


def test_resuming_says_what_is_not_read_again(trained, tiny_flags, tmp_path, capsys):
    resumed = ["--resume", str(trained / "checkpoint.pth"), "--weights", "other.pth", "--start_epoch", "1"]
    assert main(["train", *tiny_flags, *resumed, "--epochs", "3", "--max_steps", "9"]) == 0
    out = capsys.readouterr().out
    assert "--weights is not read again: the run continues from" in out
    assert "--start_epoch 1 has no effect" in out and "continues with epoch 2" in out


def test_a_checkpoint_takes_the_place_of_backbone_weights(trained, tiny_flags, capsys):
    flags = ["--weights", str(trained / "checkpoint.pth"), "--backbone_weights", "absent.pth", "--max_steps", "1"]
    assert main(["train", *tiny_flags, *flags, "--epochs", "1"]) == 0
    assert "--backbone_weights absent.pth is not read" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, limit", [(["--epochs", "2"], "--epochs 2"), (["--epochs", "9", "--max_steps", "8"], "--max_steps 8")]
)
def test_resuming_a_finished_run_says_how_to_train_longer(trained, tiny_flags, capsys, flags, limit):
    before = (trained / "log.txt").read_bytes()
    assert main(["train", *tiny_flags, *flags, "--output_dir", str(trained), "--resume", "auto"]) == 0
    out = capsys.readouterr().out
    assert f"checkpoint.pth has 2 epochs, 8 steps, and the run ends at {limit}. To train longer" in out
    assert (trained / "log.txt").read_bytes() == before


@pytest.mark.parametrize("accumulate", ["1", "2"])
def test_the_last_step_is_shown_however_short_the_run(tiny_flags, tmp_path, capsys, accumulate):
    flags = ["--epochs", "1", "--max_steps", "1", "--accumulate_steps", accumulate, "--output_dir", str(tmp_path)]
    assert main(["train", *tiny_flags, *flags]) == 0
    (line,) = re.findall(r"^Epoch: .*$", capsys.readouterr().out, re.MULTILINE)
    assert f"[{accumulate}/{accumulate}]" in line
    (row,) = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert f"loss: {row['train_loss']:.4g} " in line


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_every_flag_has_help(command, capsys):
    parser = cli._COMMANDS[command][0]()
    for action in parser._actions:
        assert action.help and len(action.help) > 3, action
    has_more = "--help_all" in parser._option_string_actions
    assert main([command, "--help-all" if has_more else "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for action in parser._actions:
        assert not action.option_strings or action.option_strings[0] in shown
        if action.nargs == 0 or action.default in (None, "", argparse.SUPPRESS) or "no effect" in action.help:
            continue
        # "default 3" or "default: in words"
        assert f"(default {action.default}" in shown if "default" not in action.help else True, action


@pytest.mark.parametrize("command", ["train", "eval", "predict", "export"])
def test_help_shows_the_basic_flags_on_one_page(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([command, "--help"]) == 0
    basic = capsys.readouterr().out
    assert len(basic.splitlines()) <= 42 and "--help_all" in basic and "--enc_layers" not in basic
    assert main([command, "--help-all"]) == 0
    assert "--enc_layers" in capsys.readouterr().out
    if command == "train":
        for flag in ("--data", "--coco_path", "--output_dir", "--weights", "--resume", "--lr", "--epochs"):
            assert f"  {flag} " in basic


@pytest.mark.parametrize("flag, meant", [("--batchsize=3", "--batch_size"), ("--weigths", "--weights"),
                                         ("--coco", "--coco_path or --coco_panoptic_path")])  # fmt: skip
def test_mistyped_and_abbreviated_flags_get_a_suggestion(capsys, flag, meant):
    message = refusal(capsys, "eval", flag, "x")
    assert f"there is no flag {flag.partition('=')[0]}; did you mean {meant}?" in message


def test_the_originals_parser_takes_no_abbreviations():
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["--epoch", "3"])


def test_predict_has_no_flags_that_mean_something_else_in_training(capsys):
    for flag in ("--resume", "--checkpoint"):
        assert f"there is no flag {flag}" in refusal(capsys, "predict", "x.jpg", flag, "a.pth")


def test_messages_speak_in_flags_and_leave_paths_alone():
    text = "train_ann and coco_path: 'coco_path', data/val_images/1.jpg, my_lr_drop, --batch_size, lr_drop."
    expected = "--train_ann and --coco_path: 'coco_path', data/val_images/1.jpg, my_lr_drop, --batch_size, --lr_drop."
    assert flag_names(text) == expected


def test_flags_without_effect_are_all_those_of_training_that_evaluation_does_not_read():
    names, _ = parse_with_given(get_args_parser(), [])
    evaluated, _ = parse_with_given(cli._COMMANDS["eval"][0](), ["--weights", "x"])
    only_training = set(vars(names)) - set(vars(evaluated)) - {"eval", "resume"}
    assert only_training - set(IDLE_IN_INFERENCE) == set()
    assert set(IDLE_IN_INFERENCE) <= set(vars(names))
