"""The rooms of the package: who imports whom, and what is asked in one room only."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from detr_fast import config
from detr_fast.criterion import lines
from detr_fast.evaluation.coco import BACKENDS
from detr_fast.training import step

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "detr_fast"

# From the ground up. A room imports from those before it, and from itself.
ROOMS = (
    "kernels errors _moved ops geometry distributed nested_tensor layers models criterion data evaluation flags config "
    "tasks training inference integrations doctor demo benchmarks cli __main__"
).split()

# The original's `detr_resnet50(..., return_postprocessor=True)` returns a part of the criterion, imported when asked.
UPWARDS = {("detr_fast.models.hub", "detr_fast.criterion")}


def files(*rooms: str) -> list[Path]:
    # `rglob` follows no links, and two rooms are links.
    return sorted(path for room in rooms or ("", "kernels", "benchmarks") for path in (PACKAGE / room).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in files()}


def imported(path: Path, at_import_only: bool) -> set[str]:
    """The modules of this package that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    if at_import_only:
        later = {inner for node in nodes if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
        typing = [node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
        later |= {inner for node in typing for inner in ast.walk(node)}
        nodes = [node for node in nodes if node not in later]
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inside = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
            assert node.level == 0 or room_of(inside) == "benchmarks", f"{path}:{node.lineno} imports relatively"
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), inside)
            members = {f"{module}.{alias.name}" for alias in node.names}
            names |= {member if member in MODULES else module for member in members}
    return names & set(MODULES)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "detr_fast"


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_those_below(module):
    assert module == "detr_fast" or room_of(module) in ROOMS, f"{module}: a room that the order of rooms does not have"
    if module == "detr_fast":
        return
    for other in imported(MODULES[module], at_import_only=False):
        if other == "detr_fast" or (module, other) in UPWARDS:
            continue
        assert ROOMS.index(room_of(other)) <= ROOMS.index(room_of(module)), f"{module} imports {other}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: imported(path, at_import_only=True) - {module} for module, path in MODULES.items()}
    graph["detr_fast"] = set()  # its names are looked up when they are asked for
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " imports ".join((*way[way.index(module) :], module))
        if module not in done:
            for other in graph[module]:
                visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_kernels_import_nothing_of_ours_but_kernels():
    for path in files("kernels"):
        assert all(other.startswith("detr_fast.kernels") for other in imported(path, at_import_only=False)), path


def lines_with(pattern: str, *outside: str) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in files()
        if path.relative_to(PACKAGE).as_posix() not in outside and path.relative_to(PACKAGE).parts[0] not in outside
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(pattern, line)
    ]


def test_nobody_but_the_command_line_sees_a_namespace():
    found = lines_with(r"getattr\(args|Namespace", "cli.py", "config.py", "flags.py", "benchmarks")
    # Checkpoints of the original hold a Namespace, which is read once.
    reading = ("safe_globals([argparse.Namespace])", 'isinstance(checkpoint.get("args"), argparse.Namespace)')
    assert [line for line in found if not any(allowed in line for allowed in reading)] == []


def test_nobody_but_the_tasks_asks_which_task_it_is():
    pattern = r"dataset_file (==|!=|in)|isinstance\(.*(LineDetection|CocoPanoptic|DETRsegm|LETR)\b|in postprocessors\b"
    allowed = 'if "dataset_file" in given and config.dataset_file != task.dataset_file'
    assert [line for line in lines_with(pattern, "tasks", "benchmarks") if allowed not in line] == []


def test_the_configuration_names_what_the_rooms_have():
    """It imports no torch, so it repeats some names."""
    assert tuple(step.PRECISIONS) == config.PRECISIONS
    assert set(config.LABEL_LOSSES) == set(lines.LABEL_LOSSES)
    assert config.EVAL_BACKENDS == BACKENDS


@pytest.mark.parametrize("module", ["detr_fast", "detr_fast.config", "detr_fast.cli"])
def test_torch_is_imported_when_it_is_needed(module):
    check = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0
