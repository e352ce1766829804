"""Draws docs/images/shapes.jpg: the first ten validation images of the demonstration, as its detector sees them.

    make demo
    python docs/images/shapes.py outputs/demo
"""

import sys
from pathlib import Path

from PIL import Image

import detr_fast

HEIGHT, GAP = 210, 6


def main(demo: Path) -> None:
    model = detr_fast.load(demo, device="cpu")
    images = sorted((demo / "data" / "val2017").glob("*.jpg"))[:10]
    pictures = [found.plot() for found in model.predict(images)]
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
