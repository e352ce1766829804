"""From a list of images to a padded batch and its mask: ours against the original's loop and stock PyTorch.

Three tasks: `float` (float images as they are), `uint8` (uint8 images to a normalised batch) and `packed` (the same
from one flat uint8 buffer that came over in one copy). The images are on the device already.
"""

import functools
import warnings

import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from detr_fast.ops import pad_collate, pad_collate_packed, pad_collate_reference
from detr_fast.ops.pad_collate import pack_images

from ..harness.case import Case, Inputs, Outputs, Provider, Unavailable
from ..harness.ceilings import PRECISIONS, Work
from ..harness.spec import BATCHES, Scale, Spec, shape_of
from ..shapes import BatchShape

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = ("float", "uint8", "packed")


def options(kind: str) -> tuple[str, ...]:
    return ("precision", "model", "padding") + (("mode",) if kind == "float" else ())


def gpu_specs(quick: bool) -> list[Spec]:
    def spec(kind: str, **fields) -> Spec:
        return Spec("pad_collate", kind, **fields)

    specs = [spec(kind, padding=padding) for kind in ("uint8", "packed") for padding in ("none", "coco")]
    specs += [spec("float", padding=padding, precision="fp32") for padding in ("none", "coco")]
    if quick:
        return specs
    specs += [spec("float", precision="fp32", mode=mode) for mode in ("both", "backward")]
    specs += [spec("uint8", precision=precision) for precision in ("fp16", "fp32")]
    return specs + [spec("uint8", batch=batch) for batch in BATCHES]


def build(spec: Spec, scale: Scale, device: torch.device, *, compile: bool, quick: bool) -> tuple[Case, list[Provider]]:
    return case(spec.kind, shape_of(spec, scale), spec.precision, spec.mode, device), providers(spec.kind)


def original_loop(images: list[torch.Tensor], dtype: torch.dtype) -> Outputs:
    """A batch of zeros and a mask of ones, then two slice writes per image, as the original's collate does it."""
    channels, height, width = (max(image.shape[axis] for image in images) for axis in range(3))
    batch = images[0].new_zeros(len(images), channels, height, width, dtype=dtype)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=batch.device)
    for index, image in enumerate(images):
        batch[index, : image.shape[0], : image.shape[1], : image.shape[2]].copy_(image)
        mask[index, : image.shape[1], : image.shape[2]] = False
    return batch, mask


def _normalised(state: Inputs) -> list[torch.Tensor]:
    """ToTensor and Normalize, image by image."""
    if not state["normalise"]:
        return state["images"]
    return [(image.float() / 255 - state["mean"]) / state["std"] for image in state["images"]]


def _statistics(inputs: Inputs) -> Inputs:
    device = inputs["device"]
    return inputs | {
        "mean": torch.tensor(MEAN, device=device)[:, None, None],
        "std": torch.tensor(STD, device=device)[:, None, None],
    }


def _loop(state: Inputs) -> Outputs:
    return original_loop(_normalised(state), state["dtype"])


def _views(buffer: torch.Tensor, header: torch.Tensor) -> list[torch.Tensor]:
    return [buffer[o : o + c * h * w].view(c, h, w) for o, c, h, w, _ in header.tolist()]


def _loop_packed(state: Inputs) -> Outputs:
    return _loop(state | {"images": _views(state["buffer"], state["header"])})


def _nested_state(inputs: Inputs) -> Inputs:
    warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors is in prototype stage")
    sizes = torch.tensor([image.shape[1:] for image in inputs["images"]], device=inputs["device"])
    return _statistics(inputs) | {"heights": sizes[:, :1], "widths": sizes[:, 1:]}


def _nested(state: Inputs) -> Outputs:
    batch = torch.nested.to_padded_tensor(torch.nested.as_nested_tensor(_normalised(state)), 0.0).to(state["dtype"])
    inside_y = torch.arange(batch.shape[2], device=batch.device) < state["heights"]
    inside_x = torch.arange(batch.shape[3], device=batch.device) < state["widths"]
    return batch, ~(inside_y[:, :, None] & inside_x[:, None, :])


@functools.lru_cache(maxsize=1)
def _torchvision_transform() -> GeneralizedRCNNTransform:
    return GeneralizedRCNNTransform(800, 1333, list(MEAN), list(STD))


