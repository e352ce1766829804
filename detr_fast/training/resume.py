"""What a run that goes on may have in another way than the checkpoint that it continues."""

from collections.abc import Mapping

from detr_fast.config import MODEL_SETTINGS, Config
from detr_fast.data.categories import Categories
from detr_fast.distributed import say
from detr_fast.errors import UsageError


def check_same_run(config: Config, checkpoint: Mapping, categories: Categories) -> None:
    """Refuses to continue a checkpoint with another model or other classes; says what else differs."""
    theirs, ours = checkpoint.get("args", {}), config.to_dict()
    differing = {name: (theirs[name], ours[name]) for name in theirs if name in ours and theirs[name] != ours[name]}
    model = [name for name in (*MODEL_SETTINGS, "dropout", "lr_schedule") if name in differing]
    if model:
        text = ", ".join(f"--{name} was {differing[name][0]} and is {differing[name][1]}" for name in model)
        raise UsageError(f"--resume {config.resume}: {text}; to start a new run from its weights, use --weights")
    if "categories" in checkpoint and checkpoint["categories"] != categories.to_dict():
        raise UsageError(
            f"--resume {config.resume}: it was trained for the categories {checkpoint['categories']['names']}, the "
            f"data has {list(categories.names)}; to start a new run from its weights, use --weights"
        )
    own = {
        "preset",
        "resume",
        "weights",
        "output_dir",
        "start_epoch",
        "world_size",
        "device",
        "checkpoint_every",
        "loader_timeout",
        "probe_memory",
    }
    changed = [name for name in differing if name not in own and name not in MODEL_SETTINGS]
    for name in changed:
        kept = name in ("lr", "lr_backbone", "weight_decay")
        note = "the checkpoint's is kept" if kept else "the new one counts"
        say(f"--resume: --{name} was {differing[name][0]} and is {differing[name][1]}: {note}")
