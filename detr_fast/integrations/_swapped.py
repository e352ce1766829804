"""What runs in a patched model: the classes that its modules are given, found again by copies and pickles."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.layers.attention import MultiheadAttention
from detr_fast.layers.norm import FrozenBatchNorm2d
from detr_fast.nested_tensor import is_nested_tensor
from detr_fast.ops.attention import attention
from detr_fast.ops.sine_position import sine_position


class Patched:
    """A swapped module. The class, not the instance, knows what it was."""

    _kind: str
    _original: type
    _settings: tuple

    def __reduce_ex__(self, protocol):
        # The class is made at run time: a copy, or another process, makes it again from the original one.
        _, (cls, *args), *rest = super().__reduce_ex__(max(int(protocol), 2))
        return _new, (cls._kind, cls._original, cls._settings, *args), *rest


class _Attention(Patched, MultiheadAttention):
    def forward(
        self, query, key, value, key_padding_mask=None, need_weights=None, attn_mask=None,
        average_attn_weights=True, is_causal=False,
    ):  # fmt: skip
        if not _fused(self, query, key, value, key_padding_mask, need_weights, attn_mask) or is_causal:
            need_weights = need_weights is None or need_weights
            # Past MultiheadAttention: the original's own forward.
            return super(MultiheadAttention, self).forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        return super().forward(query, key, value, key_padding_mask)


class _ProjectedAttention(Patched):
    """Of queries and keys [L, B, embed_dim] and values [L, B, vdim] that are projected already."""

    def forward(self, query, key, value, key_padding_mask=None, need_weights=None, attn_mask=None):
        if not _fused(self, query, key, value, key_padding_mask, need_weights, attn_mask):
            need_weights = need_weights is None or need_weights
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask)
        # [L, B, H * D] to [B, H, L, D]
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3) for x in (query, key, value))
        out, _ = attention(q, k, v, key_padding_mask, self.dropout if self.training else 0.0)
        return self.out_proj(out.permute(2, 0, 1, 3).flatten(2)), None


class _SinePosition(Patched):
    def forward(self, *args, **kwargs):
        mask = mask_of(args, kwargs)
        if mask is None:
            return super().forward(*args, **kwargs)
        return sine_position(mask, None, *self._settings)[0]


class _Norm(Patched):
    def forward(self, x):
        # Others were not compared: ours broadcasts over [B, C, H, W] alone.
        return FrozenBatchNorm2d.forward(self, x) if x.dim() == 4 else super().forward(x)  # type: ignore[arg-type]


_CLASSES = {
    "attention": _Attention,
    "projected attention": _ProjectedAttention,
    "position": _SinePosition,
    "norm": _Norm,
}


@functools.cache
def patched_class(kind: str, original: Any, settings: tuple = ()) -> Any:
    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_kind": kind,
        "_original": original,
        "_settings": settings,
    }
    return type(original.__name__, (_CLASSES[kind], original), names)


def _new(kind: str, original: type, settings: tuple) -> nn.Module:
    cls = patched_class(kind, original, settings)
    return nn.Module.__new__(cls)


def _fused(module, query, key, value, key_padding_mask, need_weights, attn_mask) -> bool:
    """Whether a call is one that the fused op computes."""
    if need_weights or attn_mask is not None or any(x.is_nested for x in (query, key, value)):
        return False
    if need_weights is None and module._forward_hooks:
        return False  # the default is to give weights, and a hook may read them
    return key_padding_mask is None or key_padding_mask.dtype == torch.bool


def mask_of(args: tuple, kwargs: Mapping) -> Tensor | None:
    """The mask [B, h, w] in a call with a NestedTensor, a mask, or features and a mask; None for any other call."""
    values = [*args, *kwargs.values()]
    if len(values) == 1 and is_nested_tensor(values[0]):
        values = [values[0].mask]
    elif len(values) == 2 and isinstance(values[0], Tensor) and values[0].is_floating_point():
        values = values[1:]
    if len(values) != 1 or not isinstance(values[0], Tensor):
        return None
    mask = values[0]
    return mask if mask.dtype == torch.bool and mask.dim() == 3 else None


def attends_to_projected(module: nn.Module) -> bool:
    out = getattr(module, "out_proj", None)
    if not isinstance(out, nn.Linear) or list(module.parameters()) != list(out.parameters()):
        return False
    return all(isinstance(getattr(module, name, None), int) for name in ("num_heads", "embed_dim", "vdim"))
