"""Every `detr-fast` command in the README and in docs/ has flags that exist, with values that they take."""

import importlib.util
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


def flags() -> set[str]:
    """All flags of all commands, and of the benchmarks' own programs."""
    known = {"--help", "--help_all", "--version", "--print_completion"}
    for make_parser, *_ in cli._COMMANDS.values():
        known |= {flag for action in make_parser()._actions for flag in action.option_strings}
    return known


# Of other programs: `benchmarks.compile_gate`, `benchmarks annotations`, sbatch, torchrun, docker.
OTHERS = {"--amd", "--images", "--annotations", "--boxes", "--panoptic", "--signal", "--max_restarts", "--shm_size"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_the_text_exist(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for code in re.findall(r"`([^`]+)`", text):
        for flag in re.findall(r"(?<!\S)--[A-Za-z][\w-]*", code):
            assert flag.replace("-", "_").replace("__", "--", 1) in flags() | OTHERS, f"{flag} in `{code}`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_exist(page):
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^    |`)make ([a-z][a-z-]*)", text, re.MULTILINE):
        assert re.search(rf"^(?:[a-z-]+ )*{target}(?: [a-z-]+)*:", makefile, re.MULTILINE), target
    for module in re.findall(r"python3? -m ((?:benchmarks|tests)[\w.]*)", text):
        assert importlib.util.find_spec(module.rstrip(".")) is not None, module
