"""`py.typed` is true: a type checker sees the types of every public name, and finds wrong calls."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import detr_fast
from detr_fast.config import Config

ROOT = Path(__file__).parents[1]

RIGHT = """
import torch
from torch import Tensor

from detr_fast import (
    DETR,
    Detections,
    DETRsegm,
    MultiheadAttention,
    NestedTensor,
    PositionEmbeddingSine,
    Transformer,
    __version__,
    attention,
    collate_fn,
    detr_resnet50,
    detr_resnet50_panoptic,
    load,
    nested_tensor_from_tensor_list,
    pad_collate,
    sine_position,
)
from detr_fast.config import Config

version: str = __version__
images = [torch.rand(3, 64, 64), torch.rand(3, 48, 80)]
batch: NestedTensor = nested_tensor_from_tensor_list(images, mean=[0.5] * 3, std=[0.2] * 3)
tensors, mask = batch.decompose()
padded, padding = pad_collate(images, size_divisor=32)
position, small = sine_position(padding, (2, 3), num_pos_feats=64, normalize=True)
query: Tensor = torch.rand(2, 8, 6, 16)
out, logsumexp = attention(query, query, query, small.flatten(1), dropout_p=0.1)
total: Tensor = out.sum() + logsumexp.sum() + padded.mean() + position.mean()
layer = MultiheadAttention(128, 8, batch_first=True)
parameters: int = layer.num_heads
embedding: tuple[Tensor, Tensor] = PositionEmbeddingSine(64, normalize=True).from_mask(padding)
model: DETR = detr_resnet50(weights=None)
both: tuple[DETR, torch.nn.Module] = detr_resnet50(return_postprocessor=True, weights=None)
positional: tuple[DETR, torch.nn.Module] = detr_resnet50(False, 91, True)
panoptic: DETRsegm = detr_resnet50_panoptic(threshold=0.5, weights=None)
config = Config(coco_path="data", lr=1e-4, weights="a.pth", image_size=640)
rate: float = config.lr
by_hand = DETR(torch.nn.Identity(), Transformer(d_model=256), num_classes=91, num_queries=100)
detector = load("run", device="cpu", image_size=640, nheads=4)
found: Detections = detector.predict("photo.jpg", 0.7)
several: list[Detections] = detector.predict(["photo.jpg", images[0]], batch_size=8)
corners, named = found.boxes[:, :2], dict(zip(found.class_name, found.scores))
nested, targets = collate_fn([(image, {"boxes": torch.zeros(0, 4)}) for image in images])
"""

# Every line is one mistake.
WRONG = """
import torch
import detr_fast
from detr_fast.config import Config

mask = torch.zeros(2, 8, 8, dtype=torch.bool)
detr_fast.attention("wrong", mask, mask)
detr_fast.sine_position(mask, (4, 4), features=64)
detr_fast.MultiheadAttention("256", 8)
detr_fast.nested_tensor_from_tensor_list([torch.rand(3, 8, 8)]).tensor
detr_fast.NestedTensor(mask, "padding")
detr_fast.Transfomer(256)
detr_fast.load("run").predict(7)
boxes: str = detr_fast.pad_collate([torch.rand(3, 8, 8)])[0]
detr_fast.load("run").predict("a.jpg").bboxes
detr_fast.load("run", devise="cpu")
detr_fast.load("run", nheads="four")
detr_fast.detr_resnet50(weights=None)[0]
single: detr_fast.DETR = detr_fast.detr_resnet50(return_postprocessor=True)
Config(learning_rate=1e-4)
Config(coco_path="data").learning_rate
"""

MISTAKE = re.compile(r"^(?!from ).*detr_fast\.\w|^Config")


def names_for_type_checkers() -> dict[str, list[str]]:
    """module → names that detr_fast/__init__.py imports for type checkers."""
    tree = ast.parse(Path(detr_fast.__file__).read_text(encoding="utf-8"))
    (block,) = (n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    imports: dict[str, list[str]] = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom) and statement.module
        assert all(alias.name == alias.asname for alias in statement.names), "`import x as x` is what re-exports"
        imports.setdefault(statement.module, []).extend(alias.name for alias in statement.names)
    return {module: sorted(names) for module, names in imports.items()}


def test_type_checkers_and_the_interpreter_see_the_same_names():
    assert names_for_type_checkers() == {module: sorted(names) for module, names in detr_fast._HOME.items()}


def test_every_public_name_loads():
    for name in detr_fast.__all__:
        assert getattr(detr_fast, name) is not None


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, detr_fast; print([name for name in ('torch', 'triton', 'numpy') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_what_load_takes_is_typed_as_the_configuration():
    from detr_fast.inference.detector import _LOADING
    from detr_fast.inference.settings import LoadSettings

    hints = get_type_hints(Config)
    assert get_type_hints(LoadSettings) == {name: hints[name] for name in _LOADING}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "right.py").write_text(RIGHT)
    (folder / "wrong.py").write_text(WRONG)
    return folder


def only_the_mistakes(output: str) -> bool:
    """Whether a type checker's output names every line of WRONG that is a mistake, and nothing else."""
    found = set(re.findall(r"(right|wrong)\.py:(\d+):.*error", output))
    lines = [number for number, line in enumerate(WRONG.splitlines(), 1) if MISTAKE.search(line)]
    return len(lines) == 15 and found == {("wrong", str(number)) for number in lines}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_mypy_passes_right_code_and_finds_wrong_calls(scripts):
    settings = "[mypy]\nstrict = true\nignore_missing_imports = true\nfollow_imports = silent\n"
    (scripts / "mypy.ini").write_text(settings)
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(scripts / "mypy.ini"), "--cache-dir", str(scripts),
         str(scripts / "right.py"), str(scripts / "wrong.py")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert only_the_mistakes(run.stdout), run.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="pyright is not installed")
def test_pyright_passes_right_code_and_finds_wrong_calls(scripts):
    settings = {"extraPaths": [str(ROOT)], "reportMissingImports": "warning", "reportUnusedExpression": False}
    (scripts / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--project", str(scripts), "--pythonpath", sys.executable]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert only_the_mistakes(run.stdout), run.stdout + run.stderr
