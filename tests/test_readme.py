"""The README's Python runs as printed, its file tree is the real one, and links between the pages lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from detr_fast.models.hub import published
from tests.inference.tiny_models import checkpoint_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_snippets_run(tmp_path, monkeypatch):
    # A small model stands in for the published one, where torch.hub would keep it.
    checkpoint = tmp_path / "hub" / "checkpoints" / published()["detr_resnet50"].rsplit("/", 1)[1]
    checkpoint.parent.mkdir(parents=True)
    torch.save({"model": checkpoint_of(num_classes=91)["model"]}, checkpoint)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (90, 70), (200, 30, 30)).save("photo.jpg")
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 3
    scope: dict = {}
    for snippet in snippets:
        exec(snippet, scope)
    assert Image.open("found.jpg").size == (540, 420)
    assert scope["out"].shape == (56, 2, 256)
    assert scope["outputs"]["pred_logits"].shape == (2, 100, 92)
    assert scope["outputs"]["pred_boxes"].shape == (2, 100, 4)


def test_readme_tree_is_the_real_one():
    tree = README.split("## Where things are")[1].split("## ")[0]
    named, folder = set(), ""
    for indent, names in re.findall(r"^    ( *)([^\s,]+(?:, [^\s,]+)*)", tree, re.MULTILINE):
        for name in names.split(", "):
            folder = "" if not indent else folder
            assert (ROOT / folder / name).exists(), folder + name
            named.add((folder + name).strip("/"))
        folder = folder if indent else name
    rooms = {f"detr_fast/{path.name}" for path in (ROOT / "detr_fast").iterdir() if (path / "__init__.py").exists()}
    assert rooms - {"detr_fast/kernels", "detr_fast/benchmarks"} <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_index_of_docs_is_complete():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= set(
        re.findall(r"\((\w+\.md)\)", index)
    )
