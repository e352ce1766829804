"""Low latency: what is recorded and replayed, with a stand-in for CUDA's graphs, and on a GPU with the real ones."""

import contextlib
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import detr_fast
from detr_fast.benchmarks.cli import main as bench
from detr_fast.benchmarks.harness.results import load_record
from detr_fast.benchmarks.studies import latency
from detr_fast.cli import main
from detr_fast.errors import UsageError
from detr_fast.inference.latency import ForwardGraphs
from detr_fast.nested_tensor import NestedTensor

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="runs without the interpreter")
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 70, 90, 3), dtype=np.uint8)
IMAGES = [Image.fromarray(pixels) for pixels in PIXELS]
UPRIGHT = [image.transpose(Image.Transpose.ROTATE_90) for image in IMAGES]


class Tape(TorchDispatchMode):
    """The operations of a capture. Replayed, each reads and writes the memory that it had then, as a graph does."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if Tape.refuses:
            raise RuntimeError("operation not permitted when stream is capturing\nsecond line")
        out = function(*args, **(kwargs or {}))
        self.steps.append((function, args, kwargs or {}, out))
        return out

    refuses = False
    replays = 0

    @torch.no_grad()
    def replay(self):
        Tape.replays += 1
        for function, args, kwargs, out in self.steps:
            new = function(*args, **kwargs)
            for old, value in zip(*(torch.utils._pytree.tree_leaves(each) for each in (out, new)), strict=True):
                if isinstance(old, torch.Tensor) and old.numel() and old.data_ptr() != value.data_ptr():
                    old.copy_(value)


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    @contextlib.contextmanager
    def graph(tape, pool, stream, capture_error_mode):
        with tape:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(Tape, "replays", 0)
    # What oneDNN keeps of the weights is a CPU's affair.
    with torch.backends.mkldnn.flags(enabled=False):
        yield Tape


def with_graphs(run_folder, said=None, limit=16):
    detector = detr_fast.load(run_folder, device="cpu")
    detector._graphs = ForwardGraphs(detector.model, (said if said is not None else []).append, limit)
    return detector


def same(found, expected):
    assert [list(each.class_id) for each in found] == [list(each.class_id) for each in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-6)
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-4)


def test_what_is_found_stays_the_same(run_folder, graphs_on_cpu):
    expected = detr_fast.load(run_folder, device="cpu").predict(IMAGES + UPRIGHT, 0)
    assert abs(expected[2].scores - expected[3].scores).max() > 1e-4, "another image must be told from this one"
    said = []
    detector = with_graphs(run_folder, said)
    # Two shapes in turn: each is recorded when it comes for the second time.
    mixed = [detector.predict(image, 0) for pair in zip(IMAGES, UPRIGHT, strict=True) for image in pair]
    same(mixed[::2] + mixed[1::2], expected)
    assert graphs_on_cpu.replays == 6 and (detector._graphs.replayed, detector._graphs.eager) == (6, 2) and not said


def test_outputs_stay_valid(run_folder, graphs_on_cpu):
    """They are copies: the next replay writes over the graph's own."""
    graphs = with_graphs(run_folder)._graphs
    batches = [NestedTensor(torch.rand(1, 3, 64, 96), None, no_padding=True) for _ in range(4)]
    with torch.no_grad():
        outputs = [graphs(batch) for batch in batches]
        for batch, out in zip(batches, outputs, strict=True):
            expected = graphs.model(batch)
            assert out.keys() == expected.keys()
            torch.testing.assert_close(out["pred_boxes"], expected["pred_boxes"])
            torch.testing.assert_close(out["pred_logits"], expected["pred_logits"])
    assert graphs_on_cpu.replays == 3


def test_the_shapes_are_bounded(run_folder, graphs_on_cpu):
    said = []
    detector = with_graphs(run_folder, said, limit=1)
    for _ in range(3):
        detector.predict(IMAGES[0])
        detector.predict(UPRIGHT[0])
    assert graphs_on_cpu.replays == 2
    assert said == ["low_latency: 1 kinds of batches are recorded, further ones run without a graph"]


