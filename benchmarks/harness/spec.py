"""A case in words, before anything is computed."""

import dataclasses
from dataclasses import dataclass

from ..shapes import BatchShape, nominal_batch, shrunk_batch, typical_real_batch

HEADS, HEAD_DIM = 8, 32
PADDINGS = ("none", "coco", "coco-dense")
BATCHES = (1, 2, 4, 8, 32, 64)  # beside 16, which everything else is measured at


@dataclass(frozen=True)
class Spec:
    """One case in words.

    Attributes:
        kind: one of the suite's `KINDS`; "" where it has only one kind.
        padding: "none" (800 x 1216), "coco" (a typical drawn batch), "coco-dense" (its size, no padding), or "validNN"
            (800 x 1216 with about NN % of the tokens valid).
    """

    suite: str
    kind: str = ""
    model: str = "R50"
    batch: int = 16
    padding: str = "coco"
    precision: str = "bf16"
    mode: str = "forward"
    dropout: float = 0.0
    head_dim: int = HEAD_DIM

    def __str__(self) -> str:
        parts = [self.suite, self.kind, self.model, f"B{self.batch}", self.padding, self.precision, self.mode]
        parts.append(f"p={self.dropout:g}" if self.dropout else "")
        parts.append(f"d={self.head_dim}" if self.head_dim != HEAD_DIM else "")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Scale:
    """How large the cases are.

    Attributes:
        image: factor of both sides of the images.
        heads: of the suite `attention`.
        layers: decoder layers of the suites `matching_cost` and `assign`.
    """

    image: float = 1.0
    heads: int = HEADS
    layers: int = 6


def both_modes(*specs: Spec) -> list[Spec]:
    return [dataclasses.replace(s, mode=mode) for s in specs for mode in ("forward", "both")]


def shape_of(spec: Spec, scale: Scale) -> BatchShape:
    if spec.padding == "none":
        return nominal_batch(spec.model, spec.batch, scale.image)
    if spec.padding.startswith("valid"):
        return shrunk_batch(spec.model, spec.batch, int(spec.padding[5:]) / 100, scale.image)
    drawn = typical_real_batch(spec.model, spec.batch, scale.image)
    return drawn.without_padding() if spec.padding == "coco-dense" else drawn
