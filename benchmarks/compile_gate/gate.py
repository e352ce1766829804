"""Compile gate: every Triton kernel, as its launcher launches it, compiled for GPUs that are not there.

The real ops are called with small CPU tensors while Triton believes that the wanted GPU is the current one, and while
compiling is put off. So tile sizes, flags, warps and the JIT's specialisation of every argument are the launchers' and
Triton's own, and nothing here can drift from them. Must not run under `TRITON_INTERPRET`.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import sys
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import detr_fast.kernels

from .cases import CASES, Case

# Shared memory a block may have, in bytes (CUDA programming guide, "Compute capabilities").
SHARED_LIMIT = {75: 64 * 1024, 80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
CHIPS = tuple(SHARED_LIMIT)
MAIN_CHIP = 90
# PTX of the matrix instructions a chip must show in a kernel with a 16-bit matrix product.
TENSOR_CORE = {
    80: ("mma.sync",),
    90: ("wgmma.mma_async",),
    100: ("tcgen05.mma", "mma.sync"),
}


# Bytes of local memory and threads per wave of AMD's chips. Whether kernels compile for them is told, not promised.
AMD = {"gfx942": (64 * 1024, 64), "gfx1100": (64 * 1024, 32)}


@dataclasses.dataclass
class Row:
    """One compiled kernel. Sizes in bytes, per thread or (shared) per block."""

    case: str
    kernel: str
    config: str
    chip: int
    no_spills: bool  # none are allowed
    low_precision: bool  # matrix products, if any, have 16-bit operands
    has_dot: bool = False
    registers: int = 0
    spills: int = 0
    shared: int = 0
    tensor_core: int = 0
    error: str = ""


@dataclasses.dataclass
class Launch:
    """What the JIT would have compiled."""

    case: Case
    kernel: JITFunction
    signature: dict
    constants: dict
    attrs: dict
    options: object
    chip: int | str

    def named_constants(self) -> dict:
        names = [parameter.name for parameter in self.kernel.params]
        return {
            names[path[0]]: value for path, value in self.constants.items() if self.kernel.params[path[0]].is_constexpr
        }

    def config(self) -> str:
        constants = [f"{name}={value}" for name, value in self.named_constants().items()]
        return " ".join([*constants, f"warps={self.options.num_warps}", f"stages={self.options.num_stages}"])


def _target(chip: int | str) -> GPUTarget:
    return GPUTarget("hip", chip, AMD[chip][1]) if chip in AMD else GPUTarget("cuda", chip, 32)


class _AbsentGpu:
    """The part of Triton's driver that JITFunction.run asks before it compiles."""

    def __init__(self, chip: int | str):
        self.chip = chip

    def get_current_target(self):
        return _target(self.chip)

    def get_current_device(self):
        return (*CHIPS, *AMD).index(self.chip)

    def get_current_stream(self, device):
        return 0


def kernel_modules() -> list:
    return [
        importlib.import_module(f"detr_fast.kernels.{module.name}")
        for module in pkgutil.iter_modules(detr_fast.kernels.__path__)
    ]


def record(cases: list[Case], chip: int | str) -> tuple[list[Launch], list[str]]:
    """Run the cases as on a GPU `chip`; return each different launch once, and what failed.

    Args:
        chip: compute capability times ten, or a name of `AMD`, whose launches are those of sm_80.
    """
    capability = 80 if chip in AMD else chip
    launches: dict[str, Launch] = {}
    problems = []

    def put_off(kernel, key, signature, device, constants, options, attrs, warmup):
        launch = Launch(case, kernel, signature, constants, attrs, options, chip)
        launches.setdefault(f"{kernel.module}.{kernel.__name__} {key}", launch)

    patches = [
        mock.patch.object(JITFunction, "_do_compile", put_off),
        mock.patch.object(triton.runtime.driver, "_active", _AbsentGpu(chip)),
    ]
    for module in kernel_modules():
        if hasattr(module, "compute_capability"):
            patches.append(mock.patch.object(module, "compute_capability", lambda device: divmod(capability, 10)))
    for name, module in list(sys.modules.items()):
        if name.startswith("detr_fast.ops."):
            for choice, stub in (("use_kernel", lambda device, op: True), ("calls_plainly", lambda tensor: False)):
                if hasattr(module, choice):
                    patches.append(mock.patch.object(module, choice, stub))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        for case in cases:
            if capability < case.from_chip:
                continue
            try:
                case.run()
            except Exception as error:  # reported with its case, so that the others are compiled all the same
                problems.append(f"{case.name} for sm_{chip} cannot be launched: {type(error).__name__}: {error}")
    return list(launches.values()), problems


