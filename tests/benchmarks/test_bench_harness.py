"""The benchmark's own proof: wrong answers are refused, a known delay is seen, the arithmetic is right."""

import time

import pytest
import torch
import torch.nn.functional as F

from detr_fast.benchmarks.harness.case import Provider, Row, Settings, Unavailable
from detr_fast.benchmarks.harness.ceilings import Ceilings, Work, measure_ceilings, set_precision
from detr_fast.benchmarks.harness.check import judge
from detr_fast.benchmarks.harness.measure import input_copies, run_case
from detr_fast.benchmarks.harness.timing import WallClock, interleave, quantiles


def _by_provider(rows: list[Row]) -> dict[str, Row]:
    return {row.provider: row for row in rows}


def _off_by(error, where=(0, 0, 0)):
    def run(state):
        out = 2 * state["value"]
        return (out.index_put(tuple(torch.tensor(i) for i in where), out[where] + error),)

    return Provider("wrong", "", run)


@pytest.mark.parametrize("error", [1e-3, float("nan"), float("inf")])
def test_wrong_values_are_refused(make_case, right, ceilings, settings, error):
    rows = _by_provider(run_case(make_case(), [right, _off_by(error)], ceilings, settings))
    assert rows["right"].status == "ok" and rows["right"].median_ms > 0
    assert rows["wrong"].status == "wrong" and rows["wrong"].median_ms is None
    assert "1 of 1024 values beyond the bound, e.g. (0, 0, 0)" in rows["wrong"].reason


def test_wrong_shape_and_missing_result_are_refused(make_case, ceilings, settings):
    shorter = Provider("shorter", "", lambda state: (2 * state["value"][:, :-1],))
    twice = Provider("twice", "", lambda state: (2 * state["value"],) * 2)
    rows = _by_provider(run_case(make_case(), [shorter, twice], ceilings, settings))
    assert rows["shorter"].status == "wrong" and "shape (2, 63, 8)" in rows["shorter"].reason
    assert rows["twice"].status == "wrong" and "2 results, expected 1" in rows["twice"].reason


@pytest.mark.parametrize("mode", ["backward", "both"])
def test_wrong_gradient_is_refused(make_case, right, ceilings, settings, mode):
    # The right output with half the gradient.
    half = Provider("half", "", lambda state: (state["value"] + state["value"].detach(),))
    rows = _by_provider(run_case(make_case(mode), [right, half], ceilings, settings))
    assert rows["right"].status == "ok"
    assert rows["half"].status == "wrong" and "result 1" in rows["half"].reason


def test_dead_head_is_seen_beside_a_large_one():
    expected = torch.stack([torch.full((4, 4), 1000.0), torch.full((4, 4), 1e-3)]).double()
    plain = expected + 1e-4 * expected
    dead = expected.clone()
    dead[1] = 0
    assert judge(plain, expected, plain, "bf16")[0] == ""
    assert "16 of 32 values" in judge(dead, expected, plain, "bf16")[0]


def test_twice_the_plain_error_is_the_bound():
    expected = torch.zeros(8, 8, dtype=torch.float64)
    plain = expected + 1.0
    assert judge(expected + 1.99, expected, plain, "bf16")[0] == ""
    assert judge(expected + 2.01, expected, plain, "bf16")[0] != ""


def test_masks_must_be_equal():
    mask = torch.tensor([[True, False], [False, True]])
    assert judge(mask, mask, mask, "fp32") == ("", 0.0, 0.0)
    assert "4 of 4 values differ" in judge(~mask, mask, mask, "fp32")[0]


def _with_dropout(scale: float, applied: float):
    """Dropout of whole values; `scale` 1 leaves the survivors as they are."""

    def run(state):
        kept = F.dropout(torch.ones_like(state["value"][..., :1]), applied * (state["dropout_p"] > 0))
        return (2 * state["value"] * (kept * scale if state["dropout_p"] > 0 else 1),)

    return Provider("dropping", "", run)


@pytest.mark.parametrize(
    ("scale", "applied", "status", "reason"),
    [(1.0, 0.25, "ok", ""), (1.0, 0.0, "wrong", "dropout is not applied"), (0.5, 0.25, "wrong", "changes the mean")],
)
def test_dropout_is_checked(make_case, ceilings, settings, scale, applied, status, reason):
    rows = run_case(make_case(dropout=0.25), [_with_dropout(scale, applied)], ceilings, settings)
    row = _by_provider(rows)["dropping"]
    assert row.status == status and reason in row.reason


