"""The notebooks in examples/ run from top to bottom, in an empty folder."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests import notebooks

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a notebook; returns its namespace, and what it printed."""

    def run(name: str, replaced: dict[str, str] | None = None) -> tuple[dict, str]:
        notebook = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))
        monkeypatch.chdir(tmp_path)
        scope, outputs = notebooks.run(notebook, replaced)
        printed = "".join(text for output in sum(outputs, []) for text in output.get("text", []))
        return scope, printed

    return run


def test_every_notebook_is_run():
    tested = re.findall(r'run\(\s*"(\w+\.ipynb)"', Path(__file__).read_text(encoding="utf-8"))
    assert set(tested) == {path.name for path in EXAMPLES.glob("*.ipynb")}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_are_small_and_hold_their_outputs(path):
    assert path.stat().st_size < 100_000
    text = path.read_text(encoding="utf-8")
    for place in ("/home/", "/tmp/", "/work/", "/root/", "/Users/"):
        assert place not in text, place
    code = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any(cell["outputs"] for cell in code)
    for output in sum((cell["outputs"] for cell in code), []):
        assert output["output_type"] != "error"
        if "image/jpeg" in output.get("data", {}):
            Image.open(io.BytesIO(base64.b64decode(output["data"]["image/jpeg"]))).verify()


@pytest.mark.slow
def test_images(run):
    # Two steps on a few images stand for some minutes of training: it runs, and finds nothing certain.
    shorter = {"num_train=1000, num_val=60": "num_train=16, num_val=4", "--epochs 8": "--epochs 1 --max_steps 2"}
    scope, printed = run("images.ipynb", shorter | {"--eval_every 8": "--eval_every 1", "threshold=0.3": "threshold=0"})
    assert len(scope["several"]) == 4 and len(scope["found"]) == len(scope["again"]) == 10
    assert "4 images, the first with" in printed and len(scope["stats"]["coco_eval_bbox"]) == 12
    assert Path("outputs/evaluated/eval/report.html").is_file()


@pytest.mark.slow
def test_other_detrs(run):
    pytest.importorskip("transformers")
    pytest.importorskip("timm")
    _, printed = run("other_detrs.ipynb")
    assert printed.count("largest difference") == 3 and printed.endswith("True\n")
    assert re.search(r"attention +MultiheadAttention +taken", printed)
    assert re.search(r"norm +NormWithoutEps +refused", printed)


@pytest.mark.interpret
def test_kernels(run):
    _, printed = run("kernels.ipynb")
    assert "the same with NaN in the padding: True" in printed and "right, not timed" in printed
    errors = re.findall(r"(?:largest error|output|gradient of \w+) (\S+)", printed)
    assert len(errors) == 6 and all(float(error) < 1e-4 for error in errors)
