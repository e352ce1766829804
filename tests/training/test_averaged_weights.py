"""What a run with --ema_decay evaluates."""

import json

from detr_fast.cli import main


def test_evaluation_takes_the_averaged_weights(trained, tiny_flags, tmp_path):
    """Training is that of a run without averages, the losses of the evaluation are not."""
    flags = [*tiny_flags, "--epochs", "1", "--ema_decay", "0.9", "--output_dir", str(tmp_path)]
    assert main(["train", *flags]) == 0
    averaged, plain = (json.loads((folder / "log.txt").read_text().split("\n")[0]) for folder in (tmp_path, trained))
    assert averaged["train_loss"] == plain["train_loss"]
    assert averaged["test_loss"] != plain["test_loss"]
