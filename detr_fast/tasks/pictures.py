"""Detections as pictures and as json: what several tasks share."""

import colorsys
import importlib.util
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

# Smaller images are enlarged for drawing, so that captions can be read.
_SHORTEST_LONG_SIDE = 480
_MASK_OPACITY = 120  # of 255


def colour_of(label: int) -> tuple[int, int, int]:
    """A colour for each label: strong, and different for labels that are close."""
    # The golden ratio spreads hues evenly, however many there are.
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1.0, 0.85, 0.95)
    return round(red * 255), round(green * 255), round(blue * 255)


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which knows most alphabets, of the system or of matplotlib; otherwise PIL's, which knows ASCII."""
    paths = ["DejaVuSans.ttf"]
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        paths.append(str(Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"))
    for path in paths:
        try:
            return ImageFont.truetype(path, size)
        except OSError:
            continue
    return ImageFont.load_default(size=size)


def _can_write(text: str, font: ImageFont.FreeTypeFont) -> bool:
    """Whether a font has all letters of a text."""
    unknown = bytes(font.getmask("\U0010ffff"))
    return not any(bytes(font.getmask(letter)) == unknown for letter in set(text) if not letter.isspace())


def draw_detections(
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    names: Mapping[int, str],
    scores: Sequence[float] | None = None,
    masks: Sequence[np.ndarray] | None = None,
) -> Image.Image:
    """A copy of an image with masks, boxes, class names and scores; line and font sizes follow the image's size.

    Args:
        image: any size; one whose long side is below 480 pixels is enlarged.
        boxes: n times x0, y0, x1, y1 in the image's pixels.
        labels: n classes, which choose the colour.
        names: label → name; a label without one, or with one that no font at hand can write, is shown by its number.
        scores: n numbers in 0..1, or None to show none. The highest is drawn last.
        masks: n arrays of the image's size, not 0 where the object is, or None.
    """
    factor = max(1, -(-_SHORTEST_LONG_SIDE // max(image.size)))
    order = range(len(boxes)) if scores is None else sorted(range(len(boxes)), key=lambda i: scores[i])
    image = image.convert("RGB")
    for i in order if masks is not None else ():
        cover = Image.fromarray((np.asarray(masks[i]) != 0).astype(np.uint8) * _MASK_OPACITY)
        image.paste(colour_of(int(labels[i])), mask=cover)
    picture = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    long_side = max(picture.size)
    line = max(2, round(long_side / 250))
    font = _font(max(11, round(long_side / 45)))
    captions = []
    for i in order:
        x0, y0, x1, y1 = (float(value) * factor for value in boxes[i])
        x0, x1 = (min(max(x, 0.0), picture.width - 1.0) for x in (x0, x1))
        y0, y1 = (min(max(y, 0.0), picture.height - 1.0) for y in (y0, y1))
        colour = colour_of(int(labels[i]))
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour, width=line)
        caption = names.get(int(labels[i]), "")
        if not caption or not _can_write(caption, font):
            caption = f"class {int(labels[i])}"
        if scores is not None:
            caption += f" {float(scores[i]):.2f}"
        captions.append((caption, x0, y0, colour))
    for caption in captions:
        _caption(draw, *caption, font, picture.size)
    return picture


def _caption(draw, text: str, x: float, y: float, colour, font, size: tuple[int, int]) -> None:
    """Text on a filled background above the point, or below it where there is no room, and never outside."""
    ascent, descent = font.getmetrics()
    width, height = draw.textlength(text, font=font) + 6, ascent + descent + 4
    x = max(0, min(x, size[0] - width))
    y = y - height if y >= height else y
    y = max(0, min(y, size[1] - height))
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    red, green, blue = colour
    is_light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    draw.text((x + 3, y + 2), text, fill="black" if is_light else "white", font=font)


def draw_lines(image: Image.Image, lines: Sequence[Sequence[float]]) -> Image.Image:
    """A copy of an image with line segments, each in a colour of its own, and dots at their ends.

    Args:
        image: any size; one whose long side is below 480 pixels is enlarged.
        lines: n times x1, y1, x2, y2 in the image's pixels.
    """
    picture, factor = _enlarged(image)
    draw = ImageDraw.Draw(picture)
    width = max(2, round(max(picture.size) / 250))
    for i, line in enumerate(lines):
        ends = [value * factor for value in line]
        draw.line(ends, fill=colour_of(i), width=width)
        for x, y in (ends[:2], ends[2:]):
            draw.ellipse((x - 2 * width, y - 2 * width, x + 2 * width, y + 2 * width), fill=colour_of(i))
    return picture


def _enlarged(image: Image.Image) -> tuple[Image.Image, int]:
    factor = max(1, -(-_SHORTEST_LONG_SIDE // max(image.size)))
    size = (image.width * factor, image.height * factor)
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC), factor


def draw_sheet(path: str | os.PathLike, rows: Sequence[tuple[Image.Image, Image.Image]]) -> None:
    """Writes one picture with a row for each pair, side by side.

    Args:
        path: the file to write.
        rows: pairs of pictures; at least one.
    """
    pairs = [_beside(left, right) for left, right in rows]
    sheet = Image.new("RGB", (max(row.width for row in pairs), sum(row.height + 8 for row in pairs) - 8), "white")
    y = 0
    for row in pairs:
        sheet.paste(row, (0, y))
        y += row.height + 8
    sheet.save(path)


def best_detections(result: Mapping[str, torch.Tensor], threshold: float, at_least: int = 0) -> tuple[list, list, list]:
    """Boxes, labels and scores from `threshold` up, best first; at least the best `at_least`, whatever their scores."""
    scores, order = result["scores"].cpu().sort(descending=True)
    count = max(int((scores >= threshold).sum()), min(at_least, len(scores)))
    order = order[:count]
    return result["boxes"].cpu()[order].tolist(), result["labels"].cpu()[order].tolist(), scores[:count].tolist()


def best_lines(result: Mapping[str, torch.Tensor], threshold: float) -> tuple[list, list, list]:
    """Lines, labels and scores from `threshold` up, best first."""
    return best_detections({**result, "boxes": result["lines"]}, threshold)


def best_masks(result: Mapping[str, torch.Tensor], count: int) -> list[np.ndarray] | None:
    """The [H, W] masks of the `count` best detections, in `best_detections`' order; None if there are no masks."""
    if "masks" not in result:
        return None
    order = result["scores"].cpu().sort(descending=True).indices[:count]
    return list(result["masks"].cpu()[order].flatten(0, 1).numpy())


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's compressed run-length encoding of a mask [H, W], as json takes it."""
    from pycocotools import mask as mask_utils

    encoded = mask_utils.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    font = ImageFont.load_default(size=16)
    sheet = Image.new("RGB", (left.width + right.width + 8, left.height + 24), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 3), "annotated", fill="black", font=font)
    draw.text((left.width + 12, 3), "predicted", fill="black", font=font)
    sheet.paste(left, (0, 24))
    sheet.paste(right, (left.width + 8, 24))
    return sheet
