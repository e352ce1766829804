"""Resident memory of inference on a CPU over images of ever new sizes: `python -m benchmarks.studies.memory`.

oneDNN compiles code for every shape and keeps it, 1024 pieces at most (ONEDNN_PRIMITIVE_CACHE_CAPACITY); DETR R50 with
random weights and images of random heights and widths fills that after about thirty sizes. What memory grows by after
that is the C library's, between the blocks that are freed and taken again. Two rows, each in a process of its own: with
the kept weights of `PackedConvs`, and with PyTorch's convolutions. Figures are MB above what the model takes before its
first image; the last column is what is left when the C library has given back what it has free.
"""

import argparse
import ctypes
import multiprocessing
import os
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch


def grown(images: int, every: int, sides: tuple[int, int], packed: bool) -> list[float]:
    """MB of resident memory above the start after each `every` images, and at last what cannot be given back.

    Args:
        images: how many, one at a time.
        every: of how many a figure is taken.
        sides: the smallest and the largest height and width, in pixels.
        packed: with `PackedConvs`.
    """
    from detr_fast.models import backbone, detr_resnet50

    if not packed:
        backbone.runs_packed = lambda x: False
    draw = random.Random(0)
    torch.manual_seed(0)
    model = detr_resnet50(weights=None, norm="frozen").eval()
    figures, before = [], _resident()
    with torch.no_grad():
        for number in range(1, images + 1):
            model(torch.randn(1, 3, draw.randint(*sides), draw.randint(*sides)))
            if number % every == 0:
                figures.append(_resident() - before)
    ctypes.CDLL(None).malloc_trim(0)  # glibc's
    return [*figures, _resident() - before]


def alone(*arguments) -> list[float]:
    """`grown` in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(grown, *arguments).result()


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--sides", type=int, nargs=2, default=(80, 230), metavar=("MIN", "MAX"))
    parser.add_argument("--kind", nargs="+", choices=["packed", "stock"], default=["packed", "stock"])
    args = parser.parse_args(argv)
    columns = [str(number) for number in range(args.every, args.images + 1, args.every)]
    print(f"sides of {args.sides[0]} to {args.sides[1]} pixels, torch {torch.__version__}\n")
    print(f"| after so many images | {' | '.join(columns)} | kept |")
    print("|---" * (len(columns) + 2) + "|")
    for kind in args.kind:
        figures = alone(args.images, args.every, tuple(args.sides), kind == "packed")
        print(f"| {kind} | {' | '.join(f'{figure:.0f}' for figure in figures)} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
