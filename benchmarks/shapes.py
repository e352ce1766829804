"""The sizes that are measured: DETR's batches as real COCO images and the training augmentation make them.

`coco_sizes.json` holds width and height of 160 COCO 2017 images (80 train, 80 val), numbers only. `draw_size` applies
the original's train augmentation to one of them, without the pixels: a batch drawn here is padded as a real one.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from detr_fast.data.transforms import resized_size

SCALES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
MAX_SIZE = 1333
STRIDES = {"R50": 32, "DC5": 16}
NOMINAL = (800, 1216)  # (height, width) of the unpadded batches: 950 tokens with R50, 3800 with DC5


def coco_sizes() -> list[tuple[int, int]]:
    """(width, height) in pixels of the committed sample of COCO images."""
    table = json.loads((Path(__file__).parent / "coco_sizes.json").read_text(encoding="utf-8"))
    return [(width, height) for width, height in table]


def draw_size(width: int, height: int, rng: random.Random) -> tuple[int, int]:
    """(height, width) of one image after the original's train augmentation (make_coco_transforms("train")).

    Half of the images are resized to a short side drawn from 480..800 with a long side of at most 1333; the other half
    are first resized to 400, 500 or 600, cropped to 384..600 by 384..600, and then resized likewise.
    """
    if rng.random() >= 0.5:
        height, width = resized_size((width, height), rng.choice((400, 500, 600)))
        width, height = rng.randint(384, min(width, 600)), rng.randint(384, min(height, 600))
    return resized_size((width, height), rng.choice(SCALES), MAX_SIZE)


@dataclass(frozen=True)
class BatchShape:
    """The images of one batch: `sizes` are (height, width) in pixels, `stride` the backbone's."""

    name: str
    stride: int
    sizes: tuple[tuple[int, int], ...]

    @property
    def batch(self) -> int:
        return len(self.sizes)

    @property
    def padded(self) -> tuple[int, int]:
        """(H, W) of the padded batch: the largest height and the largest width."""
        return max(h for h, _ in self.sizes), max(w for _, w in self.sizes)

    @property
    def feature(self) -> tuple[int, int]:
        """(h, w) of the feature map: each stride-2 convolution rounds up."""
        height, width = self.padded
        return -(-height // self.stride), -(-width // self.stride)

    @property
    def tokens(self) -> int:
        return self.feature[0] * self.feature[1]

    @property
    def has_padding(self) -> bool:
        return len(set(self.sizes)) > 1

    def _inside(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, H] and [B, W] bool: which rows and which columns belong to the image."""
        height, width = self.padded
        heights, widths = torch.tensor(self.sizes).unbind(1)
        return torch.arange(height) < heights[:, None], torch.arange(width) < widths[:, None]

    def mask(self) -> torch.Tensor:
        """[B, H, W] bool, True = padding, at full resolution."""
        rows, columns = self._inside()
        return ~(rows[:, :, None] & columns[:, None, :])

    def key_padding_mask(self) -> torch.Tensor:
        """[B, h·w] bool, True = padding: `mask` resized to the feature map as the backbone does it.

        Rows and columns are resized apart, which for rectangles is the same and takes a thousandth of the time.
        """
        rows, columns = (
            torch.nn.functional.interpolate(inside[:, None].float(), size=size)[:, 0].bool()
            for inside, size in zip(self._inside(), self.feature, strict=True)
        )
        return ~(rows[:, :, None] & columns[:, None, :]).flatten(1)

    def valid_shares(self) -> dict[str, float]:
        """Shares of valid pixels, of valid tokens, and of query-key pairs with both ends valid, in 0..1."""
        height, width = self.padded
        tokens = (~self.key_padding_mask()).double().mean(1)
        pixels = sum(h * w for h, w in self.sizes) / (self.batch * height * width)
        return {"pixels": pixels, "tokens": tokens.mean().item(), "pairs": (tokens**2).mean().item()}

    def without_padding(self) -> "BatchShape":
        """The same padded batch, of images that all have its full size."""
        return BatchShape(f"{self.name}-dense", self.stride, (self.padded,) * self.batch)


def target_counts(batch: int, most: int, seed: int = 0) -> list[int]:
    """How many targets each image of a batch has: 1 to `most`, evenly; the same seed gives the same counts."""
    rng = random.Random(seed)
    return [rng.randint(1, most) for _ in range(batch)]


def _scaled(sizes, scale: float) -> tuple[tuple[int, int], ...]:
    return tuple((max(1, round(h * scale)), max(1, round(w * scale))) for h, w in sizes)


def nominal_batch(model: str, batch: int, scale: float = 1.0) -> BatchShape:
    """`batch` images of 800 x 1216 pixels times `scale`: no padding."""
    return BatchShape(f"{model}-B{batch}", STRIDES[model], _scaled((NOMINAL,) * batch, scale))


def real_batch(model: str, batch: int, seed: int = 0, scale: float = 1.0) -> BatchShape:
    """`batch` images drawn at random from the COCO sizes and augmented; the same seed gives the same batch."""
    rng = random.Random(seed)
    table = coco_sizes()
    sizes = tuple(draw_size(*rng.choice(table), rng) for _ in range(batch))
    return BatchShape(f"{model}-B{batch}-coco", STRIDES[model], _scaled(sizes, scale))


def typical_real_batch(model: str, batch: int, scale: float = 1.0, candidates: int = 64) -> BatchShape:
    """Of `candidates` drawn batches the one whose share of valid pixels is the median: one batch stands for all."""
    drawn = [real_batch(model, batch, seed, scale) for seed in range(candidates)]
    area = [sum(h * w for h, w in d.sizes) / (d.padded[0] * d.padded[1]) for d in drawn]
    return drawn[sorted(range(candidates), key=area.__getitem__)[candidates // 2]]


def shrunk_batch(model: str, batch: int, valid: float, scale: float = 1.0) -> BatchShape:
    """The nominal batch with its first image whole and the others shrunk so that about `valid` of the tokens are valid.

    For time against the share of padding at a fixed padded size; the images keep their aspect ratio.
    """
    (height, width), *_ = _scaled((NOMINAL,), scale)
    others = max(0.01, (valid * batch - 1) / (batch - 1)) if batch > 1 else valid
    small = (max(1, round(height * others**0.5)), max(1, round(width * others**0.5)))
    sizes = ((height, width),) + (small,) * (batch - 1)
    return BatchShape(f"{model}-B{batch}-valid{round(100 * valid)}", STRIDES[model], sizes)
