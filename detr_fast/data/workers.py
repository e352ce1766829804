"""A loader's processes: how they start, fail and end, and the shared memory through which they send batches."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from multiprocessing import util
from multiprocessing.queues import Queue
from typing import Any

from torch._utils import ExceptionWrapper

SHARED_MEMORY = "/dev/shm"  # where torch puts what a process sends, on Linux
_ADVICE = (
    "Give it more (docker run --shm-size 2g, or --ipc host; in Kubernetes an emptyDir of medium Memory), or use fewer "
    "loader processes, or none (--num_workers 0)"
)


def start_worker(worker_init_fn: Callable[[int], None] | None, is_spawned: bool, worker_id: int) -> None:
    """What a loader's process does first, before the user's ``worker_init_fn``."""
    # A batch is pickled by a thread of the queue. What fails there (shared memory is full, an object that cannot be
    # pickled) would be printed, and the batch be awaited for ever.
    Queue._on_queue_feeder_error = _send_error  # type: ignore[method-assign, assignment]
    if is_spawned:
        # The thread may still be in C++ when the process ends, and before Python 3.14 an interpreter that is finalised
        # ends it there: "terminate called without an active exception". Forked processes do not finalise it.
        util.Finalize(None, _leave, exitpriority=-100)
    if worker_init_fn is not None:
        worker_init_fn(worker_id)


def _send_error(queue: Queue, error: Exception, item: Any) -> None:
    """Sends the error in the place of the batch, as torch does for those of the dataset."""
    queue.put((item[0], ExceptionWrapper(where="in a loader process, sending a batch")))


def _leave() -> None:
    if sys.exc_info()[0] is None:  # else multiprocessing has to print it
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(0)


def free_shared_memory() -> tuple[int, int] | None:
    """(free, all) bytes of the shared memory; None on systems that have no such folder."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except (OSError, AttributeError):
        return None
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def check_shared_memory(batch_bytes: int, batches: int) -> None:
    """Warns where so many batches, those that are on their way at once, do not fit into the shared memory.

    Raises:
        ValueError: not even one fits.
    """
    found = free_shared_memory()
    if found is None or found[0] >= batches * batch_bytes:
        return
    has = f"{SHARED_MEMORY} has {_size(found[0])} free, and a batch takes about {_size(batch_bytes)}"
    if found[0] < batch_bytes:
        raise ValueError(f"{has}: loader processes cannot send any. {_ADVICE}")
    warnings.warn(
        f"{has}; loader processes may have {batches} on their way, {_size(batches * batch_bytes)}. {_ADVICE}",
        stacklevel=3,
    )


def explain(error: RuntimeError, num_workers: int) -> None:
    """Raises an OSError that says in one sentence what torch says of a loader's processes that failed, if it does."""
    # Of a killed process torch says "exited unexpectedly"; what it caught while it waited names the signal.
    text = str(error.__cause__ if "exited unexpectedly" in str(error) and error.__cause__ else error)
    if "Too many open files" in text:
        raise OSError(
            f"{num_workers} loader processes need more open files than `ulimit -n` allows this one; raise it, or use "
            "fewer processes (--num_workers)"
        ) from error
    if "is killed by signal: Bus error" in text or ("/torch_" in text and "No space left on device" in text):
        found = free_shared_memory()
        has = f" ({_size(found[0])} of {_size(found[1])} are free now)" if found is not None else ""
        raise OSError(
            f"{SHARED_MEMORY} was full, through which {num_workers} loader processes send batches{has}. {_ADVICE}"
        ) from error
    if "DataLoader worker (pid" in text:
        raise ChildProcessError(
            f"{text.rstrip('. ')}. A loader process that is killed lacks memory most of the time. Use fewer processes "
            "(--num_workers)"
        ) from error


def _size(number: int) -> str:
    for unit, size in (("kB", 1e3), ("MB", 1e6)):
        if number < 1000 * size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 1e9:.1f} GB"
