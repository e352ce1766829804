"""Tuning: a wrong candidate is refused, the fastest right one is chosen, ties keep the present one."""

import argparse
import shutil

import pytest
import torch

pytest.importorskip("triton")

from detr_fast.benchmarks.cli import add_arguments, main  # noqa: E402
from detr_fast.benchmarks.harness import measure  # noqa: E402
from detr_fast.benchmarks.harness.case import Provider, Settings  # noqa: E402
from detr_fast.benchmarks.harness.provenance import ROOT  # noqa: E402
from detr_fast.benchmarks.harness.results import load_record  # noqa: E402
from detr_fast.benchmarks.studies import tune  # noqa: E402
from detr_fast.kernels import _configurations  # noqa: E402
from detr_fast.kernels._configurations import configuration  # noqa: E402

PRESENT, RIGHT, WRONG, REFUSED = ({"BLOCK_M": size, "num_warps": 4, "num_stages": 2} for size in (64, 32, 16, 128))
SHAPE = {"family": "sm_90", "precision": "16-bit", "block_d": 32, "ragged": False, "mask": True, "dropout": True}
SHAPE["lengths"] = "many"


@pytest.fixture
def settings():
    return Settings(device=torch.device("cpu"), launches=("eager",), seconds_per_case=0.05, min_rounds=3)


@pytest.fixture
def table(monkeypatch):
    """A table of one rule, as long as the test lasts."""
    rules = (("attention_forward", {"mask": True}, PRESENT), ("attention_forward", {}, RIGHT))
    monkeypatch.setattr(_configurations, "RULES", rules)
    monkeypatch.setattr(_configurations, "MEASURED", ())
    configuration.cache_clear()
    yield
    configuration.cache_clear()


@pytest.fixture
def op(table, monkeypatch):
    """A provider whose answer and time, by a clock of its own, go by the configuration it is launched with."""
    used = []

    def run(state):
        tile = _configurations.configuration("attention_forward", **SHAPE)
        used.append(tile)
        if tile == REFUSED:
            raise RuntimeError("out of resource: shared memory")
        return (state["value"] * (3 if tile == WRONG else 2),)

    class Clock:
        seconds = {"BLOCK_M=64": 2.0, "BLOCK_M=32": 1.0, "BLOCK_M=16": 0.1}

        def time(self, function):
            function()
            return self.seconds[f"BLOCK_M={used[-1]['BLOCK_M']}"]

    monkeypatch.setattr(measure, "clock_for", lambda device: Clock)
    monkeypatch.setattr(Clock, "time", classmethod(Clock.time))
    return Provider("detr_fast", "", run, ours=True), Clock


def test_the_fastest_right_candidate_is_chosen_and_wrong_ones_have_no_time(make_case, op, settings):
    provider, _ = op
    found, rows = tune.tune_class(make_case(), provider, "attention_forward", [WRONG, RIGHT, REFUSED], settings)
    assert (found.present, found.chosen, found.conditions) == (PRESENT, RIGHT, SHAPE)
    # Two calls in a block.
    assert (found.present_ms, found.chosen_ms) == (pytest.approx(1000), pytest.approx(500))
    by_tile = {row.shape["tile"]["BLOCK_M"]: row for row in rows}
    assert {size: row.status for size, row in by_tile.items()} == {64: "ok", 32: "ok", 16: "wrong", 128: "failed"}
    assert by_tile[16].median_ms is None and by_tile[64].label == "present"
    assert configuration("attention_forward", **SHAPE) == PRESENT, "the table is as it was"


def test_a_tie_keeps_the_present_configuration(make_case, op, settings):
    provider, clock = op
    clock.seconds = clock.seconds | {"BLOCK_M=32": 2.0 * (1 - 0.5 * tune.MARGIN)}
    found, _ = tune.tune_class(make_case(), provider, "attention_forward", [RIGHT], settings)
    assert found.chosen == PRESENT and found.chosen_ms == found.present_ms


def test_a_wrong_present_configuration_gives_way(make_case, op, settings, monkeypatch):
    provider, _ = op
    monkeypatch.setattr(_configurations, "RULES", (("attention_forward", {}, WRONG),))
    configuration.cache_clear()
    found, rows = tune.tune_class(make_case(), provider, "attention_forward", [RIGHT, REFUSED], settings)
    assert found.chosen == RIGHT and found.present_ms is None
    assert {row.status for row in rows if row.label == "present"} == {"wrong"}
    found, _ = tune.tune_class(make_case(), provider, "attention_forward", [REFUSED], settings)
    assert found.chosen is None and tune.measured_entries([found], "") == ()


