"""docs/finetune.md, its commands and its Python, in order, from an empty folder."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from detr_fast.cli import main
from detr_fast.config import PRESETS
from detr_fast.models.hub import published
from tests.inference.tiny_models import checkpoint_of

PAGE = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text(encoding="utf-8")


def test_the_page_says_the_presets_numbers():
    (flags,) = re.findall(r"`--preset finetune` is `(.*?)`", PAGE)
    words = shlex.split(flags)
    stated = dict(zip(words[::2], words[1::2], strict=True))
    assert {name.removeprefix("--"): value for name, value in stated.items()} == {
        name: f"{value:g}".replace("e-0", "e-") if isinstance(value, float) else str(value)
        for name, value in PRESETS["finetune"].items()
    }


@pytest.mark.slow
def test_the_page_on_fine_tuning_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETR_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    # A small model stands in for the published one, and two steps for fifty epochs.
    place = tmp_path / "hub" / "checkpoints" / published()["detr_resnet50"].rsplit("/", 1)[1]
    place.parent.mkdir(parents=True)
    weights = checkpoint_of(num_classes=91, backbone_level=1, image_size=48)
    del weights["categories"]
    torch.save(weights, place)
    quick = {"epochs": 1, "max_steps": 2, "num_workers": 0, "sample_images": 1}
    monkeypatch.setitem(PRESETS, "finetune", {**PRESETS["finetune"], **quick})

    made, again, told = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    scope: dict = {}
    exec(made, scope)
    commands = [line.strip() for line in re.findall(r"^    detr-fast (.*)$", PAGE, re.MULTILINE)]
    assert [command.split()[0] for command in commands] == ["train", "check-data", "train", "eval", "predict"]
    for command in commands:
        assert main([*shlex.split(command), *(["--device", "cpu"] if "check-data" not in command else [])]) == 0
    out = capsys.readouterr().out
    assert "category 0 ('my-shapes') is left out" in out and "class_embed.weight: [92, 32] there, [4, 32] here" in out
    (folder,) = re.findall(r"no --output_dir: everything is saved in (\S+)", out)
    for run in (folder, "outputs/mine"):
        for name in ("checkpoint_best.pth", "log.txt", "metrics.csv", "curves.png", "samples/epoch0000.png"):
            assert Path(run, name).is_file(), name
    assert len(list(Path("outputs/found").glob("*.jpg"))) == 5
    exec(again, scope)
    exec(told, scope)
    assert set(scope["model"].names.values()) == {"circle", "square", "triangle"} and 0 <= scope["best"].value <= 1