def test_what_a_provider_cannot_do_is_a_row(make_case, right, ceilings, settings):
    def unavailable(inputs):
        raise Unavailable("needs a CUDA GPU")

    def broken(state):
        raise RuntimeError("no such kernel\nand a long trace")

    providers = [
        right,
        Provider("absent", "", right.run, unavailable),
        Provider("peer", "", broken),
        Provider("ours", "", broken, ours=True),
    ]
    rows = _by_provider(run_case(make_case(), providers, ceilings, settings))
    assert (rows["absent"].status, rows["absent"].reason) == ("unavailable", "needs a CUDA GPU")
    assert (rows["peer"].status, rows["peer"].reason) == ("unavailable", "RuntimeError: no such kernel")
    assert rows["ours"].status == "failed"
    assert rows["right"].status == "ok"


def test_a_known_delay_is_measured(make_case, right, ceilings, settings):
    delay = 0.02

    def slow(state):
        time.sleep(delay)
        return right.run(state)

    rows = _by_provider(run_case(make_case(), [right, Provider("slow", "", slow)], ceilings, settings))
    # A sleep may be longer than asked for, never shorter.
    assert rows["slow"].median_ms >= 1e3 * delay
    assert rows["slow"].median_ms - rows["right"].median_ms > 1e3 * delay / 2


class _FakeTime:
    def __init__(self):
        self.seconds = 0.0

    def spend(self, seconds):
        self.seconds += seconds


def test_interleaving_on_a_fake_clock():
    fake, order = _FakeTime(), []

    def block(name, seconds):
        def run():
            order.append(name)
            fake.spend(seconds)

        return run

    blocks = {"a": block("a", 0.004), "b": block("b", 0.012)}
    samples = interleave(blocks, 4, WallClock(lambda: fake.seconds), budget=0.32, min_rounds=3)
    assert samples["a"] == pytest.approx([0.001] * 10) and samples["b"] == pytest.approx([0.003] * 10)
    # Every round has each once; the order is not always the same.
    rounds = [tuple(order[i : i + 2]) for i in range(2, len(order), 2)]
    assert {frozenset(r) for r in rounds} == {frozenset("ab")} and len(set(rounds)) == 2


def test_quantiles():
    assert quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 100.0]) == (3.5, 2.0, 5.0)
    assert quantiles([7.0]) == (7.0, 7.0, 7.0)


def test_percent_of_ceiling(make_case, ceilings, settings):
    # 1e6 bytes at 1e9/s: 1 ms; 4e6 operations at 2e9/s: 2 ms; 1e5 exps at 1e8/s: 1 ms. The slowest counts.
    case = make_case()
    assert ceilings.limit_seconds(case.work, "fp32") == pytest.approx(2e-3)
    assert ceilings.limit_seconds([Work(exps=3e5), Work(bytes=1e6)], "bf16") == pytest.approx(4e-3)

    def ten_milliseconds(state):
        time.sleep(0.01)
        return (2 * state["value"],)

    rows = _by_provider(run_case(case, [Provider("timed", "", ten_milliseconds)], ceilings, settings))
    limit, timed = rows["limit"], rows["timed"]
    assert (limit.median_ms, limit.percent_of_ceiling) == (pytest.approx(2.0), pytest.approx(100.0))
    assert timed.percent_of_ceiling == pytest.approx(100 * 2.0 / timed.median_ms)
    assert timed.gb_per_s == pytest.approx(1e6 / timed.median_ms * 1e3 / 1e9)
    assert timed.tflop_per_s == pytest.approx(4e6 / timed.median_ms * 1e3 / 1e12)


def test_check_only_times_nothing(make_case, right):
    settings = Settings(device=torch.device("cpu"), check_only=True)
    (row,) = run_case(make_case("both"), [right], None, settings)
    assert (row.status, row.median_ms) == ("checked", None)


def test_measured_ceilings_are_positive():
    measured = measure_ceilings(torch.device("cpu"), ["fp32"], quick=True)
    assert isinstance(measured, Ceilings)
    assert min(measured.copy, measured.exp, measured.matmul["fp32"]) > 0


def test_precision_sets_tf32_and_restores_it():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for own in ("none", "ieee", "tf32"):
            matmul.fp32_precision = own
            with set_precision("tf32"):
                assert matmul.fp32_precision == "tf32"
                with set_precision("fp32"):
                    assert matmul.fp32_precision == "ieee"
                assert matmul.fp32_precision == "tf32"
            assert matmul.fp32_precision == own
    finally:
        matmul.fp32_precision = before


def test_inputs_rotate():
    assert input_copies(torch.device("cpu"), 10**6) == 2
