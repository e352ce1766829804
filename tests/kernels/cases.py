"""The calls whose kernels the compile gate compiles: what the ops' launchers can be made to launch."""

import dataclasses
from collections.abc import Callable

import torch

from detr_fast.ops.sine_position import sine_position

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        name: what varies, the dtype among it (bf16, fp16, fp32).
        run: makes the call, forward and backward.
        detr: DETR's own shapes and options run this; then no kernel may spill, and every chip compiles it.
        from_chip: the first compute capability, times ten, it is meant for.
    """

    name: str
    run: Callable[[], None]
    detr: bool = False
    from_chip: int = 75


def _sine(dtype: str, layout: str, normalize: bool = True, scale: float | None = None) -> Case:
    def run():
        mask = torch.zeros(2, 64, 96, dtype=torch.bool)
        sine_position(mask, (4, 6), 128, normalize=normalize, scale=scale, dtype=DTYPES[dtype], layout=layout)

    name = f"sine_position {dtype} {layout}{'' if normalize else ' counts'}{f' scale={scale:g}' if scale else ''}"
    return Case(name, run, detr=normalize and scale is None, from_chip=80 if dtype == "bf16" else 75)


CASES: list[Case] = []
CASES += [_sine(dtype, layout) for dtype in DTYPES for layout in ("nchw", "tokens")]
CASES += [_sine("fp32", layout, normalize=False) for layout in ("nchw", "tokens")]
CASES += [_sine("fp32", layout, scale=1e6) for layout in ("nchw", "tokens")]
