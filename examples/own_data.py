"""Own data, from annotations to predictions, in seconds on a CPU.

    python examples/own_data.py                      # draws a tiny data set of red squares and blue discs first
    python examples/own_data.py --data MY_FOLDER     # train/, val/, train.json and val.json in COCO's format

The model is tiny and trained for one epoch: that shows the steps, and finds nothing yet (AP 0). Without SMALL_MODEL and
with more epochs it is DETR.
"""

import argparse
import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

from detr_fast.cli import main as detr_fast

SMALL_MODEL = """--backbone resnet18 --backbone_weights none --backbone_level 1 --enc_layers 1 --dec_layers 1
    --hidden_dim 32 --dim_feedforward 64 --nheads 4 --num_queries 5""".split()


def draw(folder: Path, annotations: Path, count: int, rng: random.Random) -> None:
    """Images of 64 x 64 pixels with one or two objects each, and their annotations in COCO's format."""
    folder.mkdir(parents=True)
    # Ids of images and categories are any integers; boxes are x, y, width, height in pixels.
    coco: dict[str, list] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3, "name": "square"}, {"id": 7, "name": "disc"}],
    }
    for image_id in range(1, count + 1):
        picture = Image.new("RGB", (64, 64), "white")
        for _ in range(rng.randint(1, 2)):
            category, side = rng.choice((3, 7)), rng.randint(12, 28)
            x, y = rng.randint(0, 64 - side), rng.randint(0, 64 - side)
            pen, box = ImageDraw.Draw(picture), (x, y, x + side - 1, y + side - 1)
            pen.rectangle(box, fill="red") if category == 3 else pen.ellipse(box, fill="blue")
            coco["annotations"].append({
                "id": len(coco["annotations"]) + 1, "image_id": image_id, "category_id": category,
                "bbox": [x, y, side, side], "area": side * side, "iscrowd": 0,
            })  # fmt: skip
        name = f"{image_id:04}.jpg"
        picture.save(folder / name, quality=95)
        coco["images"].append({"id": image_id, "file_name": name, "width": 64, "height": 64})
    annotations.write_text(json.dumps(coco))


def run(*arguments: str) -> None:
    """A `detr-fast` command, from Python."""
    print("detr-fast", *arguments, flush=True)
    code = detr_fast(arguments)
    if code != 0:
        raise SystemExit(code)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Trains on own data, evaluates and predicts.")
    parser.add_argument("--data", type=Path, help="folder with train/, val/, train.json and val.json")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/own_data"))
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)

    out = args.output_dir
    data = args.data or out / "data"
    if args.data is None and not data.exists():
        rng = random.Random(0)
        for name, count in (("train", 64), ("val", 16)):
            draw(data / name, data / f"{name}.json", count, rng)
    train = ["--train_images", str(data / "train"), "--train_ann", str(data / "train.json")]
    val = ["--val_images", str(data / "val"), "--val_ann", str(data / "val.json")]
    device = ["--device", args.device]
    checkpoint = ["--weights", str(out / "run" / "checkpoint.pth")]

    run("check-data", *train, *val)
    run("train", *train, *val, *device, *SMALL_MODEL, "--image_size", "64", "--batch_size", "8", "--num_workers", "0",
        "--lr", "1e-3", "--epochs", "1", "--output_dir", str(out / "run"))  # fmt: skip
    run("eval", *checkpoint, *val, *device, "--num_workers", "0")
    run(
        "predict", str(data / "val"), *checkpoint, *device, "--threshold", "0", "--output_dir", str(out / "predictions")
    )

    detections = json.loads((out / "predictions" / "predictions.json").read_text())
    best = max(detections, key=lambda detection: detection["score"])
    print(f"{len(detections)} detections; the best one: {best}")


if __name__ == "__main__":
    main()