def compile_launch(launch: Launch) -> Row:
    """Compile one launch and read what it came to."""
    low_precision = any(dtype in launch.case.name for dtype in ("bf16", "fp16"))
    case = launch.case
    no_spills = launch.chip in case.no_spills_on or (case.detr and launch.chip not in case.spills_on)
    row = Row(launch.case.name, launch.kernel.__name__, launch.config(), launch.chip, no_spills, low_precision)
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attrs)
    try:
        kernel, log = _compile(source, GPUTarget("cuda", launch.chip, 32), launch.options.__dict__)
    except Exception as error:  # whatever the compiler raises is the finding
        row.error = f"{type(error).__name__}: {error}"[-2000:]
        return row
    row.registers = max(map(int, re.findall(r"Used (\d+) registers", log)))
    row.spills = sum(map(int, re.findall(r"(\d+) bytes spill", log)))
    row.shared = kernel.metadata.shared
    row.has_dot = "tt.dot" in kernel.asm["ttir"]
    row.tensor_core = sum(kernel.asm["ptx"].count(f"{name}.") for name in TENSOR_CORE.get(launch.chip, ()))
    return row


def _compile(source, target, options):
    """Compile, with ptxas' report, which is kept beside Triton's cache as the cache does not hold it."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        triton.knobs.nvidia.scope(),
        triton.knobs.compilation.scope(),
    ):
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.listener = None  # the line about a cold start
        kernel = triton.compile(source, target=target, options=options)
        kept = Path(triton.knobs.cache.dir) / "detr_fast_gate" / f"{kernel.hash}.log"
        if "Used" not in printed.getvalue() and not kept.exists():
            with triton.knobs.compilation.scope():
                triton.knobs.compilation.always_compile = True
                kernel = triton.compile(source, target=target, options=options)
    if "Used" in printed.getvalue():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(printed.getvalue())
    return kernel, kept.read_text()


def compiles_for_amd(launch: Launch) -> str:
    """Compiles one launch for its AMD chip. Returns what is wrong with it, empty if nothing is."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attrs)
    try:
        with triton.knobs.compilation.scope():
            triton.knobs.compilation.listener = None
            kernel = triton.compile(source, target=_target(launch.chip), options=launch.options.__dict__)
    except Exception as error:  # as in `compile_launch`
        # The compiler quotes the source of every caller; what is wrong is the innermost error's last line.
        while error.__cause__ is not None:
            error = error.__cause__
        return f"does not compile: {(str(error).strip() or repr(error)).splitlines()[-1]}"
    shared, limit = kernel.metadata.shared, AMD[launch.chip][0]
    return f"needs {shared} bytes of local memory; a group has {limit}" if shared > limit else ""


def coverage(launches: list[Launch]) -> list[str]:
    """Kernels that no case launched, and flags that no case set or none left unset."""
    problems = []
    launched: dict[str, list[Launch]] = {}
    for launch in launches:
        launched.setdefault(launch.kernel.__name__, []).append(launch)
    for module in kernel_modules():
        for name, value in vars(module).items():
            if not (isinstance(value, JITFunction) and name.endswith("_kernel")):
                continue
            if name not in launched:
                problems.append(f"{name} is launched by no case")
                continue
            seen: dict[str, set] = {}
            for launch in launched[name]:
                for flag, setting in launch.named_constants().items():
                    seen.setdefault(flag, set()).add(setting)
            for flag, settings in seen.items():
                if len(settings) == 1 and isinstance(setting := next(iter(settings)), bool):
                    problems.append(f"{name} is only ever launched with {flag}={setting}")
    return problems


