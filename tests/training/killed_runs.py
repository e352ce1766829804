"""Trains again and again, killed by SIGKILL at an event of its own, and resumes: python killed_runs.py FOLDER N FLAGS.

An event is an optimiser step, a write into a checkpoint (half of it is done), an fsync, or a file's renaming, before
and after. Processes are forked from one that has imported everything, so that a run takes a second. Writes into FOLDER
one output folder for each kill, named killed012_EVENT, and prints nothing.
"""

import os
import random
import signal
import sys
from pathlib import Path

import torch

from detr_fast.cli import main
from detr_fast.training import checkpoint, engine
from detr_fast.training.trainer import train


def fork(function) -> int:
    """Runs `function` in a child process and waits for it. Returns the wait status."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = function()
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def count_events(event) -> None:
    """Calls `event(name)` at every event of this process's run."""
    step, write, fsync, replace = engine._optimizer_step, checkpoint._Writer.write, os.fsync, os.replace

    def counted_step(*args):
        event("step")
        return step(*args)

    def counted_write(self, data):
        half = len(data) // 2
        write(self, data[:half])
        self.flush()
        event("write")
        write(self, data[half:])
        return len(data)

    def counted_fsync(file):
        event("fsync")
        fsync(file)

    def counted_replace(source, target):
        event(f"before {Path(target).name}")
        replace(source, target)
        event(f"after {Path(target).name}")

    engine._optimizer_step, checkpoint._Writer.write = counted_step, counted_write
    os.fsync, os.replace = counted_fsync, counted_replace


def run(folder: Path, kills: int, flags: list[str]) -> None:
    assert train  # imported once here, not in every child
    torch.set_num_threads(1)
    names = folder / "events.txt"

    def undisturbed() -> int:
        with open(names, "w") as file:
            count_events(lambda name: print(name, file=file, flush=True))
            return main(["train", *flags, "--output_dir", str(folder / "counted")])

    assert fork(undisturbed) == 0
    events = names.read_text().splitlines()
    # Half of the kills inside the writes, which are most of the events, and half at all others.
    draw = random.Random(0)
    inside = [i for i, name in enumerate(events) if name == "write"]
    others = [i for i, name in enumerate(events) if name != "write"]
    chosen = draw.sample(inside, kills // 2) + draw.sample(others, kills - kills // 2)
    for number, moment in enumerate(sorted(chosen)):
        output = folder / f"killed{number:03}_{events[moment].replace(' ', '_')}"

        def killed(moment=moment, output=output) -> int:
            passed = 0

            def event(name: str) -> None:
                nonlocal passed
                if passed == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                passed += 1

            count_events(event)
            return main(["train", *flags, "--output_dir", str(output)])

        assert fork(killed) == signal.SIGKILL
        resumed = ["train", *flags, "--output_dir", str(output), "--resume", "auto"]
        assert fork(lambda resumed=resumed: main(resumed)) == 0


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
