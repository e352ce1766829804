"""Clocks, and the interleaved measurement of several providers in one process."""

import random
import statistics
import time
from collections.abc import Callable

import torch


class WallClock:
    """Seconds a function takes on the host. `now` is replaceable, for tests."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now = now

    def time(self, function: Callable[[], None]) -> float:
        start = self.now()
        function()
        return self.now() - start


class CudaClock:
    """Seconds between two CUDA events around a function, on the current stream.

    The function is called once more, unmeasured, right before: the first event then waits behind running work, so that
    the launch latency of the first call is not measured as GPU time, while a function that launches more slowly than
    the GPU works still shows its launch rate.
    """

    def time(self, function: Callable[[], None]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        function()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_for(device: torch.device) -> WallClock | CudaClock:
    return CudaClock() if device.type == "cuda" else WallClock()


def interleave(
    blocks: dict[str, Callable[[], None]],
    calls: int,
    clock: WallClock | CudaClock,
    *,
    budget: float,
    min_rounds: int = 5,
    max_rounds: int = 100,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Measures `blocks` in turn, round after round in a shuffled order, so that drift falls on all alike.

    Args:
        blocks: name → function that makes `calls` calls; each has been warmed up once by its preparation.
        calls: calls in one block.
        budget: seconds to spend on all of them together; at least `min_rounds` rounds are made all the same.

    Returns:
        name → seconds per call, one number per round.
    """
    if not blocks:
        return {}
    order, rng = list(blocks), random.Random(seed)
    once = sum(clock.time(block) for block in blocks.values())
    # A CUDA block is called twice per measurement.
    rounds = int(min(max_rounds, max(min_rounds, budget / max(2 * once, 1e-9))))
    seconds: dict[str, list[float]] = {name: [] for name in blocks}
    for _ in range(rounds):
        rng.shuffle(order)
        for name in order:
            seconds[name].append(clock.time(blocks[name]) / calls)
    return seconds


def quantiles(seconds: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile (nearest rank)."""
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)]
