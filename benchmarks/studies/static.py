"""What the compiler alone shows, without a GPU: registers, spills, occupancy, and issue slots per score element.

The kernels are those of the compile gate (`benchmarks/compile_gate`): the launchers' own configurations for DETR's
shapes. `python -m benchmarks static` prints the table and writes it into NOTES.md.
"""

import os
import re
from dataclasses import dataclass

from ..harness.markers import NOTES, replace_between

CHIP = 90  # what the goals are set for; the gate watches the other chips


@dataclass(frozen=True)
class Chip:
    """Limits of one multiprocessor (CUDA programming guide, "Technical specifications per compute capability")."""

    warps: int
    blocks: int
    shared: int  # bytes, 1024 of which each block loses
    registers: int = 65536


MULTIPROCESSORS = {
    75: Chip(warps=32, blocks=16, shared=64 * 1024),
    80: Chip(warps=64, blocks=32, shared=164 * 1024),
    90: Chip(warps=64, blocks=32, shared=228 * 1024),
    100: Chip(warps=64, blocks=32, shared=228 * 1024),
}


def occupancy(chip: int, registers: int, shared: int, warps: int) -> float:
    """Share of a multiprocessor's warp slots that resident blocks fill, 0..1.

    Args:
        chip: compute capability times ten, a key of `MULTIPROCESSORS`.
        registers: per thread; handed out in units of 8 per thread.
        shared: bytes per block.
        warps: per block.
    """
    limit = MULTIPROCESSORS[chip]
    by_registers = limit.registers // (-(-max(registers, 1) // 8) * 8 * 32 * warps)
    by_shared = limit.shared // (shared + 1024) if chip >= 80 else limit.shared // max(shared, 1)
    return min(limit.blocks, limit.warps // warps, by_registers, by_shared) * warps / limit.warps


@dataclass(frozen=True)
class Loop:
    """Instructions of one pass through a loop, per warp."""

    instructions: int
    exps: int
    products: int
    shared_copies: int


def loops(sass: str) -> list[Loop]:
    """The innermost loops of a kernel's SASS that take exponentials, in the order of the text."""
    lines = [line.split("\t")[-1].strip() if "\t" in line else line.strip() for line in sass.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\w+:", line)}
    spans = []
    for end, line in enumerate(lines):
        jump = re.search(r"\bBRA(?:\.\w+)*\b.*?\b(L\w+)", line)
        if jump and labels.get(jump[1], end) < end:
            spans.append((labels[jump[1]], end))
    found = []
    for start, end in sorted(spans):
        body = lines[start + 1 : end + 1]
        if not any("MUFU.EX2" in line for line in body):
            continue
        inner = [(a, b) for a, b in spans if (a, b) != (start, end) and start <= a and b <= end]
        if any("MUFU.EX2" in line for a, b in inner for line in lines[a : b + 1]):
            continue
        code = [line for line in body if line and not line.endswith(":") and not line.startswith("NOP")]
        found.append(
            Loop(
                instructions=len(code),
                exps=sum("MUFU.EX2" in line for line in code),
                products=sum(bool(re.search(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA|QGMMA|IMMA)", line)) for line in code),
                shared_copies=sum(bool(re.search(r"\b(LDGSTS|UBLKCP|UTMALDG)", line)) for line in code),
            )
        )
    return found


def slots_per_element(loop: Loop, tile: int, threads: int) -> float:
    """Issue slots per score element: instructions of a pass, over the elements of the pass that a thread owns.

    `tile` is BLOCK_M · BLOCK_N. Unrolled loops take several tiles per pass; the count of exponentials, one per element
    and a few per row, says how many.
    """
    own = tile / threads
    return loop.instructions / (own * max(1, round(loop.exps / own)))


@dataclass(frozen=True)
class StaticRow:
    """One kernel in one configuration on one chip."""

    chip: int
    kernel: str
    case: str
    config: str
    registers: int
    spills: int
    shared: int
    occupancy: float
    loop: Loop | None
    slots: float | None


def _disassembled(kernel) -> str:
    """The kernel's SASS, without nvdisasm's warning about formats on stderr."""
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            return kernel.asm["sass"]
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def measure(cases: list, chips: tuple[int, ...]) -> list[StaticRow]:
    """Compiles the gate's `cases` for `chips` and reads the result.

    Raises:
        RuntimeError: a case cannot be launched or a kernel does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ..compile_gate import gate

    rows = []
    for chip in chips:
        launches, problems = gate.record(cases, chip)
        if problems:
            raise RuntimeError("; ".join(problems))
        for launch in launches:
            compiled = gate.compile_launch(launch)
            if compiled.error:
                raise RuntimeError(f"{compiled.kernel} ({compiled.case}) on sm_{chip}: {compiled.error}")
            source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attrs)
            kernel = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=launch.options.__dict__)
            constants, warps = launch.named_constants(), kernel.metadata.num_warps
            # The loop with most exponentials is the loop over keys (forward) or queries (backward).
            loop = max(loops(_disassembled(kernel)), key=lambda found: found.exps, default=None)
            tile = constants.get("BLOCK_M", 0) * constants.get("BLOCK_N", 0)
            blocks = [f"{key}={value}" for key, value in constants.items() if key.startswith("BLOCK")]
            rows.append(
                StaticRow(
                    chip,
                    compiled.kernel,
                    compiled.case,
                    " ".join([*blocks, f"warps={warps}", f"stages={kernel.metadata.num_stages}"]),
                    compiled.registers,
                    compiled.spills,
                    compiled.shared,
                    occupancy(chip, compiled.registers, compiled.shared, warps),
                    loop,
                    slots_per_element(loop, tile, 32 * warps) if loop and tile else None,
                )  # fmt: skip
            )
    return rows


def markdown(rows: list[StaticRow], triton_version: str) -> str:
    """The table as it stands in NOTES.md."""
    lines = [
        f"Compiled with triton {triton_version}; kernels and configurations as the launchers choose them for DETR.",
        "",
        "| chip | kernel | case | configuration | registers | spills | shared, KiB | occupancy | slots per element | "
        "in the loop: instructions / ex2 / products / copies |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (row.chip, row.kernel, row.case)):
        loop = row.loop
        inside = f"{loop.instructions} / {loop.exps} / {loop.products} / {loop.shared_copies}" if loop else "–"
        slots = "–" if row.slots is None else f"{row.slots:.1f}"
        lines.append(
            f"| sm_{row.chip} | `{row.kernel}` | {row.case} | {row.config} | {row.registers} | {row.spills} | "
            f"{row.shared / 1024:.1f} | {row.occupancy:.0%} | {slots} | {inside} |"
        )
    return "\n".join(lines)


def run_static(save: bool = True) -> int:
    """Prints the table and, with `save`, writes it into NOTES.md."""
    import triton

    from ..compile_gate.cases import CASES

    if triton.knobs.runtime.interpret:
        raise ValueError("static: needs Triton's compiler; unset TRITON_INTERPRET")
    # fp16 compiles to what bf16 does.
    cases = [case for case in CASES if case.detr and "fp16" not in case.name]
    text = markdown(measure(cases, (CHIP,)), triton.__version__)
    print(text)
    return 0 if not save or replace_between(NOTES, "static", text) else 1
