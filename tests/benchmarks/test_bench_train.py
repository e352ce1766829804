"""The training step's benchmark and the comparison of whole trainings, on a CPU."""

import dataclasses
import functools

import pytest
import torch

from detr_fast.benchmarks.cli import main
from detr_fast.benchmarks.harness.ceilings import Ceilings
from detr_fast.benchmarks.harness.results import load_record
from detr_fast.benchmarks.report import same_training as report_of_same_training
from detr_fast.benchmarks.shapes import nominal_batch
from detr_fast.benchmarks.studies import same_training, train, training_step
from detr_fast.data import make_shapes_dataset
from detr_fast.training import step

CPU = torch.device("cpu")


def test_twenty_steps_of_ours_are_twenty_steps_of_the_reference(monkeypatch):
    from detr_fast.models import backbone

    folded = []
    for name in ("folded_conv", "forked_folded_conv"):
        true = getattr(backbone, name)
        monkeypatch.setattr(backbone, name, lambda *a, _true=true, **k: folded.append(a[1].shape) or _true(*a, **k))
    losses = same_training.compare(20, image_size=(32, 40))
    assert len(losses) == 20 and len(folded) == 20 * 10  # stem, two stages of four, one downsample
    assert len({round(loss, 3) for loss, _ in losses}) > 10
    assert max(abs(ours - reference) / reference for ours, reference in losses) < 1e-4


def test_another_model_is_another_training(monkeypatch):
    """The comparison notices a reference that drops a loss."""
    monkeypatch.setattr(same_training.LayerByLayer, "__init__", lambda self, *a: _only_boxes(self))
    losses = same_training.compare(3, image_size=(32, 40))
    assert max(abs(ours - reference) / reference for ours, reference in losses) > 1e-4


def test_in_float64_rounding_does_not_grow():
    losses = same_training.compare(20, image_size=(32, 40), dtype=torch.float64)
    assert max(abs(ours - reference) / reference for ours, reference in losses) < 1e-12


def test_from_the_same_weights_both_are_as_far_from_float64():
    losses = same_training.compare(5, image_size=(32, 40), resync=True)
    away = [[abs(x - exact) / exact for x in both] for *both, exact in losses]
    assert 0 < max(map(max, away)) < 1e-6
    exact = same_training.compare(2, image_size=(32, 40), resync=True, dtype=torch.float64)
    assert max(abs(x - y) / y for *both, y in exact for x in both) < 1e-12


def test_the_loss_in_float64_leaves_a_batch_without_padding(monkeypatch):
    seen, loss = [], same_training.Trained.loss
    monkeypatch.setattr(
        same_training.Trained, "loss", lambda self, samples, *more: seen.append(samples) or loss(self, samples, *more)
    )
    same_training.compare(1, batch=1, image_size=(32, 40), resync=True)
    assert len(seen) == 3 and all(samples.no_padding for samples in seen)


def test_the_control_trains_the_reference_twice():
    """A last bit away, and different for that reason alone."""
    losses = same_training.compare(3, image_size=(32, 40), control=True)
    assert 0 < max(abs(first - second) / second for first, second in losses) < 1e-5


def test_dropout_is_judged_by_what_is_reached(capsys):
    ours, reference = same_training.reached(3, 0.5, 0, image_size=(32, 40))
    assert ours != reference and abs(ours - reference) / reference < 0.1
    assert same_training.main(["--steps", "2", "--image-size", "32", "40", "--dropout", "0.1", "--seeds", "1"]) == 1
    assert "the reference's seeds by 0.0000" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        same_training.main(["--dropout", "0.1", "--resync"])


def test_what_was_found_is_kept_once_per_question(tmp_path):
    short = [*"--device cpu --steps 2 --image-size 32 40 --save --output".split(), str(tmp_path / "some")]
    for more in ([], ["--resync"], ["--dropout", "0.1", "--seeds", "2"], []):
        same_training.main(short + more)
    found = load_record(tmp_path / "some" / "same_training.json")["comparisons"]
    assert [one["way"] for one in found] == ["resync", "dropout", "free"]
    assert len(found[0]["from_float64"]) == 2 and "from the loss in float64 ours " in report_of_same_training(tmp_path)
    lines = report_of_same_training(tmp_path).splitlines()
    assert lines[2].startswith("| question | images | dtype | steps |") and len(lines) == 7
    assert f"means differ by {found[1]['difference']:.3f}" in lines[5] and "dropout 0.1" in lines[5]
    assert f"largest relative difference {found[2]['difference']:.1e}, in step" in lines[6]


