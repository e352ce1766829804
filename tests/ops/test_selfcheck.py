"""Kernels that are wrong, or fail, on a GPU that nobody has measured: found, named and replaced."""

import json
import re
import threading
from pathlib import Path

import pytest
import torch

from detr_fast.cli import main
from detr_fast.ops import matching_cost, matching_cost_reference, selfcheck

CPU = torch.device("cpu")
OPS = Path(selfcheck.__file__).parent

interpret = pytest.mark.interpret


def problem():
    return selfcheck._problem(torch.float32, CPU)


@pytest.fixture
def broken(monkeypatch, request):
    """The matching cost's kernel gives wrong numbers, or does not compile."""
    from detr_fast.kernels import matching_cost as kernel

    right = kernel.matching_cost_forward

    def wrong(*args, cost):
        right(*args, cost=cost)
        cost[0, 3] += 0.5

    def failing(*args, cost):
        raise RuntimeError("PassManager::run failed\nmore")

    monkeypatch.setattr(kernel, "matching_cost_forward", {"wrong": wrong, "failing": failing}[request.param])
    return request.param


@pytest.fixture
def checked(monkeypatch, tmp_path):
    """Kernels are compared before they are used, and nothing is known yet."""
    monkeypatch.setenv("DETR_FAST_SELFCHECK", "1")
    monkeypatch.setattr(selfcheck, "is_trusted", selfcheck.Trust(tmp_path))


def test_every_op_that_has_a_kernel_is_compared():
    named = {
        name for path in OPS.glob("*.py") for name in re.findall(r'use_kernel\([\w.\[\]]+, "(\w+)"\)', path.read_text())
    }
    assert named == set(selfcheck.CHECKS)


@interpret
@pytest.mark.parametrize("op", list(selfcheck.CHECKS))
def test_the_kernels_agree(op):
    for dtype in selfcheck.dtypes_of(op, CPU):
        verdict = selfcheck.compare(op, CPU, dtype)
        assert verdict.problem == "" and verdict.error < 1e-2 and verdict.seconds > 0


@interpret
@pytest.mark.parametrize("broken", ["wrong", "failing"], indirect=True)
def test_a_broken_kernel_gives_way_and_says_so_once(broken, checked, capsys):
    for _ in range(2):
        assert torch.equal(matching_cost(*problem()), matching_cost_reference(*problem()))
    said = capsys.readouterr().err
    reason = {"wrong": "differs from plain PyTorch by", "failing": "RuntimeError: PassManager::run failed)"}[broken]
    assert said.count("the matching_cost kernel does not work on") == 1 and reason in said
    assert "plain PyTorch takes its place" in said and "more" not in said


@interpret
@pytest.mark.parametrize("broken", ["wrong"], indirect=True)
def test_it_can_be_switched_off(broken, monkeypatch, capsys):
    monkeypatch.setenv("DETR_FAST_SELFCHECK", "0")
    assert not torch.equal(matching_cost(*problem()), matching_cost_reference(*problem()))
    monkeypatch.setenv("DETR_FAST_SELFCHECK", "yes")
    with pytest.raises(ValueError, match="DETR_FAST_SELFCHECK is 'yes'; expected '0', '1' or unset"):
        matching_cost(*problem())


@interpret
def test_a_comparison_leaves_autograd_and_the_random_state_alone(checked):
    """It happens in the midst of an op's forward, where autograd is off."""
    from detr_fast import attention

    torch.manual_seed(0)
    state = torch.get_rng_state()
    inputs = [torch.ones(1, 1, 16, 16, requires_grad=True) for _ in range(3)]
    with torch.inference_mode():
        attention(*inputs)
    assert torch.equal(torch.get_rng_state(), state)
    out, _ = attention(*inputs)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), inputs))


@interpret
def test_a_verdict_is_kept_between_processes(monkeypatch, tmp_path):
    compared = []
    monkeypatch.setattr(
        selfcheck, "compare", lambda op, device, dtype: compared.append(op) or selfcheck.Verdict(op, "float32", 0.0, "")
    )
    path = tmp_path / "cache" / "gpu.json"
    monkeypatch.setattr(selfcheck.Trust, "_path", lambda self, device: path)
    for _ in range(2):
        trust = selfcheck.Trust(tmp_path)
        assert trust("assign", CPU) and trust("assign", CPU) and trust("matching_cost", CPU)
    assert compared == ["assign", "matching_cost"]
    assert json.loads(path.read_text()) == ["assign", "matching_cost"] and list(path.parent.iterdir()) == [path]
    for damage in ("{ damaged", "null", "7"):
        compared.clear()
        path.write_text(damage)
        assert selfcheck.Trust(tmp_path)("assign", CPU) and compared == ["assign"]


@interpret
def test_another_thread_waits_for_the_verdict(monkeypatch, tmp_path, capsys):
    started, go_on, answers = threading.Event(), threading.Event(), []

    def compare(op, device, dtype):
        started.set()
        assert go_on.wait(10)
        return selfcheck.Verdict(op, "float32", 1.0, "differs")

    monkeypatch.setattr(selfcheck, "compare", compare)
    trust = selfcheck.Trust(None)
    threads = [threading.Thread(target=lambda: answers.append(trust("assign", CPU))) for _ in range(2)]
    threads[0].start()
    assert started.wait(10)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert answers == [False, False]


@interpret
@pytest.mark.parametrize("broken", ["wrong", "failing"], indirect=True)
def test_doctor_names_it(broken, monkeypatch, capsys):
    for op in [op for op in selfcheck.CHECKS if op not in ("assign", "matching_cost")]:
        monkeypatch.delitem(selfcheck.CHECKS, op)
    assert main(["doctor", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"matching_cost +float32 .*" + {"wrong": "WRONG", "failing": "FAILED"}[broken], printed)
    assert re.search(r"assign +float32 .* right", printed) and "1 of the comparisons failed" in printed


def test_doctor_without_a_kernel(monkeypatch, capsys):
    monkeypatch.setenv("DETR_FAST_KERNELS", "torch")
    assert main(["doctor", "--device", "cpu"]) == 0
    assert f"torch {torch.__version__.split('+')[0]}" in (printed := capsys.readouterr().out)
    assert "no kernel runs on cpu here" in printed
