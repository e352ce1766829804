"""The scripts in examples/ run as they are and print what they promise; their own assertions compare the numbers."""

import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script as its command line would, in this process; returns what it printed."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_run():
    tested = re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text(encoding="utf-8"))
    assert set(tested) == {path.name for path in EXAMPLES.glob("*.py")}


def test_fused_modules_in_a_foreign_model(run):
    assert run("fused_modules_in_a_foreign_model.py").count("largest difference") == 2


kernels = [pytest.param(id="reference", marks=pytest.mark.skipif(INTERPRET, reason="runs without the interpreter"))]
kernels += [pytest.param(id="interpreted", marks=pytest.mark.interpret)]


@pytest.mark.parametrize((), kernels)
def test_kernels_alone(run):
    printed = run("kernels_alone.py")
    assert printed.count("largest error") == 7
    for op in ("pad_collate", "sine_position", "attention"):
        assert op in printed


def test_own_data(run, tmp_path):
    printed = run("own_data.py", "--output_dir", str(tmp_path), "--device", "cpu")
    detections = json.loads((tmp_path / "predictions" / "predictions.json").read_text())
    assert {detection["category_id"] for detection in detections} <= {3, 7}  # the ids of the annotations
    assert f"{len(detections)} detections; the best one" in printed
    assert len(list((tmp_path / "predictions").glob("*.jpg"))) == 16
