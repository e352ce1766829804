"""The README's Python runs as printed, its file tree is the real one, and links between the pages lead somewhere."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from detr_fast.integrations.huggingface import convert
from detr_fast.models.hub import published
from tests.inference.tiny_models import checkpoint_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def small_model() -> dict:
    """What stands in for the published weights: a small model with COCO's number of classes."""
    return {"model": checkpoint_of(num_classes=91)["model"]}


def test_readme_snippets_run(tmp_path, monkeypatch):
    checkpoint = tmp_path / "hub" / "checkpoints" / published()["detr_resnet50"].rsplit("/", 1)[1]
    checkpoint.parent.mkdir(parents=True)
    torch.save(small_model(), checkpoint)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (90, 70), (200, 30, 30)).save("photo.jpg")
    predict, _, parts = SNIPPETS
    scope: dict = {}
    exec(predict, scope)
    exec(parts, scope)
    assert Image.open("found.jpg").size == (540, 420)
    assert scope["out"].shape == (56, 2, 256)


def test_readme_snippet_of_transformers_runs(tmp_path, monkeypatch):
    for package in ("transformers", "timm", "safetensors"):
        pytest.importorskip(package)
    from detr_fast.integrations.transformers import unregister

    monkeypatch.chdir(tmp_path)
    Path("facebook").mkdir()
    torch.save(small_model(), "small.pth")
    convert("small.pth", "facebook/detr-resnet-50")  # a folder of that name goes before the one on the hub
    scope: dict = {}
    try:
        exec(SNIPPETS[1], scope)
        assert scope["model"].config._attn_implementation == "detr_fast"
        assert scope["model"](torch.randn(1, 3, 64, 64)).logits.shape == (1, 5, 92)
    finally:
        unregister()


def test_the_picture_is_small():
    (picture,) = re.findall(r"!\[[^\]]+\]\((\S+)\)", README)
    assert (ROOT / picture).stat().st_size <= 150_000
    assert min(Image.open(ROOT / picture).size) >= 200


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


def test_every_page_with_python_is_run():
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    for page in PAGES[1:]:
        if "```python" in page.read_text(encoding="utf-8"):
            assert any(f'"{page.name}"' in test and "```python" in test for test in tests), page.name
