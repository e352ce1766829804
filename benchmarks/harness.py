"""Cases, providers, the check that comes before every measurement, and the measurement.

A case is one question (op, shape, precision, mode) with its inputs and its float64 answer. A provider is one way to
answer it. `run_case` first holds every provider's answer against float64; one that fails is refused: its row says WRONG
and has no time. The others are measured interleaved, launched eagerly and replayed as a CUDA graph.
"""

import contextlib
import dataclasses
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .ceilings import PRECISIONS, Ceilings, Work, set_precision
from .timing import clock_for, interleave, quantiles

Inputs = dict[str, Any]
Outputs = tuple[torch.Tensor, ...]

# Allowed beside twice the plain implementation's error, relative to the largest value of the slice: about one rounding
# of the result; for fp32 torch.testing's absolute tolerance.
FLOORS = {"fp32": 1e-5, "tf32": 2.0**-10, "bf16": 2.0**-8, "fp16": 2.0**-11}


class Unavailable(Exception):
    """A provider cannot answer this case here; the message says why."""


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        suite, name: "attention", "encoder R50-B16-coco p=0.1".
        precision: a key of `ceilings.PRECISIONS`.
        mode: "forward", "backward" or "both".
        inputs: seed → inputs on the device; equal seeds give equal inputs.
        reference: inputs (floating point ones in float64) → outputs, differentiable.
        plain: inputs in the case's precision → outputs of the textbook implementation, whose error is the measure.
        leaves: names of the inputs with a gradient; empty for an op without one.
        work: stages for the physical limit.
        shape: what to write down about the sizes.
        dropout: probability while timing. The comparison with float64 is made without dropout, and
            `dropout_mean` then checks that dropout is applied and scaled.
    """

    suite: str
    name: str
    precision: str
    mode: str
    inputs: Callable[[int], Inputs]
    reference: Callable[[Inputs], Outputs]
    plain: Callable[[Inputs], Outputs]
    work: list[Work]
    shape: dict[str, Any]
    leaves: tuple[str, ...] = ()
    dropout: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]


@dataclass(frozen=True)
class Provider:
    """One way to answer a case.

    Attributes:
        name, label: the label says what the numbers do and do not contain (padding, dropout, packing).
        run: state → outputs: what is timed. With `state["dropout_p"]` where the case has dropout.
        prepare: inputs → state, not timed; keeps the leaves' names. Raises `Unavailable`.
        finish: (state, outputs) → outputs in the case's layout, not timed.
        reference, plain: the question it answers, where that is not the case's.
        compare: (outputs, inputs) → the part of the outputs that it promises.
        ours: a fault of ours is an error of the run; a fault of a peer is a row.
    """

    name: str
    label: str
    run: Callable[[Inputs], Outputs]
    prepare: Callable[[Inputs], Inputs] = lambda inputs: dict(inputs)
    finish: Callable[[Inputs, Outputs], Outputs] = lambda state, outputs: outputs
    reference: Callable[[Inputs], Outputs] | None = None
    plain: Callable[[Inputs], Outputs] | None = None
    compare: Callable[[Outputs, Inputs], Outputs] = lambda outputs, inputs: outputs
    ours: bool = False


@dataclass
class Row:
    """One line of a result. `status`: ok, limit, checked (right, not timed), wrong, unavailable or failed."""

    suite: str
    case: str
    provider: str
    label: str
    precision: str
    mode: str
    launch: str
    status: str
    reason: str = ""
    shape: dict[str, Any] = field(default_factory=dict)
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    percent_of_ceiling: float | None = None
    peak_memory_mib: float | None = None
    max_error: float | None = None
    plain_error: float | None = None


@dataclass(frozen=True)
class Settings:
    """How to measure: see `cli.add_arguments`."""

    device: torch.device
    launches: tuple[str, ...] = ("eager", "graph")
    seconds_per_case: float = 1.0
    min_rounds: int = 5
    check_only: bool = False
    seed: int = 0


# -- the check ---------------------------------------------------------------------------------------------------------


def _as_double(inputs: Inputs) -> Inputs:
    def convert(value):
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, list):
            return [convert(v) for v in value]
        return value

    return {name: convert(value) for name, value in inputs.items()}


def _leaf(value):
    return [v.detach().requires_grad_() for v in value] if isinstance(value, list) else value.detach().requires_grad_()


def _flat(values) -> list[torch.Tensor]:
    return [t for v in values for t in (v if isinstance(v, list) else [v])]


def _cotangents(outputs: Outputs, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Random, rounded to `dtype` first, so that every precision is given the very same numbers."""
    generator = torch.Generator(outputs[0].device).manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, device=o.device).to(dtype).to(o.dtype) for o in outputs]


