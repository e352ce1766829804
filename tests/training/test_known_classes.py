"""A run from weights keeps the class head's rows of classes that the weights know by name."""

import json
import shutil

import pytest
import torch

import detr_fast
from detr_fast.cli import main
from detr_fast.data.categories import Categories
from detr_fast.models.weights import load_weights
from detr_fast.training.checkpoint import read_checkpoint
from detr_fast.training.classes import known_classes, say_known
from tests.inference.tiny_models import checkpoint_of

# Nothing moves: what was taken is what is saved.
STILL = [
    "--device", "cpu", "--num_workers", "0", "--epochs", "1", "--max_steps", "1", "--sample_images", "0",
    "--lr", "0", "--lr_backbone", "0", "--image_size", "48",
]  # fmt: skip
HEAD = ("class_embed.weight", "class_embed.bias")


@pytest.fixture(autouse=True)
def quickly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("detr_fast.training.trainer.draw_curves", lambda folder: True)


def weights(*names, ids=None, **settings):
    """A checkpoint that knows these classes, and its path."""
    state = checkpoint_of(backbone_level=1, image_size=48, num_classes=len(names), **settings)
    ids = tuple(ids or range(len(names)))
    state["categories"] = Categories(ids, names, contiguous=True).to_dict()
    torch.save(state, "weights.pth")
    return state


def folder_of(shapes, tmp_path, *names):
    """The shapes' folder, whose three classes are called otherwise."""
    folder = tmp_path / "data"
    shutil.copytree(shapes, folder)
    for path in (folder / "annotations").glob("*.json"):
        content = json.loads(path.read_text())
        content["categories"] = [
            {**category, "name": name} for category, name in zip(content["categories"], names, strict=True)
        ]
        path.write_text(json.dumps(content))
    return folder


def trained(folder, source="weights.pth", *flags):
    assert main(["train", "--data", str(folder), "--weights", source, *STILL, "--output_dir", "run", *flags]) == 0
    return read_checkpoint("run/checkpoint.pth")


def test_known_rows_stay_and_others_are_new(shapes, tmp_path, capsys):
    before = weights("star", "dog", "circle")["model"]
    after = trained(folder_of(shapes, tmp_path, "circle", "square", "star"))["model"]
    for name in HEAD:
        assert torch.equal(after[name][[0, 2, 3]], before[name][[2, 0, 3]])
        assert not any(torch.equal(after[name][1], row) for row in before[name])
    out = capsys.readouterr().out
    assert "--weights: class head: taken by name: circle, star, and no-object; new: square" in out
    assert "not taken" not in out


def test_more_classes_than_before(shapes, tmp_path, capsys):
    before = weights("square")["model"]
    after = trained(folder_of(shapes, tmp_path, "circle", "square", "star"))["model"]
    for name in HEAD:
        assert len(after[name]) == 4 and torch.equal(after[name][[1, 3]], before[name][[0, 1]])
    assert "taken by name: square, and no-object; new: circle, star" in capsys.readouterr().out


def test_the_same_classes_in_the_same_order_replace_nothing(shapes, tmp_path, capsys):
    before = weights("circle", "square", "star", ids=(4, 5, 6))["model"]
    after = trained(folder_of(shapes, tmp_path, "circle", "square", "star"))["model"]
    assert all(torch.equal(after[name], before[name]) for name in HEAD)
    out = capsys.readouterr().out
    assert "class head" not in out and "not taken" not in out


def test_other_classes_get_a_new_head_even_if_they_are_as_many(shapes, tmp_path, capsys):
    before = weights("cat", "dog", "bird")["model"]
    after = trained(folder_of(shapes, tmp_path, "circle", "square", "star"))["model"]
    assert not any(torch.equal(row, old) for name in HEAD for row in after[name] for old in before[name])
    out = capsys.readouterr().out
    assert "not taken, starts fresh: class_embed.weight" in out and "class head" not in out


def test_weights_that_name_no_classes_keep_a_head_of_the_same_size(shapes, tmp_path):
    state = weights("a", "b", "c")
    del state["categories"]
    torch.save(state, "weights.pth")
    after = trained(folder_of(shapes, tmp_path, "circle", "square", "star"))["model"]
    assert all(torch.equal(after[name], state["model"][name]) for name in HEAD)


@pytest.mark.parametrize("by", ["command", "object"])
def test_cocos_names_are_known_where_weights_name_none(shapes, tmp_path, capsys, by):
    state = checkpoint_of(backbone_level=1, image_size=48, num_classes=91)
    del state["categories"]
    torch.save({"model": state["model"]}, "coco.pth")
    folder = folder_of(shapes, tmp_path, "circle", "dog", "toothbrush")
    if by == "command":
        after = trained(folder, "coco.pth")["model"]
    else:
        settings = {"num_workers": 0, "epochs": 1, "max_steps": 1, "lr": 0, "lr_backbone": 0, "image_size": 48}
        model = detr_fast.load("coco.pth", device="cpu").train("run", data=folder, sample_images=0, **settings)
        after = model.model.state_dict()
        assert model.names == {1: "circle", 2: "dog", 3: "toothbrush"}
    for name in HEAD:
        assert torch.equal(after[name][1:], state["model"][name][[18, 90, 91]])
    assert "taken by name: dog, toothbrush, and no-object; new: circle" in capsys.readouterr().out


def test_with_a_new_mask_head(shapes, tmp_path):
    before = weights("star", "dog")["model"]
    model = detr_fast.load("weights.pth", device="cpu").model
    masked = torch.nn.Module()
    masked.detr, masked.mask_head = model, torch.nn.Linear(2, 2)
    masked.detr.class_embed = torch.nn.Linear(32, 2)
    lines = load_weights(masked, before, "w.pth", classes={0: 1})
    for name in HEAD:
        assert torch.equal(masked.state_dict()[f"detr.{name}"], before[name][[1, 2]])
    assert lines == ["the mask head, which w.pth does not have"]


def test_category_ids_as_labels_are_the_originals_affair():
    """Where both have COCO's ids as labels, the head stays, whatever the names are."""
    coco = Categories((1, 3), ("person", "car"))
    described = {"categories": Categories((1, 3), ("Person", "Car")).to_dict()}
    assert known_classes(coco, described) is None
    assert known_classes(Categories((1, 4), ("Car", "x")), described) == {1: 3}
    assert known_classes(coco, {}) is None


def test_a_head_too_short_for_the_classes_that_its_file_names_is_refused():
    """Of the same size as ours, it would else be taken row by row, under other classes."""
    model = torch.nn.Module()
    model.class_embed = torch.nn.Linear(4, 3)
    state = {"class_embed.weight": torch.zeros(3, 4), "class_embed.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"w.pth names a class 5, but its class_embed.weight has 3 rows"):
        load_weights(model, state, "w.pth", classes={0: 5})


def test_long_lists_are_cut():
    categories = Categories(tuple(range(14)), tuple(f"c{i}" for i in range(14)), contiguous=True)
    line = say_known(categories, {label: label for label in range(12)})
    assert "c9 and 2 more, and no-object; new: c12, c13" in line