def test_a_case_of_several_classes_or_none_is_refused(make_case, op):
    both = Provider("both", "", lambda state: (op[0].run(state)[0], _other())[:1])

    def _other():
        _configurations.configuration("attention_forward", **SHAPE | {"mask": False})

    with pytest.raises(ValueError, match="expected one set of conditions"):
        tune.conditions_of(make_case(), both, "attention_forward")
    with pytest.raises(ValueError, match=r"attention_grad_query with \[\]"):
        tune.conditions_of(make_case(), op[0], "attention_grad_query")


def _finding(conditions, chosen):
    return tune.Finding("attention_forward", conditions, PRESENT, chosen, 0.004, 0.003)


def test_entries_are_merged_and_written(table, tmp_path, monkeypatch):
    other = SHAPE | {"lengths": "few x few"}
    entries = tune.measured_entries([_finding(SHAPE, RIGHT), _finding(other, PRESENT)], "H100, 2026-01-02")
    assert entries == (("attention_forward", SHAPE, RIGHT, "4.0 → 3.0 µs, H100, 2026-01-02"),), "rules need no entry"
    monkeypatch.setattr(_configurations, "MEASURED", entries)
    more = tune.measured_entries([_finding(other, RIGHT)], "H200")
    assert [entry[1]["lengths"] for entry in more] == ["few x few", "many"]
    assert tune.measured_entries([_finding(SHAPE, PRESENT)], "H200") == (), "a class measured anew"

    copy = tmp_path / "_configurations.py"
    shutil.copy(ROOT / "kernels" / "_configurations.py", copy)
    assert tune.replace_between(copy, "measured", tune.source(more))
    namespace = {}
    exec(compile(copy.read_text(), copy, "exec"), namespace)
    assert namespace["MEASURED"] == more and namespace["RULES"]
    assert max(map(len, copy.read_text().splitlines())) <= 120
    assert tune.replace_between(copy, "measured", tune.source(()))
    exec(compile(copy.read_text(), copy, "exec"), namespace)
    assert namespace["MEASURED"] == ()


@pytest.mark.parametrize("quick", [True, False])
def test_classes_are_sound(quick):
    found = tune.classes(quick)
    assert len(set(found)) == len(found)
    assert {one.kernel for one in found} >= {"attention_forward", "attention_grad_query", "attention_grad_key_value"}
    assert {one.spec.kind for one in found} >= {"encoder", "cross", "decoder"}
    for one in found:
        assert len({tune.tile_name(tile) for tile in one.tiles}) == len(one.tiles)
        if one.kernel.startswith("attention"):
            asked = one.spec.kind == "encoder" and one.spec.padding != "none"
            assert one.provider == ("detr_fast, padded queries skipped" if asked else "detr_fast")
        # Every name of a launch's configuration, or the launcher would miss one.
        rule = next(tile for kernel, _, tile in _configurations.RULES if kernel == one.kernel)
        assert all(tile.keys() == rule.keys() for tile in one.tiles)


def test_options_choose_classes():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(["tune", "--precision", "tf32", "--kind", "cross"])
    assert [one.kernel for one in tune._chosen(tune.classes(False), args)] == [
        "attention_forward",
        "attention_grad_query",
        "attention_grad_key_value",
    ]


def test_without_a_gpu_it_says_what_it_cannot_do(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["tune", "--device", "cpu"])
    assert "there is no CUDA GPU here; --interpret checks the candidates" in capsys.readouterr().err


@pytest.mark.interpret
def test_candidates_are_checked_through_the_interpreter(capsys, monkeypatch):
    assert main(["tune", "--interpret", "--kind", "decoder", "--mode", "forward"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("right, not timed") >= 4 and "BLOCK_M=16" in printed and "BLOCK_M=128" in printed
    wrong = {"BLOCK_T": 3, "BLOCK_F": 8, "num_warps": 4}  # no power of two: the kernel cannot be launched
    monkeypatch.setattr(tune, "CANDIDATES", {("sine_position_forward", "nchw"): [wrong]})
    monkeypatch.setattr(tune, "interpreter_classes", lambda: tune_positions)
    tune_positions = [one for one in tune.classes(True) if one.kernel.startswith("sine")][-1:]
    assert main(["tune", "--interpret"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.gpu
def test_tuning_on_a_gpu(tmp_path, capsys):
    arguments = ["tune", "--quick", "--kind", "decoder", "--mode", "forward", "--output", str(tmp_path)]
    assert main(arguments) == 0, capsys.readouterr().out
    record = load_record(tmp_path / "tune.json")
    assert record["provenance"]["gpu"] and len(record["findings"]) == 2
    assert all(found["chosen_ms"] <= found["present_ms"] for found in record["findings"])
    assert "MEASURED: tuple" in capsys.readouterr().out
