"""What the generated data sets share: backgrounds, and places for what is drawn on them."""

import numpy as np
from PIL import Image

ASPECT_RATIOS = (1.0, 4 / 3, 3 / 2)
SUPERSAMPLE = 4  # edges are drawn at this many times the size


def background(rng, width: int, height: int) -> np.ndarray:
    """float [height, width, 3]: dim, soft blotches with fine grain."""
    blotches = rng.uniform(40, 130, (int(rng.integers(3, 8)), int(rng.integers(3, 8)), 3)).astype(np.uint8)
    soft = np.asarray(Image.fromarray(blotches).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64)
    grey = soft.mean(axis=2, keepdims=True)
    return grey + 0.3 * (soft - grey) + rng.normal(0, 8, (height, width, 1))


def place(rng, width: int, height: int, count: int) -> list[tuple[float, float, float]]:
    """Up to ``count`` squares (x, y, side) in the image; any two overlap by at most a tenth of the smaller."""
    placed: list[tuple[float, float, float]] = []
    short = min(width, height)
    for _ in range(50):
        if len(placed) == count:
            break
        side = rng.uniform(0.35, 0.6) * short
        x, y = rng.uniform(0, width - side), rng.uniform(0, height - side)
        if all(_overlap((x, y, side), other) <= 0.1 * min(side, other[2]) ** 2 for other in placed):
            placed.append((x, y, side))
    return placed


def _overlap(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    overlap_x = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    overlap_y = min(a[1] + a[2], b[1] + b[2]) - max(a[1], b[1])
    return max(0.0, overlap_x) * max(0.0, overlap_y)
