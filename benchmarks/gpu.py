"""Everything that only a GPU can tell, in the order of its worth: `make gpu`, or `python -m benchmarks.gpu`.

Each part is a program of its own with a time limit. It prints and saves every result when it has it, so that nothing is
lost when its time is up. A part that no longer fits into the budget is named and left out.
"""

import argparse
import importlib.util
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Part:
    """A program.

    Attributes:
        command: arguments of Python; {seconds} becomes the part's limit less what it needs to end by itself.
        seconds, quick_seconds: its limit; 0 leaves it out of a quick run.
        is_asked_for: runs only if it is named.
        may_run_out: being stopped at the limit is no failure.
    """

    command: tuple[str, ...]
    seconds: int
    quick_seconds: int = 0
    is_asked_for: bool = False
    may_run_out: bool = False


def parts(folder: Path, jobs: int) -> dict[str, Part]:
    """By name, in their order. `folder` gets what the benchmarks do not put there themselves."""
    pytest = ("-m", "pytest", "-q", "-m", "gpu")
    if importlib.util.find_spec("xdist") is not None:
        pytest += ("-n", str(jobs), "--dist", "worksteal")
    probe = ("-m", "benchmarks.studies.convolutions", "--output", str(folder / "convolutions.json"), "--seconds")
    bench, same = ("-m", "benchmarks"), ("-m", "benchmarks.studies.same_training", "--save")
    return {
        "doctor": Part(("-m", "detr_fast", "doctor", "--device", "cuda"), 90, 60),
        "probe": Part((*probe, "0.2"), 90, 0),
        "attention-tests": Part((*pytest, "tests/ops/test_attention_gpu.py"), 120, 60, may_run_out=True),
        "step": Part((*bench, "train", "--precision", "bf16", "--compile", "no", "--budget", "{seconds}"), 150, 40),
        "latency": Part((*bench, "latency", "--budget", "{seconds}"), 45, 0),
        "tests": Part((*pytest, "--deselect", "tests/ops/test_attention_gpu.py"), 150, 0, may_run_out=True),
        "ops": Part((*bench, "all", "--budget", "{seconds}"), 135, 0),
        "compiled": Part((*bench, "train", "--precision", "bf16", "--budget", "{seconds}"), 240, 0, is_asked_for=True),
        "tune": Part((*bench, "tune", "--budget", "{seconds}"), 300, 30, is_asked_for=True),
        "sanitize": Part(("-m", "benchmarks.studies.sanitize", "--budget", "{seconds}"), 300, 0, is_asked_for=True),
        "same-float64": Part((*same, "--dtype", "float64"), 60, 0, is_asked_for=True),
        "same-resync": Part((*same, "--resync"), 60, 0, is_asked_for=True),
        "same-bf16": Part((*same, "--resync", "--bf16"), 60, 0, is_asked_for=True),
        "same-dropout": Part((*same, "--dropout", "0.1"), 60, 0, is_asked_for=True),
        "same-free": Part((*same, "--tolerance", "1"), 60, 0, is_asked_for=True),
        "same-control": Part((*same, "--control", "--tolerance", "1"), 60, 0, is_asked_for=True),
    }


def chosen(names: list[str], known: dict[str, Part], quick: bool) -> dict[str, Part]:
    """The parts of these names ("same" stands for all that begin so); without names those of an ordinary run.

    Raises:
        ValueError: there is no such part.
    """
    for name in names:
        if not any(part == name or part.startswith(f"{name}-") for part in known):
            raise ValueError(f"there is no part {name!r}; the parts are {', '.join(known)}")
    if names:
        return {part: known[part] for part in known if any(part == n or part.startswith(f"{n}-") for n in names)}
    return {name: part for name, part in known.items() if not part.is_asked_for and (part.quick_seconds or not quick)}


def run(name: str, part: Part, seconds: float) -> str:
    """Runs a part for so many seconds at most. Returns "right", "failed (status)" or "ran out of time"."""
    # Ten seconds to write what it has; asked to stop it still reports, which it cannot when it is killed.
    own = max(1, int(seconds - 10))
    command = [sys.executable, *(argument.replace("{seconds}", str(own)) for argument in part.command)]
    print(f"\n=== {name}, at most {seconds:.0f} s: python {' '.join(command[1:])}", flush=True)
    process = subprocess.Popen(command, preexec_fn=_heed_interrupts)
    try:
        status = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return "right as far as it got" if part.may_run_out and process.returncode in (0, 2) else "ran out of time"
    return "right" if status == 0 else f"failed (exit {status})"


def _heed_interrupts() -> None:
    """In the part's process: what a shell starts in the background ignores interrupts, and so would all below it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def main(argv: list[str] | None = None) -> int:
    import torch

    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--part", nargs="+", default=[], help="only these, in the order of the list")
    parser.add_argument("--list", action="store_true", help="show the parts and their seconds")
    parser.add_argument("--quick", action="store_true", help="under three minutes: does everything work at all?")
    parser.add_argument("--budget", type=float, default=780, help="seconds for all of them (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=12, help="processes that compile and test (default %(default)s)")
    args = parser.parse_args(argv)
    has_gpu = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if has_gpu else "no-gpu"
    known = parts(RESULTS / card.lower().replace(" ", "-"), args.jobs)
    try:
        todo = chosen(args.part, known, args.quick)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        for name, part in known.items():
            print(f"{name:18}{part.seconds:5} s  {'if asked for' if part.is_asked_for else ''}")
        return 0
    if not has_gpu:
        print("make gpu: PyTorch finds no CUDA GPU here; nothing was run (make test needs none)")
        return 1
    print(f"{card}, torch {torch.__version__}")
    end, outcomes = time.monotonic() + args.budget, {}
    for name, part in todo.items():
        limit = min((part.quick_seconds or part.seconds) if args.quick else part.seconds, end - time.monotonic())
        outcomes[name] = run(name, part, limit) if limit >= 20 else "left out: the budget is spent"
    print(f"\n=== {card}")
    for name, outcome in outcomes.items():
        print(f"{name:18}{outcome}")
    return int(any(not outcome.startswith("right") for outcome in outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
