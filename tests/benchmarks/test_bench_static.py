"""Reading compiled kernels: loops in SASS, occupancy."""

import os

import pytest

from detr_fast.benchmarks.harness.markers import replace_between
from detr_fast.benchmarks.studies.static import (
    Loop,
    loops,
    markdown,
    measure,
    occupancy,
    slots_per_element,
)

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# An outer loop around the loop over keys, and a spin at the end, in the form that triton's disassembler prints.
SASS = """Function:_attention_forward_kernel
--:-:1:-:1\tLDC R1, c[0x0][0x28];
LBB0:
--:-:-:-:1\tMUFU.EX2 R9, R9;
LBB1:
--:-:-:-:1\tLDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64];
--:-:-:-:1\tHGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], !UPT;
--:-:-:-:1\tFFMA R2, R2, R3, R4;
--:-:-:-:1\tMUFU.EX2 R5, R5;
--:-:-:-:1\tMUFU.EX2 R6, R6;
--:-:-:-:1\tNOP;
--:-:-:-:5\t@!P0 BRA LBB1;
--:-:-:-:5\t@P1 BRA LBB0;
--:-:-:-:5\tEXIT;
LBB2:
--:-:-:Y:0\tBRA LBB2;
"""


def test_innermost_loop_with_exponentials_is_counted():
    assert loops(SASS) == [Loop(instructions=6, exps=2, products=1, shared_copies=1)]


def test_no_loop_without_exponentials():
    assert loops("LBB0:\n--:-:-:-:1\tFADD R1, R1, R2;\n--:-:-:-:5\t@P0 BRA LBB0;\n") == []


def test_slots_count_unrolled_tiles():
    # 64 x 64 over 128 threads: 32 elements per thread, 34 exponentials of which 2 rescale the rows.
    assert slots_per_element(Loop(320, 34, 4, 0), 64 * 64, 128) == pytest.approx(10)
    assert slots_per_element(Loop(640, 68, 8, 0), 64 * 64, 128) == pytest.approx(10)


@pytest.mark.parametrize(
    ("chip", "registers", "shared", "warps", "expected"),
    [
        (90, 88, 0, 4, 5 * 4 / 64),  # 65536 // (88 · 128) = 5 blocks
        (90, 134, 0, 8, 1 * 8 / 64),  # rounded up to 136: 65536 // (136 · 256) = 1
        (90, 32, 100 * 1024, 4, 2 * 4 / 64),  # 228 // 101 = 2
        (80, 32, 100 * 1024, 4, 1 * 4 / 64),  # 164 // 101 = 1
        (90, 16, 0, 1, 32 / 64),  # 32 blocks at most
        (75, 64, 0, 4, 1.0),
    ],
)
def test_occupancy(chip, registers, shared, warps, expected):
    assert occupancy(chip, registers, shared, warps) == pytest.approx(expected)


@pytest.mark.skipif(INTERPRET, reason="needs Triton's compiler")
def test_the_gates_kernels_are_read():
    pytest.importorskip("triton")
    from detr_fast.benchmarks.compile_gate.cases import CASES

    cases = [case for case in CASES if case.name.startswith("sine_position fp32 nchw") and case.detr][:1]
    (row,) = measure(cases, (90,))
    assert "sine_position" in row.kernel and row.registers > 8 and row.spills == 0 and 0 < row.occupancy <= 1
    text = markdown([row], "9.9")
    assert "triton 9.9" in text and f"| sm_90 | `{row.kernel}` | {row.case} |" in text


@pytest.mark.skipif(INTERPRET, reason="needs Triton's compiler")
def test_the_exp_ceiling_is_nothing_but_exponentials():
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from detr_fast.benchmarks.harness.ceilings import _exp_rate_kernel

    signature = {"out_ptr": "*fp32", "REPEATS": "constexpr", "BLOCK": "constexpr"}
    source = ASTSource(_exp_rate_kernel, signature, {(1,): 64, (2,): 1024})
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    code = [line for line in kernel.asm["sass"].splitlines() if "\t" in line and "NOP" not in line]
    exps = sum("MUFU.EX2" in line for line in code)
    # 8 numbers per thread, 64 times each. A partition's exp unit has 4 lanes, so a warp's exponentials take 8 cycles:
    # up to 7 other instructions for each would not show.
    assert exps == 8 * 64
    assert (len(code) - exps) / exps < 5


def test_markers(tmp_path, capsys):
    path = tmp_path / "x.md"
    path.write_text("a\n<!-- static:begin -->\nold\n<!-- static:end -->\nb\n")
    assert replace_between(path, "static", "new")
    assert path.read_text() == "a\n<!-- static:begin -->\nnew\n<!-- static:end -->\nb\n"
    assert not replace_between(path, "other", "new") and "other:begin" in capsys.readouterr().out
    assert not replace_between(tmp_path / "absent.md", "static", "new")
