"""CPU seconds and memory of COCO's evaluation, by backend: `python -m benchmarks.studies.evaluation`.

Generated annotations (80 classes, crowd regions, seven objects to an image) and 100 detections to an image, some of
them jittered objects, most of them noise, as DETR gives. Each backend runs in a process of its own; their twelve
numbers must agree to 1e-12, or nothing is printed.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import multiprocessing
import resource
import time
from pathlib import Path

import numpy as np
import torch

BACKENDS = ("pycocotools", "faster_coco_eval", "hotcoco")


def generated(images: int, detections: int, seed: int) -> tuple[dict, dict[int, dict]]:
    """Annotations as a COCO json has them, and the predictions of each image id."""
    rng = np.random.default_rng(seed)
    annotations, predictions = [], {}
    for image_id in range(1, images + 1):
        count = int(rng.integers(0, 15))
        corners = rng.uniform(0, (400, 300), (count, 2))
        sizes = np.exp(rng.uniform(np.log(6), np.log(180), (count, 2)))
        labels = rng.integers(1, 81, count)
        for box, label in zip(np.hstack((corners, sizes)).round(2).tolist(), labels.tolist(), strict=True):
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label, "bbox": box}
            annotations.append({**entry, "area": box[2] * box[3] * 0.7, "iscrowd": int(rng.random() < 0.02)})
        found = min(count, detections)
        others = detections - found
        noise = np.hstack((rng.uniform(0, (400, 300), (others, 2)), rng.uniform(6, 180, (others, 2))))
        boxes = np.vstack((np.hstack((corners, sizes))[:found] + rng.normal(0, 4, (found, 4)), noise))
        scores = np.concatenate((rng.uniform(0.3, 1, found), rng.uniform(0, 0.3, detections - found)))
        boxes[:, 2:] = np.maximum(boxes[:, 2:], 1) + boxes[:, :2]
        predictions[image_id] = {
            "scores": torch.tensor(scores, dtype=torch.float32),
            "labels": torch.tensor(np.concatenate((labels[:found], rng.integers(1, 81, detections - found)))),
            "boxes": torch.tensor(boxes, dtype=torch.float32),
        }
    return {
        "images": [{"id": i, "width": 640, "height": 480} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, 81)],
    }, predictions


def measured(backend: str, images: int, detections: int, seed: int) -> dict:
    """One backend's CPU seconds, from the first update to the twelve numbers, and its process's growth in GiB."""
    from pycocotools.coco import COCO

    from detr_fast.evaluation import CocoEvaluator

    dataset, predictions = generated(images, detections, seed)
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.process_time()
        evaluator = CocoEvaluator(coco, ["bbox"], backend=backend)
        evaluator.update(predictions)
        evaluator.synchronize_between_processes()
        evaluator.accumulate()
        evaluator.summarize()
    seconds = time.process_time() - began
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    return {"backend": backend, "seconds": seconds, "gib": growth, "stats": evaluator.coco_eval["bbox"].stats.tolist()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.evaluation", description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=100, help="of each image (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the rows there, as JSON")
    args = parser.parse_args(argv)
    installed = [name for name in BACKENDS if importlib.util.find_spec(name) is not None]
    for name in sorted(set(BACKENDS) - set(installed)):
        print(f"not installed: {name}")
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = [pool.apply(measured, (backend, args.images, args.detections, args.seed)) for backend in installed]
    difference = max(np.abs(np.subtract(rows[0]["stats"], row["stats"])).max() for row in rows)
    if difference > 1e-12:
        print(f"not printed: the backends' numbers differ by {difference}")
        return 1
    print(f"{args.images} images, {args.images * args.detections} detections, AP {rows[0]['stats'][0]:.3f}\n")
    print("| backend | CPU seconds | GiB | of pycocotools' seconds |\n|---|---|---|---|")
    for row in rows:
        share = row["seconds"] / rows[0]["seconds"]
        print(f"| {row['backend']} | {row['seconds']:.1f} | {row['gib']:.2f} | {share:.2f} |")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"images": args.images, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
