"""The whole training step, ours beside the original's: `python -m benchmarks train`.

On the same batches, from the same weights:

- as shipped: the original's step: float32 (TF32 as PyTorch's defaults have it), frozen norms as modules, attention with
  need_weights=True, every decoder layer matched by SciPy, losses read (`.item()`) in every step, AdamW per parameter;
- tuned stock: the best of stock parts: bf16 autocast, channels_last (on a CPU with and without it),
  scaled_dot_product_attention with the mask, torch.compile, fused AdamW; the reference criterion;
- detr_fast, and detr_fast with one technique switched off at a time.

Before anything is timed, each variant's loss without dropout is compared with that of the first; a variant whose loss
is wrong has no time. Operations are counted for the padded size. "% of limit" is operations / measured matrix rate /
time; the limit leaves out the bytes that must be moved, so that even a perfect step stays below 100 %.
"""

import argparse
import contextlib
import copy
import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..harness.ceilings import Ceilings, measure_ceilings
from ..harness.measure import peak_memory, reason_of
from ..harness.provenance import device_name, provenance, slug
from ..harness.results import save, suite_record
from ..harness.timing import clock_for, interleave, quantiles
from ..shapes import BatchShape, nominal_batch, typical_real_batch
from .training_step import (
    STAGES,
    Step,
    Variant,
    build_model,
    count,
    make_batch,
    tolerance,
    training_flops,
    variants,
    without_dropout,
)


@dataclass
class Row:
    """One variant on one case; `status`: ok, checked (right, not timed), wrong, failed or unavailable."""

    model: str
    batch: int
    padding: str
    size: str  # padded, height x width
    provider: str
    status: str
    reason: str = ""
    loss: float | None = None
    loss_difference: float | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    images_per_s: float | None = None
    tflop_per_s: float | None = None
    percent_of_limit: float | None = None
    peak_memory_mib: float | None = None
    counts: dict | None = None
    stages_ms: dict | None = None


@contextlib.contextmanager
def room_to_compile() -> Iterator[None]:
    """Within, the compiled code of all variants is kept.

    All variants share the layers' `forward`, and torch keeps 8 compiled forms of a function: without more room the
    later variants would run uncompiled. A reset between variants would compile the earlier ones again while timed.
    """
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        yield


@room_to_compile()
def measure_case(
    name: str,
    shape: BatchShape,
    padding: str,
    device: torch.device,
    ceilings: Ceilings | None,
    chosen: list[Variant],
    *,
    seed: int = 0,
    seconds: float = 10.0,
    min_rounds: int = 5,
    deadline: float = float("inf"),
) -> list[Row]:
    """Checks every variant, then measures the right ones interleaved; with `ceilings` None it only checks.

    After `deadline` (of `time.monotonic`) no further variant is prepared; the first three always are.
    """
    torch.manual_seed(seed)
    model = build_model(name, dropout=0.1)
    batch = make_batch(shape, device, seed)
    flops = training_flops(model, shape)
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    expected = None
    for variant in chosen:
        size = "x".join(map(str, shape.padded))
        row = rows[variant.name] = Row(name, shape.batch, padding, size, variant.name, "checked")
        if time.monotonic() > deadline and len(rows) > 3:
            row.status, row.reason = "unavailable", "time budget"
            continue
        try:
            step = Step(variant, copy.deepcopy(model), device)
            with step.ops(), without_dropout(step.model):
                row.loss = float(step.loss(batch).detach())
            expected = row.loss if expected is None else expected
            row.loss_difference = abs(row.loss - expected) / abs(expected)
            if not row.loss_difference <= tolerance(variant, device):
                row.status, row.reason = "wrong", f"the loss is {row.loss:.6g}, as shipped it is {expected:.6g}"
                continue
            row.reason = "; ".join(step.fell_back)
            if ceilings is None:
                continue
            for _ in range(3 if device.type == "cuda" else 1):
                step(batch)
            stages = [step.stages(batch) for _ in range(3)]
            row.stages_ms = {stage: 1e3 * quantiles([s.get(stage, 0.0) for s in stages])[0] for stage in STAGES}
            row.counts = count(step, batch)
            row.peak_memory_mib = peak_memory(lambda step=step: step(batch), device)
            steps[variant.name] = step
        except Exception as error:  # out of memory, or no compiler: a row of its own
            row.status = "failed" if variant.name.startswith("detr_fast") else "unavailable"
            row.reason = reason_of(error)
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    blocks = {name: (lambda step=step: step(batch)) for name, step in steps.items()}
    measured = interleave(blocks, 1, clock_for(device), budget=seconds, min_rounds=min_rounds, max_rounds=50)
    for provider, samples in measured.items():
        row = rows[provider]
        median, p20, p80 = quantiles(samples)
        row.status, row.median_ms, row.p20_ms, row.p80_ms = "ok", 1e3 * median, 1e3 * p20, 1e3 * p80
        row.images_per_s, row.tflop_per_s = shape.batch / median, flops / median / 1e12
        precision = "bf16" if steps[provider].variant.bf16 else "fp32"
        row.percent_of_limit = 100 * flops / ceilings.matmul[precision] / median
    return list(rows.values())


