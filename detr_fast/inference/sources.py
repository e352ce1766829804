"""Where a model comes from: a published name, a run's folder, a checkpoint file, or a file of another format."""

import difflib
import os
from pathlib import Path
from typing import Any

from detr_fast.models.hub import published
from detr_fast.training.checkpoint import read_checkpoint

SOURCES = (
    "a run's folder, a checkpoint of ours or of the original (a file or an https address), a Hugging Face folder, a "
    "safetensors file, or a published name: " + ", ".join(published())
)
# The best first.
_CHECKPOINTS_OF_A_RUN = ("checkpoint_best.pth", "checkpoint.pth")
# Files that `detr-fast export` writes: programs, of which no checkpoint can be made.
EXPORTED_SUFFIXES = (".onnx", ".pt2")


def read_source(source: str | os.PathLike) -> dict[str, Any]:
    """The checkpoint behind `source`, as `read_checkpoint` returns it.

    Args:
        source: see `SOURCES`. What exists on disk goes before a published name. Of a run's folder the best checkpoint
            is taken, or else the last.

    Raises:
        FileNotFoundError: there is nothing of that name, or no checkpoint in the folder.
        ValueError: an exported file, a file that cannot be read, or a download that failed; the message says what to
            do.
        UsageError: a safetensors file, and the package is absent.
    """
    name, path = os.fspath(source), Path(source)
    if not path.exists():
        if name in published():
            return _of_published(name, read_checkpoint(published()[name]))
        if name.startswith(("https://", "http://")):
            return _of_published(_published_as(name), read_checkpoint(name))
        raise FileNotFoundError(f"there is no file or folder {name!r}{_meant(name)}; expected {SOURCES}")
    if path.suffix in EXPORTED_SUFFIXES:
        raise ValueError(f"{name} is an exported file, which only detects; expected {SOURCES}")
    if (path / "config.json").is_file() or path.suffix == ".safetensors":
        return _of_hugging_face(path)
    if path.is_dir():
        for file in _CHECKPOINTS_OF_A_RUN:
            if (path / file).is_file():
                return read_checkpoint(path / file)
        raise FileNotFoundError(
            f"the folder {name!r} has no {' or '.join(reversed(_CHECKPOINTS_OF_A_RUN))}; expected {SOURCES}"
        )
    return _of_published(_published_as(name), read_checkpoint(path))


def _of_hugging_face(path: Path) -> dict[str, Any]:
    # Reads checkpoints in its turn, by way of this module.
    from detr_fast.inference.huggingface import read_folder, read_safetensors

    return read_folder(path) if path.is_dir() else read_safetensors(path)


def _published_as(name: str) -> str | None:
    """The name of the published model that has a file of this name."""
    file = name.rsplit("/", 1)[-1]
    return next((model for model, url in published().items() if url.endswith(f"/{file}")), None)


def _of_published(name: str | None, checkpoint: dict[str, Any]) -> dict[str, Any]:
    # The weights do not show it, and the published files do not say it.
    if name is not None and "_dc5" in name:
        checkpoint["args"] = {"dilation": True, **checkpoint.get("args", {})}
    return checkpoint


def _meant(name: str) -> str:
    close = difflib.get_close_matches(name, published(), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
