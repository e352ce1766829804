"""`py.typed` is true: a type checker sees the types of every public name, and finds wrong calls."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import detr_fast

ROOT = Path(__file__).parents[1]

RIGHT = """
import torch
from torch import Tensor

from detr_fast import (
    DETR,
    Detections,
    MultiheadAttention,
    NestedTensor,
    PositionEmbeddingSine,
    Transformer,
    __version__,
    attention,
    collate_fn,
    detr_resnet50,
    load,
    nested_tensor_from_tensor_list,
    pad_collate,
    sine_position,
)

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
model = detr_resnet50(weights=None)
by_hand = DETR(torch.nn.Identity(), Transformer(d_model=256), num_classes=91, num_queries=100)
detector = load("run", device="cpu")
found: Detections = detector.predict("photo.jpg", 0.7)
several: list[Detections] = detector.predict(["photo.jpg", images[0]], batch_size=8)
corners, named = found.boxes[:, :2], dict(zip(found.class_name, found.scores))
nested, targets = collate_fn([(image, {"boxes": torch.zeros(0, 4)}) for image in images])
"""

# Every line is one mistake.
WRONG = """
import torch
import detr_fast

mask = torch.zeros(2, 8, 8, dtype=torch.bool)
detr_fast.attention("wrong", mask, mask)
detr_fast.sine_position(mask, (4, 4), features=64)
detr_fast.MultiheadAttention("256", 8)
detr_fast.nested_tensor_from_tensor_list([torch.rand(3, 8, 8)]).tensor
detr_fast.NestedTensor(mask, "padding")
detr_fast.Transfomer(256)
detr_fast.load("run").predict(7)
boxes: str = detr_fast.pad_collate([torch.rand(3, 8, 8)])[0]
"""


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


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_mypy_passes_right_code_and_finds_wrong_calls(tmp_path):
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    settings = "[mypy]\nstrict = true\nignore_missing_imports = true\nfollow_imports = silent\n"
    (tmp_path / "mypy.ini").write_text(settings)
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path),
         str(tmp_path / "right.py"), str(tmp_path / "wrong.py")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    found = re.findall(r"(right|wrong)\.py:(\d+): error", run.stdout)
    mistakes = [number for number, line in enumerate(WRONG.splitlines(), 1) if "detr_fast." in line]
    assert {(name, int(number)) for name, number in found} == {("wrong", number) for number in mistakes}, run.stdout
