"""Every `detr-fast` command in the README and in docs/ has flags that exist, with values that they take."""

import re
import shlex
from pathlib import Path

import pytest

from detr_fast import cli
from detr_fast.flags import normalise_options, parse_with_given

ROOT = Path(__file__).parents[1]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").glob("*.md"))]


def commands(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^    (?:torchrun .*-m )?detr[-_]fast (.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=lambda page: page.name)
def test_commands_are_understood(page):
    for command in commands(page):
        name, *argv = shlex.split(command, comments=True)
        _, given = parse_with_given(cli._COMMANDS[name][0](), normalise_options(argv))
        assert given or not argv, command


def test_the_pages_have_commands():
    assert {"README.md", "lines.md", "segmentation.md"} <= {page.name for page in PAGES if commands(page)}
