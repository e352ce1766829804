"""Weights in autocast's dtype, made together: two launches for each layer of the transformer instead of twenty."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.models.backbone import ResNetBody
from detr_fast.nested_tensor import NestedTensor

_LAYER = re.compile(r".*\blayers\.\d+\b")


class CastWeights:
    """Calls a model with the weights of its matrix products and convolutions in a low precision.

    Autocast casts each of them where it is used, and each gradient back, in a launch of its own. The numbers are the
    same: what autocast would leave in float32, such as norms and embeddings, stays so. A backbone that folds its norms
    into the weights casts them on the way, and keeps its own.

    Args:
        model: called with a NestedTensor under autocast; its parameters are float32.
        dtype: autocast's.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        self.model, self.dtype = model, dtype
        # A group for each layer: its gradients are complete, and may be exchanged, as soon as its backward pass ends.
        self._groups: list[list[tuple[dict, str]]] = list(_products(model))

    def __call__(self, samples: NestedTensor) -> Any:
        with self._cast():
            return self.model(samples)

    @contextmanager
    def _cast(self) -> Iterator[None]:
        own: list[tuple[dict, str, nn.Parameter]] = []
        try:
            for group in self._groups:
                weights = [parameters[name] for parameters, name in group]
                casts = cast_together(self.dtype, weights)
                for (parameters, name), weight, cast in zip(group, weights, casts, strict=True):
                    own.append((parameters, name, weight))
                    parameters[name] = cast
            yield
        finally:
            for parameters, name, weight in own:
                parameters[name] = weight


def _products(model: nn.Module) -> Iterator[list[tuple[dict, str]]]:
    """Where the weights and biases of products and convolutions are kept, by layer; each weight once."""
    groups: dict[str, list[tuple[dict, str]]] = {}
    uses: dict[int, int] = {}
    bodies = [module for module in model.modules() if isinstance(module, ResNetBody)]
    skipped = {part for body in bodies for part in body.modules()}
    for path, module in model.named_modules():
        if module in skipped:
            continue
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
            if name in _WEIGHTS.get(_kind(module), ()) and parameter.dtype == torch.float32:
                layer = _LAYER.match(path)
                groups.setdefault(layer[0] if layer else "", []).append((module._parameters, name))
    for group in groups.values():
        # Those that several modules share may be read elsewhere in float32.
        alone = [(parameters, name) for parameters, name in group if uses[id(parameters[name])] == 1]
        if alone:
            yield alone


_WEIGHTS = {
    nn.Linear: ("weight", "bias"),
    nn.Conv2d: ("weight", "bias"),
    nn.MultiheadAttention: ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
}


def _kind(module: nn.Module) -> type | None:
    """The class among `_WEIGHTS` that says how a module uses its weights.

    A subclass from outside of torch and this package may use them in another way.
    """
    if not type(module).__module__.startswith(("torch.", "detr_fast.")):
        return None
    return next((kind for kind in _WEIGHTS if isinstance(module, kind)), None)


def cast_together(dtype: torch.dtype, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies of float32 tensors in another dtype, differentiable."""
    return _Cast.apply(dtype, *weights)


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        casts = [torch.empty_like(weight, dtype=dtype) for weight in weights]
        torch._foreach_copy_(casts, list(weights))
        ctx.mark_non_differentiable(*(c for c, w in zip(casts, weights, strict=True) if not w.requires_grad))
        return tuple(casts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [grad for grad in grads if grad is not None]
        casts = [torch.empty_like(grad, dtype=torch.float32) for grad in given]
        if given:
            torch._foreach_copy_(casts, given)
        remaining = iter(casts)
        return None, *(None if grad is None else next(remaining) for grad in grads)
