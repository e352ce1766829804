"""Seconds and memory of opening a large json: `python -m benchmarks annotations`.

A json of COCO's size is made (118 287 images, 803 000 annotations with a polygon each, 447 MB), and a folder without
images. Then each in a process of its own: reading it for the first time, opening it again from the cache, and an epoch
over all targets in forked workers; and, with one JPEG under all names, the first batch of a training loader: dataset,
sampler and loader as the trainer makes them, the json read for the first time, and again. Memory is that of the process
above what it has after the imports: the largest resident set, and what is private to it. `--boxes` leaves the polygons
out; `--images 2000000 --annotations 20000000 --boxes` is Objects365's size.

`--panoptic` measures a panoptic json of COCO's size instead (118 287 images, 1.3 million segments): reading it, opening
it again, and an epoch over all targets, of pictures with one row of pixels.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..harness.provenance import provenance

CLASSES = 80
PANOPTIC_CLASSES = 133
_AT_A_TIME = 20_000
_COLOURS = 64  # the most segments that a panoptic image may have


def generate(path: Path, images: int, annotations: int, *, polygons: bool, seed: int) -> None:
    """Writes a json with numbers to two decimals, as COCO's; about one annotation in a hundred is a crowd's RLE. The
    polygons are drawn from ten thousand random ones."""
    rng = np.random.default_rng(seed)
    shapes = []
    for many in rng.integers(8, 43, 10_000 if polygons else 0).tolist():
        ring = (rng.random((many, 2)) * (60, 60) + rng.uniform(0, 400, 2)).round(2).ravel().tolist()
        shapes.append(f'"segmentation": [{ring}], ')
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"info": {"description": "random"}, "images": [')
        for start in range(0, images, _AT_A_TIME):
            count = min(_AT_A_TIME, images - start)
            file.write(", " * (start > 0))
            file.write(", ".join(
                f'{{"license": 3, "file_name": "{i:012d}.jpg", "coco_url": "http://images/{i:012d}.jpg", '
                f'"height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45", "id": {i}}}'
                for i in range(start + 1, start + count + 1)
            ))  # fmt: skip
        file.write('], "annotations": [')
        for start in range(0, annotations, _AT_A_TIME):
            count = min(_AT_A_TIME, annotations - start)
            corners = rng.uniform(0, (500, 380), (count, 2)).round(2)
            sizes = rng.uniform(8, 90, (count, 2)).round(2)
            owners, labels = rng.integers(1, images + 1, count), rng.integers(1, CLASSES + 1, count)
            which, crowd = rng.integers(0, 10_000, count), rng.random(count) < 0.01
            rows = []
            numbers = zip(corners.tolist(), sizes.tolist(), owners.tolist(), labels.tolist(), which.tolist(),
                          crowd.tolist(), strict=True)  # fmt: skip
            for i, ((x, y), (w, h), owner, label, shape_of, is_crowd) in enumerate(numbers, start + 1):
                shape = ""
                if polygons and is_crowd:
                    shape = '"segmentation": {"counts": [1000, 500, 305700], "size": [480, 640]}, '
                elif polygons:
                    shape = shapes[shape_of]
                rows.append(
                    f'{{{shape}"area": {w * h:.4f}, "iscrowd": {int(is_crowd)}, "image_id": {owner}, '
                    f'"bbox": [{x}, {y}, {w}, {h}], "category_id": {label}, "id": {i}}}'
                )
            file.write(", " * (start > 0) + ", ".join(rows))
        file.write('], "categories": ')
        categories = [{"supercategory": "thing", "id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)]
        file.write(json.dumps(categories) + "}")


def colours(seed: int) -> np.ndarray:
    """int64 [_COLOURS]: the ids from which those of every panoptic image are drawn."""
    return np.random.default_rng((seed, 1)).choice((1 << 24) - 1, _COLOURS, replace=False) + 1


def generate_panoptic(path: Path, images: int, segments: int, *, seed: int) -> None:
    """Writes a panoptic json with the fields of COCO's."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(segments, np.full(images, 1 / images))
    assert counts.max() <= _COLOURS
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"info": {"description": "random"}, "licenses": [], "images": [')
        for start in range(0, images, _AT_A_TIME):
            file.write(", " * (start > 0))
            file.write(", ".join(
                f'{{"license": 3, "file_name": "{i:012d}.jpg", "coco_url": "http://images/{i:012d}.jpg", '
                f'"height": 480, "width": 640, "date_captured": "2013-11-14 11:18:45", '
                f'"flickr_url": "http://farm9.images/8186/{i:012d}_z.jpg", "id": {i}}}'
                for i in range(start + 1, min(start + _AT_A_TIME, images) + 1)
            ))  # fmt: skip
        file.write('], "annotations": [')
        for start in range(0, images, _AT_A_TIME):
            own = counts[start : start + _AT_A_TIME]
            total = int(own.sum())
            ids = rng.permuted(np.tile(colours(seed), (len(own), 1)), axis=1)
            ids = ids[np.arange(_COLOURS) < own[:, None]]
            labels, crowd = rng.integers(1, PANOPTIC_CLASSES + 1, total), rng.random(total) < 0.01
            boxes = np.hstack((rng.integers(0, 300, (total, 2)), rng.integers(8, 180, (total, 2))))
            numbers = zip(ids.tolist(), labels.tolist(), crowd.tolist(), boxes.tolist(), strict=True)
            listed = [
                f'{{"id": {i}, "category_id": {label}, "iscrowd": {int(is_crowd)}, "bbox": {box}, '
                f'"area": {box[2] * box[3] * 3 // 4}}}'
                for i, label, is_crowd, box in numbers
            ]
            ends = np.cumsum(own).tolist()
            file.write(", " * (start > 0))
            file.write(", ".join(
                f'{{"segments_info": [{", ".join(listed[first:end])}], "file_name": "{i:012d}.png", "image_id": {i}}}'
                for i, first, end in zip(range(start + 1, start + len(own) + 1), [0, *ends], ends, strict=False)
            ))  # fmt: skip
        file.write('], "categories": ')
        file.write(json.dumps([
            {"supercategory": "any", "isthing": int(i <= CLASSES), "id": i, "name": f"class {i}", "color": [i, 0, 255]}
            for i in range(1, PANOPTIC_CLASSES + 1)
        ]) + "}")  # fmt: skip


def private() -> float:
    """MB that belong to this process alone."""
    fields = Path("/proc/self/smaps_rollup").read_text().split("\n")
    return sum(int(line.split()[1]) for line in fields if line.startswith("Private_")) / 1e3


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def opened(folder: Path, ann_file: Path, masks: bool, workers: int, panoptic_seed: int | None = None) -> dict:
    """Seconds and MB of one opening; with ``workers``, of an epoch as well. ``panoptic_seed``: of the json, if it is of
    `generate_panoptic`."""
    from detr_fast.data import CocoDetection, CocoPanoptic

    before, private_before = _peak(), private()
    began, cpu, others = time.perf_counter(), time.process_time(), _cpu_of_children()
    if panoptic_seed is None:
        dataset: Any = CocoDetection(folder, ann_file, None, masks, cache_dir=folder)
    else:
        dataset = CocoPanoptic(folder, folder, ann_file, cache_dir=folder)
    row = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    row |= {"cpu of its processes": _cpu_of_children() - others, "load": os.getloadavg()[0]}
    row |= {"peak": _peak() - before, "private": private() - private_before}
    if workers:
        epoch, drawn = (_epoch, ()) if panoptic_seed is None else (_panoptic_epoch, (colours(panoptic_seed),))
        context = multiprocessing.get_context("fork")
        growths = context.SimpleQueue()
        processes = [context.Process(target=epoch, args=(dataset, n, workers, growths, *drawn)) for n in range(workers)]
        for process in processes:
            process.start()
        row["growth of a worker"] = max(growths.get() for _ in processes)
        for process in processes:
            process.join()
    print(f"  {row}", flush=True)
    return row


def _epoch(dataset, first: int, step: int, growths) -> None:
    """Every target of a worker's share, in random order, without the pixels that nobody has; masks of the first 500."""
    from PIL import Image

    indices = np.random.default_rng(first).permutation(np.arange(first, len(dataset), step)).tolist()
    image = Image.new("RGB", (640, 480))
    dataset._load = lambda *_, **__: image
    for index in indices[:100]:  # what the first items make once is no growth
        dataset[index]
    before = private()
    dataset.prepare.return_masks, masks = False, dataset.prepare.return_masks
    for number, index in enumerate(indices):
        dataset.prepare.return_masks = masks and number < 500
        dataset[index]
        if masks:
            dataset._store.annotations(index)
    growths.put(private() - before)


def _panoptic_epoch(dataset, first: int, step: int, growths, ids: np.ndarray) -> None:
    """Every target of a worker's share, in random order; of every image and PNG one row is read that has all ids."""
    from PIL import Image

    from detr_fast.data import panoptic

    indices = np.random.default_rng(first).permutation(np.arange(first, len(dataset), step)).tolist()
    image, pixels = Image.new("RGB", (len(ids), 1)), ids[None]
    dataset._load, panoptic.load_segment_ids = (lambda *_: image), (lambda _: pixels)
    for index in indices[:100]:  # what the first items make once is no growth
        dataset[index]
    before = private()
    for index in indices:
        dataset[index]
    growths.put(private() - before)


def first_batch(folder: Path, ann_file: Path, workers: int) -> dict:
    """Seconds until a training loader's first batch is there: the json opened, the sizes planned, worker processes
    started, images read and augmented. All names are one picture's."""
    from detr_fast.data import CocoDetection, PackedCollate, build_loader, make_coco_transforms

    began, cpu, others = time.perf_counter(), time.process_time(), _cpu_of_children()
    dataset = CocoDetection(folder, ann_file, make_coco_transforms("train", uint8=True), cache_dir=folder)
    loader = build_loader(dataset, 8, train=True, num_workers=workers, collate_fn=PackedCollate(), timeout=120)
    try:
        samples, targets = next(iter(loader))
        row = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    finally:
        loader.close()
    assert len(samples) == len(targets) == 8
    row |= {"cpu of its processes": _cpu_of_children() - others, "load": os.getloadavg()[0]}
    print(f"  {row}", flush=True)
    return row


def link_images(folder: Path, images: int) -> None:
    """One JPEG of noise under the names of all images of `generate`."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((640, 480)).save(folder / "image", "JPEG")
    for i in range(1, images + 1):
        os.symlink("image", folder / f"{i:012d}.jpg")  # no hard links: file systems limit how many a file may have


def _alone(function, *arguments):
    """In a process of its own, whose peak memory is nobody else's."""
    context, method = multiprocessing.get_context("spawn"), multiprocessing.get_start_method()
    with ProcessPoolExecutor(
        1, mp_context=context, initializer=_start, initargs=(method,)
    ) as pool:  # not daemonic: it may fork
        return pool.submit(function, *arguments).result()


def _start(method: str) -> None:
    import detr_fast.data  # noqa: F401

    multiprocessing.set_start_method(method, force=True)  # a loader's processes start as a user's do


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks annotations", description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=118_287)
    parser.add_argument("--annotations", type=int, help="default: 803 000, of segments 1.3 million")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--boxes", action="store_true", help="no polygons and no masks")
    kinds.add_argument("--panoptic", action="store_true", help="a panoptic json")
    parser.add_argument("--workers", type=int, default=2, help="forked processes that share an epoch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the json there, and use it if it is there already")
    parser.add_argument("--output", type=Path, help="also write the rows there, as JSON")
    args = parser.parse_args(argv)
    if args.annotations is None:
        args.annotations = 1_300_000 if args.panoptic else 803_000
    kind = "panoptic" if args.panoptic else "boxes" if args.boxes else "polygons"
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        ann_file = folder / f"{kind}-{args.images}-{args.annotations}-{args.seed}.json"
        if not ann_file.is_file():
            _alone(_generate, ann_file, args.images, args.annotations, kind, args.seed)
        panoptic_seed = args.seed if args.panoptic else None
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            rows = {
                "first time": _alone(opened, Path(cache), ann_file, False, 0, panoptic_seed),
                "mapped": _alone(opened, Path(cache), ann_file, False, args.workers, panoptic_seed),
            }
            if kind == "polygons":
                rows["mapped, with masks"] = _alone(opened, Path(cache), ann_file, True, args.workers)
        if not args.panoptic:
            with tempfile.TemporaryDirectory(dir=folder) as linked:
                link_images(Path(linked), args.images)
                for name in ("first batch, first time", "first batch, mapped"):
                    rows[name] = _alone(first_batch, Path(linked), ann_file, args.workers)
        size = os.path.getsize(ann_file) / 1e6
    what = "segments" if args.panoptic else "annotations"
    print(f"{args.images} images, {args.annotations} {what}, {size:.0f} MB of json\n")
    print("`load`: processes that wanted a core meanwhile, of this and other programs\n")
    print(
        "| | seconds | load | CPU seconds | of its processes | MB at the peak | MB private | MB that a worker grows |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        numbers = [f"{row['seconds']:.2f}", f"{row['load']:.1f}", f"{row['cpu']:.2f}"]
        numbers.append(f"{row['cpu of its processes']:.2f}")
        for key, digits in (("peak", 0), ("private", 0), ("growth of a worker", 1)):
            numbers.append(f"{row[key]:.{digits}f}" if key in row else "")
        print(f"| {' | '.join([name, *numbers])} |")
    if args.output:
        record = {"provenance": provenance(torch.device("cpu")), "images": args.images, "annotations": args.annotations}
        record |= {"polygons": kind == "polygons", "panoptic": args.panoptic, "json_mb": size, "rows": rows}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def _generate(path: Path, images: int, annotations: int, kind: str, seed: int) -> None:
    part = path.with_suffix(".part")
    if kind == "panoptic":
        generate_panoptic(part, images, annotations, seed=seed)
    else:
        generate(part, images, annotations, polygons=kind == "polygons", seed=seed)
    os.replace(part, path)


if __name__ == "__main__":
    raise SystemExit(main())
