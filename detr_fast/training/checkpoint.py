"""Checkpoints: written whole or not at all, read without running code, and continued from exactly.

Source of the five keys "model", "optimizer", "lr_scheduler", "epoch" and "args": facebookresearch/detr, main.py.
"""

import argparse
import os
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from detr_fast.models.weights import load_url

# What `load_weights` may leave at its fresh values: the parts whose size depends on the task.
_REPLACEABLE = ("class_embed.", "query_embed.")
# In a model with masks the detector's names begin with this.
DETECTOR = "detr."


def save_checkpoint(state: Mapping, path: str | os.PathLike) -> None:
    """Writes `state` to `path` so that a reader finds either the old file or the whole new one, also after a crash.

    Args:
        state: tensors, numbers, strings, lists and dicts: what ``torch.load(weights_only=True)`` reads.
        path: the file; its folder exists.
    """
    path = Path(path)
    # One fixed name: what a killed process leaves behind is overwritten by the next.
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Reads a checkpoint of ours or of the original, or a bare state dict, with ``weights_only=True``.

    Args:
        path: a file or an https address.

    Returns:
        The checkpoint's dict, on the CPU, with at least "model" (name → tensor); "args", if there, is a plain dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else, or the download failed.
    """
    if str(path).startswith(("https://", "http://")):
        try:
            checkpoint = load_url(str(path), "give the path of a file")
        except RuntimeError as error:
            raise ValueError(str(error)) from error
    else:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no checkpoint file at {str(path)!r}")
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # what the unpickler raises on other files depends on their first bytes
            raise ValueError(
                f"{str(path)!r} cannot be read; expected a file written by torch.save that holds only tensors, "
                "numbers, strings, lists and dicts"
            ) from error
    if isinstance(checkpoint, dict) and "model" not in checkpoint and _is_state_dict(checkpoint):
        checkpoint = {"model": checkpoint}
    if not isinstance(checkpoint, dict) or not _is_state_dict(checkpoint.get("model")):
        raise ValueError(f"{str(path)!r} holds no weights; expected a dict with tensors by name under 'model'")
    if isinstance(checkpoint.get("args"), argparse.Namespace):
        checkpoint["args"] = vars(checkpoint["args"])
    return checkpoint


def load_model(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads all of `state` into all of `model`.

    Args:
        model: gets the values.
        state: name → tensor.
        source: what the error message calls the state.

    Raises:
        ValueError: names or shapes differ; the message says which.
    """
    problems = _differences(model, state)
    if problems:
        raise ValueError(f"{source} does not fit this model: {_some(problems)}")
    model.load_state_dict(state)


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> list[str]:
    """Loads `state`, leaving the class head and the queries fresh where their sizes differ.

    A model with masks also takes the weights of one without; its mask head is then left fresh.

    Args:
        model: gets the values.
        state: name → tensor.
        source: what the error message calls the state.

    Returns:
        One line for each tensor that was left as it is, with both shapes, and one for the mask head.

    Raises:
        ValueError: anything else does not fit; the message says what.
    """
    own = model.state_dict()
    lines, fresh = [], {}
    if has_masks(own) and not has_masks(state):
        state = {f"{DETECTOR}{name}": value for name, value in state.items()}
        fresh = {name: value for name, value in own.items() if not name.startswith(DETECTOR)}
        lines.append(f"the mask head, which {source} does not have")
    replaced = [
        name
        for name in own
        if name.removeprefix(DETECTOR).startswith(_REPLACEABLE)
        and name in state
        and state[name].shape != own[name].shape
    ]
    load_model(model, {**state, **fresh, **{name: own[name] for name in replaced}}, source)
    return [f"{name}: {list(state[name].shape)} there, {list(own[name].shape)} here" for name in replaced] + lines


def has_masks(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is that of a model with masks."""
    return any(name.startswith(DETECTOR) for name in state)


def rng_state(device: torch.device) -> dict:
    """The states of Python's, NumPy's and torch's generators, and of `device`'s if it is a GPU, as plain values."""
    version, python, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(python), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: Mapping, device: torch.device) -> None:
    """Sets what `rng_state` returned."""
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def plain_args(args: argparse.Namespace) -> dict:
    """The arguments as a dict of numbers, strings and lists, for a checkpoint that loads with ``weights_only=True``."""
    return {
        name: value if isinstance(value, (int, float, str, list, dict, type(None))) else str(value)
        for name, value in vars(args).items()
    }


def _is_state_dict(value) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _differences(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    own = model.state_dict()
    shapes = [
        f"{name} is {list(state[name].shape)} there and {list(own[name].shape)} here"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    missing = [f"{name} is missing there" for name in own if name not in state]
    # Left by code that trains batch norm; the models drop it on loading.
    unexpected = [
        f"{name} is unknown here" for name in state if name not in own and not name.endswith("num_batches_tracked")
    ]
    return shapes + missing + unexpected


def _some(problems: list[str], most: int = 6) -> str:
    rest = len(problems) - most
    return "; ".join(problems[:most]) + (f"; and {rest} more" if rest > 0 else "")