def _float_outputs(outputs: Outputs) -> Outputs:
    return tuple(o for o in outputs if o.is_floating_point())


def _answers(case: Case, inputs: Inputs, function: Callable[[Inputs], Outputs], compare) -> list[torch.Tensor]:
    """Outputs of `function`, and their gradients where the case asks for them."""
    if case.mode == "forward":
        with torch.no_grad():
            return list(compare(function(inputs), inputs))
    inputs = {name: _leaf(value) if name in case.leaves else value for name, value in inputs.items()}
    outputs = compare(function(inputs), inputs)
    leaves = _flat(inputs[name] for name in case.leaves)
    differentiable = _float_outputs(outputs)
    grads = torch.autograd.grad(differentiable, leaves, _cotangents(differentiable, case.dtype, seed=1))
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


# -- the measurement ---------------------------------------------------------------------------------------------------


def _tensor_bytes(inputs: Inputs) -> int:
    return sum(t.numel() * t.element_size() for t in _flat(inputs.values()) if isinstance(t, torch.Tensor))


def input_copies(device: torch.device, size: int) -> int:
    """Sets of inputs to rotate through, so that none is found in the L2: twice the L2 in all, at most 64 or 4 GiB."""
    if device.type != "cuda":
        return 2
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, -(-2 * l2 // max(1, size)) + 1, max(2, 2**32 // max(1, size))))


def _calls(case: Case, provider: Provider, seeds: range) -> list[Callable[[], Any]]:
    """One ready-made call per set of inputs."""
    calls = []
    for seed in seeds:
        inputs = case.inputs(seed) | {"dropout_p": case.dropout}
        if case.mode == "forward":
            with torch.no_grad():
                state = provider.prepare(inputs)
            calls.append(lambda state=state: provider.run(state))
            continue
        inputs |= {name: _leaf(inputs[name]) for name in case.leaves}
        with torch.no_grad():
            state = provider.prepare(inputs)
        for name in case.leaves:
            # What was packed anew is a leaf of its own: the packing's backward is not part of the call either.
            if not all(t.requires_grad for t in _flat([state[name]])):
                state[name] = _leaf(state[name])
        leaves = _flat(state[name] for name in case.leaves)
        outputs = _float_outputs(provider.run(state))
        cotangents = _cotangents(outputs, case.dtype, seed)
        if case.mode == "backward":

            def backward(outputs=outputs, leaves=leaves, cotangents=cotangents):
                return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)

            calls.append(backward)
        else:
            del outputs

            def both(state=state, leaves=leaves, cotangents=cotangents):
                return torch.autograd.grad(_float_outputs(provider.run(state)), leaves, cotangents)

            calls.append(both)
    return calls


def _inference(case: Case):
    return torch.no_grad() if case.mode == "forward" else contextlib.nullcontext()


def _block(case: Case, calls: list[Callable[[], Any]]) -> Callable[[], None]:
    def block():
        with _inference(case):
            for call in calls:
                call()

    return block


def _capture(block: Callable[[], None]) -> Callable[[], None]:
    """The block's calls as one CUDA graph, captured on the current (side) stream."""
    stream = torch.cuda.current_stream()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        block()
    return graph.replay


