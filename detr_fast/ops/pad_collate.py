"""`pad_collate`: images of different sizes become one zero-padded batch and its padding mask, in one launch.

Fused with it: uint8 -> float, mean/std, cast, channels_last, rounding the size up. Without the kernel the images are
written one after the other, with the reference's arithmetic.

Source: facebookresearch/detr, `util/misc.py` (`nested_tensor_from_tensor_list`); torchvision's `ToTensor` and
`Normalize` for the order of the arithmetic.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from detr_fast.ops._dispatch import calls_plainly, refuse_transforms, use_kernel

_INTEGERS = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_SMALLEST_STD = 1e-30  # its inverse, over 255 too, is well inside float32

_HEADER_COLUMNS = 5  # offset, channels, height, width, layout
_LAYOUTS = {"chw": 0, "hwc": 1}


def pad_collate(
    images: Sequence[Tensor] | Tensor,
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    size_divisor: int = 1,
) -> tuple[Tensor, Tensor]:
    """Pad images with zeros to the largest size, and tell where the padding is.

    Deterministic. Autocast changes nothing: the output's dtype is `dtype` or the first image's.

    Args:
        images: B >= 1 images [C_i, H_i, W_i], any strides and sizes, 0 included, or a tensor [B, C, H, W], on one
            device. bool, integers or floats; images of another dtype than the first are converted to its dtype, as the
            original does.
        mean, std: one value per channel, both or neither, floats or CPU tensors (inside torch.compile: floats). Images
            become (image - mean) / std, uint8 ones after division by 255. For uint8 and floating images.
        dtype: of the batch: floating, or the images' own. Default: the images' own, but float32 for uint8 images with
            `mean` and `std`.
        channels_last: the batch's memory is [B, H, W, C]; its shape stays [B, C, H, W].
        size_divisor: H and W are rounded up to a multiple of it.

    Returns:
        batch: [B, C, H, W], C, H, W the largest of the images (H and W rounded up). Padding is exactly 0, also after
            normalisation. Differentiable in the images: each gets its crop of the gradient, over `std`.
        mask: [B, H, W] bool, True = padding. An image's own pixels are False, also in channels that it lacks.

    Raises:
        ValueError: no image; an image that is not 3-D; several devices; only one of `mean` and `std`, or one with the
            wrong length or a value that is not finite; a `std` below 1e-30; a `size_divisor` below 1.
        TypeError: not a sequence of strided tensors; an unsupported dtype of images or batch; `mean` and `std` with
            integers other than uint8, on a GPU, or not one value per channel; a `size_divisor` that is no integer.
        NotImplementedError: inside `torch.vmap` or `torch.func`'s transforms, or with forward-mode tangents.
    """
    if not hasattr(images, "__iter__") or (isinstance(images, Tensor) and images.ndim == 0):
        raise TypeError(f"images is {_describe(images)}; expected a sequence of tensors [C, H, W] or one [B, C, H, W]")
    images = list(images.unbind(0) if isinstance(images, Tensor) else images)
    _check_images(images)
    refuse_transforms("pad_collate", *images)
    image_dtype = images[0].dtype
    images = [image if image.dtype == image_dtype else image.to(image_dtype) for image in images]
    channels = images[0].shape[0]
    for image in images[1:]:
        channels = torch.sym_max(channels, image.shape[0])
    mean, std = _check_mean_std(mean, std, image_dtype, channels)
    dtype = _output_dtype(dtype, image_dtype, mean is not None)
    _check_size_divisor(size_divisor)
    return torch.ops.detr_fast.pad_collate(images, mean, std, dtype, channels_last, size_divisor)


def pad_collate_packed(
    buffer: Tensor,
    header: Tensor,
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    size_divisor: int = 1,
) -> tuple[Tensor, Tensor]:
    """`pad_collate` of uint8 images in one flat buffer, as `pack_images` makes it in a loader's worker.

    One buffer is one copy to the GPU, of one byte per value. The header stays on the CPU: the batch's size is known
    without waiting for the GPU.

    Args:
        buffer: [N] uint8, contiguous, on the device of the result.
        header: [B, 5] int32 or int64 on the CPU: each image's offset in `buffer` (bytes), channels, height, width and
            layout (0 = CHW, 1 = HWC). Images may overlap or leave gaps.
        mean, std, dtype, channels_last, size_divisor: as in `pad_collate`.

    Returns:
        (batch, mask) as `pad_collate`.

    Raises:
        ValueError: a header of another shape, without images, or that points outside the buffer; a buffer that is not
            1-D and contiguous; and as `pad_collate`.
        TypeError: a buffer that is not uint8; a header that is not an integer CPU tensor; and as `pad_collate`.
    """
    if not isinstance(buffer, Tensor) or buffer.dtype != torch.uint8:
        raise TypeError(f"buffer is {_describe(buffer)}; expected a uint8 tensor [N]")
    if buffer.ndim != 1 or not buffer.is_contiguous():
        raise ValueError(
            f"buffer has shape {tuple(buffer.shape)}, strides {buffer.stride()}; expected one contiguous axis"
        )
    if not isinstance(header, Tensor) or header.dtype not in (torch.int32, torch.int64) or header.device.type != "cpu":
        raise TypeError(f"header is {_describe(header)}; expected an int32 or int64 tensor [B, 5] on the CPU")
    if header.ndim != 2 or header.shape[1] != _HEADER_COLUMNS or header.shape[0] == 0:
        raise ValueError(
            f"header has shape {tuple(header.shape)}; expected [B, {_HEADER_COLUMNS}] with at least one image: "
            "offset, channels, height, width, layout"
        )
    rows = header.tolist()
    for index, (offset, channels, height, width, layout) in enumerate(rows):
        if min(offset, channels, height, width) < 0 or offset + channels * height * width > buffer.shape[0]:
            raise ValueError(
                f"header row {index}: {channels} x {height} x {width} values at offset {offset} do not lie within the "
                f"buffer's {buffer.shape[0]}"
            )
        if layout not in _LAYOUTS.values():
            raise ValueError(f"header row {index} has layout {layout}; expected 0 (CHW) or 1 (HWC)")
    mean, std = _check_mean_std(mean, std, torch.uint8, max(row[1] for row in rows))
    dtype = _output_dtype(dtype, torch.uint8, mean is not None)
    _check_size_divisor(size_divisor)
    flat = [value for row in rows for value in row]
    function = _forward_packed if calls_plainly(buffer) else torch.ops.detr_fast.pad_collate_packed
    return function(buffer, flat, mean, std, dtype, channels_last, size_divisor)


def pack_images(images: Sequence[Tensor], *, layout: str | None = None) -> tuple[Tensor, Tensor]:
    """Write uint8 images into one flat buffer with a header, for `pad_collate_packed`, in a loader's worker.

    Args:
        images: B >= 1 uint8 CPU images [C_i, H_i, W_i] of any strides.
        layout: "chw" or "hwc", the order of every image in the buffer. Default: each image's own, so that nothing is
            transposed.

    Returns:
        buffer: [N] uint8, the images one after the other.
        header: [B, 5] int64: offset, channels, height, width, layout (0 = CHW, 1 = HWC).

    Raises:
        ValueError: no image, an image that is not 3-D, another `layout`.
        TypeError: an image that is not a uint8 CPU tensor.
    """
    if layout is not None and layout not in _LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected 'chw', 'hwc' or None")
    images = list(images)
    _check_images(images)
    for index, image in enumerate(images):
        if image.dtype != torch.uint8 or image.device.type != "cpu":
            raise TypeError(f"image {index} is {_describe(image)}; expected a uint8 tensor on the CPU")
    buffer = torch.empty(sum(image.numel() for image in images), dtype=torch.uint8, device="cpu")
    rows, offset = [], 0
    for image in images:
        is_hwc = layout == "hwc" or (layout is None and image.stride(0) == 1 and not image.is_contiguous())
        source = image.permute(1, 2, 0) if is_hwc else image
        buffer[offset : offset + image.numel()].view(source.shape).copy_(source)
        rows.append([offset, *image.shape, _LAYOUTS["hwc" if is_hwc else "chw"]])
        offset += image.numel()
    return buffer, torch.tensor(rows, dtype=torch.int64, device="cpu")


def pad_collate_reference(
    images: Sequence[Tensor],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    size_divisor: int = 1,
) -> tuple[Tensor, Tensor]:
    """`pad_collate` in plain PyTorch, image by image; same arguments and results. Differentiable."""
    dtype = _output_dtype(dtype, images[0].dtype, mean is not None)
    device = images[0].device
    shapes = [tuple(image.shape) for image in images]
    batch, mask = _empty_outputs(shapes, dtype, device, channels_last, size_divisor)
    batch.zero_()
    mask.fill_(True)
    for index, image in enumerate(images):
        channels, height, width = image.shape
        image = image.to(images[0].dtype)
        if mean is not None:
            values = image.to(_compute_dtype(image.dtype, dtype))
            if image.dtype == torch.uint8:
                values = values / 255
            mean_C, std_C = (torch.as_tensor(v[:channels], dtype=values.dtype, device=device) for v in (mean, std))
            image = (values - mean_C[:, None, None]) / std_C[:, None, None]
        batch[index, :channels, :height, :width] = image
        mask[index, :height, :width] = False
    return batch, mask


# The ops check again only what would make the kernel read memory outside the images.


def _forward(images, mean, std, dtype, channels_last, size_divisor) -> tuple[Tensor, Tensor]:
    shapes = [tuple(image.shape) for image in images]
    batch, mask = _empty_outputs(shapes, dtype, images[0].device, channels_last, size_divisor)
    if use_kernel(images[0].device, "pad_collate"):
        from detr_fast.kernels.pad_collate import pad_collate_forward

        pad_collate_forward(images, mean, std, batch=batch, mask=mask)
    else:
        _write(images, mean, std, batch, mask)
    return batch, mask


def _write(images, mean, std, batch: Tensor, mask: Tensor) -> None:
    """The reference's arithmetic, in the batch's memory where that is in the dtype and order to compute in."""
    filled = (batch.shape[1], *mask.shape[1:])
    if any(image.shape != filled for image in images):
        batch.zero_()
    mask.fill_(True)
    dtype = _compute_dtype(images[0].dtype, batch.dtype)
    in_place = batch.dtype == dtype and batch.is_contiguous()
    if mean is not None:
        mean_C, std_C = (torch.tensor(v, dtype=dtype, device=batch.device) for v in (mean, std))
    for image, padded, padding in zip(images, batch, mask, strict=True):
        channels, height, width = image.shape
        target = padded[:channels, :height, :width]
        padding[:height, :width] = False
        if mean is None:
            target.copy_(image)
            continue
        # Whole rows at a time: a mean for every third element keeps a CPU from computing in vectors.
        if in_place or image.is_contiguous() or not image.permute(1, 2, 0).is_contiguous():
            values = rows = target.copy_(image) if in_place else image.to(dtype, copy=True)
            subtrahend, divisor = (v[:channels, None, None] for v in (mean_C, std_C))
        else:
            values = image.to(dtype, copy=True)
            rows = values.permute(1, 2, 0).view(height, width * channels)
            subtrahend, divisor = (v[:channels].repeat(width) for v in (mean_C, std_C))
        if image.dtype == torch.uint8:
            rows.div_(255)
        rows.sub_(subtrahend).div_(divisor)
        if values is not target:
            target.copy_(values)


@torch.library.custom_op("detr_fast::pad_collate", mutates_args=())
def _pad_collate(
    images: Sequence[Tensor],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
    channels_last: bool,
    size_divisor: int,
) -> tuple[Tensor, Tensor]:
    for index, image in enumerate(images):
        if image.ndim != 3 or image.dtype != images[0].dtype or image.device != images[0].device:
            raise ValueError(f"image {index} is {_describe(image)}; expected 3-D, as image 0: {_describe(images[0])}")
    return _forward(images, mean, std, dtype, channels_last, size_divisor)


@_pad_collate.register_fake
def _pad_collate_fake(images, mean, std, dtype, channels_last, size_divisor):
    shapes = [tuple(image.shape) for image in images]
    return _empty_outputs(shapes, dtype, images[0].device, channels_last, size_divisor)


def _forward_packed(
    buffer: Tensor,
    header: Sequence[int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
    channels_last: bool,
    size_divisor: int,
) -> tuple[Tensor, Tensor]:
    images = []
    for offset, channels, height, width, layout in _rows(header):
        values = buffer[offset : offset + channels * height * width]
        is_hwc = layout == _LAYOUTS["hwc"]
        images.append(
            values.view(height, width, channels).permute(2, 0, 1) if is_hwc else values.view(channels, height, width)
        )
    return _forward(images, mean, std, dtype, channels_last, size_divisor)


_pad_collate_packed = torch.library.custom_op("detr_fast::pad_collate_packed", _forward_packed, mutates_args=())


@_pad_collate_packed.register_fake
def _pad_collate_packed_fake(buffer, header, mean, std, dtype, channels_last, size_divisor):
    return _empty_outputs([row[1:4] for row in _rows(header)], dtype, buffer.device, channels_last, size_divisor)


@torch.library.custom_op("detr_fast::pad_collate_backward", mutates_args=())
def _pad_collate_backward(
    grad: Tensor, shapes: Sequence[int], std: Sequence[float] | None, dtype: torch.dtype
) -> list[Tensor]:
    """Crops of grad [B, C, H, W], over std, as contiguous [C_i, H_i, W_i]; `shapes` is flat: 3 values per image."""
    grad_images = _empty_images(shapes, dtype, grad.device)
    if use_kernel(grad.device, "pad_collate"):
        from detr_fast.kernels.pad_collate import pad_collate_backward

        pad_collate_backward(grad, std, grad_images=grad_images)
        return grad_images
    for grad_CHW, grad_image in zip(grad, grad_images, strict=True):
        channels, height, width = grad_image.shape
        crop = grad_CHW[:channels, :height, :width]
        if std is not None:
            crop = crop.to(_compute_dtype(grad.dtype, dtype))
            crop = crop / torch.as_tensor(std[:channels], dtype=crop.dtype, device=crop.device)[:, None, None]
        grad_image.copy_(crop)
    return grad_images


@_pad_collate_backward.register_fake
def _pad_collate_backward_fake(grad, shapes, std, dtype):
    return _empty_images(shapes, dtype, grad.device)


def _setup_context(ctx, inputs, output):
    images, _, std, *_ = inputs
    ctx.shapes = [size for image in images for size in image.shape]
    ctx.std, ctx.dtype = std, images[0].dtype
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_batch, grad_mask):
    grads = torch.ops.detr_fast.pad_collate_backward(grad_batch, ctx.shapes, ctx.std, ctx.dtype)
    return grads, None, None, None, None, None


_pad_collate.register_autograd(_backward, setup_context=_setup_context)


def _no_vmap(info, in_dims, *args):
    raise NotImplementedError("pad_collate does not support vmap: it takes a list of images of any sizes as it is")


_pad_collate.register_vmap(_no_vmap)
_pad_collate_packed.register_vmap(_no_vmap)
_pad_collate_backward.register_vmap(_no_vmap)


# Arguments


def _check_images(images: list[Tensor]) -> None:
    if len(images) == 0:
        raise ValueError("got no image; expected at least one tensor [C, H, W]")
    for index, image in enumerate(images):
        if not isinstance(image, Tensor) or image.layout != torch.strided:
            raise TypeError(f"image {index} is {_describe(image)}; expected a strided tensor [C, H, W]")
        if image.ndim != 3:
            raise ValueError(f"image {index} has shape {tuple(image.shape)}; expected 3 axes [C, H, W]")
        if image.dtype not in _INTEGERS + _FLOATS:
            raise TypeError(f"image {index} has dtype {image.dtype}; expected bool, an integer or floating dtype")
        if image.device != images[0].device:
            raise ValueError(
                f"image {index} is on {image.device}, image 0 on {images[0].device}; expected all on one device: move "
                "them first (a packed buffer is one copy)"
            )


def _check_mean_std(mean, std, image_dtype: torch.dtype, channels: int):
    if mean is None and std is None:
        return None, None
    if mean is None or std is None:
        raise ValueError(f"got only {'std' if mean is None else 'mean'}; expected both mean and std or neither")
    if image_dtype != torch.uint8 and image_dtype not in _FLOATS:
        raise TypeError(f"mean and std were given with images of {image_dtype}; expected uint8 or a floating dtype")
    checked = []
    for name, values in (("mean", mean), ("std", std)):
        if isinstance(values, Tensor):
            if values.device.type != "cpu":
                raise TypeError(f"{name} is on {values.device}; expected floats or a CPU tensor: reading it would wait")
            values = values.flatten().tolist()
        elif isinstance(values, str) or not hasattr(values, "__iter__"):
            raise TypeError(f"{name} is {values!r}; expected one number for each of the {channels} channels")
        values = [float(value) for value in values]
        if len(values) != channels:
            raise ValueError(f"{name} has {len(values)} values; expected one for each of the {channels} channels")
        if not all(-math.inf < value < math.inf for value in values):  # torch.compile cannot trace isfinite
            raise ValueError(f"{name} is {values}; expected finite values")
        checked.append(values)
    if min(abs(value) for value in [1.0, *checked[1]]) < _SMALLEST_STD:
        raise ValueError(f"std is {checked[1]}; expected no value below {_SMALLEST_STD} in magnitude")
    return checked[0], checked[1]


def _check_size_divisor(size_divisor: int) -> None:
    if isinstance(size_divisor, float | str):
        raise TypeError(f"size_divisor is {size_divisor!r}; expected a positive integer")
    if size_divisor < 1:
        raise ValueError(f"size_divisor is {size_divisor}; expected a positive integer")


def _output_dtype(dtype: torch.dtype | None, image_dtype: torch.dtype, normalise: bool) -> torch.dtype:
    if dtype is None:
        return torch.float32 if normalise and image_dtype not in _FLOATS else image_dtype
    if dtype not in _FLOATS and (normalise or dtype != image_dtype):
        own = "" if normalise else f" or the images' own {image_dtype}"
        raise TypeError(f"dtype is {dtype}; expected float16, bfloat16, float32, float64{own}")
    return dtype


def _compute_dtype(source: torch.dtype, target: torch.dtype) -> torch.dtype:
    """float32, or float64 where either side is."""
    return torch.float64 if torch.float64 in (source, target) else torch.float32


def _round_up(size: int, divisor: int) -> int:
    return (size + divisor - 1) // divisor * divisor


def _rows(header: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(header[i : i + _HEADER_COLUMNS]) for i in range(0, len(header), _HEADER_COLUMNS)]


def _empty_images(shapes: Sequence[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Contiguous [C_i, H_i, W_i]; `shapes` is flat: 3 values per image."""
    return [torch.empty(tuple(shapes[i : i + 3]), dtype=dtype, device=device) for i in range(0, len(shapes), 3)]


def _empty_outputs(shapes, dtype, device, channels_last, size_divisor) -> tuple[Tensor, Tensor]:
    """Batch [B, C, H, W] and mask [B, H, W] for images of these shapes, which may be symbols."""
    channels, height, width = shapes[0]
    for shape in shapes[1:]:
        channels = torch.sym_max(channels, shape[0])
        height = torch.sym_max(height, shape[1])
        width = torch.sym_max(width, shape[2])
    height, width = _round_up(height, size_divisor), _round_up(width, size_divisor)
    batch = torch.empty(
        (len(shapes), channels, height, width),
        dtype=dtype,
        device=device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    return batch, torch.empty((len(shapes), height, width), dtype=torch.bool, device=device)


def _describe(value) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a {value.dtype} {value.layout} tensor {tuple(value.shape)} on {value.device}"
