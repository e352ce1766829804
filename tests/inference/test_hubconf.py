"""`torch.hub.load` of this repository, as the original's users call it."""

import inspect
import runpy
from pathlib import Path

import pytest
import torch

import detr_fast
from detr_fast.models.hub import published

ROOT = str(Path(__file__).parents[2])


def test_every_published_name_is_an_entry_point():
    assert set(published()) <= set(runpy.run_path(f"{ROOT}/hubconf.py"))


@pytest.mark.parametrize("name", ["detr_resnet50", "detr_resnet50_panoptic"])
def test_an_entry_point_builds_the_model(name):
    with torch.device("meta"):
        model, postprocessor = torch.hub.load(
            ROOT, name, source="local", pretrained=False, num_classes=7, return_postprocessor=True, weights=None
        )
    kind = detr_fast.PostProcessPanoptic if "panoptic" in name else detr_fast.PostProcess
    assert isinstance(postprocessor, kind)
    assert getattr(model, "detr", model).class_embed.out_features == 8


def test_arguments_stand_in_the_originals_order():
    for name in published():
        names = [*inspect.signature(getattr(detr_fast, name)).parameters]
        middle = ["threshold"] if "panoptic" in name else []
        assert names[: 3 + len(middle)] == ["pretrained", "num_classes", *middle, "return_postprocessor"]
