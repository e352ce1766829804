"""`sine_position`: the sine position embedding of a feature map, straight from the batch's padding mask."""

import functools
import math

import torch
import torch.nn.functional as F

from detr_fast.ops._dispatch import calls_plainly, use_kernel

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_LAYOUTS = ("nchw", "tokens")


def sine_position(
    mask: torch.Tensor,
    size: tuple[int, int] | None = None,
    num_pos_feats: int = 64,
    temperature: float = 10000,
    normalize: bool = False,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    layout: str = "nchw",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sine position embedding of a feature map, and the padding mask at the feature map's size.

    The mask is resized as ``F.interpolate(mask.float(), size)`` does (nearest, rounding down). Any mask will do, also
    one with holes or without a valid cell. Not differentiable.

    Args:
        mask: [B, H, W] bool, any strides, True = padding.
        size: (h, w) of the feature map; None keeps the mask's own.
        num_pos_feats: F, features per axis; even.
        temperature: base of the geometric row of periods.
        normalize: divide each count by the last one of its column or row (plus 1e-6) and multiply by `scale`.
        scale: with `normalize` only; None means 2 pi.
        dtype: of the embedding. float32, bfloat16 and float16 are computed in float32 and cast, as the original does;
            float64 in float64, in plain PyTorch on every device.
        layout: "nchw" or "tokens".

    Returns:
        The embedding, contiguous: [B, 2F, h, w], or [B, h * w, 2F] in layout "tokens"; y features come before x
        features. And the resized mask [B, h, w] bool, which never shares memory with `mask`.

    Raises:
        TypeError: `mask` is no bool tensor; `dtype` is not one of the four.
        ValueError: `mask` is not 3-D; `size` is not two positive integers; an empty mask is to be resized;
            `num_pos_feats` is odd or not positive; `temperature` is not positive; `scale` without `normalize`;
            `layout` is unknown.

    Source: facebookresearch/detr `models/position_encoding.py` (PositionEmbeddingSine), `models/backbone.py`.
    """
    height, width = _check(mask, size, num_pos_feats, temperature, normalize, scale, dtype, layout)
    frequencies = _frequency_table(mask, num_pos_feats, float(temperature), torch.promote_types(dtype, torch.float32))
    scale = 2 * math.pi if scale is None else float(scale)
    function = _forward if calls_plainly(mask) else _sine_position
    return function(mask, frequencies, height, width, normalize, scale, dtype, layout == "tokens")


def sine_position_without_padding(
    features: torch.Tensor, num_pos_feats: int, temperature: float, normalize: bool, scale: float | None
) -> torch.Tensor:
    """`sine_position` of one image without padding, [1, h * w, 2F], remembered between calls in eager mode.

    Args:
        features: [B, C, h, w], whose size, dtype and device the embedding has.
        num_pos_feats, temperature, normalize, scale: as `sine_position`.
    """
    options = (num_pos_feats, temperature, normalize, scale, features.dtype)
    size, device = tuple(features.shape[-2:]), features.device
    if not _remembers(features):
        return _without_padding(size, device, *options)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    is_kernel = use_kernel(device, "sine_position")
    pos, version = _remembered_without_padding(size, device, *options, stream, is_kernel)
    # Somebody has written in it.
    return pos if pos._version == version else _without_padding(size, device, *options)


def _without_padding(size, device, *options) -> torch.Tensor:
    return sine_position(torch.zeros(1, *size, dtype=torch.bool, device=device), None, *options, layout="tokens")[0]


# As many as there are sizes of feature maps in a row; one takes a few hundred kilobytes.
@functools.lru_cache(maxsize=16)
def _remembered_without_padding(size, device, *options_stream_kernel):
    *options, _, _ = options_stream_kernel
    with torch.inference_mode(False):
        pos = _without_padding(size, device, *options)
        return pos, pos._version


def sine_position_reference(
    mask: torch.Tensor,
    size: tuple[int, int] | None = None,
    num_pos_feats: int = 64,
    temperature: float = 10000,
    normalize: bool = False,
    scale: float | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    layout: str = "nchw",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sine_position` in plain PyTorch: same arguments, results and errors."""
    height, width = _check(mask, size, num_pos_feats, temperature, normalize, scale, dtype, layout)
    compute_dtype = torch.promote_types(dtype, torch.float32)
    frequencies = _frequencies(num_pos_feats, float(temperature), compute_dtype, mask.device)
    scale = 2 * math.pi if scale is None else float(scale)
    return _reference(mask, frequencies, height, width, normalize, scale, dtype, layout == "tokens")


def _check(mask, size, num_pos_feats, temperature, normalize, scale, dtype, layout) -> tuple[int, int]:
    """Check the arguments of `sine_position`; return the feature map's height and width."""
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        got = f"dtype {mask.dtype}" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        raise TypeError(f"mask must be a bool tensor, True = padding; got {got}")
    if mask.dim() != 3:
        raise ValueError(f"mask must be [batch, height, width]; got shape {tuple(mask.shape)}")
    check_num_pos_feats(num_pos_feats)
    if isinstance(temperature, str | None) or not temperature > 0:
        raise ValueError(f"temperature must be positive; got {temperature!r}")
    if scale is not None and not normalize:
        raise ValueError(f"scale has no effect without normalize=True; got scale={scale}, normalize={normalize}")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, _DTYPES))}; got {dtype}")
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be 'nchw' or 'tokens'; got {layout!r}")
    if size is None:
        return mask.shape[1], mask.shape[2]
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise ValueError(f"size must be (height, width) or None; got {size!r}")
    height, width = size
    # Not isinstance(…, int): while tracing they may be symbols.
    if isinstance(height, float | str | None) or isinstance(width, float | str | None) or height <= 0 or width <= 0:
        raise ValueError(f"size must be two positive integers; got {tuple(size)}")
    if mask.shape[1] == 0 or mask.shape[2] == 0:
        raise ValueError(f"an empty mask cannot be resized; got shape {tuple(mask.shape)} and size {tuple(size)}")
    return height, width


