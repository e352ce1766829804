"""docs/ops.md: its Python runs as printed, and its table has every op that the package registers."""

import re
from pathlib import Path

import torch

from detr_fast.ops.selfcheck import CHECKS

PAGE = (Path(__file__).parents[2] / "docs" / "ops.md").read_text(encoding="utf-8")


def test_the_page_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    scope: dict = {}
    exec(snippet, scope)
    stated = dict(re.findall(r"^(out|position), \w+ = .*?# \[([\d, ]+)\]", snippet, re.MULTILINE))
    assert {name: str(list(scope[name].shape)) for name in stated} == {
        name: f"[{shape}]" for name, shape in stated.items()
    }
    assert len(stated) == 2 and scope["error"] < 1e-5
    assert torch.equal(scope["padding"], scope["small_mask"].flatten(1))


def test_the_page_has_every_op():
    first, *_ = PAGE.split("```python")
    assert set(CHECKS) <= set(re.findall(r"`(\w+)`", first))
