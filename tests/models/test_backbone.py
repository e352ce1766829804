import pytest
import torch
import torch.nn.functional as F
import torchvision
from plain_detr import plain_features, plain_position, randomize_norms
from torch import nn

from detr_fast.layers import BatchNorm2d, FrozenBatchNorm2d, PositionEmbeddingLearned, PositionEmbeddingSine
from detr_fast.models import Backbone, Joiner
from detr_fast.nested_tensor import NestedTensor, nested_tensor_from_tensor_list


def _batch(*sizes):
    return nested_tensor_from_tensor_list([torch.randn(3, *size) for size in sizes])


@pytest.mark.parametrize("level", [0, 1, 2, 3])
@torch.no_grad()
def test_backbone_matches_plain_resnet_at_every_level(level):
    backbone = Backbone("resnet18", True, False, False, weights=None, norm="frozen", level=level)
    randomize_norms(nn.Sequential(backbone))
    samples = _batch((65, 90), (70, 33))
    out = backbone(samples)
    assert list(out) == ["0"]
    state = {f"backbone.0.{name}": value for name, value in backbone.state_dict().items()}
    expected = plain_features(state, "resnet18", samples.tensors, level=level)
    torch.testing.assert_close(out["0"].tensors, expected)
    assert backbone.num_channels == expected.shape[1] and backbone.num_channels_per_level == [expected.shape[1]]
    assert torch.equal(out["0"].mask, F.interpolate(samples.mask[None].float(), size=expected.shape[-2:])[0].bool())
    assert not any(f"layer{level + 2}" in name for name in backbone.state_dict())


@pytest.mark.parametrize("name, last", [("resnet18", 512), ("resnet50", 2048)])
@torch.no_grad()
def test_backbone_returns_all_levels(name, last):
    backbone = Backbone(name, True, True, False, weights=None)
    out = backbone(_batch((64, 96)))
    assert list(out) == ["0", "1", "2", "3"]
    assert [level.tensors.shape[1] for level in out.values()] == [last // 8, last // 4, last // 2, last]
    assert [level.tensors.shape[-2:] for level in out.values()] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert backbone.num_channels == last
    assert backbone.num_channels_per_level == [last // 8, last // 4, last // 2, last]


@torch.no_grad()
def test_dilation_matches_plain_resnet():
    backbone = Backbone("resnet50", True, False, True, weights=None, norm="frozen")
    randomize_norms(nn.Sequential(backbone))
    samples = _batch((64, 80))
    state = {f"backbone.0.{name}": value for name, value in backbone.state_dict().items()}
    out = backbone(samples)["0"]
    assert out.tensors.shape == (1, 2048, 4, 5)
    torch.testing.assert_close(out.tensors, plain_features(state, "resnet50", samples.tensors, dilation=True))


@pytest.mark.parametrize("name", ["resnet18", "resnet34"])
def test_rejects_dilated_basic_blocks(name):
    with pytest.raises(NotImplementedError, match=f"{name} cannot be dilated"):
        Backbone(name, True, False, True, weights=None)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(name="resnet19"), "unknown backbone 'resnet19'"),
        (dict(norm="layer"), "unknown norm 'layer'"),
        (dict(level=4), "level is 4"),
        (dict(level=-1), "level is -1"),
        (dict(name="resnet50", level=2, dilation=True), "which level=2 leaves out"),
        (dict(norm="group", weights="imagenet"), "the ImageNet weights are for batch norm"),
    ],
)
def test_rejects_wrong_arguments(kwargs, message):
    defaults = dict(name="resnet18", train_backbone=True, return_interm_layers=False, dilation=False, weights=None)
    with pytest.raises(ValueError, match=message):
        Backbone(**{**defaults, **kwargs})


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    torch.manual_seed(5)
    resnet = torchvision.models.resnet18(weights=None)
    randomize = torch.Generator().manual_seed(1)
    for name, value in resnet.state_dict().items():
        if "running" in name:
            value.copy_(torch.rand(value.shape, generator=randomize) + 0.5)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(resnet.state_dict(), path)
    return path


