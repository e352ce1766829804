"""Sine position embedding and resized mask, from the mask at full resolution: ours against the original's module.

128 features per axis, normalised, as DETR uses it. No gradient: forward only.
"""

import functools
import math

import torch
import torch.nn.functional as F

from detr_fast.ops import sine_position, sine_position_reference

from ..harness.case import Case, Inputs, Outputs, Provider, needs_compile
from ..harness.ceilings import PRECISIONS, Work
from ..harness.spec import BATCHES, Scale, Spec, shape_of
from ..shapes import BatchShape

FEATURES, TEMPERATURE = 128, 10000
KINDS = ("",)


def options(kind: str) -> tuple[str, ...]:
    return ("precision", "model", "padding")


def gpu_specs(quick: bool) -> list[Spec]:
    def spec(**fields) -> Spec:
        return Spec("sine_position", **{"precision": "fp32"} | fields)

    specs = [spec(model=model, padding=padding) for model in ("R50", "DC5") for padding in ("none", "coco")]
    if quick:
        return specs
    specs += [spec(model=model, precision=precision) for model in ("R50", "DC5") for precision in ("bf16", "fp16")]
    return specs + [spec(model="DC5", batch=batch) for batch in BATCHES]


def build(spec: Spec, scale: Scale, device: torch.device, *, compile: bool, quick: bool) -> tuple[Case, list[Provider]]:
    return case(shape_of(spec, scale), spec.precision, device, compile=compile), providers()


def original(mask: torch.Tensor, size: tuple[int, int], dtype: torch.dtype) -> Outputs:
    """The backbone's mask resize and the original's embedding module, op by op, cast to `dtype` at the end."""
    small = F.interpolate(mask[None].float(), size=size).to(torch.bool)[0]
    inside = ~small
    y, x = inside.cumsum(1, dtype=torch.float32), inside.cumsum(2, dtype=torch.float32)
    y = y / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
    x = x / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
    frequency = torch.arange(FEATURES, dtype=torch.float32, device=mask.device)
    frequency = TEMPERATURE ** (2 * torch.div(frequency, 2, rounding_mode="floor") / FEATURES)
    waves = []
    for position in (y, x):
        angle = position[:, :, :, None] / frequency
        waves.append(torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=4).flatten(3))
    return torch.cat(waves, dim=3).permute(0, 3, 1, 2).to(dtype), small


@functools.lru_cache(maxsize=1)
def _compiled_original():
    return torch.compile(original)


def _eager(state: Inputs) -> Outputs:
    return original(state["mask"], state["size"], state["dtype"])


def _compiled(state: Inputs) -> Outputs:
    return _compiled_original()(state["mask"], state["size"], state["dtype"])


def _ours(state: Inputs, layout: str) -> Outputs:
    return sine_position(
        state["mask"], state["size"], FEATURES, TEMPERATURE, normalize=True, dtype=state["dtype"], layout=layout
    )


def _as_nchw(state: Inputs, outputs: Outputs) -> Outputs:
    position, mask = outputs
    return position.transpose(1, 2).unflatten(2, state["size"]), mask


def reference(inputs: Inputs) -> Outputs:
    return sine_position_reference(
        inputs["mask"], inputs["size"], FEATURES, TEMPERATURE, normalize=True, dtype=torch.float64
    )


def providers() -> list[Provider]:
    return [
        Provider(
            "detr_fast", "[B, 2F, h, w], mask resize included", functools.partial(_ours, layout="nchw"), ours=True,
        ),
        Provider(
            "detr_fast tokens", "[B, h·w, 2F], mask resize included", functools.partial(_ours, layout="tokens"),
            finish=_as_nchw, ours=True,
        ),
        Provider("original, eager", "[B, 2F, h, w], mask resize included", _eager),
        Provider("original, compiled", "[B, 2F, h, w], mask resize included; torch.compile", _compiled, needs_compile),
    ]  # fmt: skip


def case(shape: BatchShape, precision: str, device: torch.device, *, compile: bool = False) -> Case:
    dtype = PRECISIONS[precision][0]
    mask = shape.mask().to(device)

    def inputs(seed: int) -> Inputs:
        # The values do not matter to the time; every set has memory of its own.
        return {"mask": mask.clone(), "size": shape.feature, "dtype": dtype, "compile": compile}

    cells = shape.batch * shape.tokens
    height, width = shape.padded
    return Case(
        suite="sine_position",
        name=shape.name,
        precision=precision,
        mode="forward",
        inputs=inputs,
        reference=reference,
        plain=_eager,
        # The embedding and the small mask written, one byte of the large mask read per cell.
        work=[Work(cells * (2 * FEATURES * dtype.itemsize + 2))],
        shape={
            "batch": shape.batch, "height": height, "width": width, "feature": list(shape.feature),
            "features": 2 * FEATURES, "valid": shape.valid_shares(),
        },
    )  # fmt: skip
