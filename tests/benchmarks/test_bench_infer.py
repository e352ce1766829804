"""The study of inference on a CPU: what it checks before it times."""

import os

import pytest
import torch

from detr_fast.benchmarks.cli import main
from detr_fast.benchmarks.harness.results import load_record
from detr_fast.benchmarks.studies import infer

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs without the interpreter")


def test_what_is_saved(tmp_path, capsys):
    command = ["infer", "--quick", "--device", "cpu", "--batch", "4", "--output", str(tmp_path)]
    assert main([*command, "--provider", "detr_fast", "hugging"]) == 0
    record = load_record(tmp_path / "infer.json")
    rows = {(row["case"], row["provider"]): row for row in record["inference"]}
    assert {case for case, _ in rows} == {"four", "mixed"} and record["provenance"]["cpu"]
    for case in ("four", "mixed"):
        ours, shipped = rows[case, "detr_fast"], rows[case, "as shipped"]
        assert ours["status"] == shipped["status"] == "ok" and ours["difference"] < 1e-5
        assert ours["speed_up_of_ours"] == 1 and shipped["speed_up_of_ours"] > 0
        theirs = rows[case, "Hugging Face (sdpa)"]
        assert theirs["status"] == "ok" and theirs["difference"] < 1e-5 or "module" in theirs["reason"]
    assert rows["four", "detr_fast"]["valid"] == 1 and 0.6 < rows["mixed", "detr_fast"]["valid"] < 0.65
    assert "37% of the padded batch is padding" in capsys.readouterr().out


def test_cases_measured_one_by_one_are_kept(tmp_path):
    command = ["infer", "--quick", "--device", "cpu", "--output", str(tmp_path), "--provider", "none", "--case"]
    for case in ("mixed", "one", "mixed"):
        assert main([*command, case]) == 0
    record = load_record(tmp_path / "infer.json")
    assert [row["case"] for row in record["inference"]] == ["one", "mixed"]
    assert infer.cases_before(tmp_path / "infer.json", record["provenance"] | {"date": "later"}) != []
    assert infer.cases_before(tmp_path / "infer.json", record["provenance"] | {"threads": 99}) == []


def test_wrong_outputs_are_not_timed(monkeypatch):
    torch.manual_seed(0)
    model, config = infer.build_model("tiny")
    chosen = {name: infer.providers(model, config, False)[name] for name in ("as shipped", "detr_fast")}
    model.class_embed.bias.data += 1  # of ours alone
    rows = infer.measure_case(infer.cases(0.1)[0], chosen, timed=True, seed=0, seconds=0, min_rounds=1)
    assert [row.status for row in rows] == ["ok", "wrong"] and rows[1].median_ms is None


def test_outputs_stand_in_the_images_order():
    images = [torch.full((3, *size), float(i)) for i, size in enumerate([(4, 6), (6, 4), (4, 6)])]

    def mean_of(batch):
        mean = batch.tensors.mean((1, 2, 3))
        return {"pred_logits": mean, "pred_boxes": mean}

    assert infer.in_groups(mean_of, infer.grouped(images))[0].tolist() == [0, 1, 2]


def test_only_on_a_cpu():
    with pytest.raises(ValueError, match="expected --device cpu"):
        infer.run_infer(None, torch.device("cuda"))
    with pytest.raises(SystemExit):
        main(["infer", "--interpret"])
