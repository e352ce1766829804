"""Runs notebooks without Jupyter: the cells of code in order, in one namespace.

python -m tests.notebooks examples/images.ipynb    # runs it here and now and writes its outputs into it
"""

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def run(notebook: dict[str, Any], replaced: Mapping[str, str] | None = None) -> tuple[dict[str, Any], list[list[dict]]]:
    """Executes the cells in the working directory.

    Args:
        notebook: what `json` reads from the file.
        replaced: texts that stand for others while it runs, each of which must occur.

    Returns:
        The namespace at the end, and the outputs of each cell of code, as a notebook holds them: what was printed, and
        the value of its last line.
    """
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for old, new in (replaced or {}).items():
        assert any(old in cell for cell in cells), old
        cells = [cell.replace(old, new) for cell in cells]
    scope: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for number, cell in enumerate(cells, start=1):
        tree, last = ast.parse(cell), None
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = ast.Expression(tree.body.pop().value)
        printed, value = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, f"cell {number}", "exec"), scope)
            if last is not None:
                value = eval(compile(last, f"cell {number}", "eval"), scope)
        outputs.append(_outputs(printed.getvalue(), value, number))
    return scope, outputs


def _outputs(printed: str, value: Any, number: int) -> list[dict]:
    outputs: list[dict] = []
    if printed:
        outputs.append({"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)})
    if value is not None:
        data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_jpeg_"):  # a PIL image
            data = {"image/jpeg": base64.b64encode(value._repr_jpeg_()).decode(), "text/plain": ["<image>"]}
        outputs.append({"output_type": "execute_result", "execution_count": number, "metadata": {}, "data": data})
    return outputs


def main(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        _, outputs = run(notebook)
        os.chdir(path.parent)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    outputs = json.loads(json.dumps(outputs).replace(f"{folder}/", ""))  # the folder is gone
    for number, (cell, output) in enumerate(zip(code, outputs, strict=True), start=1):
        cell["execution_count"], cell["outputs"] = number, output
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
