"""Latency of a single image, call by call and as a CUDA graph: `python -m benchmarks latency`.

The time from a call until its result is there, one call after another, of

- network: from a normalised batch of one image on the device to the outputs;
- predict: from a PIL image in memory to named boxes, with resizing and copies (`Detector.predict`);

each with its kernels launched one by one ("eager"), and with the network replayed as a graph (`Detector.low_latency`).
Without a GPU there are no graphs, and the time measured is that of the calls on the CPU. Before anything is timed the
outputs are compared with those of the network in float32, and what `predict` finds with what it finds call by call.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detr_fast.inference.detector import Detector
from detr_fast.inference.latency import ForwardGraphs
from detr_fast.inference.loading import Loaded
from detr_fast.nested_tensor import NestedTensor
from detr_fast.tasks import task_of
from detr_fast.training.step import PRECISIONS

from ..harness.measure import reason_of
from ..harness.provenance import device_name, provenance, slug
from ..harness.results import save, suite_record
from ..harness.timing import WallClock, interleave, quantiles
from .infer import TOLERANCE, build_model, difference

# Width and height of the image, and the short side to which it is resized; of the quick run's tiny model.
PICTURE, SHORT, QUICK_SHORT = (640, 480), 800, 96
CALLS = 2  # before a graph is there


@dataclass
class Row:
    """One way of calling; `status`: ok, checked (right, not timed), wrong or failed."""

    what: str  # network or predict
    precision: str
    launch: str  # eager or graph
    size: tuple[int, int]  # height and width of the resized image
    status: str = "checked"
    reason: str = ""
    difference: float | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None


def build_loaded(device: torch.device, quick: bool) -> Loaded:
    """A DETR with random weights as `load` would give it: R50, or a tiny one, in float32."""
    model, config = build_model("tiny" if quick else "R50")
    config = replace(config, device=str(device), image_size=QUICK_SHORT if quick else SHORT)
    task = task_of(config)
    classes = model.class_embed.out_features - 1
    return Loaded(
        task, config, model.to(device), torch.nn.Identity(), task.postprocessors(config, classes), categories=None
    )


def ways(loaded: Loaded, precision: str, launches: list[str], image: Image.Image) -> dict[tuple[str, str], Callable]:
    """(what, launch) → a call that returns its result when it is there: logits and boxes, or sorted scores."""
    device = torch.device(loaded.config.device)
    loaded = replace(loaded, config=replace(loaded.config, precision=precision))
    dtype = PRECISIONS[precision]
    width, height = image.size
    short = loaded.config.image_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, short, int(short * width / height), generator=generator).to(device, dtype)
    if device.type == "cuda":
        images = images.contiguous(memory_format=torch.channels_last)
    samples = NestedTensor(images, None, no_padding=True)
    calls: dict[tuple[str, str], Callable] = {}
    for launch in launches:
        network = loaded.model if launch == "eager" else ForwardGraphs(loaded.model, _refuse)
        detector = Detector(loaded)
        if launch == "graph":
            detector.low_latency()

        def outputs(network=network):
            with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                out = network(samples)
            _wait(device)
            return out["pred_logits"], out["pred_boxes"]

        def scores(detector=detector):
            return (torch.from_numpy(np.sort(detector.predict(image, 0).scores)),)

        calls["network", launch], calls["predict", launch] = outputs, scores
    return calls


def _refuse(line: str) -> None:
    raise RuntimeError(line)  # a time without a graph is none of a graph


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    calls: dict[tuple[str, str], Callable],
    exact: tuple[Tensor, ...],
    precision: str,
    size: tuple[int, int],
    *,
    timed: bool,
    seconds: float,
) -> list[Row]:
    """Checks every way of calling, and with `timed` measures the right ones interleaved.

    Args:
        calls: see `ways`.
        exact: the network's outputs in float32.
        precision, size: what the rows say.
    """
    rows, right = [], {}
    expected = {"network": exact}
    for (what, launch), call in calls.items():
        row = Row(what, precision, launch, size)
        rows.append(row)
        try:
            for _ in range(CALLS + 1):
                value = call()
        except Exception as error:  # whatever a recording raises: a row of its own
            row.status, row.reason = "failed", reason_of(error)
            continue
        row.difference = difference(value, expected.setdefault(what, value))
        if not row.difference <= TOLERANCE[precision]:
            row.status, row.reason = "wrong", f"differs by {row.difference:.2g}"
            continue
        right[what, launch] = call
    if timed:
        measured = interleave(right, 1, WallClock(), budget=seconds, min_rounds=5, max_rounds=200)
        for row in rows:
            if (row.what, row.launch) in measured:
                row.status = "ok"
                times = quantiles(measured[row.what, row.launch])
                row.median_ms, row.p20_ms, row.p80_ms = (1e3 * value for value in times)
    return rows


def print_rows(rows: list[Row]) -> None:
    for row in rows:
        name = f"  {row.what:8} {row.precision} {row.launch:6}"
        apart = row.reason or f"differs by {row.difference:.1e}"
        times = "" if row.median_ms is None else f"{row.median_ms:9.2f} ms ({row.p20_ms:.2f}-{row.p80_ms:.2f}); "
        print(f"{name} {times or f'{row.status}: '}{apart}")


def run_latency(args: argparse.Namespace, device: torch.device) -> int:
    """Measures what `args` (of the command line) asks for; returns 1 if a result is wrong or a way of calling fails."""
    on_gpu = device.type == "cuda"
    launches = [launch for launch in args.launch if launch == "eager" or on_gpu]
    precisions = args.precision or (["bf16", "fp32"] if on_gpu else ["fp32"])
    if not launches:
        raise ValueError("latency: there are no CUDA graphs on a CPU; expected --launch eager, or a GPU")
    if set(precisions) - set(TOLERANCE):
        raise ValueError(f"latency: --precision {' '.join(precisions)}; expected {' or '.join(TOLERANCE)}")
    print(f"{device_name(device)}; leave the machine alone meanwhile.")
    if not on_gpu:
        print(
            "There are no CUDA graphs on a CPU: measured are the same calls one by one, with "
            f"{torch.get_num_threads()} threads."
        )
    started = time.monotonic()
    torch.manual_seed(args.seed)
    loaded = build_loaded(device, args.quick)
    pixels = np.random.default_rng(args.seed).integers(0, 256, (*PICTURE[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    record = suite_record("latency", provenance(device), ["latency"], None) | {"latency": []}
    folder = args.output or Path("benchmarks/results") / slug(device_name(device))
    exact = ways(loaded, "fp32", ["eager"], image)["network", "eager"]()
    size = (loaded.config.image_size, int(loaded.config.image_size * PICTURE[0] / PICTURE[1]))
    print(f"latency: one image, {PICTURE[0]} x {PICTURE[1]}, resized to {size[1]} x {size[0]}")
    for precision in precisions:
        if args.budget is not None and time.monotonic() - started > args.budget:
            record["not_measured"].append({"case": precision, "reason": f"time budget of {args.budget:g} s"})
            print(f"not measured: {precision}: time budget of {args.budget:g} s")
            continue
        calls = ways(loaded, precision, launches, image)
        rows = measure(calls, exact, precision, size, timed=not args.check_only, seconds=1.0 if args.quick else 8.0)
        print_rows(rows)
        record["latency"] += [asdict(row) for row in rows]
        if not args.no_save and not args.check_only:
            print(f"results: {save(record, folder)}")
    return int(any(row["status"] in ("wrong", "failed") for row in record["latency"]))
