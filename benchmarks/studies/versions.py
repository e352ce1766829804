"""The training step and inference beside an earlier version's: `python -m benchmarks.studies.versions COMMIT`.

Each version computes in a process of its own, from a copy of its tree, and the two take turns, one step at a time
(first, second, second, first, …), so that a change of the machine's speed meets both. Before anything is timed they
must agree: on the loss of the step without dropout, and on the sum of the boxes found. The step is what each version's
own `benchmarks train` calls "detr_fast". The earlier version must have `benchmarks/studies/training_step.py`.

Results: `versions.json` under `benchmarks/results/<device>`.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

# What is measured: a training step of model, batch and padding, or the detection in images of these sizes.
CASES = {
    "train tiny, no padding": ("train", "tiny", 2, "none"),
    "train tiny, padding": ("train", "tiny", 2, "coco"),
    "train R50, no padding": ("train", "R50", 2, "none"),
    "infer R50, one image": ("infer", [(800, 1066)]),
    "infer R50, four sizes": ("infer", [(800, 1066), (800, 1199), (1066, 800), (800, 800)]),
}
LARGEST_DIFFERENCE = 1e-4
PAUSE = 0.05  # seconds in which the other process's threads go to sleep


def _training_step(name: str, batch: int, padding: str) -> tuple[float, Callable[[], None]]:
    from benchmarks.studies.train import case_shape
    from benchmarks.studies.training_step import Step, build_model, make_batch, variants, without_dropout

    device = torch.device("cpu")
    torch.manual_seed(0)
    model = build_model(name, dropout=0.1)
    data = make_batch(case_shape(name, batch, padding, device), device, 0)
    step = Step(next(v for v in variants(device, False) if v.name == "detr_fast"), model, device)
    with without_dropout(step.model):
        loss = float(step.loss(data).detach())
    return loss, lambda: step(data)


def _inference(sizes: list[tuple[int, int]]) -> tuple[float, Callable[[], None]]:
    from benchmarks.studies.training_step import build_model

    torch.manual_seed(0)
    model = build_model("R50", dropout=0.1).eval()
    images = [torch.randn(3, *size) for size in sizes]

    @torch.no_grad()
    def run() -> float:
        return float(model(images)["pred_boxes"].double().sum())

    return run(), run


def _serve(case: str, tree: str) -> int:
    """Writes the result to compare, and then for every line read the seconds of one run."""
    import detr_fast

    if not Path(detr_fast.__file__).resolve().is_relative_to(Path(tree).resolve()):
        raise SystemExit(f"detr_fast is {detr_fast.__file__}; expected the one in {tree}")
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever else is printed
    kind, *settings = CASES[case]
    result, run = (_training_step if kind == "train" else _inference)(*settings)
    print(result, file=answers, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(time.perf_counter() - start, file=answers, flush=True)
    return 0


class _Version:
    """A version's process for one case."""

    def __init__(self, tree: Path, case: str):
        environment = os.environ | {"PYTHONPATH": str(tree)}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--serve", case, str(tree)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree, env=environment,
        )  # fmt: skip
        self.result = self._read()

    def time(self) -> float:
        with contextlib.suppress(BrokenPipeError):  # it has ended: `_read` says so
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        seconds = self._read()
        time.sleep(PAUSE)
        return seconds

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()

    def _read(self) -> float:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a version's process ended with status {self._process.wait()}; its error is above")
        return float(line)


def compare(case: str, before: Path, now: Path, seconds: float, rounds: int) -> dict:
    """One case's row: medians in milliseconds and the quartiles of the ratios, now / before, within a round."""
    versions = [_Version(before, case), _Version(now, case)]
    try:
        expected, found = (version.result for version in versions)
        if not abs(found - expected) <= LARGEST_DIFFERENCE * abs(expected):
            raise RuntimeError(f"{case}: the result is {found}, in the earlier version {expected}")
        for _ in range(3):
            for version in versions:
                version.time()
        times, until = [], time.monotonic() + seconds
        while len(times) < rounds or time.monotonic() < until:
            order = versions if len(times) % 2 == 0 else versions[::-1]
            taken = {version: version.time() for version in order}
            times.append([taken[version] for version in versions])
    finally:
        for version in versions:
            version.close()
    ratios = [after / first for first, after in times]
    quartiles = statistics.quantiles(ratios, n=4)
    medians = [1e3 * statistics.median(column) for column in zip(*times, strict=True)]
    return {
        "case": case,
        "rounds": len(times),
        "before_ms": medians[0],
        "now_ms": medians[1],
        "ratio": quartiles[1],
        "ratio_25_to_75": [quartiles[0], quartiles[2]],
        "difference": abs(found - expected) / abs(expected),
    }


def _tree_of(commit: str, root: Path, target: Path) -> str:
    """Writes the commit's files to `target`; returns its name in full."""
    try:
        name = subprocess.run(
            ["git", "rev-parse", "--verify", f"{commit}^{{commit}}"], cwd=root, check=True, capture_output=True
        ).stdout.decode()
        archive = subprocess.run(["git", "archive", name.strip()], cwd=root, check=True, capture_output=True).stdout
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"no tree of {commit!r}: {error.stderr.decode().strip()}") from None
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(target, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return name.strip()


def main(argv: list[str] | None = None) -> int:
    from benchmarks.harness.provenance import provenance, slug

    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.versions", description=__doc__.split("\n")[0])
    parser.add_argument("commit", help="the earlier version")
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seconds", type=float, default=30.0, help="of each case, at least")
    parser.add_argument("--rounds", type=int, default=9, help="of each case, at least")
    parser.add_argument("--output", type=Path, help="folder; default: benchmarks/results/<device>")
    args = parser.parse_args(argv)
    root = Path(__file__).resolve().parents[2]
    source = provenance(torch.device("cpu"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        name = _tree_of(args.commit, root, Path(folder))
        print("| case | before, ms | now, ms | now / before | 25 % to 75 % |\n|---|---|---|---|---|")
        for case in args.case:
            row = compare(case, Path(folder), root, args.seconds, args.rounds)
            rows.append(row)
            low, high = row["ratio_25_to_75"]
            figures = f"{row['before_ms']:.1f} | {row['now_ms']:.1f} | {row['ratio']:.3f} | {low:.3f} – {high:.3f}"
            print(f"| {case} | {figures} |", flush=True)
            target = args.output or root / "benchmarks" / "results" / slug(source["device"])
            target.mkdir(parents=True, exist_ok=True)
            record = {"study": "versions", "before": name, "provenance": source, "rows": rows}
            (target / "versions.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        raise SystemExit(_serve(*sys.argv[2:]))
    raise SystemExit(main())
