"""Convolutions with frozen norms for inference on a CPU, their folded weights kept in oneDNN's own order."""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detr_fast.ops._dispatch import kernels_chosen
from detr_fast.ops._onednn import HAS_ONEDNN


class _Kept(NamedTuple):
    """A convolution's folded weight and bias, and copies of what they were made of."""

    sources: tuple[Tensor, ...]
    weight: Tensor
    bias: Tensor | None
    is_finite: bool


class NotFinite(ArithmeticError):
    """A weight holds NaN or infinity."""


class PackedConvs:
    """relu(conv(x, scale * weight) + bias + residual) on a CPU, in one oneDNN call, in channels-last memory.

    The folded weights are computed and reordered once and kept for as long as their convolution exists. Every call
    compares weight, scale and bias bit by bit with those that the kept ones were made of: version counters would miss
    what is written through `.data` or a numpy view. The comparison reads the weights once, which takes about a
    hundredth of the convolution's time.

    oneDNN's ReLU makes 0 of NaN, which must be seen in the results: weights and images that are not finite are
    refused.

    Copies and pickles are empty: what is kept is no state.
    """

    def __init__(self) -> None:
        self._kept: weakref.WeakKeyDictionary[nn.Conv2d, _Kept] = weakref.WeakKeyDictionary()

    def __reduce__(self):
        return type(self), ()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        self._kept.clear()

    def __call__(
        self,
        x: Tensor,
        conv: nn.Conv2d,
        affine: tuple[Tensor, Tensor | None],
        residual: Tensor | None = None,
        relu: bool = True,
        overwrite: bool = False,
    ) -> Tensor:
        """One convolution; `runs_packed(x)` must hold.

        Args:
            x: [B, C, H, W], channels-last.
            conv: without a bias of its own, padded with zeros.
            affine: scale and bias [O] of the norm; the bias may be None.
            residual: [B, O, h, w] in x's dtype, channels-last, or None.
            relu: False leaves the ReLU out; not with a residual.
            overwrite: the result may take the residual's memory.

        Returns:
            [B, O, h, w] in x's dtype, channels-last.

        Raises:
            NotFinite: weight, scale or bias hold NaN or infinity.
        """
        weight, bias, is_finite = self._folded(x, conv, *affine)
        if not is_finite:
            raise NotFinite
        geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(
                x, weight, bias, *geometry, "relu" if relu else "none", [], ""
            )
        added = ("add", 1.0, "relu", [], "")
        if overwrite:
            return torch.ops.mkldnn._convolution_pointwise_.binary(residual, x, weight, bias, *geometry, *added)
        return torch.ops.mkldnn._convolution_pointwise.binary(x, residual, weight, bias, *geometry, *added)

    def _folded(
        self, x: Tensor, conv: nn.Conv2d, scale: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None, bool]:
        sources = (conv.weight.detach(), scale) if bias is None else (conv.weight.detach(), scale, bias)
        kept = self._kept.get(conv)
        if kept is None or kept.weight.dtype != x.dtype or not _same_bits(kept.sources, sources):
            folded = (sources[0] * scale[:, None, None, None]).to(x.dtype)
            is_finite = _is_finite(folded) and (bias is None or _is_finite(bias))
            if x.shape[1] > 3:  # the stem's is faster as it is
                folded = torch._C._nn.mkldnn_reorder_conv2d_weight(
                    folded.contiguous().to_mkldnn(), conv.padding, conv.stride, conv.dilation, conv.groups, x.shape
                )
            else:
                folded = folded.contiguous(memory_format=torch.channels_last)
            copies = tuple(source.clone() for source in sources)
            kept = _Kept(copies, folded, None if bias is None else bias.to(x.dtype), is_finite)
            self._kept[conv] = kept
        return kept.weight, kept.bias, kept.is_finite


def runs_packed(x: Tensor) -> bool:
    """Whether `PackedConvs` takes x, in autocast's dtype if that is on: finite, on x86, without gradients."""
    if not HAS_ONEDNN or type(x) is not Tensor or x.device.type != "cpu" or torch.is_grad_enabled():
        return False
    if not torch.backends.mkldnn.enabled or torch.jit.is_tracing() or kernels_chosen(x.device) or x.numel() == 0:
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if not (dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())):
        return False
    return _is_finite(x)


def _is_finite(x: Tensor) -> bool:
    """Whether no element is NaN or infinite, which their sum shows in one pass."""
    return bool(x.sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite())


def _same_bits(before: tuple[Tensor, ...], now: tuple[Tensor, ...]) -> bool:
    return len(before) == len(now) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
        for a, b in zip(before, now, strict=True)
    )


def _bits(tensor: Tensor) -> Tensor:
    """The values as integers, which unlike floats equal themselves always, in the widest that fits: it is fastest."""
    if tensor.dim() == 4 and not tensor.is_contiguous():
        tensor = tensor.permute(0, 2, 3, 1)  # channels-last weights are not copied
    flat = tensor.contiguous().flatten()
    wide = flat.nbytes % 8 == 0 and flat.storage_offset() * flat.itemsize % 8 == 0
    return flat.view(torch.int64 if wide else {2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.itemsize])
