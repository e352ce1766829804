"""Draws docs/images/shapes.jpg: ten generated images that a detector trained on a CPU has not seen, and what it finds.

    make demo
    python -c "from detr_fast.data import make_shapes_dataset as make; make('outputs/more', num_train=6000, seed=1)"
    detr-fast train --coco_path outputs/more --weights outputs/demo --output_dir outputs/longer --image_size 64 \\
        --augmentation flip --dropout 0 --lr 4e-4 --lr_backbone 4e-4 --lr_schedule cosine --warmup_steps 50 \\
        --batch_size 8 --epochs 5 --eval_every 5 --num_workers 0
    python docs/images/shapes.py outputs/longer
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

import detr_fast
from detr_fast.data import make_shapes_dataset

HEIGHT, GAP = 210, 6


def main(weights: Path) -> None:
    model = detr_fast.load(weights, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        # Drawn larger than the model sees them, so that they look well.
        data = make_shapes_dataset(folder, num_train=0, num_val=10, image_size=240, seed=2)
        pictures = [found.plot() for found in model.predict(data / "val2017")]
    pictures = [picture.resize((picture.width * HEIGHT // picture.height, HEIGHT)) for picture in pictures]
    rows = [pictures[:5], pictures[5:]]
    widths = [sum(picture.width + GAP for picture in row) - GAP for row in rows]
    sheet = Image.new("RGB", (max(widths), 2 * HEIGHT + GAP), "white")
    for number, (row, width) in enumerate(zip(rows, widths, strict=True)):
        x = (sheet.width - width) // 2
        for picture in row:
            sheet.paste(picture, (x, number * (HEIGHT + GAP)))
            x += picture.width + GAP
    sheet.save(Path(__file__).with_suffix(".jpg"), quality=88)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
