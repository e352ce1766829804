"""The README's Python snippets run as printed, one after the other."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_readme_snippets_run():
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert snippets
    scope: dict = {}
    for snippet in snippets:
        exec(snippet, scope)
    assert scope["out"].shape == (56, 2, 256)
    assert scope["outputs"]["pred_logits"].shape == (2, 100, 92)
