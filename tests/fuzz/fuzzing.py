"""How much is fuzzed: a bounded, repeatable part in `make test`, all, with new examples each time, in `make fuzz`."""

import os

from hypothesis import HealthCheck, settings

FULL = os.environ.get("DETR_FAST_FUZZ") == "full"


def fuzz(full: int):
    """A test's number of examples: `full` of them, in `make test` a hundredth."""
    return settings(
        max_examples=full if FULL else max(full // 100, 5),
        derandomize=not FULL,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
