"""What CONTRIBUTING.md tells to type works: its op, benchmark and task are written into a copy of the tree and run."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

# The gate, for the example's kernels alone.
GATE = """
from benchmarks.compile_gate import gate
from benchmarks.compile_gate.cases import CASES
launches, problems = gate.record([case for case in CASES if case.name.startswith("squared_relu")], 90)
rows = [gate.compile_launch(launch) for launch in launches]
assert {row.kernel for row in rows} == {"_squared_relu_forward_kernel", "_squared_relu_backward_kernel"}
assert not problems + gate.problems_of(rows), problems + gate.problems_of(rows)
"""

# The task, as a user's program would train and predict with it.
TASK = """
import json, sys
from detr_fast.cli import main
from detr_fast.data import make_shapes_dataset
out = sys.argv[1]
data = make_shapes_dataset(f"{out}/data", image_size=64, num_train=8, num_val=2)
small = "--backbone resnet18 --backbone_weights none --enc_layers 1 --dec_layers 1 --hidden_dim 32 --num_queries 3"
small += " --dim_feedforward 32 --nheads 2 --image_size 64 --num_workers 0 --epochs 1 --device cpu"
train = ["train", "--dataset_file", "coco_centres", "--coco_path", str(data), "--output_dir", f"{out}/run"]
assert main(train + small.split()) == 0
predict = ["predict", f"{data}/val2017", "--weights", f"{out}/run/checkpoint.pth", "--threshold", "0"]
assert main([*predict, "--device", "cpu", "--output_dir", f"{out}/predictions"]) == 0
found = json.load(open(f"{out}/predictions/predictions.json"))
assert found and all(len(detection["point"]) == 2 and "bbox" not in detection for detection in found)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the repository, after a contributor has typed in the examples."""
    tree = tmp_path_factory.mktemp("contributor")
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in ("kernels", "detr_fast", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tree)
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (append to )?(\S+\.py)\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```python") == 7
    for append, name, code in blocks:
        with open(tree / name, "a" if append else "x", encoding="utf-8") as file:
            file.write(code)
    suites = tree / "benchmarks" / "__init__.py"
    suites.write_text(suites.read_text().replace("SUITES = (", 'SUITES = ("squared_relu", ', 1))
    return tree


def python(tree: Path, *arguments: str, interpret: bool = False) -> str:
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    env.pop("TRITON_INTERPRET", None)
    env |= {"TRITON_INTERPRET": "1"} if interpret else {}
    run = subprocess.run([sys.executable, *arguments], cwd=tree, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("interpret", [False, pytest.param(True, marks=needs_triton)], ids=["reference", "interpreted"])
def test_the_op_passes_its_tests(tree, interpret):
    printed = python(tree, "-m", "pytest", "-q", "tests/ops/test_squared_relu.py", interpret=interpret)
    assert re.search(r"\d+ passed", printed) and "failed" not in printed


@pytest.mark.slow
@needs_triton
def test_the_op_is_compared_by_doctor(tree):
    printed = python(tree, "-m", "detr_fast", "doctor", "--device", "cpu", interpret=True)
    assert len(re.findall(r"^squared_relu .* right$", printed, re.MULTILINE)) == 3


@pytest.mark.slow
@needs_triton
def test_the_op_passes_the_gate(tree):
    python(tree, "-c", GATE)


@pytest.mark.slow
@needs_triton
def test_the_benchmark_runs(tree):
    printed = python(tree, "-m", "benchmarks", "squared_relu", "--interpret", "--no-save")
    answers = re.findall(r"^  (detr_fast|eager) .*?(\w+), not timed$", printed, re.MULTILINE)
    assert ("detr_fast", "right") in answers and {status for _, status in answers} == {"right"}, printed


@pytest.mark.slow
def test_the_task_trains_and_predicts(tree, tmp_path):
    python(tree, "-c", f"import detr_fast.tasks\n{TASK}", str(tmp_path))