def problems_of(rows: list[Row]) -> list[str]:
    """What is wrong with the compiled kernels."""
    problems = []
    for row in rows:
        where = f"{row.kernel} ({row.case}; {row.config}) on sm_{row.chip}"
        if row.error:
            problems.append(f"{where} does not compile: {row.error}")
            continue
        if row.shared > SHARED_LIMIT[row.chip]:
            problems.append(f"{where} needs {row.shared} bytes of shared memory; a block has {SHARED_LIMIT[row.chip]}")
        if row.spills and row.no_spills:
            problems.append(f"{where} spills {row.spills} bytes")
        if row.has_dot and row.low_precision and row.chip in TENSOR_CORE and not row.tensor_core:
            problems.append(f"{where} has no {' or '.join(TENSOR_CORE[row.chip])}")
    return problems


def table(rows: list[Row]) -> str:
    lines = [f"{'chip':6} {'regs':>4} {'spill':>6} {'shared':>7} {'tensor':>6}  kernel, case, configuration"]
    for row in sorted(rows, key=lambda row: (row.chip, row.kernel, row.case)):
        numbers = (
            f"{row.registers:4} {row.spills:6} {row.shared:7} {row.tensor_core:6}"
            if not row.error
            else "does not compile"
        )
        lines.append(f"sm_{row.chip:<3} {numbers}  {row.kernel}, {row.case}, {row.config}")
    return "\n".join(lines)


_launches: list[Launch] = []  # read by the forked workers; a JITFunction cannot be sent to them


def _compile_index(index: int) -> Row | str:
    launch = _launches[index]
    return compiles_for_amd(launch) if launch.chip in AMD else compile_launch(launch)


def _compile_all() -> list:
    with multiprocessing.get_context("fork").Pool(min(len(os.sched_getaffinity(0)), 8)) as pool:
        return pool.map(_compile_index, range(len(_launches)), chunksize=1)


def amd_table(detr_only: bool = False) -> str:
    """What Triton's compiler for AMD makes of the kernels: a line for each chip and kernel. Nothing runs there."""
    _launches.clear()
    lines = []
    for chip in AMD:
        launches, failed = record([case for case in CASES if case.detr or not detr_only], chip)
        _launches.extend(launches)
        lines += failed
    found: dict[tuple, list[str]] = {}
    for launch, wrong in zip(_launches, _compile_all(), strict=True):
        found.setdefault((launch.chip, launch.kernel.__name__), []).append(wrong)
    for (chip, kernel), wrongs in found.items():
        first = next(filter(None, wrongs), "")
        count = f"{wrongs.count('')} of {len(wrongs)}"
        lines.append(f"{chip:8} {count:9} {kernel}" + (f": {first}" if first else ""))
    return "\n".join(lines)


def run(chips: tuple[int, ...] = CHIPS, detr_only: bool = False) -> tuple[list[Row], list[str]]:
    """Compile every case for `chips`, with `detr_only` DETR's own; return the rows and the problems.

    What no case launches is looked for among all cases of the main chip in either way: it takes no compiler.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("the compile gate needs Triton's compiler: unset TRITON_INTERPRET")
    _launches.clear()
    problems = []
    for chip in chips:
        launches, failed = record(CASES, chip)
        problems += failed
        if chip == MAIN_CHIP:
            problems += coverage(launches)
        if detr_only:
            launches, _ = record([case for case in CASES if case.detr], chip)
        _launches.extend(launches)
    rows = _compile_all()
    return rows, problems + problems_of(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_gate", description=__doc__.splitlines()[0])
    parser.add_argument("--chips", type=int, nargs="+", default=CHIPS, choices=CHIPS)
    parser.add_argument("--detr", action="store_true", help="only the shapes and options that DETR runs")
    parser.add_argument("--amd", action="store_true", help="instead, what compiles for AMD's chips: information")
    parser.add_argument("--json", type=Path, help="also write rows and problems here")
    arguments = parser.parse_args()
    if arguments.amd:
        print(f"triton {triton.__version__}, kernels that compile (none has run there)")
        print(amd_table(arguments.detr))
        return 0
    rows, problems = run(tuple(arguments.chips), arguments.detr)
    print(f"triton {triton.__version__}, {len(rows)} kernels compiled")
    print(table(rows))
    for problem in problems:
        print("PROBLEM:", problem)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": list(map(dataclasses.asdict, rows)), "problems": problems}))
    return 1 if problems else 0
