"""What a build contains, and when it refuses."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def built(tree: Path, name: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", name]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True)


@pytest.fixture
def tree(tmp_path):
    """A checkout, without what the build does not read."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for name in ("detr_fast", "kernels", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    return tmp_path


def test_a_build_has_kernels_and_data_files(tree):
    assert built(tree, "out").returncode == 0
    package = tree / "out" / "detr_fast"
    for file in ("kernels/attention.py", "py.typed", "evaluation/report.html", "benchmarks/coco_sizes.json"):
        assert (package / file).is_file(), file


@pytest.mark.parametrize("link", ["kernels", "benchmarks"])
def test_a_checkout_with_links_as_text_files_is_refused(tree, link):
    path = tree / "detr_fast" / link
    path.unlink()
    path.write_text(f"../{link}")  # as git writes it
    done = built(tree, "out")
    assert done.returncode != 0 and not (tree / "out").exists()
    assert f"detr_fast/{link} is not the link" in done.stderr and "core.symlinks" in done.stderr


def test_the_oldest_versions_are_those_that_setup_allows():
    """tests/oldest.txt, with which the suite is run at the other end of the ranges; lint's versions aside."""
    setup = (ROOT / "setup.py").read_text()
    lists = [setup[setup.index("install_requires=[") : setup.index("extras_require")]]
    lists += re.findall(r"^(?:VIZ|TENSORBOARD|TEST) = .*$", setup, re.MULTILINE)
    allowed = {"==".join(found) for text in lists for found in re.findall(r'"([\w-]+)>=([\d.]+)', text)}
    pinned = {line for line in (ROOT / "tests" / "oldest.txt").read_text().splitlines() if not line.startswith("#")}
    assert pinned == allowed