def test_same_training_in_bf16_and_on_other_images(tmp_path):
    """bf16 is told from float32; a COCO folder is used as it is, its images again where there are too few."""
    losses = same_training.compare(3, image_size=(32, 40), bf16=True, resync=True)
    assert 1e-5 < max(abs(ours - reference) / reference for ours, reference, _ in losses) < 3e-2
    make_shapes_dataset(tmp_path, num_train=1, num_val=3, image_size=(32, 40))
    losses = same_training.compare(3, image_size=(32, 40), coco_path=tmp_path)
    assert max(abs(ours - reference) / reference for ours, reference in losses) < 1e-4
    with pytest.raises(SystemExit):
        same_training.main(["--bf16", "--control"])


def _only_boxes(matcher):
    super(same_training.LayerByLayer, matcher).__init__(0, 5, 0)


SHAPE = nominal_batch("R50", 2, 0.06)


def test_every_variant_has_the_same_loss_and_ours_fewer_operators():
    rows = train.measure_case(
        "tiny", SHAPE, "none", CPU, Ceilings(1e10, {"fp32": 1e11}, 1e9), training_step.variants(CPU, False),
        seconds=0.1, min_rounds=1,
    )  # fmt: skip
    assert [row.status for row in rows] == ["ok"] * len(rows), rows
    by_name = {row.provider: row for row in rows}
    assert {"as shipped", "tuned stock", "detr_fast", "detr_fast without fused backbone"} < by_name.keys()
    ours, shipped = by_name["detr_fast"], by_name["as shipped"]
    assert ours.counts["operators"] < 0.6 * shipped.counts["operators"]
    assert ours.counts["host_reads"] < 0.2 * shipped.counts["host_reads"]
    assert set(ours.stages_ms) == set(training_step.STAGES) and all(v >= 0 for v in ours.stages_ms.values())
    assert ours.tflop_per_s > 0 and ours.images_per_s == pytest.approx(2e3 / ours.median_ms)
    fused = ours.counts["operators"]
    for technique in ("fused backbone", "criterion in one pass", "fused AdamW"):
        assert by_name[f"detr_fast without {technique}"].counts["operators"] > fused, technique


@pytest.mark.slow  # half a minute of tracing
def test_nothing_is_compiled_while_it_is_timed(monkeypatch):
    """More variants than the compiler keeps code of one function for, each compiled when it is prepared."""
    graphs, timed = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def interleave(blocks, *args, **kwargs):
        before = len(graphs)
        for block in blocks.values():
            block()
        timed.append((before, len(graphs)))
        return {name: [1.0] for name in blocks}

    torch._dynamo.register_backend(name="counted")(backend)
    monkeypatch.setattr(step, "compile_regions", functools.partial(step.compile_regions, backend="counted"))
    monkeypatch.setattr(train, "interleave", interleave)
    ours = dataclasses.replace(training_step.OURS, bf16=False, channels_last=False)
    chosen = [dataclasses.replace(ours, name=f"detr_fast {i}") for i in range(6)]
    rows = train.measure_case("tiny", SHAPE, "none", CPU, Ceilings(1e10, {"fp32": 1e11}, 1e9), chosen)
    assert [row.status for row in rows] == ["ok"] * 6, rows
    ((before, after),) = timed
    # Each has the encoder's and the decoder's layers and the box head, without and with dropout.
    assert before == after >= 6 * 5


def test_a_wrong_variant_is_not_timed(monkeypatch):
    broken = dataclasses.replace(training_step.OURS, name="detr_fast", bf16=False, channels_last=False, compile="no")
    true_conv = training_step.Step.loss
    monkeypatch.setattr(
        training_step.Step, "loss", lambda self, batch: true_conv(self, batch) * (1 + self.variant.packed)
    )
    shipped = dataclasses.replace(training_step.AS_SHIPPED)
    first, second = train.measure_case("tiny", SHAPE, "none", CPU, None, [shipped, broken])
    assert first.status == "checked" and second.status == "wrong" and second.median_ms is None


def test_command(capsys):
    assert main(["train", "--quick", "--check-only", "--device", "cpu", "--provider", "without packed"]) == 0
    printed = capsys.readouterr().out
    assert "Not measured without a GPU" in printed and "detr_fast without packed input" in printed
    for arguments in (["--interpret"], ["--padding", "valid50"]):
        with pytest.raises(SystemExit, match="2"):
            main(["train", "--device", "cpu", *arguments])


def test_plan_covers_models_and_batches():
    from argparse import Namespace

    args = Namespace(model=None, batch=None, padding=None, quick=False)
    cases = train.cases(args, torch.device("cuda"))
    assert cases[0] == ("R50", 16, "none") and cases[1] == ("R50", 16, "coco")
    assert {model for model, _, _ in cases} == {"R50", "R101", "DC5"} and {b for _, b, _ in cases} >= {2, 64}


@pytest.mark.gpu
def test_step_on_a_gpu(tmp_path, capsys):
    assert (
        main(["train", "--quick", "--model", "R50", "--batch", "2", "--compile", "no", "--output", str(tmp_path)]) == 0
    )
    assert "launches" in capsys.readouterr().out and (tmp_path / "train.json").is_file()
