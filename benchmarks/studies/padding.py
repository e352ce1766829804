"""How much of a training batch is padding, in the original's order and grouped: `python -m benchmarks.studies.padding`.

Nothing is timed and no image is read: the augmentation is drawn for the sizes of COCO images, and batches are formed by
the package's own samplers. Rows: random order, as the original trains; grouped by the files' aspect ratio, as
torchvision's detection reference does; and grouped by the size that the augmentation gives (the default here). A second
table counts the distinct shapes of the grouped batches where their sizes are rounded up to a multiple: each new shape
costs a GPU a cuDNN plan for every convolution.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch

from detr_fast.data import SizeGroupedBatchSampler, make_coco_transforms
from detr_fast.data.grouping import WINDOW, SizePlanner, padded_sizes, valid_shares

from ..shapes import coco_sizes

ORDERS = ("random", "aspect ratio", "planned size")


class AnnotatedSizes:
    """A dataset of sizes: (width, height) of each image, and what the original's training augmentation makes of it."""

    def __init__(self, sizes: list[tuple[int, int]]):
        self.sizes = sizes
        self.transforms = make_coco_transforms("train")

    def __len__(self) -> int:
        return len(self.sizes)

    def planned_size(self, index: int) -> tuple[int, int]:
        width, height = self.transforms.draw(self.sizes[index])[1]
        return height, width


def resampled(sizes: list[tuple[int, int]], count: int, seed: int) -> list[tuple[int, int]]:
    """`count` sizes, each of `sizes` about equally often."""
    repeated = (sizes * -(-count // len(sizes)))[:count]
    random.Random(seed).shuffle(repeated)
    return repeated


def batches_of(order: str, data: AnnotatedSizes, planned: np.ndarray, batch: int, seed: int, window: int) -> np.ndarray:
    """[batches, batch] indices of one epoch."""
    if order == "planned size":
        sampler = SizeGroupedBatchSampler(
            len(data), lambda epoch, indices: planned[indices].tolist(), batch, seed=seed, window=window
        )
        return np.array(list(sampler))
    shuffled = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).numpy()
    if order == "aspect ratio":
        # torchvision's --aspect-ratio-group-factor 3: batches within seven classes of width / height.
        ratios = np.array([width / height for width, height in data.sizes])[shuffled]
        classes = np.digitize(ratios, 2 ** np.linspace(-1, 1, 7))
        groups = [shuffled[classes == c] for c in np.unique(classes)]
        groups = [group[: len(group) // batch * batch].reshape(-1, batch) for group in groups]
        return np.concatenate(groups)
    return shuffled[: len(data) // batch * batch].reshape(-1, batch)


def rows(sizes: list[tuple[int, int]], batches: list[int], seed: int, window: int) -> list[dict]:
    """One row for each batch size and order: shares of valid pixels, tokens (stride 32) and pairs, in 0..1."""
    data = AnnotatedSizes(sizes)
    planned = np.array(SizePlanner(data, seed)(0, range(len(data))))
    table = []
    for batch in batches:
        for order in ORDERS:
            indices = batches_of(order, data, planned, batch, seed, window)
            table.append({"batch": batch, "order": order, "batches": len(indices)} | valid_shares(planned[indices]))
    return table


def divisor_rows(
    sizes: list[tuple[int, int]], batch: int, steps: int, divisors: list[int], seed: int, window: int
) -> list[dict]:
    """One row for each divisor: distinct shapes in `steps` grouped batches, and pixels beside divisor 1's."""
    data = AnnotatedSizes(sizes)
    planned = np.array(SizePlanner(data, seed)(0, range(len(data))))
    chosen = planned[batches_of("planned size", data, planned, batch, seed, window)[:steps]]
    exact, table = padded_sizes(chosen).prod(axis=1).sum(), []
    for divisor in divisors:
        shapes = padded_sizes(chosen, divisor)
        row = {"batch": batch, "steps": len(chosen), "divisor": divisor, "shapes": len(np.unique(shapes, axis=0))}
        row["more_pixels"] = float(shapes.prod(axis=1).sum() / exact - 1)
        table.append(row | valid_shares(chosen, divisor=divisor))
    return table


def divisor_markdown(table: list[dict]) -> str:
    heads = ["batch", "steps", "multiple of", "distinct shapes", "more pixels", "valid pixels", "valid tokens"]
    counts, shares = ("batch", "steps", "divisor", "shapes"), ("more_pixels", "pixels", "tokens")
    return in_markdown(heads, [[row[n] for n in counts] + [f"{row[n]:.1%}" for n in shares] for row in table])


def markdown(table: list[dict]) -> str:
    heads = ["batch", "order", "valid pixels", "valid tokens", "valid pairs", "pixels computed per valid one"]
    rows = []
    for row in table:
        shares = [f"{row[name]:.1%}" for name in ("pixels", "tokens", "pairs")]
        rows.append([row["batch"], row["order"], *shares, f"{1 / row['pixels']:.2f}"])
    return in_markdown(heads, rows)


def in_markdown(heads: list[str], rows: list[list]) -> str:
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (heads, ["---"] * len(heads), *rows))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.padding", description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=118_000, help="images in an epoch (default %(default)s)")
    parser.add_argument(
        "--ann", type=Path, nargs="+", help="COCO jsons to take sizes from; default: a committed sample"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 4, 8, 16, 32])
    parser.add_argument("--window", type=int, default=WINDOW, help="images grouped at a time (default %(default)s)")
    parser.add_argument("--divisor", type=int, nargs="+", default=[1, 32, 64, 128])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the rows there, as JSON")
    args = parser.parse_args(argv)
    sizes = coco_sizes()
    if args.ann:
        entries = [entry for path in args.ann for entry in json.loads(path.read_text(encoding="utf-8"))["images"]]
        sizes = [(entry["width"], entry["height"]) for entry in entries]
    images = resampled(sizes, args.images, args.seed)
    table = rows(images, args.batch, args.seed, args.window)
    print(f"{args.images} images of {len(sizes)} sizes, window {args.window}\n\n{markdown(table)}")
    divisors = divisor_rows(images, min(16, args.images), 2000, args.divisor, args.seed, args.window)
    print(f"\n{divisor_markdown(divisors)}")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"orders": table, "divisors": divisors}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
