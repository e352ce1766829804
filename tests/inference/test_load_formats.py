"""`detr_fast.load` of Hugging Face's files and of exported ones: the same detections as the checkpoint's."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import detr_fast
from detr_fast.cli import main
from detr_fast.errors import UsageError
from detr_fast.inference import export as exporting
from detr_fast.inference.huggingface import convert
from detr_fast.inference.sources import read_source
from tests.inference.tiny_models import checkpoint_of

IMAGES = [
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8))
    for w, h in ((90, 70), (70, 90), (180, 140))
]


def same(found, expected):
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=0, atol=1e-5 * max(expected.size))
    assert found.class_id.tolist() == expected.class_id.tolist() and found.class_name == expected.class_name
    assert found.to_coco()[0].keys() == expected.to_coco()[0].keys()


def agree(model, expected):
    """One image, and a batch of several sizes."""
    for one, other in zip(model.predict(IMAGES, 0, batch_size=3), IMAGES, strict=True):
        same(one, expected.predict(other, 0))
    same(model.predict(IMAGES[0], 0), expected.predict(IMAGES[0], 0))


# Hugging Face


@pytest.fixture(scope="module")
def trained(run_folder):
    return detr_fast.load(run_folder, device="cpu")


@pytest.fixture(scope="module")
def folder(run_folder, tmp_path_factory):
    pytest.importorskip("safetensors")
    folder = tmp_path_factory.mktemp("hf") / "mine"
    convert(str(run_folder / "checkpoint_best.pth"), str(folder))
    return folder


def test_a_hugging_face_folder(folder, trained):
    model = detr_fast.load(folder, device="cpu")
    agree(model, trained)
    assert model.names == {5: "dot", 9: "bar"}
    same(
        detr_fast.load(folder / "model.safetensors", device="cpu").predict(IMAGES[0], 0), trained.predict(IMAGES[0], 0)
    )


@pytest.mark.slow
def test_a_folder_with_masks(tmp_path):
    pytest.importorskip("safetensors")
    torch.save(checkpoint_of(masks=True, hidden_dim=128), tmp_path / "masks.pth")
    convert(str(tmp_path / "masks.pth"), str(tmp_path / "hf"))
    found = detr_fast.load(tmp_path / "hf", device="cpu").predict(IMAGES[0], 0)
    expected = detr_fast.load(tmp_path / "masks.pth", device="cpu").predict(IMAGES[0], 0)
    same(found, expected)
    np.testing.assert_array_equal(found.masks, expected.masks)


@pytest.mark.parametrize("theirs", [True, False], ids=["their-names", "our-names"])
def test_a_lone_safetensors_file_is_bare_weights(theirs, folder, trained, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    if theirs:
        shutil.copy(folder / "model.safetensors", tmp_path / "weights.safetensors")
    else:
        safetensors.save_file(trained.model.state_dict(), tmp_path / "weights.safetensors")
    model = detr_fast.load(tmp_path / "weights.safetensors", device="cpu", image_size=64)
    found, expected = model.predict(IMAGES[0], 0), trained.predict(IMAGES[0], 0)
    np.testing.assert_allclose(found.boxes, expected.boxes, rtol=0, atol=1e-3)
    assert found.class_id.tolist() == [{5: 0, 9: 1}[label] for label in expected.class_id.tolist()]


def test_settings_that_contradict_a_folder_are_refused(folder):
    with pytest.raises(ValueError, match="--nheads 4, it was trained with 8"):
        detr_fast.load(folder, device="cpu", nheads=4)


def test_without_safetensors_the_message_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UsageError, match=r"detr_fast\[hf\]"):
        detr_fast.load(folder, device="cpu")


# Exported files


def exported(model, path, **options):
    model.export(path, {".onnx": "onnx", ".pt2": "torch"}[path.suffix], **options)
    return detr_fast.load(path)


KINDS = {
    "boxes": {},
    "masks": {"masks": True, "hidden_dim": 128},
    "lines": {"dataset_file": "lines"},
    "fine-lines": {
        "dataset_file": "lines", "LETRpost": True, "second_hidden_dim": 32, "second_enc_layers": 1,
        "second_dec_layers": 1, "second_dim_feedforward": 32,
    },
}  # fmt: skip


def model_of(kind, folder):
    torch.save(checkpoint_of(**KINDS[kind]), folder / "model.pth")
    return detr_fast.load(folder / "model.pth", device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "postprocess"])
def test_an_onnx_file(kind, raw, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    trained = model_of(kind, tmp_path)
    model = exported(trained, tmp_path / "model.onnx", mask=not raw, postprocess=not raw)
    agree(model, trained)
    found, expected = model.predict(IMAGES[0], 0), trained.predict(IMAGES[0], 0)
    assert (found.masks is None) == (kind != "masks") and (found.lines is None) == ("lines" not in kind)
    if kind == "masks":
        assert (found.masks != expected.masks).mean() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "aoti"])
def test_files_of_torch(format, trained, tmp_path):
    trained.export(tmp_path / "model.pt2", format, postprocess=True)
    agree(detr_fast.load(tmp_path / "model.pt2"), trained)


@pytest.fixture(params=[False, True], ids=["raw", "postprocess"])
def file(request, trained, tmp_path, monkeypatch):
    """A file whose program is the graph itself: reading a true one takes seconds."""
    graph = exporting._Graph(trained.model, request.param, request.param, trained.categories)
    metadata = json.dumps(exporting.metadata_of(trained._loaded, graph))

    def run(inputs):
        with torch.no_grad():
            return graph(*inputs)

    monkeypatch.setitem(exporting.READERS, "torch", lambda path: (run, metadata))
    monkeypatch.setattr("detr_fast.inference.exported.format_of", lambda path: "torch")
    (tmp_path / "model.pt2").write_bytes(b"")
    return tmp_path / "model.pt2"


def test_an_exported_file(file, trained, tmp_path):
    model = detr_fast.load(file)
    agree(model, trained)
    assert repr(model) == "Detector of boxes: model.pt2, 2 classes, on cpu" and model.names == trained.names
    # On the command line, too.
    IMAGES[0].save(tmp_path / "image.png")
    flags = ["--device", "cpu", "--threshold", "0", "--output_dir", str(tmp_path / "out")]
    assert main(["predict", str(tmp_path / "image.png"), "--weights", str(file), *flags]) == 0
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert [entry["category_name"] for entry in written] == trained.predict(IMAGES[0], 0).class_name


def test_an_exported_file_sees_images_at_another_size(file, run_folder):
    expected = detr_fast.load(run_folder, device="cpu", image_size=96).predict(IMAGES[0], 0)
    same(detr_fast.load(file, image_size=96).predict(IMAGES[0], 0), expected)


def test_an_exported_file_only_detects(file, tmp_path):
    model = detr_fast.load(file)
    for use in (
        lambda: model.model,
        lambda: model.evaluate(coco_path="coco"),
        lambda: model.train(tmp_path / "run"),
        lambda: model.export(tmp_path / "again.onnx"),
        lambda: model.save(tmp_path / "saved.pth"),
    ):
        with pytest.raises(UsageError, match="model.pt2 is an exported file, which only detects; for"):
            use()
    with pytest.raises(UsageError, match="only image_size and max_size can be set, not nheads"):
        detr_fast.load(file, nheads=4)
    with pytest.raises(UsageError, match="which computes in fp32; got precision bf16"):
        detr_fast.load(file, precision="bf16")
    with pytest.raises(UsageError, match="runs on the CPU here; got device 'cuda'"):
        detr_fast.load(file, device="cuda")
    with pytest.raises(ValueError, match="is an exported file, which only detects; expected a run's folder"):
        read_source(file)  # as training does


def test_a_program_of_somebody_else(tmp_path):
    class Double(torch.nn.Module):
        def forward(self, x):
            return x * 2

    torch.export.save(torch.export.export(Double(), (torch.zeros(2),)), tmp_path / "other.pt2")
    with pytest.raises(ValueError, match="other.pt2' is not of detr-fast export: its metadata has no entry"):
        detr_fast.load(tmp_path / "other.pt2")


def test_an_onnx_file_of_somebody_else(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["y"])], "g", value[:1], value[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "other.onnx"))
    with pytest.raises(ValueError, match="other.onnx' is not of detr-fast export: its metadata has no entry"):
        detr_fast.load(tmp_path / "other.onnx")


def test_without_onnxruntime_the_message_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"model.onnx needs onnxruntime: pip install 'detr_fast\[export\]'"):
        detr_fast.load(tmp_path / "model.onnx")


def test_metadata_of_another_version(monkeypatch, tmp_path):
    """A file whose metadata says less."""
    monkeypatch.setitem(exporting.READERS, "torch", lambda path: (None, '{"names": {}}'))
    monkeypatch.setattr("detr_fast.inference.exported.format_of", lambda path: "torch")
    (tmp_path / "old.pt2").write_bytes(b"")
    with pytest.raises(ValueError, match="old.pt2' is of another version of this package; export it again"):
        detr_fast.load(tmp_path / "old.pt2")


def test_lines_are_resized_as_in_their_evaluation(tmp_path):
    torch.save(checkpoint_of(dataset_file="lines", image_size=None), tmp_path / "lines.pth")
    loaded = detr_fast.load(tmp_path / "lines.pth", device="cpu")
    graph = exporting._Graph(loaded.model, False, False, loaded.categories)
    steps = exporting.metadata_of(loaded._loaded, graph)["preprocessing"]
    assert (steps["shorter_side"], steps["longer_side_at_most"]) == (1100, 1333)
    assert graph.outputs == ["pred_logits", "pred_lines"]
