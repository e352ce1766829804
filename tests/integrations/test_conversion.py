"""Weights between the original's names and Hugging Face's folders, both ways."""

import json
import re
import sys

import pytest
import torch
from PIL import Image
from torch import nn

import detr_fast
from detr_fast.cli import main
from detr_fast.config import Config
from detr_fast.data.categories import Categories
from detr_fast.data.transforms import make_coco_transforms
from detr_fast.inference.loading import load_for_inference
from detr_fast.integrations.huggingface import convert, from_huggingface, to_huggingface
from detr_fast.nested_tensor import NestedTensor
from detr_fast.tasks import task_of
from detr_fast.training.checkpoint import read_checkpoint, save_checkpoint

transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")
pytest.importorskip("safetensors")

TINY = {
    "backbone": "resnet18", "backbone_weights": "none", "backbone_norm": "frozen", "hidden_dim": 32, "nheads": 2,
    "enc_layers": 2, "dec_layers": 2, "dim_feedforward": 48, "num_queries": 9, "device": "cpu", "image_size": 64,
    "num_classes": 4,
}  # fmt: skip
KINDS = {
    "boxes": {"backbone_level": 1},
    "learned": {"backbone_level": 1, "position_embedding": "learned"},
    "whole-backbone": {},
    "dilated": {"backbone": "resnet50", "dilation": True},
    "masks": {"masks": True, "hidden_dim": 128, "nheads": 8},
}
CATEGORIES = Categories((5, 9, 11, 20), ("dot", "bar", "cross", "ring"), contiguous=True)


def randomise(model):
    """Weights that tell a swapped pair of tensors: norms' statistics are no longer ones and zeros."""
    for name, value in model.state_dict().items():
        if name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
            value.uniform_(0.5, 1.5)
        elif value.dim() == 1:
            value.normal_(std=0.1)
    with torch.no_grad():
        head = getattr(model, "detr", model)
        head.query_embed.weight.mul_(2)
    return model


def checkpoint_of(folder, kind, **more):
    config = Config(**{**TINY, **KINDS[kind]})
    torch.manual_seed(0)
    model = randomise(task_of(config).build(config)[0]).eval()
    path = folder / f"{kind}.pth"
    save_checkpoint({"model": model.state_dict(), "args": config.to_dict(), **more}, path)
    return path, model


def padded():
    pixels, mask = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, 40:], mask[1, :, 56:] = True, True
    return pixels * ~mask[:, None], mask


def load_theirs(folder):
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def assert_same_outputs(ours, theirs):
    pixels, mask = padded()
    with torch.no_grad():
        out = ours(NestedTensor(pixels, mask))
        expected = theirs(pixel_values=pixels, pixel_mask=(~mask).long())
    names = {"pred_logits": "logits", "pred_boxes": "pred_boxes", "pred_masks": "pred_masks"}
    for ours_name, name in names.items():
        if ours_name in out:
            value, other = out[ours_name], expected[name]
            scale = max(1.0, float(other.abs().max()))
            assert (value - other).abs().max() <= 1e-5 * scale, name
    assert ("pred_masks" in out) == ("pred_masks" in expected)


def assert_bit_equal(state, other):
    assert set(state) == set(other)
    assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("kind", ["boxes", "learned", pytest.param("masks", marks=pytest.mark.slow)])
