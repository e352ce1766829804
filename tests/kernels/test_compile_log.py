"""The line about a cold start: once per kernel, none from a warm cache, and other people's listeners are called."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton")

from detr_fast.kernels import _compile_log, matching_cost  # noqa: E402

ROOT = Path(__file__).parents[2]
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# Two launches of one kernel that need two variants of it, and one of another, compiled as on an H100.
PROGRAM = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

heard = []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **rest: heard.append((src.fn.__name__, cache_hit))

from detr_fast.benchmarks.compile_gate import gate
from detr_fast.benchmarks.compile_gate.cases import CASES

launches, problems = gate.record([c for c in CASES if c.name in ("joint_softmax fp32 H8", "joint_softmax fp16 H8")], 90)
assert not problems, problems
for launch in launches:
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attrs)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options=launch.options.__dict__)
print(*(f"{name} {hit}" for name, hit in heard), sep="\\n")
"""


def _run(cache: Path) -> tuple[list[str], list[str]]:
    """Lines of stdout and of stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), [line for line in done.stderr.splitlines() if "detr_fast" in line]


@pytest.mark.skipif(INTERPRET, reason="needs Triton's compiler")
def test_a_cold_start_says_so_once_per_kernel_and_a_warm_one_nothing(tmp_path):
    heard, lines = _run(tmp_path)
    kernels = [line.split()[0] for line in heard]
    assert len(kernels) > len(set(kernels)) == 2, f"several variants of two kernels, not {heard}"
    assert [line.split(" in ")[0] for line in lines] == [
        f"detr_fast: compiled the kernel {kernel.strip('_')}" for kernel in dict.fromkeys(kernels)
    ]
    assert lines[0].endswith(f" s; once per GPU and shape class, kept in {tmp_path}")
    assert lines[1].endswith(" s")
    warm, lines = _run(tmp_path)
    assert [line.split()[1] for line in warm] == ["True"] * len(heard) and lines == []


@pytest.mark.parametrize(
    ("module", "cache_hit", "expected"),
    [("detr_fast.kernels.x", False, 1), ("detr_fast.kernels.x", True, 0), ("torch.x", False, 0), (None, False, 0)],
)
def test_only_what_is_ours_and_really_compiled_is_said(monkeypatch, caplog, module, cache_hit, expected):
    monkeypatch.setattr(_compile_log, "_compiled", set())
    heard = []
    listen = _compile_log._listener(lambda **call: heard.append(call))
    source = SimpleNamespace(fn=SimpleNamespace(__module__=module, __name__="_a_kernel")) if module else object()
    call = dict(src=source, metadata={}, metadata_group={}, times=SimpleNamespace(total=1.5e6), cache_hit=cache_hit)
    listen(**call)
    listen(**call)
    assert heard == [call, call]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == expected and all("compiled the kernel a_kernel in 1.5 s; once per GPU" in line for line in said)


def test_who_speaks(monkeypatch):
    knobs = SimpleNamespace(
        compilation=SimpleNamespace(listener=None), runtime=SimpleNamespace(interpret=False), cache=triton.knobs.cache
    )
    monkeypatch.setattr(_compile_log, "triton", SimpleNamespace(knobs=knobs))
    monkeypatch.setattr(_compile_log, "_SPEAKS", False)
    _compile_log.install()
    assert knobs.compilation.listener is None, "another process of this machine speaks"
    monkeypatch.setattr(_compile_log, "_SPEAKS", True)
    knobs.runtime.interpret = True
    _compile_log.install()
    assert knobs.compilation.listener is None, "the interpreter compiles nothing"
    knobs.runtime.interpret = False
    _compile_log.install()
    assert knobs.compilation.listener is not None


def test_importing_a_kernel_installs_it():
    assert matching_cost and (triton.knobs.compilation.listener is None) == INTERPRET
