"""When a run has to save between the ends of epochs, and when it has to stop: signals and `--checkpoint_every`."""

import signal
import threading
import time
from collections.abc import Iterable
from types import FrameType

import torch
import torch.distributed as dist

from detr_fast.config import checkpoint_interval
from detr_fast.data.loader import EpochLoader
from detr_fast.distributed import get_rank, get_world_size

# Windows has no SIGHUP.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
_ALARM = getattr(signal, "SIGALRM", None)
GO_ON, SAVE = 0, 1  # a wish above SAVE is to stop: SAVE + the signal's number
# A terminal's Ctrl-C reaches a process twice where torchrun passes it on: that is no second thought of the user's.
_IMPATIENCE = 5.0  # seconds
_WAIT = 8.0  # seconds; docker kills ten after its signal


class NoBatch(RuntimeError):
    """A signal came, and the step that was to be finished lacks its batch.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int):
        super().__init__(f"no batch came for {_WAIT:g} seconds, nor since {signal.Signals(number).name}")
        self.signal = number


class Interruption:
    """Notes signals, and agrees with the other processes on the step after which all of them save or stop.

    A context manager: inside it SIGTERM, SIGINT and SIGHUP are noted, unless they are ignored; a second one, seconds
    later, acts as it would outside. In a thread other than the main one signals are left alone, as Python demands.

    A step whose batch does not come, from a worker that hangs, is not waited for: `NoBatch` is raised where the batch
    is awaited, 8 seconds after the signal.

    No step waits for a GPU. Several processes exchange one number per step by gloo, on the CPU, in the background; a
    step reads what was sent in the step before.

    Args:
        checkpoint_every: as the flag; see `checkpoint_interval`.
        loaders: where the batches come from.
    """

    def __init__(self, checkpoint_every: str = "", loaders: Iterable[EpochLoader] = ()):
        self._steps, self._seconds = checkpoint_interval(checkpoint_every)
        self._saved_at = time.monotonic()
        self._signal, self._noted_at = 0, 0.0
        self._before: dict[int, object] = {}
        self._loaders = list(loaders)
        self._group = dist.new_group(backend="gloo") if get_world_size() > 1 else None
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            # What was ignored stays so: nohup starts a run that is to outlive its terminal.
            heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_) -> None:
        if _ALARM in self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal and now - self._noted_at > _IMPATIENCE:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.raise_signal(number)
        elif not self._signal:
            self._signal, self._noted_at = number, now
            # Not where somebody else has an alarm of his own.
            if self._loaders and _ALARM is not None and signal.getsignal(_ALARM) == signal.SIG_DFL:
                self._before[_ALARM] = signal.signal(_ALARM, self._look)
                signal.setitimer(signal.ITIMER_REAL, _WAIT, 1.0)

    def _look(self, number: int, frame: FrameType | None) -> None:
        since = [loader.waits_since for loader in self._loaders if loader.waits_since is not None]
        if since and time.monotonic() - min(since) >= _WAIT:
            raise NoBatch(self._signal)

    def after_step(self, steps: int) -> int:
        """What all processes do now: GO_ON, SAVE, or stop (a number above SAVE, see `signal_of`).

        Every process calls this after every optimiser step, and `while_evaluating` after every batch of an evaluation.

        Args:
            steps: optimiser steps so far.
        """
        wish = self._stop_wish()
        # One clock decides, the first process's.
        if not wish and self._seconds and get_rank() == 0 and time.monotonic() - self._saved_at >= self._seconds:
            self._saved_at, wish = time.monotonic(), SAVE
        agreed = self._agree(wish)
        if agreed == GO_ON and self._steps and steps % self._steps == 0:
            return SAVE
        return agreed

    def while_evaluating(self) -> int:
        """As `after_step`, where there is nothing to save: GO_ON or stop."""
        agreed = self._agree(self._stop_wish())
        return agreed if agreed > SAVE else GO_ON

    def saved(self) -> None:
        """The time until the next checkpoint counts from now."""
        self._saved_at = time.monotonic()

    def _stop_wish(self) -> int:
        return SAVE + self._signal if self._signal else GO_ON

    def _agree(self, wish: int) -> int:
        """The largest wish of all processes: of this call if there is one process, else of the call before."""
        if self._group is None:
            return wish
        before, value = self._pending, torch.tensor([wish])
        self._pending = value, dist.all_reduce(value, dist.ReduceOp.MAX, self._group, async_op=True)
        if before is None:
            return GO_ON
        agreed, work = before
        work.wait()
        return int(agreed)


def signal_of(agreed: int) -> int:
    """The signal for which all processes stop."""
    return agreed - SAVE


def ignore_signals(_worker: int) -> None:
    """For a loader's workers: what is sent to the whole group of processes is the training process's business.

    Without it a worker dies at once and the step that is to be finished lacks its batch. Whoever uses this has to end
    the workers itself, see `EpochLoader.close`.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
