"""Kernels under CUDA's compute-sanitizer, and run again and again: `python -m benchmarks.studies.sanitize`, on a GPU.

Three looks at every op and dtype of `detr_fast.ops.selfcheck`, on its small inputs, forward and backward: memcheck
(accesses out of bounds), racecheck (of shared memory), and 100 runs that have to give the same bits.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from detr_fast.ops.selfcheck import CHECKS, dtypes_of

TOOLS = ("memcheck", "racecheck")
_FOUND = 9  # exit code of the sanitizer when it has found something


def find_sanitizer() -> str | None:
    """The program, from the PATH or from CUDA's folder; None where it is not installed."""
    folders = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [str(Path(folder) / "bin") for folder in folders if folder]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *places]))


def run_checks(device: torch.device, ops: Iterable[str] = CHECKS) -> None:
    """Every op in every dtype, once."""
    for op in ops:
        for dtype in dtypes_of(op, device):
            CHECKS[op].run(dtype, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def first_difference(run: Callable[[], list[torch.Tensor]], times: int) -> int | None:
    """The number of the first run, counted from 1, that does not give the first one's bits; None: all do."""
    first = [value.clone() for value in run()]
    for number in range(2, times + 1):
        found = run()
        if not all(
            one.dtype == other.dtype and torch.equal(_bits(one), _bits(other))
            for one, other in zip(first, found, strict=True)
        ):
            return number
    return None


def _bits(value: torch.Tensor) -> torch.Tensor:
    """As bytes: NaN equals NaN, and -0 is not 0."""
    return value.detach().contiguous().flatten().view(torch.uint8)


def repeat(device: torch.device, times: int) -> int:
    """Prints a line for each op and dtype; returns how many differ."""
    failed = 0
    for op, check in CHECKS.items():
        for dtype in dtypes_of(op, device):
            number = first_difference(lambda check=check, dtype=dtype: check.run(dtype, device), times)
            failed += number is not None
            verdict = f"{times} runs are equal" if number is None else f"run {number} differs from the first"
            print(f"{op:16}{str(dtype).removeprefix('torch.'):10}{verdict}", flush=True)
    return failed


def sanitize(tool: str, seconds: float) -> int:
    """Runs all checks under a tool of the sanitizer. Returns its exit code, 0 if it is not installed."""
    program = find_sanitizer()
    if program is None:
        print(f"{tool}: compute-sanitizer is not installed (it comes with the CUDA toolkit); left out")
        return 0
    command = [program, "--tool", tool, "--error-exitcode", str(_FOUND), "--print-limit", "20", sys.executable, "-m"]
    # Kernels are trusted: a comparison of their own would only run them twice.
    environment = {**os.environ, "DETR_FAST_SELFCHECK": "0", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    print(f"{tool}, at most {seconds:.0f} s", flush=True)
    try:
        return subprocess.run([*command, __spec__.name, "--checks"], env=environment, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"{tool} ran out of time")
        return 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.sanitize", description=__doc__.split("\n")[0])
    parser.add_argument("--times", type=int, default=100, help="runs that must be equal (default %(default)s)")
    parser.add_argument("--budget", type=float, default=280, help="seconds for all of it (default %(default)s)")
    parser.add_argument("--checks", action="store_true", help="only run every check once, as under the sanitizer")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("sanitize: PyTorch finds no CUDA GPU here; nothing was run")
        return 1
    device, end = torch.device("cuda"), time.monotonic() + args.budget
    if args.checks:
        run_checks(device)
        return 0
    failed = repeat(device, args.times)
    for tool in TOOLS:
        failed += sanitize(tool, max(10, end - time.monotonic())) != 0
    print("nothing was found" if not failed else f"{failed} of the looks found something")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