@pytest.mark.parametrize("change", ["written", "through .data", "replaced", "buffer", "dtype and back"])
def test_changed_weights_count(change, run_folder, graphs_on_cpu):
    detector = with_graphs(run_folder)
    before = [detector.predict(IMAGES[0], 0) for _ in range(3)][-1]
    model = detector.model
    with torch.no_grad():
        if change == "written":
            model.class_embed.bias[0] += 1
        elif change == "through .data":
            model.class_embed.bias.data[0] += 1
        elif change == "replaced":
            model.class_embed.bias = nn.Parameter(model.class_embed.bias + torch.tensor([1.0, 0, 0]))
        elif change == "buffer":
            model.backbone[0].body.bn1.bias += 1
        else:
            model.class_embed.bias[0] += 1
            model.double().float()
    found = [detector.predict(IMAGES[0], 0) for _ in range(3)]
    plain = detr_fast.load(run_folder, device="cpu")
    plain.model.load_state_dict(model.state_dict())
    same(found, [plain.predict(IMAGES[0], 0)] * 3)
    assert abs(found[0].scores - before.scores).max() > 1e-4


def test_a_replaced_module_counts(run_folder, graphs_on_cpu):
    detector = with_graphs(run_folder)
    for _ in range(3):
        detector.predict(IMAGES[0], 0)
    own = detector.model.class_embed
    new = nn.Linear(own.in_features, own.out_features)
    new.load_state_dict({"weight": own.weight, "bias": own.bias + torch.eye(own.out_features)[0]})
    detector.model.class_embed = new
    plain = detr_fast.load(run_folder, device="cpu")
    plain.model.load_state_dict(detector.model.state_dict())
    same([detector.predict(IMAGES[0], 0)], [plain.predict(IMAGES[0], 0)])


def test_a_hook_that_came_later_is_called(run_folder, graphs_on_cpu):
    detector, calls = with_graphs(run_folder), []
    for _ in range(3):
        detector.predict(IMAGES[0], 0)
    detector.model.class_embed.register_forward_hook(lambda *_: calls.append(1))
    detector.predict(IMAGES[0], 0)
    assert calls


def test_what_was_recorded_in_inference_mode_serves_outside(run_folder, graphs_on_cpu):
    detector = with_graphs(run_folder)
    with torch.inference_mode():
        inside = [detector.predict(IMAGES[0], 0) for _ in range(3)]
    same([detector.predict(IMAGES[0], 0)], inside[-1:])


def test_what_cannot_be_recorded_runs_as_before(run_folder, graphs_on_cpu, monkeypatch):
    monkeypatch.setattr(Tape, "refuses", True)
    said = []
    detector = with_graphs(run_folder, said)
    expected = detr_fast.load(run_folder, device="cpu").predict(IMAGES[0], 0)
    same([detector.predict(IMAGES[0], 0) for _ in range(4)], [expected] * 4)
    assert said == ["low_latency: images are computed without graphs: operation not permitted when stream is capturing"]
    assert torch.is_autocast_cache_enabled()


def test_training_is_not_replayed(run_folder, graphs_on_cpu):
    graphs = with_graphs(run_folder)._graphs
    graphs.model.train()
    batch = NestedTensor(torch.rand(1, 3, 64, 96), None, no_padding=True)
    for _ in range(3):
        graphs(batch)
    assert graphs_on_cpu.replays == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_is_said_and_done(run_folder, tmp_path, capsys):
    detector = detr_fast.load(run_folder)
    assert detector.low_latency() is detector
    line = "low_latency has no effect: CUDA graphs need a GPU\n"
    assert capsys.readouterr().out == line
    IMAGES[0].save(tmp_path / "photo.png")
    argv = ["predict", str(tmp_path / "photo.png"), "--weights", str(run_folder), "--output_dir", str(tmp_path / "out")]
    assert main([*argv, "--low_latency"]) == 0 and line in capsys.readouterr().out


def test_what_it_refuses(run_folder):
    with pytest.raises(ValueError, match="shapes must be at least 1, got 0"):
        detr_fast.load(run_folder, device="cpu").low_latency(0)


def test_an_exported_file_has_none(run_folder, tmp_path):
    detector = detr_fast.load(run_folder, device="cpu")
    detector._loaded = detr_fast.inference.exported.Exported(
        tmp_path / "x.onnx", detector._loaded.task, detector.config, None, {}, (), (), lambda inputs: []
    )
    with pytest.raises(UsageError, match="exported file, which only detects"):
        detector.low_latency()


