"""The snippet of docs/segmentation.md runs as printed and gives the shapes it names."""

import io
import re
from pathlib import Path

from PIL import Image

DOC = Path(__file__).parents[1] / "docs" / "segmentation.md"


def test_segmentation_snippet_runs():
    (snippet,) = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    scope: dict = {}
    exec(snippet, scope)
    shapes = {name: list(scope["outputs"][name].shape) for name in ("pred_logits", "pred_boxes", "pred_masks")}
    for name, shape in shapes.items():
        assert f"{name} {shape}" in snippet
    for image, picture in zip(scope["images"], scope["pictures"], strict=True):
        assert set(picture) == {"png_string", "segments_info"}
        assert Image.open(io.BytesIO(picture["png_string"])).size == (image.shape[2], image.shape[1])
