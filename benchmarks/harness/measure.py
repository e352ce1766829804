"""The measurement: `run_case` refuses wrong providers, then measures the others interleaved.

A provider that fails the check has a row that says WRONG and no time. The others are launched eagerly and replayed as a
CUDA graph, in turn, over inputs rotated past the L2.
"""

import contextlib
import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch

from .case import Case, Inputs, Provider, Row, Settings, Unavailable
from .ceilings import Ceilings, set_precision
from .check import Checker, cotangents_for, flat, float_outputs, leaf
from .timing import clock_for, interleave, quantiles


def _tensor_bytes(inputs: Inputs) -> int:
    return sum(t.numel() * t.element_size() for t in flat(inputs.values()) if isinstance(t, torch.Tensor))


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
        inputs |= {name: leaf(inputs[name]) for name in case.leaves}
        with torch.no_grad():
            state = provider.prepare(inputs)
        for name in case.leaves:
            # What was packed anew is a leaf of its own: the packing's backward is not part of the call either.
            if not all(t.requires_grad for t in flat([state[name]])):
                state[name] = leaf(state[name])
        leaves = flat(state[name] for name in case.leaves)
        outputs = float_outputs(provider.run(state))
        cotangents = cotangents_for(outputs, case.dtype, seed)
        if case.mode == "backward":

            def backward(outputs=outputs, leaves=leaves, cotangents=cotangents):
                return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)

            calls.append(backward)
        else:
            del outputs

            def both(state=state, leaves=leaves, cotangents=cotangents):
                return torch.autograd.grad(float_outputs(provider.run(state)), leaves, cotangents)

            calls.append(both)
    return calls


def _inference(case: Case):
    return torch.no_grad() if case.mode == "forward" else contextlib.nullcontext()


def _block(case: Case, provider: Provider, calls: list[Callable[[], Any]]) -> Callable[[], None]:
    def block():
        with provider.setting(), _inference(case):
            for call in calls:
                call()

    return block


def first_call(case: Case, provider: Provider) -> None:
    """Makes one call of the case, with its gradient where the case has one."""
    _block(case, provider, _calls(case, provider, range(1)))()


def _capture(block: Callable[[], None]) -> Callable[[], None]:
    """The block's calls as one CUDA graph, captured on the current (side) stream."""
    stream = torch.cuda.current_stream()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            block()
    except BaseException:
        # A capture that failed leaves the random generator believing that it goes on; it is given a new state.
        fresh = torch.Generator(stream.device).manual_seed(0)
        torch.cuda.default_generators[stream.device.index].graphsafe_set_state(fresh.graphsafe_get_state())
        raise
    return graph.replay


def peak_memory(call: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that one call allocates above what was there before."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def reason_of(error: Exception) -> str:
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
    return {"status": "failed" if provider.ours else "unavailable", "reason": reason_of(error)}


def run_case(case: Case, providers: list[Provider], ceilings: Ceilings | None, settings: Settings) -> list[Row]:
    """Checks every provider, refuses the wrong ones, measures the others interleaved.

    Args:
        ceilings: of this run; None: no row for the limit, and no share of it.
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
            with provider.setting():
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
    errors = {provider.name: e for provider, e in right}
    rows += [dataclasses.replace(row, **errors[row.provider]) for row in timed]
    if ceilings is None:
        return rows
    limit = ceilings.limit_seconds(case.work, case.precision)
    for row in rows:
        if row.median_ms is not None:
            _add_rates(row, case, limit)
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
            with provider.setting():
                calls = _calls(case, provider, seeds)
            block = _block(case, provider, calls)
            block()
            with provider.setting(), _inference(case):
                peak[provider.name] = peak_memory(calls[0], settings.device)
            calls_of[provider.name] = (provider, calls, block)
        except Exception as fault:
            rows.append(_row(case, provider, "-", **_blame(provider, fault)))
    for launch in settings.launches:
        blocks = {}
        for name, (provider, _, block) in calls_of.items():
            try:
                if launch == "graph":
                    if provider.eager_only:
                        raise Unavailable(provider.eager_only)
                    block = _capture(block)
                    block()
                    torch.cuda.synchronize()
                blocks[name] = block
            except Exception as fault:
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
