import json
from pathlib import Path

import pytest
import torch

import detr_fast.models.hub as hub
from detr_fast.models import (
    detr_resnet50,
    detr_resnet50_dc5,
    detr_resnet50_dc5_panoptic,
    detr_resnet50_panoptic,
    detr_resnet101,
    detr_resnet101_dc5,
    detr_resnet101_panoptic,
)
from detr_fast.nested_tensor import nested_tensor_from_tensor_list

NAMED = [detr_resnet50, detr_resnet50_dc5, detr_resnet101, detr_resnet101_dc5]
PANOPTIC = [detr_resnet50_panoptic, detr_resnet50_dc5_panoptic, detr_resnet101_panoptic]
KEYS = Path(__file__).parent / "official_keys"


def official_state(name):
    """Tensors of the official checkpoint's names and shapes."""
    shapes = json.loads((KEYS / f"{name}.json").read_text())
    return {key: torch.full(shape, 0.01) for key, shape in shapes.items()}


@pytest.mark.parametrize("norm", ["frozen", "batch"])
@pytest.mark.parametrize("named", NAMED + PANOPTIC, ids=lambda named: named.__name__)
def test_official_keys_load_strictly(named, norm):
    # On the meta device: it is about names and shapes, and quick.
    with torch.device("meta"):
        model = named(weights=None, norm=norm)
    state = official_state(named.__name__)
    model.load_state_dict(state, strict=True, assign=True)
    assert list(model.state_dict()) == list(state)
    prefix = "detr." if named in PANOPTIC else ""
    assert torch.equal(model.state_dict()[f"{prefix}backbone.0.body.bn1.running_var"], torch.full((64,), 0.01))
    state.pop(f"{prefix}backbone.0.body.layer4.0.bn1.running_mean")
    with pytest.raises(RuntimeError, match="layer4.0.bn1.running_mean"):
        model.load_state_dict(state, strict=True)


@pytest.mark.parametrize("named, size", [(detr_resnet50, (2, 3)), (detr_resnet50_dc5, (4, 6))])
@torch.no_grad()
def test_named_model_shapes(named, size):
    model = named(weights=None).eval()
    sizes = []
    model.input_proj.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape[-2:])))
    samples = nested_tensor_from_tensor_list([torch.randn(3, 64, 96), torch.randn(3, 50, 60)])
    out = model(samples)
    assert sizes == [size]
    assert out["pred_logits"].shape == (2, 100, 92) and out["pred_boxes"].shape == (2, 100, 4)
    assert "aux_outputs" not in out


@pytest.mark.parametrize("norm", [None, "batch"])
def test_pretrained_loads_the_checkpoint_and_no_backbone(monkeypatch, tmp_path, norm):
    urls = []
    state = official_state("detr_resnet50")

    def download(url, **kwargs):
        urls.append(url)
        assert kwargs["check_hash"] and kwargs["weights_only"]
        return {"model": state}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    model = detr_resnet50(pretrained=True, norm=norm)
    assert urls == ["https://dl.fbaipublicfiles.com/detr/detr-r50-e632da11.pth"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    trained = {
        name.split(".")[3] for name, p in model.backbone.named_parameters() if p.requires_grad for name in ["x." + name]
    }
    assert trained == {"layer2", "layer3", "layer4"}


def test_every_named_model_has_its_checkpoint():
    assert set(hub._CHECKPOINTS) == {named.__name__ for named in NAMED + PANOPTIC}


def test_pretrained_rejects_what_the_checkpoint_is_not():
    with pytest.raises(ValueError, match="91 classes, num_classes is 20"):
        detr_resnet50(pretrained=True, num_classes=20)
    with pytest.raises(ValueError, match="250 classes, num_classes is 91"):
        detr_resnet101_panoptic(pretrained=True, num_classes=91)
    with pytest.raises(ValueError, match="batch norm"):
        detr_resnet50(pretrained=True, norm="group")


def test_failed_download_says_what_to_do(monkeypatch, tmp_path):
    def fail(url, *args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(RuntimeError, match="no network") as error:
        detr_resnet50_dc5(pretrained=True)
    for part in ("detr-r50-dc5-f0fb7ef5.pth", str(tmp_path / "checkpoints"), "detr_resnet50_dc5(weights=None)"):
        assert part in str(error.value)


def test_postprocessor_and_classes():
    with torch.device("meta"):
        model, postprocessor = detr_resnet50(num_classes=7, return_postprocessor=True, weights=None)
    assert model.class_embed.out_features == 8
    assert type(postprocessor).__name__ == "PostProcess"
    with torch.device("meta"):
        model, postprocessor = detr_resnet50_panoptic(threshold=0.6, return_postprocessor=True, weights=None)
    assert model.detr.class_embed.out_features == 251 and postprocessor.threshold == 0.6
    assert postprocessor.is_thing_map == {i: i <= 90 for i in range(250)}


def test_pretrained_panoptic_loads_the_checkpoint_and_no_backbone(monkeypatch):
    state = official_state("detr_resnet50_panoptic")
    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda url, **kwargs: urls.append(url) or {"model": state}
    )
    urls = []
    model = detr_resnet50_panoptic(True)
    assert urls == ["https://dl.fbaipublicfiles.com/detr/detr-r50-panoptic-00ce5173.pth"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
