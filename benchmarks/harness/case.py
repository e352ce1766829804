"""Cases and providers: what is asked, and who is asked.

A case is one question (op, shape, precision, mode) with its inputs and its float64 answer. A provider is one way to
answer it.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .ceilings import PRECISIONS, Work

Inputs = dict[str, Any]
Outputs = tuple[torch.Tensor, ...]


class Unavailable(Exception):
    """A provider cannot answer this case here; the message says why."""


def needs_compile(inputs: "Inputs") -> "Inputs":
    """`Provider.prepare` of those that need torch.compile; the case says in its inputs whether it may be used."""
    if not inputs["compile"]:
        raise Unavailable("needs torch.compile (--compile yes)")
    return dict(inputs)


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
        eager_only: why it cannot be captured in a CUDA graph, where that is known; "" if it can.
        ours: a fault of ours is an error of the run; a fault of a peer is a row.
        setting: makes the context in which its calls are checked, warmed up, captured and run.
    """

    name: str
    label: str
    run: Callable[[Inputs], Outputs]
    prepare: Callable[[Inputs], Inputs] = lambda inputs: dict(inputs)
    finish: Callable[[Inputs, Outputs], Outputs] = lambda state, outputs: outputs
    reference: Callable[[Inputs], Outputs] | None = None
    plain: Callable[[Inputs], Outputs] | None = None
    compare: Callable[[Outputs, Inputs], Outputs] = lambda outputs, inputs: outputs
    eager_only: str = ""
    ours: bool = False
    setting: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


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
    seconds_per_case: float = 0.5
    min_rounds: int = 5
    check_only: bool = False
    seed: int = 0
