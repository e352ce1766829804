"""A checkpoint's model, ready to detect with."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.config import IDLE_IN_INFERENCE, LOSS_SETTINGS, MODEL_SETTINGS, Config, without_auto
from detr_fast.data.categories import Categories
from detr_fast.distributed import say
from detr_fast.errors import UsageError
from detr_fast.inference.names import coco_names
from detr_fast.inference.sources import read_source
from detr_fast.models.backbone import STAGES
from detr_fast.models.weights import DETECTOR, has_masks, load_model
from detr_fast.tasks import Task, task_of_weights
from detr_fast.training.regions import compile_regions
from detr_fast.training.setup import build

# Of the settings that a checkpoint brings along, those that may be given all the same: the weights fit anyway. Whether
# there are masks is seen from the weights.
_FREE = ("image_size", "max_size", "masks")

# Kind of block, blocks per stage, and the first 3x3 convolution's [out, in]: what tells one ResNet from another.
_RESNETS = {
    "resnet18": (2, (2, 2, 2, 2), (64, 64)),
    "resnet34": (2, (3, 4, 6, 3), (64, 64)),
    "resnet50": (3, (3, 4, 6, 3), (64, 64)),
    "resnet101": (3, (3, 4, 23, 3), (64, 64)),
    "resnet152": (3, (3, 8, 36, 3), (64, 64)),
    "resnext50_32x4d": (3, (3, 4, 6, 3), (128, 4)),
    "resnext101_32x8d": (3, (3, 4, 23, 3), (256, 8)),
    "wide_resnet50_2": (3, (3, 4, 6, 3), (128, 128)),
    "wide_resnet101_2": (3, (3, 4, 23, 3), (256, 128)),
}


@dataclass(frozen=True)
class Loaded:
    """What `load_for_inference` returns.

    Attributes:
        task: what the model detects.
        config: the settings, the checkpoint's among them.
        model: in evaluation mode, on `config.device`.
        criterion, postprocessors: see `Task.build`.
        categories: the classes; None where the checkpoint does not say.
    """

    task: Task
    config: Config
    model: nn.Module
    criterion: nn.Module
    postprocessors: dict[str, nn.Module]
    categories: Categories | None

    @property
    def names(self) -> dict[int, str]:
        """Category id → name: the checkpoint's, or COCO's where it has none and as many classes as COCO."""
        if self.categories is None:
            return coco_names(self.config.num_classes)
        return dict(zip(self.categories.ids, self.categories.names, strict=True))


def load_for_inference(config: Config, given: Collection[str], path: str) -> Loaded:
    """A checkpoint's model in evaluation mode on `config.device`, described by the checkpoint itself.

    Args:
        config: its settings of the model, of the images' size and of the losses give way to the checkpoint's, unless
            they are in `given`. What has no effect is said.
        given: names of the settings that the user chose.
        path: whatever `read_source` takes. Averaged weights (EMA) are taken where there are some. The settings of bare
            weights are seen from their shapes, except `nheads` and `dilation`.

    Raises:
        UsageError: a given setting describes another model, or images too small for this one.
        ValueError, FileNotFoundError: it cannot be read, does not fit, or has weights that are not finite.
    """
    checkpoint = read_source(path)
    state, theirs = checkpoint["model"], checkpoint.get("args", {})
    try:
        asked = config.dataset_file if "dataset_file" in given else None
        task = task_of_weights(state, asked, theirs.get("dataset_file"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _check_given(config, given, path, theirs, task)
    if "ema" in checkpoint:
        say(f"{path}: using its averaged weights (EMA)")
        state = checkpoint["ema"]["values"]
    if config.masks and "masks" in given and not has_masks(state):
        raise ValueError(f"--masks: {path} has no mask head")

    brought = (*MODEL_SETTINGS, *LOSS_SETTINGS, "thing_classes")
    known = theirs if "backbone" in theirs else {**settings_from_shapes(state), **theirs}
    settings: dict[str, Any] = {name: known[name] for name in brought if name in known and name not in given}
    # The checkpoint has all weights; nothing is fetched, trained or dropped.
    settings |= {"backbone_weights": "none", "lr_backbone": 0.0, "dropout": 0.0, "frozen_weights": None}
    settings |= task.settings_of(state)
    config = without_auto(Config.from_mapping({**config.to_dict(), **settings}))
    if config.backbone_norm is None:
        config = replace(config, backbone_norm="frozen")
    if "image_size" in given:
        task.check_image_size(config)
    model, criterion, postprocessors = build(task, config, own_weights=True)
    load_model(model, state, path)
    broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
    if broken:  # of a run that diverged: it would detect nothing, without a word
        raise ValueError(
            f"{path}: {broken[0]} has values that are NaN or infinite ({len(broken)} of {len(state)} weights)"
        )
    model.to(config.device).eval()
    if config.precision == "bf16" and config.device == "cpu" and not cpu_has_bf16():
        say("--precision bf16: this CPU has no instructions for it (AVX512_BF16, AMX); fp32 is faster here")
    if config.compile:
        compile_regions(model, say)
    categories = Categories.from_dict(checkpoint["categories"]) if "categories" in checkpoint else None
    return Loaded(task, config, model, criterion, postprocessors, categories)


def cpu_has_bf16() -> bool:
    """Whether this machine's CPU has instructions for products in bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def settings_from_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a DETR's weights, with or without masks, show of its settings by their names and shapes.

    The number of attention heads and dilation leave no trace, and "backbone" is absent where it is no ResNet of
    torchvision's. Empty for weights of another model.
    """
    state = {name.removeprefix(DETECTOR): value for name, value in state.items()}
    if not {"bbox_embed.layers.0.weight", "input_proj.weight", "query_embed.weight"} <= set(state):
        return {}

    def count(prefix: str) -> int:
        return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})

    body = "backbone.0.body."
    blocks = tuple(filter(None, (count(f"{body}{stage}.") for stage in STAGES)))
    layers = sum(f"{body}layer1.0.conv{i}.weight" in state for i in (1, 2, 3))
    second = state.get(f"{body}layer1.0.conv2.weight", torch.empty(0, 0)).shape[:2]
    shape = (layers, blocks, tuple(second))
    backbones = [name for name, (kind, n, size) in _RESNETS.items() if (kind, n[: len(blocks)], size) == shape]
    settings = {
        "position_embedding": "learned" if "backbone.1.row_embed.weight" in state else "sine",
        "enc_layers": count("transformer.encoder.layers."),
        "dec_layers": count("transformer.decoder.layers."),
        "pre_norm": "transformer.encoder.norm.weight" in state,
        "hidden_dim": state["input_proj.weight"].shape[0],
        "dim_feedforward": len(state["transformer.decoder.layers.0.linear1.bias"]),
        "num_queries": len(state["query_embed.weight"]),
    }
    if "backbone.0.body.bn1.running_mean" not in state:
        settings["backbone_norm"] = "group"
    if blocks and backbones:
        settings["backbone"] = backbones[0]
    return settings if len(blocks) in (0, len(STAGES)) else {**settings, "backbone_level": len(blocks) - 1}


def _check_given(config: Config, given: Collection[str], path: str, theirs: Mapping, task: Task) -> None:
    """Says which of the given settings do nothing, and refuses those that describe another model than this one."""
    for name in sorted(set(given) & set(IDLE_IN_INFERENCE)):
        say(f"--{name} has no effect here: {IDLE_IN_INFERENCE[name]}")
    other = [
        f"--{name} {getattr(config, name)}, it was trained with {theirs[name]}"
        for name in MODEL_SETTINGS
        if name in given and name in theirs and name not in _FREE and theirs[name] != getattr(config, name)
    ]
    if "dataset_file" in given and config.dataset_file != task.dataset_file:
        other.append(f"--dataset_file {config.dataset_file}, it detects {task.name}")
    if other:
        raise UsageError(
            f"{path} is another model: {'; '.join(other)}. The checkpoint describes itself: leave that out"
        )