def cases(args: argparse.Namespace, device: torch.device) -> list[tuple[str, int, str]]:
    """(model, batch, padding), the most telling first."""
    if args.model or args.batch or args.padding:
        models = args.model or (["R50"] if device.type == "cuda" else ["tiny"])
        return [(m, b, p) for m in models for b in args.batch or [16] for p in args.padding or ["none"]]
    if device.type == "cpu":
        return [("tiny", 2, "none"), ("tiny", 2, "coco"), ("R50", 2, "none")][: 1 if args.quick else 3]
    chosen = [("R50", 16, "none"), ("R50", 16, "coco")]
    if not args.quick:
        chosen += [("DC5", 16, "none"), ("R101", 16, "none")] + [("R50", b, "none") for b in (2, 4, 8, 32, 64)]
    return chosen


def case_shape(model: str, batch: int, padding: str, device: torch.device) -> BatchShape:
    """ "none": 800 x 1216 throughout; "coco": a typical batch of real sizes.

    A tenth of that (of each side) for the tiny model, and a quarter for the others on a CPU.
    """
    scale = 0.1 if model == "tiny" else 0.25 if device.type == "cpu" else 1.0
    kind = "DC5" if model == "DC5" else "R50"
    if padding == "none":
        return nominal_batch(kind, batch, scale)
    if padding == "coco":
        return typical_real_batch(kind, batch, scale)
    raise ValueError(f"--padding {padding}: the training step is measured with none or coco")


def print_rows(rows: list[Row]) -> None:
    first = rows[0]
    print(f"\ntrain: {first.model}, batch {first.batch}, {first.size}, padding {first.padding}")
    for row in sorted(rows, key=lambda r: (r.median_ms is None, r.median_ms or 0.0)):
        if row.median_ms is None:
            print(f"  {row.provider:40} {row.status}: {row.reason or 'same loss, not timed'}")
            continue
        counts = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in row.counts.items())
        memory = "" if row.peak_memory_mib is None else f", {row.peak_memory_mib:.0f} MiB"
        print(
            f"  {row.provider:40} {row.median_ms:9.2f} ms ({row.p20_ms:.2f}-{row.p80_ms:.2f}) {row.images_per_s:7.1f} "
            f"img/s {row.tflop_per_s:7.3g} TFLOP/s {row.percent_of_limit:5.1f} % of limit{memory}; "
            f"{counts or 'not counted'}{'; ' + row.reason if row.reason else ''}"
        )
        print(" " * 43 + "  ".join(f"{stage} {value:.2f}" for stage, value in row.stages_ms.items() if value))


def run_train(args: argparse.Namespace, device: torch.device) -> int:
    """Measures what `args` (of the command line) asks for; returns 1 if a variant of ours is wrong or fails."""
    started = time.monotonic()
    cuda = device.type == "cuda"
    compile = cuda if args.compile == "auto" else args.compile == "yes"
    if not cuda:
        print(
            f"CPU ({device_name(device)}): small images in float32; leave the machine alone meanwhile. Not measured "
            "without a GPU: the kernels, cuDNN's fused convolutions, bf16, launches, waits for the GPU and peak "
            "memory; operators and values read by the host are counted instead. Loading from disk: python -m "
            "benchmarks.studies.data."
        )
    chosen = variants(device, compile)
    if args.provider:
        # The first one is what the others' losses are compared with.
        chosen = chosen[:1] + [v for v in chosen[1:] if any(part.lower() in v.name.lower() for part in args.provider)]
    ceilings = None if args.check_only else measure_ceilings(device, ["bf16", "fp32"] if cuda else ["fp32"], args.quick)
    record = suite_record("train", provenance(device), ["train"], ceilings) | {"steps": []}
    folder = args.output or Path("benchmarks/results") / slug(device_name(device))
    for name, batch, padding in cases(args, device):
        if args.budget is not None and time.monotonic() - started > args.budget:
            record["not_measured"].append({"case": f"{name} B{batch} {padding}", "reason": "time budget"})
            print(f"not measured: train {name} B{batch} {padding}: time budget of {args.budget:g} s")
            continue
        rows = measure_case(
            name,
            case_shape(name, batch, padding, device),
            padding,
            device,
            ceilings,
            chosen,
            seed=args.seed,
            seconds=(5.0 if cuda else 1.0) if args.quick else 15.0,
            min_rounds=5 if cuda else 3 if args.quick else 9,
            deadline=float("inf") if args.budget is None else started + 0.6 * args.budget,
        )
        print_rows(rows)
        record["steps"] += [asdict(row) for row in rows]
        if not args.no_save and not args.check_only:
            print(f"results: {save(record, folder)}")
    return int(
        any(row["status"] in ("wrong", "failed") and row["provider"].startswith("detr_fast") for row in record["steps"])
    )
