"""The command line on tiny CPU runs, the results files, the pictures and the README's table."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detr_fast.benchmarks import PRECISIONS, SUITES, plan
from detr_fast.benchmarks.cli import main
from detr_fast.benchmarks.harness import ceilings
from detr_fast.benchmarks.harness.provenance import slug
from detr_fast.benchmarks.harness.results import load_record, save
from detr_fast.benchmarks.harness.spec import Spec
from detr_fast.benchmarks.plots import plot_suite
from detr_fast.benchmarks.report import cpu_training, padding_share, table, update_readme

ROOT = Path(__file__).parents[2]
TINY = ["--quick", "--device", "cpu", "--batch", "1", "--precision", "fp32"]


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_runs_on_a_cpu(suite, tmp_path, capsys):
    kinds = plan.suite_module(suite).KINDS
    chosen = ["--kind", "decoder" if "decoder" in kinds else kinds[0]] if len(kinds) > 1 else []
    assert main([suite, *TINY, *chosen, "--output", str(tmp_path), "--no-plots"]) == 0
    record = load_record(tmp_path / f"{suite}.json")
    _check_provenance(record, suite)
    rows = [row for row in record["rows"] if row["provider"] == "detr_fast"]
    assert [row["status"] for row in rows] == ["ok"]
    assert rows[0]["p20_ms"] <= rows[0]["median_ms"] <= rows[0]["p80_ms"] and rows[0]["max_error"] < 1e-4
    assert not any(row["status"] in ("wrong", "failed") for row in record["rows"])
    printed = capsys.readouterr().out
    assert "Not measured without a GPU" in printed.replace("\n", " ") and "the measured ceilings" in printed


def _check_provenance(record, suite):
    where = record["provenance"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", where["date"])
    assert where["device_type"] == "cpu" and where["gpu"] is None and where["device"] == where["cpu"]
    assert {"driver", "torch", "triton", "python", "git_sha", "git_dirty"} <= where.keys()
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode == 0:
        assert where["git_sha"] == git.stdout.strip() and isinstance(where["git_dirty"], bool)
    assert record["ceilings"]["copy"] > 0 and record["command"][0] == suite


def test_gradients_and_dropout_on_a_cpu(capsys):
    assert main(["attention", *TINY, "--kind", "decoder", "--mode", "both", "--dropout", "0.1", "--check-only"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"detr_fast +- .*right, not timed", printed), printed


def test_a_wrong_op_makes_the_run_fail(monkeypatch, capsys):
    from detr_fast.benchmarks.suites import sine_position

    monkeypatch.setattr(sine_position, "sine_position", lambda *a, **k: tuple(-t for t in _true_position(*a, **k)))
    assert main(["sine_position", *TINY, "--check-only"]) == 1
    assert "WRONG" in capsys.readouterr().out


def _true_position(*args, **options):
    from detr_fast.ops import sine_position

    position, mask = sine_position(*args, **options)
    return position, mask.float()


def test_budget_lists_what_was_left_out(tmp_path, capsys):
    arguments = ["--batch", "1", "2", "--budget", "0", "--output", str(tmp_path), "--no-plots"]
    assert main(["sine_position", *TINY, *arguments]) == 0
    record = load_record(tmp_path / "sine_position.json")
    assert record["rows"] == [] and len(record["not_measured"]) == 2
    assert "not measured: sine_position R50 B2" in capsys.readouterr().out


def test_device_that_is_not_there(capsys):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="2"):
            main(["attention", "--device", "cuda"])
        assert "no CUDA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["attention", "--device", "meta"])
    assert "--device meta: expected cuda or cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["--padding", "some"], ["--padding", "valid0"], ["--kind", "x"], ["--batch", "0"], ["--dropout", "1"]],
)
def test_bad_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["attention", *arguments])
    assert re.search(rf"{arguments[0]} {arguments[1]}\S*: expected", capsys.readouterr().err)


@pytest.mark.gpu
@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_runs_on_a_gpu(suite, tmp_path, capsys):
    arguments = [suite, "--quick", "--batch", "2", "--no-plots", "--compile", "no", "--output", str(tmp_path)]
    assert main(arguments) == 0, capsys.readouterr().out
    record = load_record(tmp_path / f"{suite}.json")
    ours = [row for row in record["rows"] if row["provider"] == "detr_fast"]
    assert {row["launch"] for row in ours} == {"eager", "graph"} and all(row["median_ms"] > 0 for row in ours)
    assert not any(row["status"] == "failed" for row in record["rows"])
    assert record["provenance"]["driver"] and record["provenance"]["gpu"]


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("quick", [True, False])
def test_plans_are_sound(suite, quick):
    specs = plan.gpu_plan(suite, quick)
    assert len(set(specs)) == len(specs), "a case twice"
    assert {spec.suite for spec in specs} == {suite}
    padded = "padding" in plan.suite_module(suite).options(specs[0].kind)
    assert {spec.padding for spec in specs} >= ({"none", "coco"} if padded else {"none"})
    if not quick:
        assert {1, 2, 4, 8, 16, 32, 64} <= {spec.batch for spec in specs}


def test_chosen_options_multiply():
    base = plan.gpu_plan("attention", True)
    specs = plan.chosen_plan("attention", base, {"batch": [1, 2], "mode": ["both"], "dropout": [0.0, 0.1]})
    assert len(specs) == 4 and {spec.mode for spec in specs} == {"both"}
    assert plan.chosen_plan("attention", base, {"kind": ["float"]}) == []
    # Options that a suite does not have leave it as it is.
    position = plan.gpu_plan("sine_position", True)
    assert len(plan.chosen_plan("sine_position", position, {"dropout": [0.1], "mode": ["both"]})) == 1


@pytest.mark.interpret
@pytest.mark.parametrize("suite", [suite for suite in SUITES if plan.interpreter_plan(suite)])
def test_kernels_are_right_through_the_interpreter(suite, capsys):
    assert main([suite, "--interpret", "--batch", "2", "--precision", "fp32"]) == 0
    printed = capsys.readouterr().out
    assert "Not shown: time" in printed and re.search(r"detr_fast +- .*right, not timed", printed), printed


def test_command_line_knows_the_suites_and_precisions():
    from detr_fast.benchmarks import runner

    assert PRECISIONS == tuple(ceilings.PRECISIONS) and set(SUITES) >= set(runner.SHARES)
    assert sum(runner.SHARES.values()) == pytest.approx(1.0)


def test_short_names(capsys):
    assert main(["position", *TINY, "--check-only"]) == 0
    assert "sine_position: R50-B1-coco" in capsys.readouterr().out


def test_slug():
    assert slug("NVIDIA H200") == "nvidia-h200" and slug("AMD EPYC 9004 (x)") == "amd-epyc-9004-x"


BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


# -- report and plots: from a made-up GPU's results --------------------------------------------------------------------


def _row(suite, provider, milliseconds, spec: Spec, shape, launch="graph", status="ok"):
    return {
        "suite": suite, "case": f"{spec}", "provider": provider, "label": "", "precision": spec.precision,
        "mode": spec.mode, "launch": launch, "status": status, "reason": "", "median_ms": milliseconds,
        "p20_ms": milliseconds, "p80_ms": milliseconds, "gb_per_s": 100 / milliseconds,
        "tflop_per_s": 10 / milliseconds, "percent_of_ceiling": 100 * 0.04 / milliseconds,
        "shape": {"model": spec.model, "padding": spec.padding} | shape,
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """One attention file: dropout 0.1 without padding, a sweep of batch sizes and one of padded shares."""
    rows = []
    sweep = [Spec("attention", "encoder", batch=b, padding="none", dropout=0.1) for b in (1, 4, 16)]
    sweep += [Spec("attention", "encoder", padding=padding) for padding in ("valid80", "valid50", "valid20")]
    for spec in sweep:
        valid = int(spec.padding[5:]) / 100 if spec.padding != "none" else 1.0
        shape = {
            "kind": "encoder", "batch": spec.batch, "heads": 8, "head_dim": 32, "q_len": 950, "k_len": 950,
            "dropout": spec.dropout, "valid": {"pixels": valid, "tokens": valid, "pairs": valid**2},
        }  # fmt: skip
        size = spec.batch / 16
        for provider, time in (("detr_fast", 0.05 * valid), ("SDPA efficient", 0.2), ("as shipped", 1.0)):
            rows.append(_row("attention", provider, time * size, spec, shape))
            rows.append(_row("attention", provider, time * size + 0.03, spec, shape, launch="eager"))
        rows.append(_row("attention", "SDPA flash, no mask", 0.01 * size, spec, shape))
        rows.append(_row("attention", "limit", 0.04 * valid * size, spec, shape, launch="-", status="limit"))
    record = {
        "suite": "attention",
        "provenance": {
            "device": "Some GPU", "device_type": "cuda", "driver": "1.2", "torch": "3", "triton": "4",
            "git_sha": "0123456789abcdef", "git_dirty": False, "date": "2030-01-02T03:04:05+00:00",
        },
        "command": ["attention"],
        "ceilings": {"copy": 4e12, "matmul": {"bf16": 8e14}, "exp": 4e12},
        "rows": rows,
        "not_measured": [],
    }  # fmt: skip
    path = save(record, tmp_path / "results" / "some-gpu")
    assert load_record(path) == record
    return tmp_path / "results"


def test_report_quotes_the_results(results):
    text = table(results)
    assert "**Some GPU**, driver 1.2, torch 3, triton 4, commit 012345678, 2030-01-02" in text
    line = next(line for line in text.splitlines() if "dropout 0.1" in line)
    # Not the flash kernel without a mask: it does not answer the question.
    assert line == (
        "| attention, encoder, R50, no padding, bf16, forward, dropout 0.1 | 40.0 | **50.0** | 80 % | "
        "SDPA efficient: 200.0 (4.0x) | 1000.0 (20.0x) |"
    )
    assert len([line for line in text.splitlines() if line.startswith("| attention")]) == 1


def training_record(device_type: str) -> dict:
    row = dict(
        model="R50", batch=16, padding="none", size="800x1216", status="ok", reason="", p20_ms=1.0, p80_ms=200.0,
    )  # fmt: skip
    steps = [
        row | dict(provider="as shipped", median_ms=100.0, images_per_s=160.0, counts={"launches": 3000, "syncs": 90}),
        row | dict(provider="detr_fast", median_ms=20.0, images_per_s=800.0, counts={"launches": 900, "syncs": 0}),
        row | dict(provider="tuned stock", status="unavailable", reason="no compiler", median_ms=None, counts=None),
    ]
    where = {"device_type": device_type, "device": f"Some {device_type}", "driver": "1", "torch": "3", "triton": "4"}
    where |= {"git_sha": "0123456789ab", "git_dirty": False, "date": "2030-01-02T00:00:00+00:00"}
    return {"suite": "train", "provenance": where, "rows": [], "steps": steps}


@pytest.mark.parametrize("device_type", ["cuda", "cpu"])
def test_report_of_the_training_step(device_type, tmp_path):
    save(training_record(device_type), tmp_path / "some")
    text, other = table(tmp_path), cpu_training(tmp_path)
    if device_type == "cpu":
        text, other = other, text
    lines = text.splitlines()
    first = lines.index("| variant | ms | 20 % to 80 % | img/s | times as shipped | launches | syncs |")
    assert lines[first - 2] == "Training step, R50, batch 16, 800x1216, no padding:"
    assert lines[first + 2 : first + 4] == [
        "| **detr_fast** | 20.0 | 1.0 – 200.0 | 800.0 | 5.00 | 900 | 0 |",
        "| as shipped | 100.0 | 1.0 – 200.0 | 160.0 | 1.00 | 3000 | 90 |",
    ]
    assert "tuned stock: unavailable, no compiler" in lines and "commit 012345678, 2030-01-02" in text
    assert "detr_fast" not in other.replace("detr_fast train", "")


def test_report_of_what_padding_leaves(tmp_path):
    """Shares of the dense time of the same case: other dropout, precision or launch does not count as such."""

    def row(provider, padding, median_ms, dropout=0.1, **changes):
        shape = {"kind": "encoder", "batch": 16, "q_len": 950, "padding": padding, "dropout": dropout}
        shape["valid"] = {"pairs": 0.29 if padding == "coco" else 1.0}
        return dict(provider=provider, shape=shape, median_ms=median_ms, precision="bf16", mode="both", launch="eager",
                    status="ok") | changes  # fmt: skip

    assert padding_share(tmp_path) == "Not measured."
    where = {"device": "Some GPU", "git_sha": "0123456789ab", "git_dirty": False, "date": "2030-01-02T00:00:00+00:00"}
    rows = [row("detr_fast", "coco", 0.05), row("detr_fast, padded queries skipped", "coco", 0.03)]
    rows += [row("detr_fast", "coco-dense", 7.0, dropout=0.0), row("detr_fast", "coco-dense", 7.0, precision="fp32")]
    rows += [row("detr_fast", "coco-dense", 7.0, launch="graph"), row("SDPA", "coco-dense", 7.0)]
    save({"suite": "attention", "provenance": where, "rows": rows}, tmp_path / "some")
    assert padding_share(tmp_path) == "Not measured."
    rows.append(row("detr_fast", "coco-dense", 0.1))
    save({"suite": "attention", "provenance": where, "rows": rows}, tmp_path / "some")
    assert padding_share(tmp_path).splitlines()[2:] == [
        "| Some GPU | 950 tokens, batch 16, bf16, both, eager, p=0.1 | 29% | 0.1 | 0.05 (50%) | 0.03 (30%) | "
        "commit 012345678, 2030-01-02 |"
    ]


def test_report_is_idempotent_and_leaves_the_rest(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    assert update_readme(readme, results) == 0
    once = readme.read_text()
    assert update_readme(readme, results) == 0
    assert readme.read_text() == once
    assert (
        once.startswith(f"# Title\n\n{BEGIN}\n**Some GPU**")
        and once.endswith(f"{END}\n\nafter\n")
        and "old" not in once
    )


def test_report_without_markers_or_results(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n")
    assert update_readme(readme, tmp_path) == 1
    assert readme.read_text() == "# Title\n" and "benchmarks:begin" in capsys.readouterr().out
    assert "No GPU has been measured yet" in table(tmp_path)


def test_pictures(results, tmp_path):
    pytest.importorskip("matplotlib")
    paths = plot_suite(load_record(results / "some-gpu" / "attention.json"), tmp_path)
    assert [path.name for path in paths] == ["attention-tokens.png", "attention-padding.png", "attention-roofline.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in paths)


def test_results_are_json_without_nan(tmp_path):
    record = {"suite": "x", "rows": [{"max_error": float("nan")}], "ceilings": None}
    text = save(record, tmp_path).read_text()
    assert json.loads(text) == {"suite": "x", "ceilings": None, "rows": [{"max_error": "nan"}]}
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


def test_detr_fast_bench(capsys):
    from detr_fast.cli import main as detr_fast

    arguments = [
        "bench",
        "attention",
        "--check-only",
        "--batch",
        "1",
        "--kind",
        "decoder",
        "--device",
        "cpu",
        "--quick",
    ]
    assert detr_fast(arguments) == 0
    assert "right, not timed" in capsys.readouterr().out
    assert detr_fast(["bench", "attention", "--padding", "some"]) == 2
    assert "--padding some: expected" in capsys.readouterr().err


def test_module_is_a_command():
    done = subprocess.run([sys.executable, "-m", "benchmarks", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--interpret" in done.stdout, done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_gpu_says_that_there_is_no_gpu():
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = ["make", "gpu", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert done.returncode != 0 and "no CUDA GPU" in done.stdout
