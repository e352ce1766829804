"""The walk-through in docs/ runs and gives the shapes that it prints."""

import doctest
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_nested_tensor_walk_through():
    result = doctest.testfile(str(DOCS / "nested_tensor.md"), module_relative=False)
    assert result.attempted > 20
    assert result.failed == 0
