"""ResNet-50's distinct convolutions, one by one, in every way this package can run them:
`python -m benchmarks.studies.convolutions`.

Ways: the convolution alone; convolution, then bias, residual and ReLU as PyTorch's own steps; and `folded_conv`,
whatever it chooses. The shapes are those of one batch at the resolution of DETR's training images. Before a way is
timed its result is compared with float64's; memory that is handed out next is filled with NaN first, so that an element
which nobody writes shows. "first" is the first call with a new width: what each new shape of a batch costs.
"""

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from detr_fast.ops.folded_conv import folded_conv

WAYS = ("convolution", "steps", "folded_conv")


@dataclass(frozen=True)
class Shape:
    """A convolution of the body: channels, kernel, stride, its input's stride in the image, and what follows it."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    level: int
    residual: bool
    relu: bool
    count: int

    def __str__(self) -> str:
        tail = " +res" * self.residual + " relu" * self.relu
        return f"{self.kernel}x{self.kernel}/{self.stride} {self.inputs}->{self.outputs} @1/{self.level}{tail}"


def resnet50() -> list[Shape]:
    """The convolutions behind the stem, each distinct one once, with how often it comes."""
    found: dict[Shape, int] = {}

    def add(*fields) -> None:
        shape = Shape(*fields, count=0)
        found[shape] = found.get(shape, 0) + 1

    channels, level = 64, 4
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            stride = 2 if block == 0 and width > 64 else 1
            add(channels, width, 1, 1, level, False, True)
            add(width, width, 3, stride, level, False, True)
            if block == 0:
                add(channels, 4 * width, 1, stride, level, False, False)
            level *= stride
            add(width, 4 * width, 1, 1, level, True, True)
            channels = 4 * width
    return [replace(shape, count=count) for shape, count in found.items()]


def inputs_of(shape: Shape, batch: int, height: int, width: int, dtype: torch.dtype, device: torch.device) -> dict:
    generator = torch.Generator().manual_seed(0)

    def draw(*size, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(device, dtype)

    rows, columns = -(-height // shape.level), -(-width // shape.level)
    fan_in = shape.inputs * shape.kernel**2
    x = draw(batch, shape.inputs, rows, columns).to(memory_format=torch.channels_last)
    weight = draw(shape.outputs, shape.inputs, shape.kernel, shape.kernel, scale=fan_in**-0.5)
    bias, residual = draw(shape.outputs), None
    if shape.residual:
        residual = draw(batch, shape.outputs, rows, columns).to(memory_format=torch.channels_last)
    return {"x": x, "weight": weight.to(memory_format=torch.channels_last), "bias": bias, "residual": residual}


def run(way: str, shape: Shape, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    stride, padding = (shape.stride,) * 2, (shape.kernel // 2,) * 2
    if way == "folded_conv":
        constants = torch.ones_like(bias, dtype=torch.float32), bias.float()
        return folded_conv(x, weight, *constants, residual, relu=shape.relu, stride=stride, padding=padding)
    out = F.conv2d(x, weight, None, stride, padding)
    if way == "convolution":
        return out
    out = out + bias[:, None, None]
    if residual is not None:
        out = out + residual
    return out.relu() if shape.relu else out


def poison(inputs: dict, shape: Shape) -> None:
    """Leaves NaN in the memory that the next output will get."""
    x = inputs["x"]
    size = (x.shape[0], shape.outputs, -(-x.shape[2] // shape.stride), -(-x.shape[3] // shape.stride))
    # Held together: one that is freed at once would be the same block again.
    _ = [torch.full(size, torch.nan, dtype=x.dtype, device=x.device) for _ in range(3)]


def milliseconds(call, device: torch.device, seconds: float) -> float:
    """Median time of a call, measured for about so many seconds."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
        if device.type == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
        else:
            began = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - began))
    return sorted(times)[len(times) // 2]


def measure(shape: Shape, args: argparse.Namespace, device: torch.device) -> dict:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.dtype]
    inputs = inputs_of(shape, args.batch, args.height, args.width, dtype, device)
    exact_inputs = {name: None if x is None else x[:1].double() if x.dim() == 4 and name != "weight" else x.double()
                    for name, x in inputs.items()}  # fmt: skip
    row: dict = {"shape": str(shape), "count": shape.count}
    for index, way in enumerate(WAYS, 1):
        # A width of its own: the library has not planned it for another way.
        wider = inputs_of(shape, args.batch, args.height, args.width + 32 * index, dtype, device)
        exact = run("convolution" if way == "convolution" else "steps", shape, **exact_inputs)
        poison(inputs, shape)
        found = run(way, shape, **inputs)[:1].double()
        error = float((found - exact).abs().max() / exact.abs().max())
        if not error < (1e-5 if dtype == torch.float32 else 2e-2):
            row[way] = f"wrong by {error:.2g}"
            continue
        began = time.perf_counter()
        run(way, shape, **wider)
        if device.type == "cuda":
            torch.cuda.synchronize()
        first = 1e3 * (time.perf_counter() - began)
        row[way] = {"ms": milliseconds(lambda w=way: run(w, shape, **inputs), device, args.seconds), "first_ms": first}
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.convolutions", description="See the module.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1216)
    parser.add_argument(
        "--seconds", type=float, default=0.3, help="to time each way of each shape (default %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="also write the rows there, as JSON, after each")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # float32 is compared with float64
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, {args.dtype}, {args.batch}x{args.height}x{args.width}, channels-last\n")
    print(f"{'':38}{'':>3}" + "".join(f"{way + ' ms':>16}{'first':>8}" for way in WAYS))
    rows, totals, wrong = [], dict.fromkeys(WAYS, 0.0), 0
    with torch.no_grad():
        for shape in resnet50():
            row = measure(shape, args, device)
            cells = ""
            for way in WAYS:
                if isinstance(row[way], str):
                    wrong += 1
                    cells += f"{row[way]:>24}"
                else:
                    totals[way] += shape.count * row[way]["ms"]
                    cells += f"{row[way]['ms']:16.3f}{row[way]['first_ms']:8.1f}"
            print(f"{row['shape']:38}{row['count']:>3}{cells}", flush=True)
            rows.append(row)
            if args.output:
                args.output.parent.mkdir(parents=True, exist_ok=True)
                found = {
                    "device": name,
                    "torch": torch.__version__,
                    "dtype": args.dtype,
                    "rows": rows,
                    "totals": totals,
                }
                args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{'all of the body, forward':41}" + "".join(f"{totals[way]:16.2f}{'':8}" for way in WAYS))
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
