"""The calls whose kernels the compile gate compiles: what the ops' launchers can be made to launch."""

import dataclasses
from collections.abc import Callable

import torch

from detr_fast.ops.attention import attention
from detr_fast.ops.joint_softmax import joint_softmax
from detr_fast.ops.matching_cost import matching_cost
from detr_fast.ops.pad_collate import pad_collate
from detr_fast.ops.pointwise_conv import pointwise_conv, pointwise_conv_input_grad
from detr_fast.ops.sine_position import sine_position

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call of an op.

    Attributes:
        name: what varies, the dtype among it (bf16, fp16, fp32).
        run: makes the call, forward and backward.
        detr: DETR's own shapes and options run this; then no kernel may spill.
        from_chip: the first compute capability, times ten, that the call is meant for.
        no_spills_on: chips for which no kernel may spill, though DETR does not run this.
        spills_on: chips for which a kernel may spill, though DETR runs this.
    """

    name: str
    run: Callable[[], None]
    detr: bool = False
    from_chip: int = 75
    no_spills_on: tuple[int, ...] = ()
    spills_on: tuple[int, ...] = ()


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


def _pad(
    name: str,
    source: torch.dtype,
    target: torch.dtype | None = None,
    channels: int = 3,
    hwc: bool = False,
    detr: bool = False,
    backward: bool = False,
    **options,
) -> Case:
    def run():
        images = []
        for height, width in ((40, 300), (33, 280)):
            image = torch.zeros((height, width, channels) if hwc else (channels, height, width)).to(source)
            image = image.permute(2, 0, 1) if hwc else image
            images.append(image.requires_grad_() if backward else image)
        batch, _ = pad_collate(images, dtype=target, **options)
        if backward:
            batch.backward(torch.zeros_like(batch))

    bf16 = torch.bfloat16 in (source, target)
    return Case(f"pad_collate {name}", run, detr, from_chip=80 if bf16 else 75)


_NORM = dict(mean=[0.5] * 3, std=[0.25] * 3)
for _name, _dtype in DTYPES.items():
    CASES += [
        _pad(f"uint8 -> {_name} normalised", torch.uint8, _dtype, detr=True, **_NORM),
        _pad(
            f"uint8 HWC -> {_name} normalised channels_last",
            torch.uint8,
            _dtype,
            hwc=True,
            channels_last=True,
            detr=True,
            **_NORM,
        ),
        _pad(f"{_name} copy", _dtype, detr=_name == "fp32"),
        _pad(f"{_name} copy backward", _dtype, backward=True),
        _pad(f"{_name} normalised backward", _dtype, backward=True, **_NORM),
    ]
CASES += [
    _pad("bool copy, 5 channels", torch.bool, channels=5),
    _pad("uint8 HWC -> fp32 normalised", torch.uint8, torch.float32, hwc=True, **_NORM),
    _pad("uint8 CHW -> bf16 normalised channels_last", torch.uint8, torch.bfloat16, channels_last=True, **_NORM),
    _pad("fp32 4 channels normalised", torch.float32, channels=4, mean=[0.5] * 4, std=[0.25] * 4),
    _pad("fp32 4 channels channels_last", torch.float32, channels=4, channels_last=True),
    _pad(
        "fp32 4 channels normalised channels_last",
        torch.float32,
        channels=4,
        channels_last=True,
        mean=[0.5] * 4,
        std=[0.25] * 4,
    ),
    _pad("fp64 normalised backward", torch.float64, backward=True, **_NORM),
    _pad("fp64 copy", torch.float64),
]
CASES += [
    _pad(f"{str(_dtype)[6:]} -> fp32", _dtype, torch.float32)
    for _dtype in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.float64,
    )
]


def _attention(
    dtype: str,
    lengths: tuple[int, int] = (950, 950),
    head_dims: tuple[int, int] = (32, 32),
    padding: bool = True,
    dropout: float = 0.1,
    tf32: bool = False,
    detr: bool = False,
    rows: bool = False,
    **limits,
) -> Case:
    def run():
        heads = 8
        query, key, value = (
            # As a projection gives them: [L, B, H, D] in memory.
            torch.empty(length, 2, heads, dim, dtype=DTYPES[dtype]).permute(1, 2, 0, 3).requires_grad_()
            for length, dim in zip((lengths[0], lengths[1], lengths[1]), (head_dims[0], *head_dims), strict=True)
        )
        mask = torch.zeros(2, lengths[1], dtype=torch.bool) if padding else None
        query_mask = torch.zeros(2, lengths[0], dtype=torch.bool) if rows else None
        allowed = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            out, _ = attention(query, key, value, mask, dropout, query_padding_mask=query_mask)
            out.backward(torch.empty_like(out))
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed

    name = f"attention {dtype}{' tf32' if tf32 else ''} {lengths[0]}x{lengths[1]} d={head_dims[0]}"
    name += f",{head_dims[1]}" if head_dims[0] != head_dims[1] else ""
    name += f"{' padding' if padding else ''}{' dropout' if dropout else ''}{' rows' if rows else ''}"
    return Case(name, run, detr, from_chip=80, **limits)


# Encoder, cross and decoder self-attention, in training and in evaluation; DC5's encoder.
for _dtype in ("bf16", "fp16"):
    CASES += [
        _attention(_dtype, detr=True),
        _attention(_dtype, dropout=0.0, detr=True),
        _attention(_dtype, (100, 950), detr=True),
        # All keys in one block of 128; for sm_100 ptxas spills 32 bytes of it.
        _attention(_dtype, (100, 100), padding=False, detr=True, spills_on=(100,)),
        _attention(_dtype, (100, 100), padding=False, dropout=0.0, detr=True),
        _attention(_dtype, (3800, 3800), detr=True),
    ]
for _tf32 in (False, True):
    CASES += [
        _attention("fp32", tf32=_tf32, detr=True),
        _attention("fp32", dropout=0.0, tf32=_tf32, detr=True),
        _attention("fp32", (100, 100), padding=False, tf32=_tf32, detr=True),
        _attention("fp32", (100, 100), padding=False, dropout=0.0, tf32=_tf32, detr=True),
    ]
# The encoder as the detectors call it, where rows of padded queries are not computed.
CASES += [_attention("bf16", dropout=dropout, rows=True, detr=True) for dropout in (0.1, 0.0)]
CASES += [_attention("fp32", rows=True), _attention("bf16", padding=False, rows=True)]
# Every padded head dimension, head dimensions narrower than their tiles, and a value dimension of its own. At 96 and
# 128 the gradient of keys and values spills; in 16 bits, smaller tiles that would not spill would lose wgmma.
for _dims in ((16, 16), (64, 64), (128, 128), (24, 40), (24, 24), (40, 40), (96, 96)):
    _no_spills = () if _dims[0] > 64 else (90,)
    CASES += [_attention("bf16", head_dims=_dims, no_spills_on=_no_spills)]
    CASES += [_attention("fp32", head_dims=_dims, tf32=True, no_spills_on=_no_spills)]
    _no_spills = (90,) if _dims[0] in (16, 64) else ()
    CASES += [_attention("fp32", head_dims=_dims, dropout=0.0, no_spills_on=_no_spills)]
for _dims in ((64, 64), (40, 40), (128, 128)):
    _no_spills = () if _dims[0] > 64 else (90,)
    CASES += [_attention("bf16", head_dims=_dims, padding=False, no_spills_on=_no_spills)]
    CASES += [_attention("bf16", (100, 950), _dims, no_spills_on=_no_spills)]
    CASES += [_attention("fp32", head_dims=_dims, padding=False)]


def _joint_softmax(dtype: str, masked: bool = True, transposed: bool = True, heads: int = 8) -> Case:
    def run():
        scores = torch.zeros(2, heads, 100, 950, dtype=DTYPES[dtype])
        scores = (scores.transpose(1, 2) if transposed else scores.transpose(1, 3)).requires_grad_()
        weights = joint_softmax(scores, torch.zeros(2, scores.shape[3], dtype=torch.bool) if masked else None)
        grad = torch.zeros(weights.shape, dtype=weights.dtype)
        weights.backward(grad if transposed else grad.transpose(2, 3).contiguous().transpose(2, 3))

    name = f"joint_softmax {dtype}{' masked' if masked else ''}{'' if transposed else ' strided'} H{heads}"
    return Case(name, run, detr=transposed and heads == 8, from_chip=80 if dtype == "bf16" else 75)


CASES += [_joint_softmax(_dtype, masked) for _dtype in DTYPES for masked in (True, False)]
CASES += [_joint_softmax("fp32", transposed=False), _joint_softmax("fp32", heads=5)]


def _assignment(dtype: str, queries: int, targets: int, detr: bool = False) -> Case:
    def run():
        cost = torch.zeros(6, 2 * targets, queries, dtype={**DTYPES, "fp64": torch.float64}[dtype])
        # Not `assign`, which would read what no kernel has written.
        torch.ops.detr_fast.assign(cost, torch.arange(3) * targets, targets)

    # On sm_75, 512 columns spill three registers.
    return Case(f"assignment {dtype} {queries}x{targets}", run, detr, from_chip=80 if queries == 300 else 75)


def _matching_cost(classes: int, detr: bool = False) -> Case:
    def run():
        logits, boxes = torch.zeros(6, 2, 100, classes), torch.zeros(6, 2, 100, 4)
        labels, target_boxes = torch.zeros(30, dtype=torch.int64), torch.zeros(30, 4)
        matching_cost(logits, boxes, labels, target_boxes, torch.tensor([0, 10, 30]), 1, 5, 2)

    return Case(f"matching_cost fp32 {classes} classes", run, detr)


CASES += [_assignment("fp32", 100, 63, detr=True), _assignment("fp32", 300, 300, detr=True)]
CASES += [_assignment("fp32", 900, 100), _assignment("fp32", 100, 1500), _assignment("fp64", 100, 20)]
CASES += [_matching_cost(92, detr=True), _matching_cost(1)]


def _pointwise_conv(
    dtype: str, channels: tuple[int, int], residual: bool = False, tf32: bool = False, plain: bool = False,
    detr: bool = False,
) -> Case:  # fmt: skip
    def run():
        x = torch.zeros(2, channels[0], 25, 38, dtype=DTYPES[dtype]).to(memory_format=torch.channels_last)
        weight = torch.zeros(channels[1], channels[0], 1, 1, dtype=DTYPES[dtype])
        added = torch.zeros(2, channels[1], 25, 38, dtype=DTYPES[dtype]) if residual else None
        saved = torch.backends.cudnn.conv.fp32_precision
        torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            pointwise_conv(x, weight, None if plain else torch.zeros(channels[1]), added, relu=not plain)
        finally:
            torch.backends.cudnn.conv.fp32_precision = saved

    name = f"pointwise_conv {dtype}{' tf32' if tf32 else ''} {channels[0]} to {channels[1]}"
    name += f"{' residual' if residual else ''}{' plain' if plain else ''}"
    return Case(name, run, detr, from_chip=80)


def _pointwise_conv_input_grad(
    dtype: str, channels: tuple[int, int], shortcut: bool, tf32: bool, detr: bool = True
) -> Case:
    """`channels`: of the output, whose gradient is given, and of the input."""

    def run():
        grad, x = (
            torch.zeros(2, n, 25, 38, dtype=DTYPES[dtype]).to(memory_format=torch.channels_last) for n in channels
        )
        weight = torch.zeros(*channels, 1, 1, dtype=DTYPES[dtype])
        saved = torch.backends.cudnn.conv.fp32_precision
        torch.backends.cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
        try:
            pointwise_conv_input_grad(grad, weight, x if shortcut else None, x)
        finally:
            torch.backends.cudnn.conv.fp32_precision = saved

    name = f"pointwise_conv input grad {dtype}{' tf32' if tf32 else ''} {channels[0]} to {channels[1]}"
    return Case(f"{name}{' shortcut' if shortcut else ''}", run, detr, from_chip=80)


# A bottleneck's first and last convolution, layer1's downsampling, and numbers of channels that fit no tile.
for _dtype, _tf32 in (("bf16", False), ("fp16", False), ("fp32", True), ("fp32", False)):
    CASES += [
        _pointwise_conv(_dtype, (256, 64), tf32=_tf32, detr=True),
        _pointwise_conv(_dtype, (512, 128), tf32=_tf32, detr=True),
        _pointwise_conv(_dtype, (64, 256), residual=True, tf32=_tf32, detr=True),
        _pointwise_conv(_dtype, (64, 256), plain=True, tf32=_tf32, detr=True),
        _pointwise_conv(_dtype, (40, 72), residual=True, tf32=_tf32),
        # Of a bottleneck's first convolution, beside the shortcut, and of its last one.
        _pointwise_conv_input_grad(_dtype, (128, 512), True, _tf32),
        _pointwise_conv_input_grad(_dtype, (512, 128), False, _tf32),
        _pointwise_conv_input_grad(_dtype, (40, 72), True, _tf32, detr=False),
    ]