def _peak_memory(call: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that one call allocates above what was there before."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _row(case: Case, provider: Provider, launch: str, status: str, **values) -> Row:
    return Row(
        case.suite, case.name, provider.name, provider.label, case.precision, case.mode, launch, status,
        shape=case.shape, **values,
    )  # fmt: skip


def _blame(provider: Provider, error: Exception) -> dict[str, str]:
    """Our own error is a failure; a peer's is a thing it cannot do."""
    if isinstance(error, Unavailable):
        return {"status": "unavailable", "reason": str(error)}
    return {"status": "failed" if provider.ours else "unavailable", "reason": _reason(error)}


def run_case(case: Case, providers: list[Provider], ceilings: Ceilings | None, settings: Settings) -> list[Row]:
    """Checks every provider, refuses the wrong ones, measures the others interleaved.

    Args:
        ceilings: of this run; None with `settings.check_only`.
    """
    device = settings.device
    stream = torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()
    with stream:
        try:
            return _run_case(case, providers, ceilings, settings)
        finally:
            if device.type == "cuda":
                gc.collect()
                torch.cuda.synchronize(device)
                torch.cuda.empty_cache()


def _run_case(case: Case, providers: list[Provider], ceilings: Ceilings | None, settings: Settings) -> list[Row]:
    rows, right = [], []
    checker = Checker(case, settings.seed)
    for provider in providers:
        try:
            wrong, error, plain_error = checker.check(provider)
        except Exception as fault:  # whatever a peer raises becomes its row
            rows.append(_row(case, provider, "-", **_blame(provider, fault)))
            continue
        errors = {"max_error": error, "plain_error": plain_error}
        if wrong:
            rows.append(_row(case, provider, "-", "wrong", reason=wrong, **errors))
        elif settings.check_only:
            rows.append(_row(case, provider, "-", "checked", **errors))
        else:
            right.append((provider, errors))
    # For the backward alone every copy keeps its saved tensors, and those alone are larger than the L2.
    copies = 2 if case.mode == "backward" else input_copies(settings.device, _tensor_bytes(checker.inputs))
    del checker
    if settings.check_only:
        return rows
    with set_precision(case.precision):
        timed = _measure(case, [p for p, _ in right], copies, settings)
    limit = ceilings.limit_seconds(case.work, case.precision)
    errors = {provider.name: e for provider, e in right}
    for row in timed:
        if row.median_ms is not None:
            _add_rates(row, case, limit)
        rows.append(dataclasses.replace(row, **errors[row.provider]))
    limit_row = _row(
        case, Provider("limit", "the measured ceilings", lambda state: ()), "-", "limit", median_ms=limit * 1e3
    )
    _add_rates(limit_row, case, limit)
    return [limit_row] + rows


def _add_rates(row: Row, case: Case, limit: float) -> None:
    seconds = row.median_ms / 1e3
    total_bytes, total_flops = sum(s.bytes for s in case.work), sum(s.flops for s in case.work)
    row.gb_per_s = total_bytes / seconds / 1e9 if total_bytes else None
    row.tflop_per_s = total_flops / seconds / 1e12 if total_flops else None
    row.percent_of_ceiling = 100 * limit / seconds


def _measure(case: Case, providers: list[Provider], copies: int, settings: Settings) -> list[Row]:
    rows, peak, calls_of = [], {}, {}
    seeds = range(settings.seed, settings.seed + copies)
    for provider in providers:
        try:
            calls = _calls(case, provider, seeds)
            block = _block(case, calls)
            block()
            with _inference(case):
                peak[provider.name] = _peak_memory(calls[0], settings.device)
            calls_of[provider.name] = (provider, calls, block)
        except Exception as fault:
            rows.append(_row(case, provider, "-", **_blame(provider, fault)))
    for launch in settings.launches:
        blocks = {}
        for name, (provider, _, block) in calls_of.items():
            try:
                if launch == "graph":
                    if settings.device.type != "cuda":
                        continue
                    block = _capture(block)
                    block()
                    torch.cuda.synchronize()
                blocks[name] = block
            except Exception as fault:
                # Most of all: a provider that waits for the GPU inside its call.
                rows.append(_row(case, provider, launch, **_blame(provider, fault)))
        seconds = interleave(
            blocks, copies, clock_for(settings.device), budget=settings.seconds_per_case, min_rounds=settings.min_rounds
        )
        for name, samples in seconds.items():
            median, p20, p80 = (1e3 * s for s in quantiles(samples))
            rows.append(
                _row(
                    case,
                    calls_of[name][0],
                    launch,
                    "ok",
                    median_ms=median,
                    p20_ms=p20,
                    p80_ms=p80,
                    rounds=len(samples),
                    peak_memory_mib=peak[name],
                )  # fmt: skip
            )
    return rows
