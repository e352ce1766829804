"""A run's output folder: one run at a time, no left-overs, and room for its checkpoints."""

import errno
import itertools
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from detr_fast.distributed import all_gather, is_main_process
from detr_fast.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = "run.lock"
_LEFT_OVERS = ("checkpoint*.pth.tmp", "log.txt.tmp", "metrics.csv.tmp", "eval/*.pth.tmp")
# EFBIG: a limit on the size of files (ulimit -f).
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
_OTHERS = 2**20  # bytes for log, pictures and a checkpoint's numbers and names, at least


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Inside, no other process gets this folder's lock, on whichever machine that shares the folder.

    ``run.lock`` says who holds it: host, pid and start. The operating system frees the lock when its process ends,
    however that happens: a file that nobody has locked is stale, and is taken over.

    Args:
        folder: exists; None: there is nothing to lock.

    Raises:
        UsageError: another run is using the folder.
    """
    if folder is None or fcntl is None:
        yield
        return
    path = folder / LOCK
    file = _lock(path)
    try:
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)
            file.close()


def _lock(path: Path):
    while True:
        file = open(path, "a+", encoding="utf-8")  # it stays open as long as the run lasts
        try:
            # A POSIX lock: unlike flock's it is not inherited by the loader's workers, which may outlive their parent.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read()
            file.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                print(f"no lock on {path.parent}, its file system has none ({error.strerror}): start one run in it")
                return None
            raise UsageError(
                f"--output_dir {path.parent} is in use by {_describe(holder)}; wait for that run to end, or choose "
                "another folder"
            ) from error
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except FileNotFoundError:
            pass
        file.close()  # its holder has just removed it: what was locked is no longer the folder's
    file.truncate(0)
    json.dump({"host": socket.gethostname(), "pid": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S %z")}, file)
    file.flush()
    return file


def _describe(holder: str) -> str:
    try:
        return "process {pid} on {host}, started {start}".format(**json.loads(holder))
    except (ValueError, KeyError, TypeError):
        return "another run"


def new_folder() -> Path:
    """Makes ``outputs/<date>_<time>``."""
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    for number in itertools.count(1):
        path = Path("outputs", name if number == 1 else f"{name}_{number}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:  # another run has begun in this second
            if not path.is_dir():
                raise
        except OSError as error:
            raise UsageError(f"no --output_dir, and {path} cannot be made: {error.strerror}") from error
    raise AssertionError


def new_folder_of_all() -> str:
    """The path of a `new_folder` that the first process has made, in every process."""
    made: Any = None
    if is_main_process():
        try:
            made = str(new_folder())
        except UsageError as error:
            made = error
    made = all_gather(made)[0]
    if isinstance(made, UsageError):
        raise made
    return made


def remove_left_overs(folder: Path) -> None:
    """Removes the half-written files of a run that was killed; the folder is locked."""
    for pattern in _LEFT_OVERS:
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def is_full(error: OSError) -> bool:
    """Whether a write failed for want of space."""
    return error.errno in _FULL


def size_of(state: object) -> int:
    """Bytes of the tensors in nested dicts and lists, about what a checkpoint of them takes."""
    if isinstance(state, Tensor):
        return state.nbytes
    if isinstance(state, Mapping):
        return sum(map(size_of, state.values()))
    return sum(map(size_of, state)) if isinstance(state, (list, tuple)) else 0


def space_needed(folder: Path, checkpoint_bytes: int) -> int:
    """Bytes to be free for the next checkpoints: each is written beside the one that it replaces."""
    absent = sum(not (folder / name).exists() for name in ("checkpoint.pth", "checkpoint_best.pth"))
    return checkpoint_bytes * (1 + absent) + _OTHERS


def check_space(folder: Path, checkpoint_bytes: int, numbered: int) -> str | None:
    """Refuses to start where the first checkpoints will not fit.

    Args:
        folder: of the output.
        checkpoint_bytes: of one checkpoint.
        numbered: how many numbered checkpoints the run will keep beside the last and the best.

    Returns:
        A warning if there is room for the first ones only; else None.

    Raises:
        UsageError: says how much is needed and how much is free.
    """
    free = shutil.disk_usage(folder).free
    first = space_needed(folder, checkpoint_bytes)
    if free < first:
        raise UsageError(
            f"--output_dir {folder}: {megabytes(free)} are free and {megabytes(first)} are needed (a checkpoint has "
            f"{megabytes(checkpoint_bytes)}); nothing was trained"
        )
    whole = first + checkpoint_bytes * numbered
    if free < whole:
        return (
            f"{folder} has {megabytes(free)} free; with {numbered} numbered checkpoints, {megabytes(whole)} are needed"
        )
    return None


def megabytes(size: int) -> str:
    """A size for people, in MB."""
    return f"{size / 1e6:.1f} MB"
