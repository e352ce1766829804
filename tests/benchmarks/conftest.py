"""Cases made by hand, small enough to check in a moment."""

import pytest
import torch

from detr_fast.benchmarks.harness.case import Case, Provider, Settings
from detr_fast.benchmarks.harness.ceilings import Ceilings, Work


@pytest.fixture
def ceilings() -> Ceilings:
    return Ceilings(copy=1e9, matmul={"fp32": 2e9, "bf16": 4e9}, exp=1e8)


@pytest.fixture
def settings() -> Settings:
    return Settings(device=torch.device("cpu"), launches=("eager",), seconds_per_case=0.05, min_rounds=3)


@pytest.fixture
def make_case():
    """A case whose answer is value · 2, with or without dropout and gradient."""

    def make(mode: str = "forward", dropout: float = 0.0, precision: str = "fp32") -> Case:
        def inputs(seed: int):
            generator = torch.Generator().manual_seed(seed)
            return {"value": torch.randn(2, 64, 8, generator=generator)}

        def double(state):
            return (2 * state["value"],)

        return Case(
            suite="attention", name="doubling", precision=precision, mode=mode, inputs=inputs, reference=double,
            plain=double, work=[Work(bytes=1e6, flops=4e6, exps=1e5)], shape={"batch": 16}, leaves=("value",),
            dropout=dropout,
        )  # fmt: skip

    return make


@pytest.fixture
def right() -> Provider:
    return Provider("right", "", lambda state: (state["value"] + state["value"],))