def test_a_checkpoint_there_and_back(kind, tmp_path):
    path, model = checkpoint_of(tmp_path, kind, categories=CATEGORIES.to_dict())
    convert(str(path), str(tmp_path / "hf"))
    assert_same_outputs(model, load_theirs(tmp_path / "hf"))

    convert(str(tmp_path / "hf"), str(tmp_path / "back.pth"))
    back = read_checkpoint(tmp_path / "back.pth")
    assert_bit_equal(model.state_dict(), back["model"])
    assert Categories.from_dict(back["categories"]) == CATEGORIES
    before = read_checkpoint(path)["args"]
    described = ("backbone", "backbone_level", "dilation", "nheads", "enc_layers", "num_queries", "image_size", "masks")
    assert {name: back["args"][name] for name in described} == {name: before[name] for name in described}
    # Loads without any flag, as the checkpoint did.
    loaded = load_for_inference(Config(device="cpu"), (), str(tmp_path / "back.pth"))
    with torch.no_grad():
        batch = NestedTensor(*padded())
        assert torch.equal(loaded.model(batch)["pred_logits"], model(batch)["pred_logits"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole-backbone", "dilated"])
def test_a_whole_backbone_there_and_back(kind, tmp_path):
    path, model = checkpoint_of(tmp_path, kind)
    convert(str(path), str(tmp_path / "hf"))
    assert_same_outputs(model, load_theirs(tmp_path / "hf"))
    convert(str(tmp_path / "hf"), str(tmp_path / "back.pth"))
    assert_bit_equal(model.state_dict(), read_checkpoint(tmp_path / "back.pth")["model"])


NAMED = {
    "detr_resnet50": (458, 530),
    "detr_resnet50_dc5": (458, 530),
    "detr_resnet101": (713, 785),
    "detr_resnet50_panoptic": (490, 562),
}


@pytest.mark.parametrize("name", NAMED)
def test_every_name_of_the_published_models(name):
    with torch.device("meta"):
        ours = getattr(detr_fast, name)(weights=None).state_dict()
    theirs = to_huggingface(ours)
    assert (len(ours), len(theirs)) == NAMED[name]
    assert {key: value.shape for key, value in from_huggingface(theirs).items()} == {
        key: value.shape for key, value in ours.items()
    }
    # In memory transformers has names of its own; they are understood, too.
    backbone = "resnet101" if "101" in name else "resnet50"
    config = transformers.DetrConfig(backbone=backbone, num_labels=250 if "panoptic" in name else 91)
    kind = transformers.DetrForSegmentation if "panoptic" in name else transformers.DetrForObjectDetection
    with torch.device("meta"):
        memory = kind(config).state_dict()
    memory = {key: value for key, value in memory.items() if not key.endswith("num_batches_tracked")}
    assert len(memory) == NAMED[name][1]
    back = from_huggingface(memory)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in ours.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_published_models(name, tmp_path):
    torch.manual_seed(0)
    model = randomise(getattr(detr_fast, name)(weights=None)).eval()
    # As the original's files: the weights alone.
    torch.save({"model": model.state_dict()}, tmp_path / "original.pth")
    convert(str(tmp_path / "original.pth"), str(tmp_path / "hf"), dilation=True if "dc5" in name else None)
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert described["id2label"]["17"] == "cat" and described["id2label"]["12"] == "N/A"
    assert_same_outputs(model, load_theirs(tmp_path / "hf"))
    convert(str(tmp_path / "hf"), str(tmp_path / "back.pth"))
    back = read_checkpoint(tmp_path / "back.pth")
    assert_bit_equal(model.state_dict(), back["model"])
    assert back["args"]["dilation"] == ("dc5" in name)
    assert dict(zip(back["categories"]["ids"], back["categories"]["names"], strict=True))[17] == "cat"


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_folder_that_transformers_wrote(safe, tmp_path):
    path, model = checkpoint_of(tmp_path, "boxes")
    convert(str(path), str(tmp_path / "hf"))
    theirs = load_theirs(tmp_path / "hf")
    theirs.config.id2label = {0: "dot", 1: "N/A", 2: "cross", 3: "ring"}
    theirs.save_pretrained(tmp_path / "saved")
    if not safe:  # transformers 4 wrote such a file, 5 under the names of its memory if asked by hand
        torch.save(theirs.state_dict(), tmp_path / "saved" / "pytorch_model.bin")
        (tmp_path / "saved" / "model.safetensors").unlink()
    convert(str(tmp_path / "saved"), str(tmp_path / "back.pth"))
    back = read_checkpoint(tmp_path / "back.pth")
    assert_bit_equal(model.state_dict(), back["model"])
    assert Categories.from_dict(back["categories"]).label_names == {0: "dot", 2: "cross", 3: "ring"}


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "images" / "gradient.png"
    path.parent.mkdir()
    image = Image.radial_gradient("L").resize((150, 100))
    Image.merge("RGB", [image, image.rotate(90), image.rotate(180)]).save(path)
    return path


@torch.no_grad()
def tell_queries_apart(model, picture):
    """Heads under which the queries of a fresh model, nearly all alike, have labels and boxes of their own."""
    seen = []
    with model.class_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        model(make_coco_transforms("val", scales=64)(Image.open(picture), None)[0][None])
    hidden = seen[0][-1, 0]  # [Q, C]
    away = torch.nn.functional.normalize(hidden - hidden.mean(0), dim=-1)
    model.class_embed.weight[:-1] = away[: len(model.class_embed.weight) - 1] * 3
    model.class_embed.weight[-1] = 0
    model.class_embed.bias.copy_(-model.class_embed.weight @ hidden.mean(0))
    first = model.bbox_embed.layers[0]
    first.weight.mul_(20)
    first.bias.copy_(-first.weight @ hidden.mean(0))


def test_their_pipeline_finds_what_our_command_finds(tmp_path, picture):
    path, model = checkpoint_of(tmp_path, "boxes")
    tell_queries_apart(model, picture)
    content = {**read_checkpoint(path), "model": model.state_dict(), "categories": CATEGORIES.to_dict()}
    save_checkpoint(content, path)
    assert main(["convert", str(path), str(tmp_path / "hf")]) == 0
    out = tmp_path / "out"
    flags = ["--weights", str(path), "--device", "cpu", "--threshold", "0", "--output_dir", str(out)]
    assert main(["predict", str(picture), *flags]) == 0
    ours = json.loads((out / "predictions.json").read_text())
    detect = transformers.pipeline("object-detection", model=str(tmp_path / "hf"), device="cpu")
    theirs = sorted(detect(str(picture), threshold=0.0), key=lambda found: -found["score"])
    assert len(theirs) == len(ours) == 9
    names = dict(zip(CATEGORIES.ids, CATEGORIES.names, strict=True))
    assert len({found["label"] for found in theirs}) > 1
    assert len({tuple(found["box"].values()) for found in theirs}) > 5
    for mine, found in zip(ours, theirs, strict=True):
        assert names[mine["category_id"]] == found["label"]
        assert abs(mine["score"] - found["score"]) < 0.01
        x, y, width, height = mine["bbox"]
        box = found["box"]  # whole pixels, rounded down
        for value, other in zip((x, y, x + width, y + height), box.values(), strict=True):
            assert abs(value - (other + 0.5)) <= 1, (mine, found)


def test_the_folder_describes_the_images_and_itself(tmp_path):
    path, _ = checkpoint_of(tmp_path, "boxes", categories=CATEGORIES.to_dict())
    convert(str(path), str(tmp_path / "my_model"))
    processor = json.loads((tmp_path / "my_model" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 64, "longest_edge": 107}
    card = (tmp_path / "my_model" / "README.md").read_text()
    assert re.match(r"---\n.*pipeline_tag: object-detection\n.*\n---\n", card, re.DOTALL)
    assert "dot, bar, cross, ring" in card and "# my_model" in card


def test_averaged_weights_are_taken(tmp_path):
    path, model = checkpoint_of(tmp_path, "boxes")
    checkpoint = read_checkpoint(path)
    values = {name: value + 1 if value.is_floating_point() else value for name, value in checkpoint["model"].items()}
    save_checkpoint({**checkpoint, "ema": {"values": values}}, path)
    convert(str(path), str(tmp_path / "hf"))
    bias = load_theirs(tmp_path / "hf").class_labels_classifier.bias
    assert torch.equal(bias, model.class_embed.bias + 1)


def refusal(capsys, *argv):
    assert main(["convert", *map(str, argv)]) == 2
    return capsys.readouterr().err


def test_what_has_no_counterpart_is_refused(tmp_path, capsys):
    config = Config(**{**TINY, "backbone_level": 1, "pre_norm": True})
    state = task_of(config).build(config)[0].state_dict()
    torch.save(state, tmp_path / "pre_norm.pth")
    assert "transformer.encoder.norm.weight" in refusal(capsys, tmp_path / "pre_norm.pth", tmp_path / "hf")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    assert "no counterpart" in refusal(capsys, tmp_path / "linear.pth", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_nothing_is_overwritten_and_contradictions_are_refused(tmp_path, capsys):
    path, _ = checkpoint_of(tmp_path, "boxes")
    assert "--nheads 4" in refusal(capsys, path, tmp_path / "hf", "--nheads", "4")
    assert not (tmp_path / "hf").exists()
    assert "exists" in refusal(capsys, path, tmp_path)
    convert(str(path), str(tmp_path / "hf"))
    assert "exists" in refusal(capsys, tmp_path / "hf", path)
    assert "says itself" in refusal(capsys, tmp_path / "hf", tmp_path / "new.pth", "--dilation")
    assert "no checkpoint file" in refusal(capsys, tmp_path / "absent.pth", tmp_path / "new")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refusal(capsys, tmp_path / "empty", tmp_path / "new.pth")


def test_without_safetensors_the_message_names_the_extra(tmp_path, capsys, monkeypatch):
    path, _ = checkpoint_of(tmp_path, "boxes")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "detr_fast[hf]" in refusal(capsys, path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("change", [{"model_type": "conditional_detr"}, {"encoder_attention_heads": 4}])
def test_folders_of_other_models_are_refused(change, tmp_path, capsys):
    path, _ = checkpoint_of(tmp_path, "boxes")
    convert(str(path), str(tmp_path / "hf"))
    described = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**described, **change}))
    error = refusal(capsys, tmp_path / "hf", tmp_path / "new.pth")
    assert "expected 'detr'" in error or "must be alike" in error
