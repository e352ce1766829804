"""The sanitizer's part of `make gpu`, as far as it runs without a GPU."""

import pytest
import torch

from benchmarks.studies import sanitize
from detr_fast.ops.selfcheck import CHECKS

CPU = torch.device("cpu")


def test_the_first_run_that_differs_is_told():
    values = iter([0.0, 0.0, -0.0, 1.0])
    assert sanitize.first_difference(lambda: [torch.tensor([next(values)])], 4) == 3  # -0 has other bits than 0
    assert sanitize.first_difference(lambda: [torch.tensor([float("nan"), 2])], 5) is None
    empties = iter([torch.zeros(0), torch.zeros(0, dtype=torch.float64)])
    assert sanitize.first_difference(lambda: [next(empties)], 2) == 2


def test_every_check_is_run_and_repeated(capsys):
    sanitize.run_checks(CPU)
    assert sanitize.repeat(CPU, 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == set(CHECKS) and all("2 runs are equal" in line for line in lines)


def test_a_check_that_differs_is_counted(monkeypatch, capsys):
    real = CHECKS["attention"]
    count = iter(range(1000))
    changed = type(real)(lambda dtype, device: [torch.tensor([next(count)])], real.dtypes[:1])
    monkeypatch.setattr(sanitize, "CHECKS", {"attention": changed})
    monkeypatch.setattr(sanitize, "dtypes_of", lambda op, device: [torch.float32])
    assert sanitize.repeat(CPU, 3) == 1 and "run 2 differs" in capsys.readouterr().out


def test_without_the_sanitizer_its_looks_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert sanitize.sanitize("memcheck", 10) == 0 and "is not installed" in capsys.readouterr().out


@pytest.mark.parametrize("code", [0, 9])
def test_the_sanitizers_exit_code_counts(tmp_path, monkeypatch, code):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nexit {code}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert sanitize.sanitize("racecheck", 10) == code
    said = (tmp_path / "arguments").read_text()
    assert said.startswith("--tool racecheck") and said.rstrip().endswith("-m benchmarks.studies.sanitize --checks")


@pytest.mark.gpu
def test_a_hundred_runs_are_equal_on_a_gpu():
    assert sanitize.repeat(torch.device("cuda"), 100) == 0
