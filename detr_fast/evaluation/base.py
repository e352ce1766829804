"""What every evaluator offers, so that the evaluation loop needs to know none in particular."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Evaluator(Protocol):
    """Collects results image by image, then computes a metric.

    Call `update` for every batch, then `synchronize_between_processes`, `accumulate` and `summarize` once each, in
    every process; after that `log_row` and `state`.
    """

    def update(self, predictions: Mapping[int, Mapping[str, Any]]) -> None:
        """Adds the results of some images: image id → what the task's post-processing returned."""

    def synchronize_between_processes(self) -> None:
        """Brings all processes' results together."""

    def accumulate(self) -> None:
        """Computes the numbers."""

    def summarize(self) -> None:
        """Prints them, in the first process only."""

    def log_row(self) -> dict[str, Any]:
        """Numbers, lists and dicts of numbers for the log, under the original's names where it has some."""

    def state(self) -> dict[str, Any]:
        """Tensors and numbers for ``eval.pth``, readable with ``torch.load(weights_only=True)``."""
