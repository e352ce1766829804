"""Training from weights of any kind that `load` takes: they bring the settings of their model along."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from detr_fast.config import MODEL_SETTINGS, Config, default_of
from detr_fast.distributed import first_process_first, say
from detr_fast.errors import UsageError
from detr_fast.inference.loading import settings_from_shapes
from detr_fast.inference.names import with_names
from detr_fast.inference.sources import read_source
from detr_fast.models.weights import has_masks
from detr_fast.training.checkpoint import read_checkpoint

# Settings of the model that may differ from the weights': those of the images, and what is added, replaced or trained.
_FREE = ("image_size", "max_size", "num_queries", "masks", "backbone_norm", "second_dropout")


def weights_reader(given: Collection[str]) -> Callable[[Config], tuple[Config, Mapping[str, Any] | None]]:
    """What `detr_fast.training.trainer.train` takes as `read_weights`.

    Args:
        given: names of the settings that the user chose; the weights' own take the place of all others.
    """

    def read(config: Config) -> tuple[Config, Mapping[str, Any] | None]:
        resumed = Path(config.output_dir, "checkpoint.pth") if config.resume == "auto" else config.resume
        if resumed and Path(resumed).is_file():
            # The run goes on with its own checkpoint, which describes the same model.
            return _described(config, given, read_checkpoint(resumed), f"--resume {resumed}"), None
        with first_process_first():
            checkpoint = with_names(read_source(config.weights))
        return _described(config, given, checkpoint, f"--weights {config.weights}"), checkpoint

    return read


def _described(config: Config, given: Collection[str], checkpoint: Mapping[str, Any], source: str) -> Config:
    """The configuration with the model's settings as the checkpoint has them.

    Raises:
        UsageError: a setting in `given` describes another model.
    """
    state, theirs = checkpoint["model"], checkpoint.get("args", {})
    known = dict(theirs) if "backbone" in theirs else {**settings_from_shapes(state), **theirs}
    known["masks"] = has_masks(state)
    known = {name: known[name] for name in MODEL_SETTINGS if name in known}
    other = [
        f"--{name} {getattr(config, name)}, it has {value}"
        for name, value in known.items()
        if name in given and name not in _FREE and value != getattr(config, name)
    ]
    if other:
        raise UsageError(
            f"{source} is another model: {'; '.join(other)}. The weights bring their settings: leave that out"
        )
    brought = {name: value for name, value in known.items() if name not in given}
    if "image_size" in given:
        brought.pop("max_size", None)  # it belongs to the size that gives way
    config = replace(config, **brought)
    if "backbone_weights" not in given:
        # As `Detector.train`: frozen norms came with pretrained weights, whose first layers stay as they are.
        trained = config.backbone_norm in ("batch", "group")
        config = replace(config, backbone_weights="none" if trained else "imagenet")
    shown = [f"--{name} {value}" for name, value in brought.items() if value != default_of(name)]
    if shown:
        say(f"{source}: its settings: {', '.join(shown)}")
    return config
