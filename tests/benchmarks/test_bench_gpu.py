"""`make gpu`: which parts run in which order, and what becomes of one that fails or takes too long."""

import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.studies import convolutions

PARTS = gpu.parts(Path("results"), 12)


def test_the_parts_fit_into_the_minutes_that_a_gpu_is_lent():
    ordinary, quick = gpu.chosen([], PARTS, quick=False), gpu.chosen([], PARTS, quick=True)
    assert sum(part.seconds for part in ordinary.values()) <= 780
    assert 0 < sum(part.quick_seconds for part in quick.values()) <= 160
    assert list(ordinary)[:4] == ["doctor", "probe", "attention-tests", "step"]
    assert not {"tune", "same-float64"} & set(ordinary)


def test_parts_by_name():
    assert list(gpu.chosen(["step", "probe"], PARTS, quick=False)) == ["probe", "step"]
    assert len(gpu.chosen(["same"], PARTS, quick=False)) == 6
    with pytest.raises(ValueError, match="there is no part 'sam'; the parts are doctor, "):
        gpu.chosen(["sam"], PARTS, quick=False)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_every_command_is_understood(monkeypatch, capsys):
    monkeypatch.syspath_prepend(Path(gpu.__file__).parents[1])
    for part in PARTS.values():
        _, module, *arguments = part.command
        if module in ("pytest", "detr_fast"):
            continue
        given = [a.replace("{seconds}", "9") for a in arguments]
        monkeypatch.setattr(sys, "argv", [module, *given, "--no-such-flag"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        # Nothing else is unknown; `--help` would end the program before it says so.
        assert ended.value.code == 2
        assert capsys.readouterr().err.rstrip().endswith("unrecognized arguments: --no-such-flag")


@pytest.mark.parametrize(
    "code, may_run_out, outcome",
    [
        ("pass", False, "right"),
        ("import sys; sys.exit(3)", False, "failed (exit 3)"),
        ("import time; time.sleep(60)", False, "ran out of time"),
        (
            "import sys, time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: sys.exit(2)",
            True,
            "right as far as it got",
        ),
        ("import sys, time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: sys.exit(1)", True, "ran out of time"),
    ],
)
def test_what_becomes_of_a_part(code, may_run_out, outcome):
    # As in a process that a shell has started in the background.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert gpu.run("part", gpu.Part(("-c", code), 60, may_run_out=may_run_out), 3.0) == outcome
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_nothing_runs(capsys):
    assert gpu.main([]) == 1
    assert "finds no CUDA GPU here; nothing was run" in capsys.readouterr().out


def test_the_convolutions_are_resnet50s():
    shapes = convolutions.resnet50()
    assert sum(shape.count for shape in shapes) == 52 and len(shapes) == 23  # and the stem
    from torchvision.models import resnet50

    ours = sorted((s.inputs, s.outputs, s.kernel, s.stride) for s in shapes for _ in range(s.count))
    modules = [m for m in resnet50().modules() if isinstance(m, torch.nn.Conv2d)][1:]
    assert ours == sorted((m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]) for m in modules)


def test_the_probe_checks_before_it_times(monkeypatch, capsys):
    monkeypatch.setattr(convolutions, "resnet50", lambda: [convolutions.Shape(8, 16, 1, 1, 8, True, True, 2)])
    flags = [
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--batch",
        "1",
        "--height",
        "64",
        "--width",
        "64",
        "--seconds",
        "0.01",
    ]
    assert convolutions.main(flags) == 0
    assert "wrong" not in capsys.readouterr().out
    monkeypatch.setattr(convolutions, "folded_conv", lambda x, *args, **options: torch.full((1, 16, 8, 8), torch.nan))
    assert convolutions.main(flags) == 1
    assert "wrong by nan" in capsys.readouterr().out