def _trained(backbone):
    return {name.split(".")[1] for name, parameter in backbone.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("norm", [None, "frozen", "batch"])
def test_weights_from_a_file_are_loaded_and_frozen_as_the_original(weights_file, norm):
    backbone = Backbone("resnet18", True, False, False, weights=weights_file, norm=norm)
    saved = torch.load(weights_file)
    for name, value in backbone.body.state_dict().items():
        assert torch.equal(value, saved[name])
    assert isinstance(backbone.body.bn1, BatchNorm2d if norm == "batch" else FrozenBatchNorm2d)
    assert _trained(backbone) == {"layer2", "layer3", "layer4"}
    assert _trained(Backbone("resnet18", False, False, False, weights=weights_file, norm=norm)) == set()


@pytest.mark.parametrize("wrapper", ["model", "state_dict"])
def test_weights_file_may_be_wrapped(weights_file, tmp_path, wrapper):
    torch.save({wrapper: torch.load(weights_file), "epoch": 3}, tmp_path / "wrapped.pth")
    backbone = Backbone("resnet18", True, False, False, weights=str(tmp_path / "wrapped.pth"), level=1)
    assert torch.equal(backbone.body.conv1.weight, torch.load(weights_file)["conv1.weight"])


def test_weights_file_errors_say_what_is_wrong(weights_file, tmp_path):
    def load(path):
        Backbone("resnet18", True, False, False, weights=path)

    with pytest.raises(FileNotFoundError, match="nowhere.pth"):
        load(tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match="text.pth.*not a file of weights"):
        load(tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        load(tmp_path / "list.pth")
    state = torch.load(weights_file)
    torch.save({name: value for name, value in state.items() if name != "conv1.weight"}, tmp_path / "missing.pth")
    with pytest.raises(ValueError, match="conv1.weight missing"):
        load(tmp_path / "missing.pth")
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "extra.pth")
    with pytest.raises(ValueError, match="extra unexpected"):
        load(tmp_path / "extra.pth")
    torch.save({**state, "conv1.weight": torch.zeros(64, 1, 7, 7)}, tmp_path / "shape.pth")
    with pytest.raises(ValueError, match="size mismatch for conv1.weight"):
        load(tmp_path / "shape.pth")


@pytest.mark.parametrize(
    "norm, norm_class", [(None, BatchNorm2d), ("group", nn.GroupNorm), ("frozen", FrozenBatchNorm2d)]
)
@pytest.mark.parametrize("train_backbone", [True, False])
def test_without_weights_everything_trains(norm, norm_class, train_backbone):
    backbone = Backbone("resnet18", train_backbone, False, False, weights=None, norm=norm)
    assert isinstance(backbone.body.bn1, norm_class)
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    out = backbone(_batch((64, 64), (40, 64)))["0"].tensors
    out.backward(torch.randn_like(out))
    assert all(parameter.grad.abs().max() > 0 for parameter in backbone.parameters())


def test_failed_download_says_what_to_do(monkeypatch, tmp_path):
    def fail(url, *args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(RuntimeError, match="no network") as error:
        Backbone("resnet18", True, False, False)
    for part in ("download.pytorch.org/models/resnet18", str(tmp_path / "checkpoints" / "resnet18"), "weights=None"):
        assert part in str(error.value)


def test_imagenet_weights_come_from_the_cache(monkeypatch, weights_file, tmp_path):
    def fail(url, *args, **kwargs):
        raise AssertionError("downloads although the file is there")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "resnet18-f37072fd.pth").write_bytes(weights_file.read_bytes())
    backbone = Backbone("resnet18", True, False, False)
    assert torch.equal(backbone.body.conv1.weight, torch.load(weights_file)["conv1.weight"])


@torch.no_grad()
def test_joiner_matches_plain_positions_and_masks():
    backbone = Backbone("resnet18", True, True, False, weights=None)
    joiner = Joiner(backbone, PositionEmbeddingSine(8, normalize=True)).eval()
    samples = _batch((65, 90), (70, 33))
    features, positions = joiner(samples)
    alone = backbone(samples)
    assert joiner.num_channels == 512 and len(features) == len(positions) == 4
    for feature, position, expected in zip(features, positions, alone.values(), strict=True):
        torch.testing.assert_close(feature.tensors, expected.tensors)
        assert torch.equal(feature.mask, expected.mask)
        torch.testing.assert_close(position, plain_position(expected.mask, 8), rtol=1e-4, atol=1e-5)
        # Channels last: its tokens are a view.
        assert position.flatten(2).transpose(1, 2).is_contiguous()


class _Shifted(PositionEmbeddingSine):
    def forward(self, tensor_list):
        return super().forward(tensor_list) + 1


@pytest.mark.parametrize("embedding", [PositionEmbeddingLearned(8), _Shifted(8), PositionEmbeddingSine(8)])
@torch.no_grad()
def test_joiner_asks_any_position_embedding(embedding):
    backbone = Backbone("resnet18", True, False, False, weights=None, level=2)
    samples = _batch((64, 96), (50, 70))
    (feature,), (position,) = Joiner(backbone, embedding).eval()(samples)
    torch.testing.assert_close(position, embedding(feature))
    assert position.shape == (2, 16, 4, 6)


@torch.no_grad()
def test_position_has_the_features_dtype():
    backbone = Backbone("resnet18", True, False, False, weights=None, norm="frozen").bfloat16()
    joiner = Joiner(backbone, PositionEmbeddingSine(8, normalize=True))
    samples = _batch((64, 96), (50, 70))
    (feature,), (position,) = joiner(NestedTensor(samples.tensors.bfloat16(), samples.mask))
    assert position.dtype == feature.tensors.dtype == torch.bfloat16
    # Computed in float32 and rounded once.
    assert torch.equal(position, PositionEmbeddingSine(8, normalize=True)(feature).bfloat16())


def test_backbone_hook_sees_nested_features_with_masks():
    joiner = Joiner(Backbone("resnet18", True, False, False, weights=None), PositionEmbeddingSine(8))
    seen = []
    joiner[0].register_forward_hook(lambda module, args, output: seen.append(output))
    features, _ = joiner(_batch((64, 64)))
    assert seen[0]["0"] is features[0] and features[0].mask.shape == (1, 2, 2)


def _assigned_mask(mask):
    samples = NestedTensor(torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.bool))
    samples.mask = mask
    return samples


@pytest.mark.parametrize(
    "samples, error, message",
    [
        (torch.zeros(2, 3, 32, 32), TypeError, "expected a NestedTensor, got Tensor"),
        (NestedTensor(torch.zeros(2, 1, 32, 32), torch.zeros(2, 32, 32, dtype=torch.bool)), ValueError, "2, 1, 32, 32"),
        (NestedTensor(torch.zeros(2, 3, 8, 8).byte(), torch.zeros(2, 8, 8, dtype=torch.bool)), TypeError, "uint8"),
        (NestedTensor(torch.zeros(2, 3, 32, 32), None), TypeError, "the mask is None"),
        (_assigned_mask(torch.zeros(2, 32, 32)), TypeError, "the mask is torch.float32"),
        (_assigned_mask(torch.zeros(2, 1, 1, dtype=torch.bool)), ValueError, r"the mask is \[2, 1, 1\]"),
    ],
)
def test_rejects_bad_samples(samples, error, message):
    backbone = Backbone("resnet18", True, False, False, weights=None, level=0)
    with pytest.raises(error, match=message):
        backbone(samples)