def _torchvision(state: Inputs) -> Outputs:
    transform, images = _torchvision_transform(), state["images"]
    if state["normalise"]:
        images = [transform.normalize(image.float() / 255) for image in images]
    return (transform.batch_images(images, size_divisible=1).to(state["dtype"]),)


def _normalisation(state: Inputs) -> dict:
    return {"mean": MEAN, "std": STD} if state["normalise"] else {}


def _ours(state: Inputs) -> Outputs:
    return pad_collate(state["images"], dtype=state["dtype"], **_normalisation(state))


def _ours_packed(state: Inputs) -> Outputs:
    return pad_collate_packed(state["buffer"], state["header"], dtype=state["dtype"], mean=MEAN, std=STD)


def _ours_channels_last(state: Inputs) -> Outputs:
    return pad_collate(state["images"], dtype=state["dtype"], channels_last=True, **_normalisation(state))


def reference(inputs: Inputs) -> Outputs:
    return pad_collate_reference(inputs["images"], dtype=torch.float64, **_normalisation(inputs))


def plain(inputs: Inputs) -> Outputs:
    return original_loop(_normalised(_statistics(inputs)), inputs["dtype"])


def _without_mask(outputs: Outputs, inputs: Inputs) -> Outputs:
    return outputs[:1]


def _no_gradient(inputs: Inputs) -> Inputs:
    if torch.is_grad_enabled() and any(image.requires_grad for image in inputs["images"]):
        raise Unavailable("nested tensors of this layout have no gradient here")
    return _nested_state(inputs)


def providers(task: str) -> list[Provider]:
    if task == "packed":
        return [
            Provider("detr_fast", "normalised, mask", _ours_packed, ours=True),
            Provider(
                "original loop", "views of the buffer, normalised image by image, mask", _loop_packed, _statistics
            ),
        ]
    prepared = "normalised image by image, " if task == "uint8" else ""
    return [
        Provider("detr_fast", "normalised, mask" if task == "uint8" else "mask", _ours, ours=True),
        Provider("detr_fast channels_last", "the batch as channels_last, mask", _ours_channels_last, ours=True),
        Provider("original loop", f"{prepared}mask", _loop, _statistics),
        Provider(
            "nested to_padded_tensor", f"{prepared}mask; sizes on the device beforehand", _nested, _no_gradient,
            eager_only="copies its sizes to the GPU and waits",
        ),
        Provider(
            "torchvision batch_images", f"{prepared}NO mask", _torchvision, compare=_without_mask,
            eager_only="copies mean and std to the GPU and waits" if task == "uint8" else "",
        ),
    ]  # fmt: skip


def case(task: str, shape: BatchShape, precision: str, mode: str, device: torch.device) -> Case:
    """`task`: one of `KINDS`. `precision`: of the batch, and of the images where the task is "float".

    Raises:
        ValueError: an unknown task; another mode than "forward" where the images are uint8 and have no gradient.
    """
    if task not in KINDS:
        raise ValueError(f"task is {task!r}; expected one of {KINDS}")
    if task != "float" and mode != "forward":
        raise ValueError(f"mode is {mode!r}; uint8 images have no gradient: expected 'forward'")
    dtype = PRECISIONS[precision][0]
    source = dtype if task == "float" else torch.uint8

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        images = [
            torch.randint(0, 256, (3, *size), generator=generator, device=device, dtype=torch.uint8).to(source)
            for size in shape.sizes
        ]
        made = {"images": images, "dtype": dtype, "normalise": task != "float", "device": device}
        if task == "packed":
            buffer, header = pack_images([image.cpu() for image in images])
            made |= {"buffer": buffer.to(device), "header": header}
        return made

    height, width = shape.padded
    read = 3 * sum(h * w for h, w in shape.sizes)
    written = 3 * shape.batch * height * width
    mask = shape.batch * height * width
    forward = Work(read * source.itemsize + written * dtype.itemsize + mask)
    backward = Work(2 * read * dtype.itemsize)  # each image's crop of the gradient: read and written
    return Case(
        suite="pad_collate",
        name=f"{task} {shape.name}",
        precision=precision,
        mode=mode,
        inputs=inputs,
        reference=reference,
        plain=plain,
        leaves=("images",) if task == "float" else (),
        work={"forward": [forward], "backward": [backward], "both": [forward, backward]}[mode],
        shape={
            "task": task, "batch": shape.batch, "height": height, "width": width, "source": str(source).split(".")[1],
            "valid": shape.valid_shares(),
        },
    )  # fmt: skip