def check_num_pos_feats(num_pos_feats: int) -> None:
    """Raise ValueError unless `num_pos_feats` is even and positive: the original pairs sine with cosine features."""
    if isinstance(num_pos_feats, str | None) or num_pos_feats <= 0 or num_pos_feats % 2:
        raise ValueError(f"num_pos_feats must be even and positive (sine and cosine in pairs); got {num_pos_feats!r}")


def _frequencies(num_pos_feats: int, temperature: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The divisors of the counts, temperature ** (2 i / F), each twice: [F]."""
    index = torch.arange(num_pos_feats, dtype=dtype, device=device)
    return temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / num_pos_feats)


def _frequency_table(mask: torch.Tensor, num_pos_feats: int, temperature: float, dtype: torch.dtype) -> torch.Tensor:
    """`_frequencies` on the mask's device, remembered between calls in eager mode.

    Not remembered while compiling or tracing, where its five small ops belong to the graph, nor during the capture of a
    CUDA graph, whose memory belongs to that graph.
    """
    device = mask.device
    if not _remembers(mask):
        return _frequencies(num_pos_feats, temperature, dtype, device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _remembered_frequencies(num_pos_feats, temperature, dtype, device, stream)


def _remembers(tensor: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(tensor) is not torch.Tensor:
        return False
    # A dispatch mode or a transform may make tensors of its own, which are not to outlive it.
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    return tensor.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


# A model uses one table per device and stream. Each stream has its own because only within a stream the launches that
# fill a table come before those that read it, and before those that reuse its memory when it is dropped.
@functools.lru_cache(maxsize=32)
def _remembered_frequencies(num_pos_feats, temperature, dtype, device, stream: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return _frequencies(num_pos_feats, temperature, dtype, device)


def _reference(mask, frequencies, height, width, normalize, scale, dtype, tokens):
    if (height, width) == tuple(mask.shape[1:]):
        resized = mask.clone(memory_format=torch.contiguous_format)
    else:
        resized = F.interpolate(mask[:, None].float(), size=(height, width))[:, 0].to(torch.bool)
    valid = ~resized
    embeds = []  # y, x; each [B, h, w, F]
    for axis in (1, 2):
        embed = valid.cumsum(axis, dtype=frequencies.dtype)
        if normalize:
            embed = (
                embed / (embed.narrow(axis, max(embed.shape[axis] - 1, 0), min(embed.shape[axis], 1)) + 1e-6) * scale
            )
        argument = embed[..., None] / frequencies
        embeds.append(torch.stack((argument[..., 0::2].sin(), argument[..., 1::2].cos()), dim=-1).flatten(-2))
    pos = torch.cat(embeds, dim=-1).to(dtype)  # [B, h, w, 2F]
    return (pos.flatten(1, 2) if tokens else pos.permute(0, 3, 1, 2).contiguous()), resized


def _forward(
    mask: torch.Tensor,
    frequencies: torch.Tensor,
    height: int,
    width: int,
    normalize: bool,
    scale: float,
    dtype: torch.dtype,
    tokens: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not use_kernel(mask.device, "sine_position") or dtype == torch.float64:
        return _reference(mask, frequencies, height, width, normalize, scale, dtype, tokens)
    from detr_fast.kernels.sine_position import sine_position_forward

    pos, resized = _empty_outputs(mask, frequencies, height, width, dtype, tokens)
    sine_position_forward(mask, frequencies, normalize, scale, pos=pos, resized=resized)
    return pos, resized


_sine_position = torch.library.custom_op("detr_fast::sine_position", _forward, mutates_args=())


@_sine_position.register_fake
def _sine_position_fake(mask, frequencies, height, width, normalize, scale, dtype, tokens):
    return _empty_outputs(mask, frequencies, height, width, dtype, tokens)


def _empty_outputs(mask, frequencies, height, width, dtype, tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and resized mask, contiguous."""
    batch, channels = mask.shape[0], 2 * frequencies.shape[0]
    shape = (batch, height * width, channels) if tokens else (batch, channels, height, width)
    return mask.new_empty(shape, dtype=dtype), mask.new_empty((batch, height, width))


@_sine_position.register_vmap
def _sine_position_vmap(info, in_dims, *args):
    raise NotImplementedError("sine_position does not support vmap: it takes a batch of masks as it is")