def test_the_benchmark_checks_times_and_says_what_there_is(tmp_path, capsys):
    assert bench(["latency", "--quick", "--device", "cpu", "--output", str(tmp_path)]) == 0
    rows = {(row["what"], row["launch"]): row for row in load_record(tmp_path / "latency.json")["latency"]}
    assert set(rows) == {("network", "eager"), ("predict", "eager")}
    assert all(row["status"] == "ok" and row["median_ms"] > 0 and row["size"] == [96, 128] for row in rows.values())
    assert rows["predict", "eager"]["median_ms"] > rows["network", "eager"]["median_ms"]
    assert "There are no CUDA graphs on a CPU: measured are the same calls" in capsys.readouterr().out
    for wrong, reason in (
        (["--launch", "graph"], "no CUDA graphs on a CPU"),
        (["--precision", "tf32"], "fp32 or bf16"),
    ):
        with pytest.raises(SystemExit):
            bench(["latency", "--quick", "--device", "cpu", *wrong])
        assert reason in capsys.readouterr().err


def test_wrong_outputs_and_failures_are_not_timed():
    exact = torch.tensor([[1.0, 2]]), torch.tensor([[0.5, 0.5]])

    def fail():
        raise RuntimeError("low_latency: images are computed without graphs: no")

    calls = {
        ("network", "eager"): lambda: exact,
        ("network", "graph"): lambda: (exact[0], exact[1] + 1),
        ("predict", "eager"): lambda: (torch.tensor([0.2, 0.9]),),
        ("predict", "graph"): fail,
    }
    rows = latency.measure(calls, exact, "fp32", (96, 128), timed=True, seconds=0)
    assert [row.status for row in rows] == ["ok", "wrong", "ok", "failed"]
    assert [row.median_ms is None for row in rows] == [False, True, False, True]


def test_the_benchmark_with_graphs(tmp_path, graphs_on_cpu, monkeypatch):
    """The rows that a GPU has, the stand-in being one."""
    monkeypatch.setattr(detr_fast.inference.detector.Detector, "low_latency", _with_stand_in)
    loaded = latency.build_loaded(torch.device("cpu"), quick=True)
    calls = latency.ways(loaded, "fp32", ["eager", "graph"], IMAGES[0])
    rows = latency.measure(calls, calls["network", "eager"](), "fp32", (96, 123), timed=False, seconds=0)
    assert [(row.what, row.launch, row.status) for row in rows] == [
        ("network", "eager", "checked"), ("predict", "eager", "checked"),
        ("network", "graph", "checked"), ("predict", "graph", "checked"),
    ]  # fmt: skip
    assert graphs_on_cpu.replays == 4 and all(row.difference < 1e-5 for row in rows)


def _with_stand_in(detector):
    detector._graphs = ForwardGraphs(detector.model, pytest.fail)
    return detector


# On a GPU


def on_gpu(run_folder, **settings):
    return detr_fast.load(run_folder, device="cuda", **settings)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gpu_finds_the_same(precision, run_folder):
    expected = on_gpu(run_folder, precision=precision).predict(IMAGES + UPRIGHT, 0)
    detector = on_gpu(run_folder, precision=precision).low_latency()
    mixed = [detector.predict(image, 0) for pair in zip(IMAGES, UPRIGHT, strict=True) for image in pair]
    assert (detector._graphs.replayed, detector._graphs.eager) == (6, 2)
    tolerance = 1e-5 if precision == "fp32" else 0.02
    for found, wanted in zip(mixed[::2] + mixed[1::2], expected, strict=True):
        np.testing.assert_allclose(found.scores, wanted.scores, atol=tolerance)


@pytest.mark.gpu
def test_gpu_changed_weights_count_and_replaced_ones_are_recorded_anew(run_folder):
    detector = on_gpu(run_folder).low_latency()
    for change in (lambda m: m.class_embed.bias.data.add_(torch.tensor([1.0, 0, 0], device="cuda")), nn.Module.double):
        for _ in range(3):
            detector.predict(IMAGES[0], 0)
        change(detector.model)
        detector.model.float()
        plain = on_gpu(run_folder)
        plain.model.load_state_dict(detector.model.state_dict())
        for _ in range(2):
            np.testing.assert_allclose(
                detector.predict(IMAGES[0], 0).scores, plain.predict(IMAGES[0], 0).scores, atol=1e-5
            )


@pytest.mark.gpu
def test_gpu_a_model_that_waits_for_the_host_falls_back(run_folder, capsys):
    detector = on_gpu(run_folder).low_latency()
    plain = detector.model.forward
    detector.model.forward = lambda samples: (samples.tensors.sum().item(), plain(samples))[1]
    expected = on_gpu(run_folder).predict(IMAGES[0], 0)
    for _ in range(3):
        np.testing.assert_allclose(detector.predict(IMAGES[0], 0).scores, expected.scores, atol=1e-5)
    assert "low_latency: images are computed without graphs" in capsys.readouterr().out
    torch.rand(3, device="cuda")  # the generator still draws
