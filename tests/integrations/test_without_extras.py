"""Without the extra `hf`: nothing imports it before it is used, and what needs it says so."""

import ast
import sys
from pathlib import Path

import pytest

from detr_fast.integrations import transformers as plug

PACKAGE = Path(plug.__file__).parents[1]
EXTRAS = {"transformers", "safetensors", "timm"}


def test_nobody_imports_an_extra_at_import():
    for path in PACKAGE.rglob("*.py"):
        nodes = ast.parse(path.read_text(encoding="utf-8")).body
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not {name.split(".")[0] for name in names} & EXTRAS, path


@pytest.mark.parametrize("function", [plug.register, plug.unregister])
def test_without_transformers_the_message_names_the_extra(function, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"detr_fast\[hf\]"):
        function()
