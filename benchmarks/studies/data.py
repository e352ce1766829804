"""What one CPU core loads: the original's transforms against ours, `python -m benchmarks.studies.data --coco_path DIR`.

Both take the same images with the same draws to what a worker hands to the training process:

- original: PIL decodes and resizes, float32, normalised, padded to a NestedTensor in the worker;
- ours: uint8 from the decoder on, packed into one buffer; normalising and padding happen on the training device.

The results are compared before anything is timed: a difference of more than 2 grey levels prints no times. Times are
of the CPU (`time.thread_time`) in one thread, image by image in turn, so that other work on the machine counts little.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from detr_fast.data import PackedBatch, PackedCollate, build_dataset, build_loader, make_shapes_dataset
from detr_fast.data.seeding import seeded
from detr_fast.data.transforms import IMAGENET_STD
from detr_fast.nested_tensor import NestedTensor, collate_fn

PIPELINES = {"original": (False, collate_fn), "ours": (True, PackedCollate())}
TOLERANCE = 2 / 255 / min(IMAGENET_STD) * 1.001  # two grey levels after normalising


def _seconds(function) -> tuple[float, object]:
    start = time.thread_time()
    result = function()
    return time.thread_time() - start, result


def _load(dataset):
    image_id = dataset.ids[0]
    return lambda index: dataset._load(dataset._path(index), image_id)


def _bytes(samples) -> int:
    parts = (samples.buffer,) if isinstance(samples, PackedBatch) else samples.decompose()
    return sum(part.numel() * part.element_size() for part in parts)


def check(original: NestedTensor, ours: PackedBatch) -> float:
    """The largest difference of the two batches, in grey levels. Raises ValueError where it is more than allowed."""
    got = ours.to("cpu")
    if got.tensors.shape != original.tensors.shape or not torch.equal(got.mask, original.mask):
        raise ValueError("the pipelines' batches differ in size or mask")
    difference = (got.tensors - original.tensors).abs().max().item()
    if difference > TOLERANCE:
        raise ValueError(f"the pipelines differ by {difference * 255 * min(IMAGENET_STD):.2f} grey levels")
    return difference * 255 * min(IMAGENET_STD)


def measure(coco_path: Path, images: int, batch: int, seed: int) -> list[dict]:
    """One row for each pipeline: milliseconds of CPU per image (medians), megabytes per image, images per second."""
    args = SimpleNamespace(coco_path=coco_path)
    datasets = {name: build_dataset("train", args, uint8=uint8) for name, (uint8, _) in PIPELINES.items()}
    size = len(datasets["ours"])
    indices = [index % size for index in range(max(1, images // batch) * batch)]
    loads = {name: _load(dataset) for name, dataset in datasets.items()}
    times = {name: {"decode": [], "sample": [], "collate": []} for name in PIPELINES}
    sent = dict.fromkeys(PIPELINES, 0)
    worst = 0.0
    for start in range(-batch, len(indices), batch):  # the first batch warms up and is not counted
        samples = {name: [] for name in PIPELINES}
        for position in range(max(start, 0), max(start, 0) + batch):
            names = list(PIPELINES) if position % 2 else list(PIPELINES)[::-1]
            for name in names:
                index = indices[position]
                decode, _ = _seconds(lambda name=name, index=index: loads[name](index))
                with seeded(seed, position, index):
                    whole, sample = _seconds(lambda name=name, index=index: datasets[name][index])
                samples[name].append(sample)
                if start >= 0:
                    times[name]["decode"].append(decode)
                    times[name]["sample"].append(whole)
        batches = {}
        for name, (_, collate) in PIPELINES.items():
            seconds, batches[name] = _seconds(lambda collate=collate, part=samples[name]: collate(part))
            if start >= 0:
                times[name]["collate"].append(seconds / batch)
                sent[name] += _bytes(batches[name][0])
        worst = max(worst, check(batches["original"][0], batches["ours"][0]))
    table = []
    for name, parts in times.items():
        decode, sample, collate = (1e3 * statistics.median(parts[part]) for part in ("decode", "sample", "collate"))
        row = {"pipeline": name, "decode_ms": decode, "augment_ms": sample - decode, "collate_ms": collate}
        row |= {"total_ms": sample + collate, "images_per_s_and_core": 1e3 / (sample + collate)}
        table.append(row | {"mb_per_image": sent[name] / len(indices) / 1e6, "worst_grey_levels": worst})
    return table


def loader_rate(coco_path: Path, batch: int, workers: int, batches: int, seed: int) -> float:
    """Images per second that leave our loader with `workers` processes, by the clock, after the first batches."""
    dataset = build_dataset("train", SimpleNamespace(coco_path=coco_path), uint8=True)
    loader = build_loader(
        dataset, batch, train=True, num_workers=workers, seed=seed, collate_fn=PackedCollate(), pin_memory=False
    )
    warm, seen, start = 2 * workers, 0, 0.0
    while seen < warm + batches:
        for _ in loader:
            seen += 1
            if seen == warm:
                start = time.perf_counter()
            if seen == warm + batches:
                break
    return batches * batch / (time.perf_counter() - start)


def markdown(table: list[dict]) -> str:
    lines = [
        "| pipeline | decode | augment | collate | total, ms/image | img/s per core | MB/image sent |",
        "|" + "---|" * 7,
    ]
    for row in table:
        parts = " | ".join(f"{row[name]:.2f}" for name in ("decode_ms", "augment_ms", "collate_ms", "total_ms"))
        lines.append(
            f"| {row['pipeline']} | {parts} | {row['images_per_s_and_core']:.0f} | {row['mb_per_image']:.1f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.data", description=__doc__.split("\n")[0])
    parser.add_argument("--coco_path", type=Path, help="COCO's layout; default: generated images of COCO's size")
    parser.add_argument("--images", type=int, default=80, help="images to measure (default %(default)s)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0, help="also measure the loader with so many processes")
    parser.add_argument("--cores", type=int, default=16, help="cores to extrapolate to (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the rows there, as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = args.coco_path
        if path is None:
            path = make_shapes_dataset(folder, num_train=args.batch, num_val=1, image_size=480)
        try:
            table = measure(path, args.images, args.batch, args.seed)
        except ValueError as error:
            print(f"not timed: {error}")
            return 1
        original, ours = table
        print(markdown(table))
        print(f"largest difference: {ours['worst_grey_levels']:.2f} grey levels")
        print(f"ratio: {original['total_ms'] / ours['total_ms']:.2f}")
        rates = {row["pipeline"]: row["images_per_s_and_core"] * args.cores for row in table}
        print(f"{args.cores} cores: {rates['ours']:.0f} img/s, {rates['original']:.0f} the original's way")
        if args.workers:
            rate = loader_rate(path, args.batch, args.workers, 8 * args.workers, args.seed)
            print(f"loader with {args.workers} workers: {rate:.0f} img/s by the clock")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
