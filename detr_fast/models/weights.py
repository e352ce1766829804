"""Weights: from the web, once per machine, or from a file; and into a model, saying what does not fit."""

import argparse
import http.client
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from detr_fast.distributed import first_process_first

# What `load_weights` may leave at its fresh values: the parts whose size depends on the task.
_REPLACEABLE = ("class_embed.", "query_embed.")
_CLASS_HEAD = ("class_embed.weight", "class_embed.bias")  # a row for each class, that of no-object last
# In a model with masks the detector's names begin with this.
DETECTOR = "detr."


def load_url(url: str, otherwise: str):
    """The checkpoint behind `url`, from torch.hub's cache if it is there; the hash in the file name is checked.

    Args:
        url: address of a file written by `torch.save`.
        otherwise: what a caller can do without this file; becomes part of the error message.

    Raises:
        RuntimeError: the download failed or the file is damaged.
    """
    try:
        with first_process_first(), torch.serialization.safe_globals([argparse.Namespace]):
            return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError, http.client.HTTPException, pickle.UnpicklingError) as error:
        place = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
        reason = getattr(error, "reason", "") or str(error) or type(error).__name__
        raise RuntimeError(
            f"could not get {url}: {reason}. Download it elsewhere and put it at {place}, or {otherwise}."
        ) from None


def load_file(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict in a file written by `torch.save`, read with weights_only=True.

    Args:
        path: file holding a state dict, or a dict that has one under "model" or "state_dict".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights file at {str(path)!r}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        # torch's own message goes on for a page, and advises to load without the check.
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"{str(path)!r} is not a file of weights written by torch.save: {reason}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{str(path)!r} holds no state dict (names with tensors), neither plain nor under 'model'")
    return dict(state)


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


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], source: str, *, classes: Mapping[int, int] | None = None
) -> list[str]:
    """Loads `state`, leaving the class head and the queries fresh where their sizes differ.

    A model with masks also takes the weights of one without; its mask head is then left fresh.

    Args:
        model: gets the values.
        state: name → tensor.
        source: what the error message calls the state.
        classes: where the classes of the two differ: label here → label there, of those that both have. Their rows of
            the class head are taken, and that of no-object; the others are left fresh. Empty: the whole head is. None:
            the head is taken if it has the same size.

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
    heads = [name for name in own if name.removeprefix(DETECTOR) in _CLASS_HEAD and name in state]
    if classes:
        last = max(classes.values())
        for name in heads:
            if last >= len(state[name]) - 1:
                raise ValueError(
                    f"{source} names a class {last}, but its {name} has {len(state[name])} rows, the last for no-object"
                )
        state = {**state, **{name: _with_rows(own[name], state[name], classes) for name in heads}}
    replaced = [
        name
        for name in own
        if name.removeprefix(DETECTOR).startswith(_REPLACEABLE)
        and name in state
        and (state[name].shape != own[name].shape or (classes is not None and not classes and name in heads))
    ]
    load_model(model, {**state, **fresh, **{name: own[name] for name in replaced}}, source)
    return [f"{name}: {list(state[name].shape)} there, {list(own[name].shape)} here" for name in replaced] + lines


def _with_rows(own: Tensor, other: Tensor, classes: Mapping[int, int]) -> Tensor:
    """`own` with rows of `other`, those of `classes` and the last; `other` itself where its rows have another size."""
    if own.shape[1:] != other.shape[1:]:
        return other
    rows = own.clone()
    rows[[*classes, -1]] = other[[*classes.values(), -1]].to(rows)
    return rows


def has_masks(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is that of a model with masks."""
    return any(name.startswith(DETECTOR) for name in state)


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
