import re
from pathlib import Path

import pytest


@pytest.mark.filterwarnings("ignore:sample .* is left out")
def test_the_page_on_loading_runs():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    exec(compile("\n".join(blocks), "docs/data.md", "exec"), {"__name__": "docs"})
