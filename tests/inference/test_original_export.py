"""The steps of the original's own export test (facebookresearch/detr, test_all.py, ONNXExporterTester), done with this
package: random weights, images of two sizes, named inputs and outputs, the file's numbers beside the model's."""

import pytest
import torch

from detr_fast.config import Config
from detr_fast.inference.export import export
from detr_fast.inference.exported import READERS
from detr_fast.inference.loading import load_for_inference
from detr_fast.models import detr_resnet50, detr_resnet50_panoptic

pytestmark = pytest.mark.slow
for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)


@pytest.mark.parametrize("kind", [detr_resnet50, detr_resnet50_panoptic], ids=lambda kind: kind.__name__)
def test_the_original_models_export(kind, tmp_path):
    torch.manual_seed(0)
    torch.save({"model": kind(weights=None).state_dict()}, tmp_path / "weights.pth")
    loaded = load_for_inference(Config(device="cpu"), (), str(tmp_path / "weights.pth"))
    names = ["pred_logits", "pred_boxes", *(["pred_masks"] if "panoptic" in kind.__name__ else [])]
    path = export(loaded, tmp_path / "model.onnx", "onnx")
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    assert [value.name for value in model.graph.input] == ["images"]
    assert [value.name for value in model.graph.output] == names
    run, _ = READERS["onnx"](path)
    for batch, height, width in ((1, 200, 256), (2, 128, 320)):
        images = torch.rand(batch, 3, height, width)
        with torch.no_grad():
            expected = loaded.model(images)
        for name, value in zip(names, run([images]), strict=True):
            scale = float(expected[name].abs().max().clamp(min=1))
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4 * scale)


@torch.no_grad()
def test_a_backbone_exports_by_torch_alone(tmp_path):
    """Its ops are PyTorch's, so nothing has to be replaced."""
    backbone = detr_resnet50(weights=None).backbone[0].body.eval()

    class Last(torch.nn.Module):
        def forward(self, images):
            return list(backbone(images).values())[-1]

    images = torch.rand(2, 3, 128, 160)
    dims = {0: torch.export.Dim("batch", min=1), 2: torch.export.Dim("h", min=33), 3: torch.export.Dim("w", min=33)}
    torch.onnx.export(
        Last().eval(), (images,), tmp_path / "body.onnx", dynamo=True, input_names=["images"],
        output_names=["features"], dynamic_shapes=(dims,), verbose=False,
    )  # fmt: skip
    run, metadata = READERS["onnx"](tmp_path / "body.onnx")
    assert metadata == ""
    images = torch.rand(1, 3, 200, 256)
    torch.testing.assert_close(run([images])[0], Last()(images), rtol=1e-4, atol=1e-4)
