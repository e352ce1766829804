"""Getting weights: from the web, once per machine, or from a file."""

import argparse
import http.client
import os
import pickle
from pathlib import Path

import torch
from torch import Tensor

from detr_fast.distributed import first_process_first


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
        raise RuntimeError(
            f"could not get {url}: {error}. Download it elsewhere and put it at {place}, or {otherwise}."
        ) from error


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
