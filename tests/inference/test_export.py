"""Exported files give the model's numbers, without the package; what differs is not kept."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detr_fast
from detr_fast import cli
from detr_fast.errors import UsageError
from detr_fast.inference import export as exporting
from detr_fast.inference.export import ExportDiffersError
from tests.inference.tiny_models import checkpoint_of

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def detector(run_folder):
    return detr_fast.load(run_folder, device="cpu")


def run_elsewhere(code, path):
    """What a process that cannot import detr_fast prints."""
    code = f"import sys, json; sys.modules['detr_fast'] = None; path = {str(path)!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=path.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_onnx_runs_elsewhere(detector, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    detector.export(path, mask=True, postprocess=True)  # compares
    got = run_elsewhere(
        """
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(path)
inputs = {"images": np.zeros((1, 3, 70, 90), np.float32), "mask": np.zeros((1, 70, 90), bool)}
values = session.run(["boxes", "scores", "labels"], {**inputs, "sizes": np.array([[140, 180]])})
meta = json.loads(session.get_modelmeta().custom_metadata_map["detr_fast"])
print(json.dumps([*(value.tolist() for value in values), meta, [i.name for i in session.get_inputs()]]))
""",
        path,
    )
    boxes, scores, labels, metadata, inputs = got
    with torch.no_grad():
        outputs = detector.model(torch.zeros(1, 3, 70, 90))
    expected = detr_fast.PostProcess()(outputs, torch.tensor([[140, 180]]))[0]
    torch.testing.assert_close(torch.tensor(boxes[0]), expected["boxes"], rtol=0, atol=1e-2)
    torch.testing.assert_close(torch.tensor(scores[0]), expected["scores"], rtol=0, atol=1e-4)
    assert labels[0] == detector.categories.to_id(expected["labels"]).tolist() and set(labels[0]) <= {5, 9}
    assert inputs == ["images", "mask", "sizes"]
    assert metadata["names"] == {"5": "dot", "9": "bar"}
    assert metadata["preprocessing"]["shorter_side"] == 64 and metadata["preprocessing"]["mean"][0] == 0.485


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "aoti"])
def test_torch_formats_run_elsewhere(detector, tmp_path, format):
    path = tmp_path / "model.pt2"
    detector.export(path, format)  # compares
    load = {
        "torch": "extra = {'detr_fast': ''}; run = torch.export.load(path, extra_files=extra).module()",
        "aoti": "run = torch._inductor.aoti_load_package(path); extra = run.get_metadata()",
    }
    got = run_elsewhere(
        f"""
import torch
{load[format]}
with torch.no_grad():
    values = run(torch.zeros(1, 3, 70, 90))
print(json.dumps([*(value.tolist() for value in values), json.loads(extra["detr_fast"])]))
""",
        path,
    )
    with torch.no_grad():
        outputs = detector.model(torch.zeros(1, 3, 70, 90))
    for value, name in zip(got, ("pred_logits", "pred_boxes"), strict=False):
        torch.testing.assert_close(torch.tensor(value), outputs[name], rtol=0, atol=1e-4)
    assert got[2]["names"] == {"0": "dot", "1": "bar"}


@pytest.mark.slow
def test_a_wrong_substitution_is_refused(run_folder, tmp_path, monkeypatch, capsys):
    right = exporting._attention_in_torch

    def without_mask(query, key, value, key_padding_mask, *others):
        return right(query, key, value, None, *others)

    monkeypatch.setattr(exporting, "_attention_in_torch", without_mask)
    path = tmp_path / "model.pt2"
    path.write_text("the old file")
    argv = ["export", "--weights", str(run_folder), "--format", "torch", "--output", str(path), "--mask"]
    assert cli.main(argv) == 1
    assert "differs from the model's by" in capsys.readouterr().err
    assert path.read_text() == "the old file" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_differs_is_not_kept(run_folder, detector, tmp_path, monkeypatch, capsys):
    """The graph itself, off by a little, in the place of a file."""
    off = 0.0

    def read(path):
        def run(inputs):
            with torch.no_grad():
                logits, boxes = exporting._Graph(detector.model, False, False, None)(*inputs)
            return logits, boxes + off

        return run, ""

    monkeypatch.setattr(exporting, "_program", lambda *args: None)
    monkeypatch.setattr(exporting, "_decomposed", lambda program: None)
    monkeypatch.setitem(exporting._WRITERS, "torch", lambda program, path, *args: path.write_text("a file"))
    monkeypatch.setitem(exporting.READERS, "torch", read)
    path = tmp_path / "new" / "model.pt2"
    argv = ["export", "--weights", str(run_folder), "--format", "torch", "--output", str(path)]
    off = 2e-4
    assert cli.main(argv) == 1 and "pred_boxes differs from the model's by 2.0e-04" in capsys.readouterr().err
    assert list(path.parent.iterdir()) == []
    off = float("nan")
    with pytest.raises(ExportDiffersError, match="nan"):
        detector.export(path, "torch")
    off = 0.0
    assert cli.main(argv) == 0 and path.read_text() == "a file"


def test_export_refuses(detector, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="format is 'engine'; expected one of onnx, torch, aoti"):
        detector.export("model.onnx", "engine")
    with pytest.raises(UsageError, match=r"must end in \.pt2"):
        detector.export("model.onnx", "torch")
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"onnx, onnxscript, onnxruntime: pip install 'detr_fast\[export\]'"):
        detector.export(tmp_path / "model.onnx")


@pytest.mark.slow
def test_the_page_runs(run_folder, tmp_path, monkeypatch):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    Path("outputs/mine").symlink_to(run_folder)
    Image.new("RGB", (90, 70), (200, 30, 30)).save("photo.jpg")
    scope: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(snippet, scope)
    expected = detr_fast.load("outputs/mine", device="cpu").predict("photo.jpg", 0.0)
    np.testing.assert_allclose(np.sort(scope["scores"][0])[::-1], expected.scores, atol=1e-2)


def test_the_command_line_offers_the_formats():
    action = next(a for a in cli._export_parser()._actions if a.dest == "format")
    assert tuple(action.choices) == exporting.FORMATS


@pytest.mark.slow
def test_learned_positions_bound_the_size(tmp_path):
    torch.save(checkpoint_of(position_embedding="learned"), tmp_path / "learned.pth")
    detr_fast.load(tmp_path / "learned.pth", device="cpu").export(tmp_path / "learned.pt2", "torch")  # compares
    module = torch.export.load(tmp_path / "learned.pt2").module()
    assert module(torch.zeros(1, 3, 70, 90))[0].shape[0] == 1
    with pytest.raises(AssertionError, match="1600"):
        module(torch.zeros(1, 3, 70, 1700))
