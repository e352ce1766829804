"""A 1x1 convolution with bias, residual and ReLU: ours, one kernel, against cuBLAS, cuDNN and the steps apart.

Kinds, all of ResNet-50 on 800 x 1216 images: `reduce` (layer1's first, 256 to 64 channels), `expand` (layer1's last, 64
to 256 channels with the block's input added before the ReLU) and `expand-deep` (layer4's last, 512 to 2048 channels);
and `input-grad`, the gradient of layer2's input (128 to 512 channels), added to the shortcut's and masked by the ReLU.
Channels-last, so that the peers' matrix products take views.
"""

import functools

import torch
import torch.nn.functional as F

from detr_fast.ops import pointwise_conv, pointwise_conv_reference
from detr_fast.ops.pointwise_conv import pointwise_conv_input_grad

from ..harness.case import Case, Inputs, Outputs, Provider, Unavailable, needs_compile
from ..harness.ceilings import PRECISIONS, Work
from ..harness.spec import BATCHES, Scale, Spec, both_modes, shape_of
from ..shapes import BatchShape
from .folded_conv import work_of

# (channels in, channels out, whether there is a residual, stride of the image)
LAYERS = {"reduce": (256, 64, False, 4), "expand": (64, 256, True, 4), "expand-deep": (512, 2048, True, 32)}
INPUT_GRAD = "input-grad"
KINDS = (*LAYERS, INPUT_GRAD)
TENSORS = ("x", "weight", "bias", "residual")
INPUT_GRAD_TENSORS = ("grad", "weight", "shortcut", "gate")


def options(kind: str) -> tuple[str, ...]:
    return ("precision",) if kind == INPUT_GRAD else ("precision", "mode")


def gpu_specs(quick: bool) -> list[Spec]:
    def spec(kind: str, **fields) -> Spec:
        return Spec("pointwise_conv", kind, padding="none", **fields)

    specs = both_modes(*map(spec, LAYERS)) + [spec(INPUT_GRAD)]
    if quick:
        return specs
    specs += [spec("expand", precision=precision) for precision in ("fp16", "tf32", "fp32")]
    return specs + [spec("expand", batch=batch) for batch in BATCHES]


def build(spec: Spec, scale: Scale, device: torch.device, *, compile: bool, quick: bool) -> tuple[Case, list[Provider]]:
    if spec.kind == INPUT_GRAD:
        return input_grad_case(shape_of(spec, scale), spec.precision, device, compile=compile), input_grad_providers()
    return case(spec.kind, shape_of(spec, scale), spec.precision, spec.mode, device, compile=compile), providers()


def _ours(state: Inputs) -> Outputs:
    return (pointwise_conv(*(state[name] for name in TENSORS)),)


def reference(inputs: Inputs) -> Outputs:
    return (pointwise_conv_reference(*(inputs[name] for name in TENSORS)),)


def steps(x, weight, bias, residual) -> torch.Tensor:
    out = F.conv2d(x, weight, bias.to(x.dtype))
    return (out if residual is None else out + residual).relu()


def _steps(state: Inputs) -> Outputs:
    return (steps(*(state[name] for name in TENSORS)),)


def _pixels(image: torch.Tensor) -> torch.Tensor:
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def _image(pixels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return pixels.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)


def _product(state: Inputs) -> Outputs:
    x, weight, bias, residual = (state[name] for name in TENSORS)
    out = torch.addmm(bias.to(x.dtype), _pixels(x), weight.flatten(1).t())
    if residual is not None:
        out = out + _pixels(residual)
    return (_image(out.relu(), x),)


def _epilogue(state: Inputs) -> Outputs:
    x, weight, bias, _ = (state[name] for name in TENSORS)
    return (_image(torch._addmm_activation(bias.to(x.dtype), _pixels(x), weight.flatten(1).t()), x),)


def _epilogue_takes(inputs: Inputs) -> Inputs:
    if inputs["residual"] is not None:
        raise Unavailable("its epilogue has no residual")
    if inputs["differentiated"]:
        raise Unavailable("it has no backward")
    return dict(inputs)


def _cudnn(state: Inputs) -> Outputs:
    x, weight, bias, residual = (state[name] for name in TENSORS)
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    if residual is None:
        return (torch.ops.aten.cudnn_convolution_relu(x, weight, bias.to(x.dtype), *geometry),)
    return (torch.ops.aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias.to(x.dtype), *geometry),)


def _cudnn_takes(inputs: Inputs) -> Inputs:
    if inputs["x"].device.type != "cuda" or not torch.backends.cudnn.is_available():
        raise Unavailable("needs cuDNN")
    if inputs["differentiated"]:
        raise Unavailable("it has no backward")
    return dict(inputs)


@functools.lru_cache(maxsize=1)
def _compiled_steps():
    return torch.compile(steps)


def _compiled(state: Inputs) -> Outputs:
    return (_compiled_steps()(*(state[name] for name in TENSORS)),)


