"""Checkpoints: written whole or not at all, read without running code, and continued from exactly.

Source of the five keys "model", "optimizer", "lr_scheduler", "epoch" and "args": facebookresearch/detr, main.py.
"""

import argparse
import errno
import os
import random
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from detr_fast.data.categories import Categories
from detr_fast.models.weights import load_url


def save_checkpoint(state: Mapping, path: str | os.PathLike) -> None:
    """Writes `state` to `path` so that a reader finds either the old file or the whole new one, also after a crash.

    Args:
        state: tensors, numbers, strings, lists and dicts: what ``torch.load(weights_only=True)`` reads.
        path: the file; its folder exists.

    Raises:
        OSError: it could not be written, for instance because the disk is full. What there was stays.
    """
    path = Path(path)
    # One fixed name: what a killed process leaves behind is overwritten by the next.
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            writer = _Writer(file)
            try:
                torch.save(dict(state), writer)
            except Exception:
                if writer.error is not None:
                    raise writer.error from None
                raise
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class _Writer:
    """A file to write to that keeps the error of a write: torch.save raises another one, without its reason."""

    def __init__(self, file: BinaryIO):
        self.file, self.error = file, None

    def write(self, data) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def read_checkpoint(path: str | os.PathLike) -> dict:
    """Reads a checkpoint of ours or of the original, or a bare state dict, with ``weights_only=True``.

    Args:
        path: a file or an https address.

    Returns:
        The checkpoint's dict, on the CPU, with at least "model" (name → tensor, without a wrapper's prefix); "args",
        "categories" and "ema", if there, are as `detr_fast` writes them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds something else, or the download failed.
    """
    if str(path).startswith(("https://", "http://")):
        try:
            checkpoint = load_url(str(path), "give the path of a file")
        except RuntimeError as error:
            raise ValueError(str(error)) from None
    else:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no checkpoint file at {str(path)!r}")
        _check_records(path)
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # what torch.load raises on other files depends on their first bytes
            if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
                raise
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
    checkpoint["model"] = _unwrapped(checkpoint["model"])
    problem = _kind_problem(checkpoint, {"args": dict, "categories": dict, "ema": dict})
    if problem is None and "ema" in checkpoint and not _is_state_dict(checkpoint["ema"].get("values")):
        problem = "'ema' has no tensors by name under 'values'"
    if problem is None and "categories" in checkpoint:
        try:
            Categories.from_dict(checkpoint["categories"])
        except (KeyError, TypeError, ValueError) as error:
            problem = f"'categories' holds no classes ({type(error).__name__}: {error})"
    if problem is not None:
        raise ValueError(f"{str(path)!r} is not as detr_fast writes it: {problem}")
    return checkpoint


def check_resumable(checkpoint: dict, source: str) -> None:
    """Raises ValueError where the state of a run, as far as `checkpoint` has one, is not as `detr_fast` writes it."""
    kinds = {"optimizer": dict, "lr_scheduler": dict, "epoch": int, "steps": int, "stale": int, "rng": list}
    numbers, tables = dict.fromkeys(("best", "seconds"), (int, float)), dict.fromkeys(("inside", "scaler"), dict)
    problem = _kind_problem(checkpoint, kinds | numbers | tables)
    if problem is not None:
        raise ValueError(
            f"--resume: {source} is not as detr_fast writes it: {problem}; --weights takes its weights alone"
        )


def _kind_problem(checkpoint: dict, kinds: Mapping[str, type | tuple]) -> str | None:
    """What is of another kind than expected, or None. Entries that are None are taken out: there is nothing in them."""
    for key, kind in kinds.items():
        if key in checkpoint and checkpoint[key] is None:
            del checkpoint[key]
        if key in checkpoint and not isinstance(checkpoint[key], kind):
            return f"{key!r} is a {type(checkpoint[key]).__name__}"
    return None


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by the names that the model itself has."""
    for prefix in ("module.", "_orig_mod.", "module."):  # DistributedDataParallel's, torch.compile's, both
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _check_records(path: str | os.PathLike) -> None:
    """Compares the checksums in the archive that torch.save writes, which torch.load does not do.

    Raises:
        ValueError: a part of the file is damaged.
    """
    if not zipfile.is_zipfile(path):
        return  # of torch before 1.6, or no checkpoint at all: torch.load will tell
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # what zipfile raises depends on the place of the damage
        # A damaged offset may lead to a place that the operating system refuses, by EINVAL.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(f"{str(path)!r} is damaged ({error}); take another checkpoint or a copy of it") from error
    if damaged is not None:
        raise ValueError(
            f"{str(path)!r} is damaged: the checksum of {damaged!r} in it is wrong; take another checkpoint or a copy "
            "of it"
        )


def averaged_weights(checkpoint: Mapping) -> dict[str, Tensor]:
    """A checkpoint's weights, averaged ones (EMA) where there are some."""
    return checkpoint.get("ema", {}).get("values", checkpoint["model"])


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


def _is_state_dict(value) -> bool:
    return isinstance(value, dict) and bool(value) and all(map(_is_weight, value.items()))


def _is_weight(item: tuple) -> bool:
    name, value = item
    return isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
