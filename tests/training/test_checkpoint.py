"""Checkpoints: whole or absent, safe to read, and refused with names and shapes when they do not fit."""

import argparse
import random

import numpy as np
import pytest
import torch
from torch import nn

from detr_fast.models.weights import load_model, load_weights
from detr_fast.training.checkpoint import check_resumable, read_checkpoint, rng_state, save_checkpoint, set_rng_state


class Heads(nn.Module):
    def __init__(self, classes=3, queries=4, width=2):
        super().__init__()
        self.class_embed = nn.Linear(width, classes + 1)
        self.query_embed = nn.Embedding(queries, width)
        self.input_proj = nn.Linear(2, width)


def test_save_is_read_back_with_weights_only(tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint({"model": Heads().state_dict(), "epoch": 3, "args": {"lr": 0.1}}, path)
    loaded = torch.load(path, weights_only=True)
    assert loaded["epoch"] == 3 and loaded["args"] == {"lr": 0.1}


def test_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint({"model": Heads().state_dict(), "epoch": 1}, path)

    def broken(state, file):
        file.write(b"half a checkpoint")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint({"model": Heads().state_dict(), "epoch": 2}, path)
    assert read_checkpoint(path)["epoch"] == 1


def test_reads_the_originals_checkpoint_with_a_namespace(tmp_path):
    path = tmp_path / "original.pth"
    torch.save({"model": Heads().state_dict(), "args": argparse.Namespace(lr=1e-4, masks=False)}, path)
    assert read_checkpoint(path)["args"] == {"lr": 1e-4, "masks": False}


def test_reads_a_bare_state_dict(tmp_path):
    torch.save(Heads().state_dict(), tmp_path / "bare.pth")
    assert set(read_checkpoint(tmp_path / "bare.pth")["model"]) == set(Heads().state_dict())


class Harmful:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize("content", ["hello", "some text", ".", "Xyz", "code", "no_weights"])
def test_rejects_what_is_no_checkpoint(tmp_path, content, capsys):
    path = tmp_path / "wrong.pth"
    if content not in ("code", "no_weights"):
        path.write_text(content)
    else:
        torch.save({"model": Harmful()} if content == "code" else {"epoch": 1}, path)
    with pytest.raises(ValueError, match="wrong.pth"):
        read_checkpoint(path)
    assert "run" not in capsys.readouterr().out


def test_rejects_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        read_checkpoint(tmp_path / "absent.pth")


def test_weights_replace_only_heads_of_another_size():
    source, target = Heads(classes=91, queries=100), Heads()
    fresh = target.class_embed.weight.detach().clone()
    lines = load_weights(target, source.state_dict(), "w.pth")
    assert [line.split(":")[0] for line in lines] == ["class_embed.weight", "class_embed.bias", "query_embed.weight"]
    assert "[92, 2] there, [4, 2] here" in lines[0]
    assert torch.equal(target.class_embed.weight, fresh)
    assert torch.equal(target.input_proj.weight, source.input_proj.weight)


def test_weights_that_fit_are_all_taken():
    source, target = Heads(), Heads()
    assert load_weights(target, source.state_dict(), "w.pth") == []
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_weights_of_another_model_are_refused_with_names_and_shapes():
    state = Heads(width=3).state_dict()
    del state["query_embed.weight"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        load_weights(Heads(), state, "w.pth")
    message = str(error.value)
    assert "w.pth" in message and "input_proj.weight is [3, 2] there and [2, 2] here" in message
    assert "query_embed.weight is missing there" in message and "extra is unknown here" in message


def test_other_heads_are_refused_on_resuming():
    with pytest.raises(ValueError, match=r"class_embed.weight is \[92, 2\] there and \[4, 2\] here"):
        load_model(Heads(), Heads(classes=91).state_dict(), "c.pth")


def test_rng_states_survive_a_checkpoint(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(3).tolist(), random.gauss(0, 1), np.random.randn()

    draw()
    cpu = torch.device("cpu")
    save_checkpoint({"rng": rng_state(cpu)}, tmp_path / "rng.pth")
    expected = draw()
    set_rng_state(torch.load(tmp_path / "rng.pth", weights_only=True)["rng"], cpu)
    assert draw() == expected


WRITTEN_OTHERWISE = {  # name → (change, what the message says)
    "args a list": (lambda c: c.update(args=[1]), "'args' is a list"),
    "categories a list": (lambda c: c.update(categories=[{"id": 1}]), "'categories' is a list"),
    "categories by name": (lambda c: c.update(categories={1: "cup"}), "'categories' holds no classes"),
    "averages without values": (lambda c: c.update(ema={"x": 1}), "'ema' has no tensors by name under 'values'"),
    "a numbered weight": (lambda c: c["model"].update({5: torch.zeros(1)}), "holds no weights"),
    "a weight without data": (lambda c: c["model"].update(a=torch.zeros(1, device="meta")), "holds no weights"),
    "a sparse weight": (lambda c: c["model"].update(a=torch.eye(2).to_sparse()), "holds no weights"),
}


@pytest.mark.parametrize("name", WRITTEN_OTHERWISE)
def test_fields_of_another_kind_are_named(tmp_path, name):
    change, says = WRITTEN_OTHERWISE[name]
    checkpoint = {"model": Heads().state_dict()}
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="odd.pth") as caught:
        read_checkpoint(tmp_path / "odd.pth")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "key, value",
    [("epoch", "1"), ("epoch", float("nan")), ("steps", "x"), ("optimizer", [1]), ("lr_scheduler", 5), ("rng", 5),
     ("inside", 5), ("best", "x"), ("scaler", 1)],
)  # fmt: skip
def test_a_run_whose_state_is_of_another_kind_is_not_resumed(key, value):
    with pytest.raises(ValueError, match=f"--resume: c.pth is not as detr_fast writes it: '{key}' is a"):
        check_resumable({"model": Heads().state_dict(), key: value}, "c.pth")


def test_fields_that_are_none_are_absent(tmp_path):
    torch.save({"model": Heads().state_dict(), "args": None, "categories": None, "ema": None}, tmp_path / "c.pth")
    assert set(read_checkpoint(tmp_path / "c.pth")) == {"model"}
    checkpoint = {"model": {}, "optimizer": None, "rng": None}
    check_resumable(checkpoint, "c.pth")
    assert set(checkpoint) == {"model"}


@pytest.mark.parametrize("wrap", [lambda name: f"module.{name}", lambda name: f"_orig_mod.module.{name}"])
def test_weights_of_a_wrapped_model_have_its_own_names(tmp_path, wrap):
    weights = Heads().state_dict()
    torch.save({"model": {wrap(name): value for name, value in weights.items()}}, tmp_path / "c.pth")
    assert list(read_checkpoint(tmp_path / "c.pth")["model"]) == list(weights)
