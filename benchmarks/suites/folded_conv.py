"""A convolution with its frozen norm, residual and ReLU: ours, one kernel on a GPU, against the steps apart.

Kinds, all of ResNet-50 on 800 x 1216 images: `stem` (7 x 7, stride 2, on the image), `3x3` (128 channels, stride 8) and
`residual` (1 x 1, 128 to 512 channels, with the block's input added before the ReLU). Channels-last on a GPU, as the
backbone runs them. The stem is frozen in DETR and has no backward.
"""

import functools

import torch
import torch.nn.functional as F

from detr_fast.ops.folded_conv import folded_conv, folded_conv_reference

from ..harness.case import Case, Inputs, Outputs, Provider, needs_compile
from ..harness.ceilings import PRECISIONS, Work
from ..harness.spec import BATCHES, Scale, Spec, both_modes, shape_of
from ..shapes import BatchShape

# (channels in, channels out, kernel, stride, padding, stride of the input)
LAYERS = {"3x3": (128, 128, 3, 1, 1, 8), "residual": (128, 512, 1, 1, 0, 8), "stem": (3, 64, 7, 2, 3, 1)}
KINDS = tuple(LAYERS)
TENSORS = ("x", "weight", "scale", "bias", "residual")


def options(kind: str) -> tuple[str, ...]:
    return ("precision",) if kind == "stem" else ("precision", "mode")


def gpu_specs(quick: bool) -> list[Spec]:
    def spec(kind: str, **fields) -> Spec:
        return Spec("folded_conv", kind, padding="none", **fields)

    specs = both_modes(spec("3x3"), spec("residual")) + [spec("stem")]
    if quick:
        return specs
    specs += both_modes(*(spec("3x3", precision=precision) for precision in ("fp16", "tf32", "fp32")))
    return specs + [spec("residual", batch=batch) for batch in BATCHES]


def build(spec: Spec, scale: Scale, device: torch.device, *, compile: bool, quick: bool) -> tuple[Case, list[Provider]]:
    return case(spec.kind, shape_of(spec, scale), spec.precision, spec.mode, device, compile=compile), providers()


def _ours(state: Inputs) -> Outputs:
    return (folded_conv(*(state[name] for name in TENSORS), **state["geometry"]),)


def reference(inputs: Inputs) -> Outputs:
    return (folded_conv_reference(*(inputs[name] for name in TENSORS), **inputs["geometry"]),)


def folded_steps(x, weight, scale, bias, residual, stride, padding) -> torch.Tensor:
    """The norm folded into the convolution's weights and bias; residual and ReLU one by one."""
    weight, bias = (weight * scale[:, None, None, None]).to(x.dtype), bias.to(x.dtype)
    out = F.conv2d(x, weight, bias, stride, padding)
    return (out if residual is None else out + residual).relu()


def _folded_steps(state: Inputs) -> Outputs:
    return (folded_steps(*(state[name] for name in TENSORS), **state["geometry"]),)


@functools.lru_cache(maxsize=1)
def _compiled_steps():
    return torch.compile(folded_steps)


def _compiled(state: Inputs) -> Outputs:
    return (_compiled_steps()(*(state[name] for name in TENSORS), **state["geometry"]),)


def providers() -> list[Provider]:
    return [
        Provider("detr_fast", "norm folded, residual and ReLU in the convolution where it can be", _ours, ours=True),
        Provider("as shipped", "convolution, frozen norm, residual and ReLU one by one", reference),
        Provider("folded, op by op", "norm folded into the convolution, residual and ReLU after it", _folded_steps),
        Provider("folded, compiled", "the same; torch.compile", _compiled, needs_compile),
    ]


def work_of(mode: str, itemsize: int, read: int, weights: int, written: int, residual: int, flops: int) -> list[Work]:
    """A convolution's, from the elements of its input, weights, output and residual."""
    forward = Work(itemsize * (read + weights + residual + written), flops)
    # The output and its gradient, the input and the weights read; their gradients and the residual's written.
    backward = Work(itemsize * (2 * written + 2 * read + 2 * weights + residual), 2 * flops)
    return {"forward": [forward], "backward": [backward], "both": [forward, backward]}[mode]


def case(
    kind: str, shape: BatchShape, precision: str, mode: str, device: torch.device, *, compile: bool = False
) -> Case:
    """`kind`: one of `KINDS`; `shape`: of the images.

    Raises:
        ValueError: another mode than "forward" for the stem.
    """
    if kind == "stem" and mode != "forward":
        raise ValueError(f"mode is {mode!r}; the stem is frozen: expected 'forward'")
    channels, filters, kernel, stride, padding, divisor = LAYERS[kind]
    dtype = PRECISIONS[precision][0]
    size = tuple(-(-side // divisor) for side in shape.padded)
    out_size = tuple((side + 2 * padding - kernel) // stride + 1 for side in size)
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*size, scale=1.0):
            drawn = scale * torch.randn(*size, generator=generator, device=device)
            return drawn.to(dtype, memory_format=layout if len(size) == 4 else torch.contiguous_format)

        return {
            "x": draw(shape.batch, channels, *size),
            "weight": draw(filters, channels, kernel, kernel, scale=(channels * kernel**2) ** -0.5),
            "scale": 0.5 + torch.rand(filters, generator=generator, device=device),
            "bias": torch.randn(filters, generator=generator, device=device),
            "residual": draw(shape.batch, filters, *out_size) if kind == "residual" else None,
            "geometry": {"stride": (stride, stride), "padding": (padding, padding)},
            "compile": compile,
        }

    read, weights = shape.batch * channels * size[0] * size[1], filters * channels * kernel**2
    written = shape.batch * filters * out_size[0] * out_size[1]
    residual = written if kind == "residual" else 0
    flops = 2 * written * channels * kernel**2
    return Case(
        suite="folded_conv",
        name=f"{kind} {shape.name}",
        precision=precision,
        mode=mode,
        inputs=inputs,
        reference=reference,
        plain=reference,
        leaves=() if kind == "stem" else ("x", "weight") + (("residual",) if kind == "residual" else ()),
        work=work_of(mode, dtype.itemsize, read, weights, written, residual, flops),
        shape={
            "kind": kind, "batch": shape.batch, "channels": channels, "filters": filters, "kernel": kernel,
            "height": size[0], "width": size[1],
        },
    )  # fmt: skip
