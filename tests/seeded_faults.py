"""Seeded faults: does the test suite notice when the code is wrong?

Each fault of `faults.py` is a small, plausible mistake. The script writes it into a copy of the tree, runs the tests
that should notice (and, if they do not, the whole suite) and reports the first test that fails. That test must pass
without the fault. Whoever removes or thins out tests runs it before and after: every fault must stay caught.

    python -m tests.seeded_faults --list
    python -m tests.seeded_faults --only matcher-giou-sign
    python -m tests.seeded_faults --save docs/seeded_faults.md --column "after the cut"

The exit status is 1 if a fault is not caught, or no longer applies: its old text must stand in its file exactly once.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tests.faults import FAULTS, Fault

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 1800


class Outcome(NamedTuple):
    """`test`: the first one that failed, with its mode in front, or None."""

    test: str | None
    seconds: float


def copy_tree(target: Path) -> Path:
    ignored = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", "*.egg-info", "build", "dist")
    return shutil.copytree(ROOT, target, symlinks=True, ignore=ignored)


def first_failure(tree: Path, mode: str, tests: list[str], *options: str) -> str | None:
    """Runs pytest in a copy. Returns the first test or file that failed, "mode id", or None."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    env.setdefault("DETR_FAST_COCO_MINI", str(ROOT.parent / "shared" / "coco_mini"))
    env.pop("TRITON_INTERPRET", None)
    if mode == "interpret":
        env["TRITON_INTERPRET"] = "1"
    chosen = "interpret and not gpu" if mode == "interpret" else "not interpret and not gpu"
    command = [sys.executable, "-m", "pytest", "-v", "-m", chosen, "-p", "no:cacheprovider", *options, *tests]
    try:
        run = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"{mode} {' '.join(tests) or 'tests'}"  # it hangs: noticed, too
    failed = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", run.stdout, re.MULTILINE)
    if run.returncode < 0:  # a wild address ended the process: in the last test that it began
        failed = re.search(r"^(tests/\S+)(?!.*^tests/)", run.stdout, re.MULTILINE | re.DOTALL)
    if failed:
        return f"{mode} {failed[1]}"
    if run.returncode not in (0, 5):  # 5: none of these tests has this mode
        sys.exit(f"pytest ended with {run.returncode}\n{run.stdout[-3000:]}{run.stderr[-3000:]}")
    return None


def try_fault(fault: Fault) -> Outcome:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder) / "tree")
        file = tree / fault.file
        file.write_text(file.read_text().replace(fault.old, fault.new))
        *mode, tests = fault.first.split()
        attempts = [(mode[0] if mode else "plain", [tests]), ("plain", []), ("interpret", [])]
        failures = (first_failure(tree, mode, tests, "-x") for mode, tests in attempts)
        test = next((failure for failure in failures if failure), None)
    outcome = Outcome(test, time.perf_counter() - began)
    print(f"{fault.name}: {test or 'NOT CAUGHT'} ({outcome.seconds:.0f} s)", flush=True)
    return outcome


def fails_anyway(outcomes: list[Outcome]) -> list[str]:
    """Of the tests that noticed a fault those that fail in a copy without any."""
    failing = []
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder) / "tree")
        for mode in ("plain", "interpret"):
            tests = sorted({o.test.split(" ", 1)[1] for o in outcomes if o.test and o.test.startswith(mode)})
            failing.append(first_failure(tree, mode, tests) if tests else None)
    return [test for test in failing if test]


def does_not_apply(fault: Fault) -> bool:
    file = ROOT / fault.file
    return not file.is_file() or file.read_text().count(fault.old) != 1


def save(path: Path, column: str, outcomes: dict[str, Outcome]) -> None:
    """Writes the outcomes into one column of the table in a markdown file; its other columns and its text stay."""
    text = path.read_text() if path.exists() else "# Seeded faults\n\n"
    head, rows = text, {}
    columns: list[str] = []
    if "| fault |" in text:
        head, table = text.split("| fault |", 1)
        first, _, *lines = table.strip().splitlines()
        columns = [cell.strip() for cell in first.strip(" |").split("|")]
        for line in lines:
            name, *cells = (cell.strip() for cell in line.strip(" |").split(" | "))
            rows[name] = dict(zip(columns, cells, strict=True))
    columns += [column] if column not in columns else []
    for name, outcome in outcomes.items():
        rows.setdefault(name, {})[column] = f"{outcome.test or '**not caught**'} ({outcome.seconds:.0f} s)"
    order = [fault.name for fault in FAULTS if fault.name in rows]
    lines = [["fault", *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(rows[name].get(column, "not run") for column in columns)] for name in order]
    path.write_text(head + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--list", action="store_true", help="show the faults, and whether they still apply")
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help="these faults alone")
    parser.add_argument("--jobs", type=int, default=1, help="faults tried at the same time")
    parser.add_argument("--save", type=Path, metavar="FILE", help="markdown file whose table gets the outcomes")
    parser.add_argument("--column", default="first failing test", help="its column")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if not args.only or fault.name in args.only]
    stale = [fault for fault in faults if does_not_apply(fault)]
    if args.list:
        for fault in faults:
            print(f"{fault.name:45} {fault.file}{'  DOES NOT APPLY' if fault in stale else ''}")
    for fault in stale:
        print(f"{fault.name} does not apply: its old text is not exactly once in {fault.file}", file=sys.stderr)
    if args.list or stale:
        return int(bool(stale))
    with ThreadPoolExecutor(args.jobs) as pool:
        outcomes = dict(zip([fault.name for fault in faults], pool.map(try_fault, faults), strict=True))
    if args.save:
        save(args.save, args.column, outcomes)
    wrong = fails_anyway(list(outcomes.values()))
    for test in wrong:
        print(f"{test} fails without any fault", file=sys.stderr)
    return int(bool(wrong) or any(outcome.test is None for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
