"""`detr_fast.load`: every kind of source, what the object says, saves and trains, and the errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import detr_fast
from detr_fast.config import Config
from detr_fast.inference.loading import settings_from_shapes
from detr_fast.models.hub import published
from detr_fast.tasks import task_of
from tests.inference.tiny_models import TINY, checkpoint_of

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))


def same(found, expected):
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-5 * max(expected.size))
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
    assert found.class_name == expected.class_name


def test_run_folder_is_its_best_checkpoint(run_folder, tmp_path):
    model = detr_fast.load(run_folder, device="cpu")
    found = model.predict(IMAGE, 0)
    same(found, detr_fast.load(run_folder / "checkpoint_best.pth", device="cpu").predict(IMAGE, 0))
    last = detr_fast.load(str(run_folder / "checkpoint.pth"), device="cpu").predict(IMAGE, 0)
    assert abs(last.scores - found.scores).max() > 1e-4
    assert set(found.class_name) <= {"dot", "bar"} and set(found.class_id) <= {5, 9}
    assert model.names == {5: "dot", 9: "bar"} and not model.model.training
    assert repr(model) == "Detector of boxes: resnet18, 2 classes, on cpu"
    (tmp_path / "checkpoint.pth").write_bytes((run_folder / "checkpoint.pth").read_bytes())
    same(detr_fast.load(tmp_path, device="cpu").predict(IMAGE, 0), last)


@pytest.mark.parametrize("has", [True, False])
def test_bf16_on_a_cpu_without_it_is_said_and_done(has, run_folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    model = detr_fast.load(run_folder, device="cpu", precision="bf16")
    assert ("this CPU has no instructions for it" in capsys.readouterr().out) != has
    scores = model.predict(IMAGE, 0).scores
    exact = detr_fast.load(run_folder, device="cpu").predict(IMAGE, 0).scores
    assert 0 < abs(np.sort(scores) - np.sort(exact)).max() < 0.05


def test_boxes_are_the_models(run_folder):
    """Written out: the original's resizing, normalisation and post-processing."""
    model = detr_fast.load(run_folder, device="cpu")
    pixels = torch.from_numpy(np.array(IMAGE.resize((82, 64), Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
    normalised = (pixels - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    with torch.no_grad():
        out = model.model(normalised[None])
    scores, labels = out["pred_logits"][0].softmax(-1)[:, :-1].max(-1)
    order = scores.argsort(descending=True)
    x, y, w, h = (out["pred_boxes"][0, order] * torch.tensor([90, 70, 90, 70])).unbind(-1)
    found = model.predict(IMAGE, 0)
    expected = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
    np.testing.assert_allclose(found.boxes, expected, atol=1e-3)
    np.testing.assert_allclose(found.scores, scores[order], atol=1e-5)
    assert found.class_id.tolist() == [(5, 9)[label] for label in labels[order]]
    threshold = float(found.scores[1])
    assert len(model.predict(IMAGE, threshold)) == 2


def test_checkpoint_of_the_original_has_cocos_names(original):
    found = detr_fast.load(original, device="cpu").predict(IMAGE, 0)
    names = detr_fast.load(original, device="cpu").names
    assert len(names) == 80 and names[1] == "person" and names[90] == "toothbrush" and 12 not in names
    assert found.class_name == [names.get(label, f"class {label}") for label in found.class_id.tolist()]


def test_bare_weights_show_their_settings(original, tmp_path):
    torch.save(torch.load(original, weights_only=False)["model"], tmp_path / "bare.pth")
    bare = detr_fast.load(tmp_path / "bare.pth", device="cpu", image_size=64)
    same(bare.predict(IMAGE, 0), detr_fast.load(original, device="cpu").predict(IMAGE, 0))


@pytest.mark.parametrize(
    "settings",
    [
        {"backbone": "resnet34", "backbone_level": 1, "position_embedding": "learned", "num_queries": 7},
        {"backbone": "resnet50", "backbone_level": 0, "pre_norm": True, "dec_layers": 3, "backbone_norm": "group"},
        {"backbone": "resnet101", "backbone_level": 2, "masks": True, "hidden_dim": 128, "dim_feedforward": 48},
    ],
    ids=lambda settings: settings["backbone"],
)
def test_settings_are_seen_from_shapes(settings):
    config = Config(**{**TINY, "num_classes": 2, **settings})
    with torch.device("meta"):
        state = task_of(config).build_model(config, 2).state_dict()
    found = settings_from_shapes(state)
    assert found == {name: getattr(config, name) for name in found}
    shown = {"backbone", "position_embedding", "pre_norm", "hidden_dim", "dim_feedforward", "num_queries", "dec_layers"}
    assert shown | ({*settings} - {"masks"}) <= {*found}


@pytest.mark.parametrize("name", published())
def test_published_weights_show_their_settings(name):
    shapes = json.loads((Path(__file__).parents[1] / "models" / "official_keys" / f"{name}.json").read_text())
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    expected = Config(backbone=name.split("_")[1])
    found = settings_from_shapes(state)
    assert len(found) == 8 and found == {setting: getattr(expected, setting) for setting in found}


def test_published_name_comes_from_torch_hubs_cache(tmp_path, monkeypatch, original):
    """A small model stands in for the published one; it must be where torch.hub keeps that."""
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    bare = {"model": torch.load(original, weights_only=False)["model"]}
    for name in ("detr_resnet50", "detr_resnet50_dc5"):
        torch.save(bare, checkpoints / published()[name].rsplit("/", 1)[1])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = detr_fast.load("detr_resnet50", device="cpu", image_size=64).predict(IMAGE, 0)
    same(found, detr_fast.load(original, device="cpu").predict(IMAGE, 0))
    same(detr_fast.load(published()["detr_resnet50"], device="cpu", image_size=64).predict(IMAGE, 0), found)
    assert not detr_fast.load("detr_resnet50", device="cpu").config.dilation
    with pytest.raises(ValueError, match="resnet18 cannot be dilated"):  # of a ResNet-18, so it was asked for
        detr_fast.load("detr_resnet50_dc5", device="cpu")


def test_download_is_checked_and_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked = []

    def no_network(url, file, hash_prefix=None, progress=True):
        asked.append((url, hash_prefix))
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ValueError, match="Name or service not known. Download it elsewhere and put it at") as error:
        detr_fast.load("detr_resnet101", device="cpu")
    assert str(tmp_path / "hub" / "checkpoints" / "detr-r101-2c7b67e5.pth") in str(error.value)
    # One sentence, not what urllib, torch.hub and we raised on the way.
    assert error.value.__cause__ is None and error.value.__suppress_context__
    assert asked == [("https://dl.fbaipublicfiles.com/detr/detr-r101-2c7b67e5.pth", "2c7b67e5")]


def test_panoptic_weights_have_masks_and_names_of_stuff(tmp_path):
    state = checkpoint_of(num_classes=250, masks=True, hidden_dim=128)
    del state["categories"]
    torch.save(state, tmp_path / "panoptic.pth")
    model = detr_fast.load(tmp_path / "panoptic.pth", device="cpu")
    assert len(model.names) == 133 and model.names[1] == "person" and model.names[200] == "rug-merged"
    found = model.predict(IMAGE, 0)
    assert found.masks.shape == (5, 70, 90) and found.masks.dtype == bool
    assert found.to_coco()[0]["segmentation"]["size"] == [70, 90]
    assert found[:2].masks.shape == (2, 70, 90) and found.plot().size == (540, 420)


def test_saved_model_is_the_same(run_folder, original, tmp_path):
    for source in (run_folder, original):
        model = detr_fast.load(source, device="cpu")
        model.save(tmp_path / "saved.pth")
        saved = detr_fast.load(tmp_path / "saved.pth", device="cpu")
        same(saved.predict(IMAGE, 0), model.predict(IMAGE, 0))
        assert saved.names == model.names
        assert all(torch.equal(v, model.model.state_dict()[k]) for k, v in saved.model.state_dict().items())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    images, annotations = [], []
    for number in range(3):
        IMAGE.save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 90, "height": 70})
        annotations.append({"id": number + 1, "image_id": number, "category_id": 5, "bbox": [5, 6, 20, 22]})
    categories = [{"id": 5, "name": "dot"}, {"id": 9, "name": "bar"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "ann.json").write_text(json.dumps(content))
    return folder


def test_evaluates(run_folder, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = detr_fast.load(run_folder, device="cpu")
    stats = model.evaluate(val_ann=data / "ann.json", val_images=data, num_workers=0, output_dir=tmp_path / "new")
    assert len(stats["coco_eval_bbox"]) == 12 and capsys.readouterr().out.count("Average") == 12
    assert (tmp_path / "new" / "eval.pth").is_file()
    model.evaluate(val_ann=data / "ann.json", val_images=data, num_workers=0, output_dir="none")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    with pytest.raises(TypeError, match="evaluate takes no setting 'lr'"):
        model.evaluate(lr=1)
    with pytest.raises(ValueError, match="no val data"):
        model.evaluate()


@pytest.fixture
def training(data):
    places = {"train_ann": data / "ann.json", "train_images": data, "val_ann": data / "ann.json", "val_images": data}
    return {**places, "epochs": 1, "max_steps": 1, "num_workers": 0, "sample_images": 0, "batch_size": 2}


def test_trains_on_from_its_weights(run_folder, training, tmp_path):
    model = detr_fast.load(run_folder, device="cpu")
    trained = model.train(tmp_path / "run", **training, lr=0.0, lr_backbone=0.0)
    same(trained.predict(IMAGE, 0), model.predict(IMAGE, 0))  # a rate of 0: the weights it starts from
    assert (tmp_path / "run" / "checkpoint.pth").is_file()
    with pytest.raises(TypeError, match="'weights' cannot be set"):
        model.train(tmp_path / "run", weights="other.pth")
    with pytest.raises(TypeError, match="'learning_rate'"):
        model.train(tmp_path / "run", **training, learning_rate=1)


@pytest.mark.slow
def test_trains_for_other_classes(original, training, tmp_path):
    """Of COCO's 91 classes two are left; the norms are frozen, so the first stage is not trained."""
    model = detr_fast.load(original, device="cpu")
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    trained = model.train(tmp_path, **training, lr=1e-2)
    assert trained.names == {5: "dot", 9: "bar"} and len(trained.model.class_embed.bias) == 3
    state = trained.model.state_dict()
    assert torch.equal(state["backbone.0.body.layer1.0.conv1.weight"], before["backbone.0.body.layer1.0.conv1.weight"])
    assert not torch.equal(state["query_embed.weight"], before["query_embed.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere.pth", "no file or folder 'nowhere.pth'; expected a run's folder, a checkpoint"),
        ("detr_resnet5", "did you mean 'detr_resnet50'"),
        ("empty", "'empty' has no checkpoint.pth or checkpoint_best.pth; expected a run's folder"),
        ("model.onnx", "'model.onnx' cannot be read: "),
        ("model.pt2", "'model.pt2' cannot be read: File is not a zip file"),
        ("model.safetensors", "'model.safetensors' cannot be read as a safetensors file: "),
        ("hf", "hf: model_type is None, expected 'detr'"),
        ("image.png", "'image.png' cannot be read; expected a file written by torch.save"),
        ("other.pth", "other.pth: the weights are of no model that is known here"),
    ],
)
def test_what_is_no_model_is_refused(name, message, tmp_path, monkeypatch):
    for suffix, package in ((".onnx", "onnxruntime"), (".safetensors", "safetensors")):
        if name.endswith(suffix):
            pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    for file in ("model.safetensors", "model.onnx", "model.pt2"):
        (tmp_path / file).write_bytes(b"x")
    IMAGE.save("image.png")
    torch.save({"weight": torch.zeros(2)}, "other.pth")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        detr_fast.load(name, device="cpu")


def test_settings_that_contradict_or_do_not_exist_are_refused(run_folder):
    with pytest.raises(TypeError, match="load takes no setting 'learning_rate'; expected one of backbone, "):
        detr_fast.load(run_folder, learning_rate=1)
    with pytest.raises(ValueError, match="--hidden_dim 64, it was trained with 32"):
        detr_fast.load(run_folder, device="cpu", hidden_dim=64)
    with pytest.raises(ValueError, match="'tpu'"):
        detr_fast.load(run_folder, device="tpu")


@pytest.mark.parametrize("backbone", ["resnet34", "resnet152", "wide_resnet50_2", "resnext50_32x4d"])
def test_weights_show_which_resnet_they_are_of(backbone):
    args = Config(
        backbone=backbone, backbone_weights="none", enc_layers=1, dec_layers=1, hidden_dim=32, nheads=2, device="meta"
    )
    with torch.device("meta"):
        state = task_of(args).build(args)[0].state_dict()
    shown = settings_from_shapes(state)
    assert shown["backbone"] == backbone and shown["hidden_dim"] == 32 and "backbone_level" not in shown


def test_weights_that_are_not_finite_are_refused(run_folder, tmp_path):
    """Of a run that diverged: the model would detect nothing, without a word."""
    checkpoint = torch.load(run_folder / "checkpoint.pth", weights_only=True)
    checkpoint["model"]["class_embed.bias"].fill_(float("nan"))
    checkpoint.pop("ema", None)
    torch.save(checkpoint, tmp_path / "nan.pth")
    with pytest.raises(ValueError, match="nan.pth: class_embed.bias has values that are NaN or infinite"):
        detr_fast.load(tmp_path / "nan.pth", device="cpu")
