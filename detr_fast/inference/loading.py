"""A checkpoint's model, ready to detect with."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from detr_fast.config import IDLE_IN_INFERENCE, LOSS_SETTINGS, MODEL_SETTINGS, Config
from detr_fast.data.categories import Categories
from detr_fast.distributed import say
from detr_fast.errors import UsageError
from detr_fast.models.weights import has_masks, load_model
from detr_fast.tasks import Task, task_of_weights
from detr_fast.training.checkpoint import read_checkpoint
from detr_fast.training.regions import compile_regions
from detr_fast.training.setup import build

# Of the settings that a checkpoint brings along, those that may be given all the same: the weights fit anyway. Whether
# there are masks is seen from the weights.
_FREE = ("image_size", "max_size", "masks")


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


def load_for_inference(config: Config, given: Collection[str], path: str) -> Loaded:
    """A checkpoint's model in evaluation mode on `config.device`, described by the checkpoint itself.

    Args:
        config: its settings of the model, of the images' size and of the losses give way to the checkpoint's, unless
            they are in `given`. What has no effect is said.
        given: names of the settings that the user chose.
        path: a checkpoint of ours, of the original, or bare weights of the original. Averaged weights (EMA) are taken
            where there are some.

    Raises:
        UsageError: a given setting describes another model, or images too small for this one.
        ValueError, FileNotFoundError: it cannot be read, or does not fit.
    """
    checkpoint = read_checkpoint(path)
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
    settings: dict[str, Any] = {name: theirs[name] for name in brought if name in theirs and name not in given}
    # The checkpoint has all weights; nothing is fetched, trained or dropped.
    settings |= {"backbone_weights": "none", "lr_backbone": 0.0, "dropout": 0.0, "frozen_weights": None}
    settings |= task.settings_of(state)
    config = Config.from_mapping({**config.to_dict(), **settings})
    if config.backbone_norm is None:
        config = replace(config, backbone_norm="frozen")
    if "image_size" in given:
        task.check_image_size(config)
    model, criterion, postprocessors = build(task, config, own_weights=True)
    load_model(model, state, path)
    model.to(config.device).eval()
    if config.compile:
        compile_regions(model, say)
    categories = Categories.from_dict(checkpoint["categories"]) if "categories" in checkpoint else None
    return Loaded(task, config, model, criterion, postprocessors, categories)


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
