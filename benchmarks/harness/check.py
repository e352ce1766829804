"""The check before the measurement: every provider's answer and gradients against float64, and its dropout."""

import math
from collections.abc import Callable
from typing import Any

import torch

from .case import Case, Inputs, Outputs, Provider
from .ceilings import set_precision

# Allowed beside twice the plain implementation's error, relative to the largest value of the slice: about one rounding
# of the result; for fp32 torch.testing's absolute tolerance.
FLOORS = {"fp32": 1e-5, "tf32": 2.0**-10, "bf16": 2.0**-8, "fp16": 2.0**-11}


def _as_double(inputs: Inputs) -> Inputs:
    def convert(value):
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, list):
            return [convert(v) for v in value]
        return value

    return {name: convert(value) for name, value in inputs.items()}


def leaf(value):
    return [v.detach().requires_grad_() for v in value] if isinstance(value, list) else value.detach().requires_grad_()


def flat(values) -> list[torch.Tensor]:
    return [t for v in values for t in (v if isinstance(v, list) else [v])]


def cotangents_for(outputs: Outputs, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Random, in the outputs' memory layout; rounded to `dtype` first, so that every precision has the same numbers."""
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    drawn = [torch.randn(o.shape, generator=generator, device=o.device).to(dtype) for o in outputs]
    return [torch.empty_like(o).copy_(d) for o, d in zip(outputs, drawn, strict=True)]


def float_outputs(outputs: Outputs) -> Outputs:
    return tuple(o for o in outputs if o.is_floating_point())


def _answers(case: Case, inputs: Inputs, function: Callable[[Inputs], Outputs], compare) -> list[torch.Tensor]:
    """Outputs of `function`, and their gradients where the case asks for them."""
    if case.mode == "forward":
        with torch.no_grad():
            return list(compare(function(inputs), inputs))
    inputs = {name: leaf(value) if name in case.leaves else value for name, value in inputs.items()}
    outputs = compare(function(inputs), inputs)
    leaves = flat(inputs[name] for name in case.leaves)
    differentiable = float_outputs(outputs)
    grads = torch.autograd.grad(differentiable, leaves, cotangents_for(differentiable, case.dtype, seed=1))
    return [o.detach() for o in outputs] + list(grads)


def judge(
    actual: torch.Tensor, expected: torch.Tensor, plain: torch.Tensor, precision: str
) -> tuple[str, float, float]:
    """Judges one tensor element by element against float64.

    An element may be wrong by twice the largest error of the plain implementation in the same slice (the last two
    axes: one head, one image's channel) plus `FLOORS` times the slice's largest value, so that one dead head or one
    wrong image is seen. NaN and infinity are never within a bound. Integers and bools must be equal.

    Returns:
        (what is wrong or "", largest error, largest error of the plain implementation)
    """
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}", math.inf, 0.0
    if not expected.is_floating_point():
        different = int((actual != expected).sum())
        return (f"{different} of {expected.numel()} values differ" if different else ""), float(different), 0.0
    if not expected.numel():
        return "", 0.0, 0.0
    axes = tuple(range(max(0, expected.ndim - 2), expected.ndim)) or None
    error, plain_error = (actual.double() - expected).abs(), (plain.double() - expected).abs()
    size = expected.abs().amax(axes, keepdim=True)
    bound = 2 * plain_error.amax(axes, keepdim=True) + FLOORS[precision] * size + 1e-6 * FLOORS[precision] * size.max()
    outside = ~(error <= bound)
    worst = float(error.max()) if not bool(error.isnan().any()) else math.nan
    wrong = ""
    if bool(outside.any()):
        # The element furthest beyond its bound, for the reader.
        ratio = torch.where(error.isnan(), math.inf, error / bound.clamp_min(1e-300))
        where = torch.unravel_index(ratio.argmax(), ratio.shape)
        index = tuple(int(i) for i in where)
        wrong = (
            f"{int(outside.sum())} of {outside.numel()} values beyond the bound, e.g. {index}: "
            f"{float(actual[index]):.6g}, expected {float(expected[index]):.6g}"
        )
    return wrong, worst, float(plain_error.max())


class Checker:
    """Float64 and plain answers of one case, computed once per question and shared by its providers."""

    def __init__(self, case: Case, seed: int):
        self.case = case
        self.inputs = case.inputs(seed) | {"dropout_p": 0.0}
        self.cache: dict[Any, list[torch.Tensor]] = {}

    def _cached(self, function, compare, inputs: Callable[[], Inputs]) -> list[torch.Tensor]:
        key = (function, compare)
        if key not in self.cache:
            self.cache[key] = _answers(self.case, inputs(), function, compare)
        return self.cache[key]

    def check(self, provider: Provider) -> tuple[str, float, float]:
        """(what is wrong or "", largest error, the plain implementation's largest error)."""
        case = self.case
        reference, plain = provider.reference or case.reference, provider.plain or case.plain
        expected = self._cached(reference, provider.compare, lambda: _as_double(self.inputs))
        with set_precision(case.precision):
            baseline = self._cached(plain, provider.compare, lambda: self.inputs)

            def whole(inputs: Inputs) -> Outputs:
                state = provider.prepare(inputs)
                return provider.finish(state, provider.run(state))

            actual = _answers(case, self.inputs, whole, provider.compare)
        if len(actual) != len(expected):
            return f"{len(actual)} results, expected {len(expected)}", math.inf, 0.0
        judged = [judge(a, e, p, case.precision) for a, e, p in zip(actual, expected, baseline, strict=True)]
        wrong = "; ".join(f"result {i}: {w}" for i, (w, _, _) in enumerate(judged) if w)
        if not wrong and case.dropout > 0:
            with set_precision(case.precision):
                wrong = dropout_mean(case, self.inputs, provider)
        return wrong, max(e for _, e, _ in judged), max(p for _, _, p in judged)


def dropout_mean(case: Case, inputs: Inputs, provider: Provider) -> str:
    """What is wrong with a provider's dropout, or "": it must change the rows, but not their mean.

    With all values 1 the output without dropout is one vector c (plus a bias), and dropout scales c by the sum of the
    surviving weights, 1 on average. The sums' own spread, which must be more than rounding, gives the standard error;
    six of them are allowed.
    """

    def run(dropout: float) -> torch.Tensor:
        ones = inputs | {"value": torch.ones_like(inputs["value"]), "dropout_p": dropout}
        with torch.no_grad():
            state = provider.prepare(ones)
            return provider.compare(provider.finish(state, provider.run(state)), ones)[0].double()

    without = run(0.0)
    norm = without.square().sum(-1)
    sums = 1 + ((run(case.dropout) - without) * without).sum(-1)[norm > 0] / norm[norm > 0]
    spread = float(sums.std()) if sums.numel() > 1 else 0.0
    if spread <= 1e-4:
        return "dropout is not applied"
    bound = 6 * spread / math.sqrt(sums.numel()) + FLOORS[case.precision]
    if abs(float(sums.mean()) - 1) > bound:
        return f"dropout changes the mean: {float(sums.mean()):.4f}, expected 1 within {bound:.4f}"
    return ""