def providers() -> list[Provider]:
    return [
        Provider("detr_fast", "one product; bias, residual and ReLU in its epilogue", _ours, ours=True),
        Provider("convolution, op by op", "convolution with bias, residual and ReLU after it", _steps),
        Provider("product, op by op", "addmm with bias, residual and ReLU after it", _product),
        Provider("_addmm_activation", "bias and ReLU in the product's epilogue", _epilogue, _epilogue_takes),
        Provider("cuDNN fused", "bias, residual and ReLU in cuDNN's convolution", _cudnn, _cudnn_takes),
        Provider("convolution, compiled", "convolution, residual and ReLU; torch.compile", _compiled, needs_compile),
    ]


def case(
    kind: str, shape: BatchShape, precision: str, mode: str, device: torch.device, *, compile: bool = False
) -> Case:
    """`kind`: one of `KINDS`; `shape`: of the images."""
    channels, filters, has_residual, stride = LAYERS[kind]
    dtype = PRECISIONS[precision][0]
    height, width = (-(-side // stride) for side in shape.padded)

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*size, scale=1.0):
            drawn = scale * torch.randn(*size, generator=generator, device=device)
            return drawn.to(dtype, memory_format=torch.channels_last)

        return {
            "x": draw(shape.batch, channels, height, width),
            "weight": draw(filters, channels, 1, 1, scale=channels**-0.5),
            "bias": torch.randn(filters, generator=generator, device=device),
            "residual": draw(shape.batch, filters, height, width) if has_residual else None,
            "differentiated": mode != "forward",
            "compile": compile,
        }

    pixels = shape.batch * height * width
    read, weights, written = pixels * channels, channels * filters, pixels * filters
    residual = written if has_residual else 0
    flops = 2 * written * channels
    return Case(
        suite="pointwise_conv",
        name=f"{kind} {shape.name}",
        precision=precision,
        mode=mode,
        inputs=inputs,
        reference=reference,
        plain=_steps,
        leaves=("x", "weight") + (("residual",) if has_residual else ()),
        work=work_of(mode, dtype.itemsize, read, weights, written, residual, flops),
        shape={
            "kind": kind, "batch": shape.batch, "channels": channels, "filters": filters, "height": height,
            "width": width,
        },
    )  # fmt: skip


def _input_grad(state: Inputs) -> Outputs:
    return (pointwise_conv_input_grad(*(state[name] for name in INPUT_GRAD_TENSORS)),)


def _input_grad_steps(grad, weight, shortcut, gate) -> torch.Tensor:
    total = _image(_pixels(grad) @ weight.flatten(1), grad) + shortcut
    return torch.ops.aten.threshold_backward(total, gate, 0)


def _input_grad_reference(inputs: Inputs) -> Outputs:
    return (_input_grad_steps(*(inputs[name] for name in INPUT_GRAD_TENSORS)),)


@functools.lru_cache(maxsize=1)
def _compiled_input_grad():
    return torch.compile(_input_grad_steps)


def _input_grad_compiled(state: Inputs) -> Outputs:
    return (_compiled_input_grad()(*(state[name] for name in INPUT_GRAD_TENSORS)),)


def input_grad_providers() -> list[Provider]:
    return [
        Provider("detr_fast", "one product; shortcut and mask in its epilogue", _input_grad, ours=True),
        Provider("product, op by op", "cuBLAS's product, sum and mask after it", _input_grad_reference),
        Provider("product, compiled", "the same; torch.compile", _input_grad_compiled, needs_compile),
    ]


def input_grad_case(shape: BatchShape, precision: str, device: torch.device, *, compile: bool = False) -> Case:
    channels, filters, stride = 512, 128, 8
    dtype = PRECISIONS[precision][0]
    height, width = (-(-side // stride) for side in shape.padded)

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*size):
            drawn = torch.randn(*size, generator=generator, device=device)
            return drawn.to(dtype, memory_format=torch.channels_last)

        image = (shape.batch, channels, height, width)
        grad, weight = draw(shape.batch, filters, height, width), draw(filters, channels, 1, 1) * filters**-0.5
        state = dict(zip(INPUT_GRAD_TENSORS, (grad, weight, draw(*image), draw(*image).relu()), strict=True))
        return state | {"compile": compile}

    pixels = shape.batch * height * width
    moved = dtype.itemsize * (pixels * (filters + 3 * channels) + channels * filters)
    return Case(
        suite="pointwise_conv",
        name=f"{INPUT_GRAD} {shape.name}",
        precision=precision,
        mode="forward",
        inputs=inputs,
        reference=_input_grad_reference,
        plain=_input_grad_reference,
        leaves=(),
        work=[Work(moved, 2 * pixels * channels * filters)],
        shape={
            "kind": INPUT_GRAD, "batch": shape.batch, "channels": channels, "filters": filters, "height": height,
            "width": width,
        },
    )  # fmt: skip
