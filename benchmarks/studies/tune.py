"""Which configuration of a kernel is fastest here: candidates for the entries of `kernels/_configurations.py`, timed.

`python -m benchmarks tune` takes one shape class after the other, most telling first. Every candidate's result is
checked as any provider's is, so that a wrong one, or one that does not fit the GPU, has no time; the others are timed
interleaved, as CUDA graphs. All other kernels keep their present configuration meanwhile. What is faster than the
present configuration goes into the table's `MEASURED` with `--write`, or is printed to be put there.
"""

import argparse
import contextlib
import dataclasses
import datetime
import pprint
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from detr_fast.kernels import _configurations

from .. import plan
from ..harness.case import Case, Provider, Row, Settings
from ..harness.markers import replace_between
from ..harness.measure import first_call, run_case
from ..harness.provenance import ROOT, device_name, provenance, slug
from ..harness.results import save, suite_record
from ..harness.spec import Spec
from ..harness.table import print_case

Tile = dict[str, int]

# A candidate must be this much faster than the present configuration: less is within what two runs differ by.
MARGIN = 0.02


def _attention_tiles(*tiles: tuple[int, ...]) -> list[Tile]:
    """Of BLOCK_M, warps and stages, and BLOCK_N where that is not 64."""
    names = ("BLOCK_M", "num_warps", "num_stages", "BLOCK_N")
    return [dict(zip(names, tile if len(tile) == 4 else (*tile, 64), strict=True)) for tile in tiles]


def _tiles(names: tuple[str, str], *tiles: tuple[int, int, int]) -> list[Tile]:
    return [dict(zip((*names, "num_warps"), tile, strict=True)) for tile in tiles]


def _products(*tiles: tuple[int, int, int, int, int]) -> list[Tile]:
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return [dict(zip(names, tile, strict=True)) for tile in tiles]


# The layers that stand for pointwise_conv's shape classes: more than 64 output channels, and at most 64.
_PRODUCTS = ("expand", "reduce")

# Kernel and kind of shape → candidates beside the present configuration.
CANDIDATES: dict[tuple[str, str], list[Tile]] = {
    ("attention_forward", "many"): _attention_tiles(
        (64, 4, 2), (64, 4, 3), (64, 4, 5), (128, 4, 2), (128, 4, 3), (128, 4, 5), (128, 8, 2), (128, 8, 3)
    ),
    ("attention_forward", "few"): _attention_tiles(
        (16, 1, 2), (16, 2, 2), (16, 4, 2), (32, 2, 2), (32, 4, 2), (64, 4, 2), (64, 4, 3), (64, 4, 5), (128, 8, 2),
        (16, 4, 1, 128), (64, 4, 1, 128), (128, 8, 1, 128),
    ),
    ("attention_forward", "float32"): _attention_tiles(
        (16, 4, 1), (16, 8, 3), (32, 4, 1), (32, 4, 2), (32, 8, 1), (32, 8, 2), (32, 8, 3), (64, 8, 1), (64, 8, 2)
    ),
    ("attention_grad_query", "many"): _attention_tiles(
        (64, 4, 1), (64, 4, 2), (64, 4, 3), (64, 4, 5), (64, 8, 2), (128, 8, 1), (128, 8, 2)
    ),
    ("attention_grad_query", "few"): _attention_tiles(
        (16, 1, 2), (16, 2, 2), (16, 4, 2), (32, 2, 2), (32, 4, 2), (64, 4, 1), (64, 4, 2), (64, 4, 3), (64, 8, 2),
        (16, 4, 1, 128), (64, 4, 1, 128), (128, 8, 1, 128),
    ),
    ("attention_grad_query", "float32"): _attention_tiles(
        (16, 4, 1), (16, 8, 1), (16, 8, 2), (32, 4, 1), (32, 8, 1), (64, 8, 1)
    ),
    ("attention_grad_key_value", "many"): _attention_tiles(
        (16, 4, 2), (32, 4, 2), (32, 4, 3), (32, 4, 5), (32, 8, 2), (64, 4, 1), (64, 4, 2), (64, 4, 3), (64, 4, 5),
        (64, 8, 2), (128, 8, 1),
    ),
    ("attention_grad_key_value", "few"): _attention_tiles(
        (16, 4, 2), (32, 4, 2), (32, 8, 2), (64, 4, 1), (64, 4, 2), (64, 4, 3), (64, 8, 2), (128, 8, 1)
    ),
    ("attention_grad_key_value", "float32"): _attention_tiles(
        (16, 4, 1), (16, 8, 1), (16, 8, 2), (32, 4, 1), (32, 8, 1), (32, 8, 2)
    ),
    ("pointwise_conv_forward", ""): _products(
        (64, 64, 32, 4, 3), (64, 64, 64, 4, 4), (64, 128, 64, 4, 4), (128, 64, 32, 4, 4), (128, 64, 64, 4, 3),
        (128, 64, 64, 8, 4), (128, 128, 32, 8, 4), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (128, 256, 64, 8, 3),
        (256, 64, 64, 8, 3), (256, 128, 64, 8, 3),
    ),
    ("pad_collate_forward", ""): _tiles(
        ("BLOCK_H", "BLOCK_W"),
        (4, 1024, 4), (8, 256, 4), (8, 512, 4), (16, 256, 4), (16, 256, 8), (16, 512, 8), (32, 128, 4), (32, 256, 8),
    ),
    ("sine_position_forward", "tokens"): _tiles(
        ("BLOCK_T", "BLOCK_F"), (16, 32, 4), (16, 64, 4), (32, 16, 4), (32, 32, 4), (32, 64, 4), (64, 32, 4)
    ),
    ("sine_position_forward", "nchw"): _tiles(
        ("BLOCK_T", "BLOCK_F"), (64, 8, 4), (64, 16, 4), (128, 4, 4), (128, 8, 4), (128, 16, 4), (256, 8, 8)
    ),
}  # fmt: skip
CANDIDATES["pad_collate_backward", ""] = CANDIDATES["pad_collate_forward", ""]


@dataclass(frozen=True)
class Class:
    """One shape class of one kernel, and the case that stands for it: `provider` of `spec`."""

    kernel: str
    spec: Spec
    provider: str = "detr_fast"

    @property
    def tiles(self) -> list[Tile]:
        kind = ""
        if self.spec.suite == "attention":
            kind = "many" if self.spec.kind == "encoder" else "few"
            if self.spec.precision in ("fp32", "tf32"):
                kind = "float32"
        if self.spec.suite == "sine_position":
            kind = "tokens" if self.provider.endswith("tokens") else "nchw"
        return CANDIDATES[self.kernel, kind]

    def __str__(self) -> str:
        return f"{self.kernel}: {self.spec}{self.provider.removeprefix('detr_fast')}"


def _attention(spec: Spec, forward_only: bool = False) -> list[Class]:
    backward = dataclasses.replace(spec, mode="backward")
    kernels = [] if forward_only else ["attention_grad_query", "attention_grad_key_value"]
    # The encoder as the detectors ask for it.
    skipped = spec.kind == "encoder" and spec.padding != "none"
    provider = "detr_fast, padded queries skipped" if skipped else "detr_fast"
    return [Class("attention_forward", spec, provider)] + [Class(kernel, backward, provider) for kernel in kernels]


def classes(quick: bool) -> list[Class]:
    """What is tuned on a GPU, most telling first: a time budget cuts the tail off."""
    encoder, cross, decoder = (Spec("attention", kind, dropout=0.1) for kind in ("encoder", "cross", "decoder"))
    dense = dataclasses.replace(encoder, padding="none")
    found = _attention(encoder) + _attention(cross) + _attention(decoder)
    found += [Class("pointwise_conv_forward", Spec("pointwise_conv", kind, padding="none")) for kind in _PRODUCTS]
    collate, position = Spec("pad_collate", "uint8"), Spec("sine_position")
    found += [Class("pad_collate_forward", collate), Class("sine_position_forward", position, "detr_fast tokens")]
    found += [Class("sine_position_forward", dataclasses.replace(position, precision="fp32"))]
    # As in evaluation: padding, no dropout.
    found += [c for s in (encoder, cross, decoder) for c in _attention(dataclasses.replace(s, dropout=0.0), True)]
    found += _attention(dense) + _attention(dataclasses.replace(dense, dropout=0.0), True)
    if quick:
        return found
    found += [
        Class("pad_collate_forward", collate, "detr_fast channels_last"),
        Class("pad_collate_forward", dataclasses.replace(collate, precision="fp32")),
        Class("pad_collate_forward", Spec("pad_collate", "float", precision="fp32")),
        Class("pad_collate_backward", Spec("pad_collate", "float", precision="fp32", mode="backward")),
        Class("sine_position_forward", dataclasses.replace(position, precision="fp32"), "detr_fast tokens"),
        Class("sine_position_forward", position),
    ]
    for precision in ("tf32", "fp32"):
        products = [Spec("pointwise_conv", kind, padding="none", precision=precision) for kind in _PRODUCTS]
        found += [Class("pointwise_conv_forward", spec) for spec in products]
        for spec in (encoder, cross, decoder):
            found += _attention(dataclasses.replace(spec, precision=precision))
    for head_dim in (64, 128, 16, 24, 40, 96):
        found += _attention(dataclasses.replace(encoder, head_dim=head_dim))
    # Training without dropout.
    return found + [
        c for s in (encoder, cross, decoder) for c in _attention(dataclasses.replace(s, dropout=0.0))[1:]
    ]  # fmt: skip


def interpreter_classes() -> list[Class]:
    """Tiny cases for every kernel: whether its candidates are right, which does not depend on warps and stages."""
    found = []
    for spec in plan.interpreter_plan("attention"):
        if spec.mode == "both":
            found += _attention(dataclasses.replace(spec, mode="backward"))[1:]
        else:
            found += _attention(spec, forward_only=True)
    collate = plan.interpreter_plan("pad_collate")[0]
    found += [Class("pad_collate_forward", dataclasses.replace(collate, kind="uint8"))]
    found += [Class("pad_collate_forward", collate, "detr_fast channels_last")]
    found += [Class("pad_collate_backward", dataclasses.replace(collate, kind="float", mode="backward"))]
    product = plan.interpreter_plan("pointwise_conv")[0]
    found += [Class("pointwise_conv_forward", dataclasses.replace(product, kind=kind)) for kind in _PRODUCTS]
    position = plan.interpreter_plan("sine_position")[0]
    return found + [Class("sine_position_forward", position, name) for name in ("detr_fast", "detr_fast tokens")]


@contextlib.contextmanager
def _configured(kernel: str, choose: Callable[[dict], Tile]) -> Iterator[None]:
    """Within, `kernel` is launched as `choose`, given the launch's conditions, says."""
    present = _configurations.configuration

    def configuration(name: str, **conditions) -> Tile:
        return choose(conditions) if name == kernel else present(name, **conditions)

    _configurations.configuration = configuration
    try:
        yield
    finally:
        _configurations.configuration = present


def conditions_of(case: Case, provider: Provider, kernel: str) -> dict:
    """The shape class that `case` stands for: the conditions with which it launches `kernel`.

    Raises:
        ValueError: it launches the kernel not at all, or in several classes.
    """
    seen: list[dict] = []
    present = _configurations.configuration

    def note(conditions: dict) -> Tile:
        if conditions not in seen:
            seen.append(conditions)
        return present(kernel, **conditions)

    with _configured(kernel, note):
        first_call(case, provider)
    if len(seen) != 1:
        raise ValueError(f"{case.name} launches {kernel} with {seen}; expected one set of conditions")
    return seen[0]


def tile_name(tile: Tile) -> str:
    return " ".join(f"{name.removeprefix('num_')}={value}" for name, value in tile.items())


@dataclass(frozen=True)
class Finding:
    """What came out for one shape class. `chosen` is `present` where nothing is better; None if nothing is right."""

    kernel: str
    conditions: dict
    present: Tile
    chosen: Tile | None
    present_ms: float | None
    chosen_ms: float | None


def tune_class(
    case: Case, provider: Provider, kernel: str, tiles: list[Tile], settings: Settings
) -> tuple[Finding, list[Row]]:
    """Checks the present configuration and `tiles`, times those that are right, and chooses.

    Returns:
        What was found, and one row per configuration, the present one first.
    """
    conditions = conditions_of(case, provider, kernel)
    present = _configurations.configuration(kernel, **conditions)
    every = {tile_name(tile): tile for tile in (present, *tiles)}
    providers = [
        dataclasses.replace(
            provider,
            name=name,
            label="present" if tile == present else "",
            setting=lambda tile=tile: _configured(kernel, lambda conditions: tile),
        )
        for name, tile in every.items()
    ]
    rows = [
        dataclasses.replace(
            row, suite="tune", shape=row.shape | {"kernel": kernel, "tile": every[row.provider]} | conditions
        )
        for row in run_case(case, providers, None, settings)
    ]  # fmt: skip
    times = {row.provider: row.median_ms for row in rows if row.status == "ok"}
    before, fastest = times.get(tile_name(present)), min(times, key=times.get, default=None)
    chosen = every.get(fastest)
    if before is not None and times[fastest] > (1 - MARGIN) * before:
        chosen = present
    after = None if chosen is None else times[tile_name(chosen)]
    return Finding(kernel, conditions, present, chosen, before, after), rows


def measured_entries(findings: list[Finding], origin: str) -> tuple:
    """`_configurations.MEASURED` with the findings in place of older ones.

    A class whose best configuration is what `RULES` say anyway has no entry.
    """
    kept = {_key(entry[0], entry[1]): entry for entry in _configurations.MEASURED}
    for found in findings:
        if found.chosen is None:
            continue
        kept.pop(_key(found.kernel, found.conditions), None)
        if found.chosen != _configurations.by_rule(found.kernel, found.conditions):
            gain = "" if found.present_ms is None else f"{1e3 * found.present_ms:.1f} → "
            origin_here = f"{gain}{1e3 * found.chosen_ms:.1f} µs, {origin}"
            kept[_key(found.kernel, found.conditions)] = (found.kernel, found.conditions, found.chosen, origin_here)
    return tuple(sorted(kept.values(), key=lambda entry: _key(entry[0], entry[1])))


def _key(kernel: str, conditions: dict) -> tuple:
    return kernel, *map(str, conditions.values())


def source(entries: tuple) -> str:
    """`entries` as they stand in `kernels/_configurations.py`."""
    if not entries:
        return "MEASURED: tuple[Entry, ...] = ()"
    lines = "".join(f"{pprint.pformat(entry, width=110, sort_dicts=False)},\n" for entry in entries)
    return f"MEASURED: tuple[Entry, ...] = (\n{textwrap.indent(lines, '    ')})  # fmt: skip"


def run_tune(args: argparse.Namespace, device: torch.device) -> int:
    """Tunes on `device`; with `args.interpret` only checks the candidates on tiny shapes.

    Returns:
        The exit status: 1 if a present configuration of ours, or with `--interpret` any candidate, is wrong or fails.

    Raises:
        ValueError: no GPU and not `--interpret`; `--write` in an installed package.
    """
    if device.type != "cuda" and not args.interpret:
        raise ValueError(
            "tune: times the kernels, and there is no CUDA GPU here; --interpret checks the candidates on a CPU, "
            "python -m benchmarks static shows what the compiler makes of the present configurations"
        )
    table = ROOT / "kernels" / "_configurations.py"
    if args.write and not (ROOT / "setup.py").is_file():
        raise ValueError(f"tune: --write needs a checkout of the repository; {table.parent} is an installed package")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    started = time.monotonic()
    settings = Settings(
        device, ("graph",) if device.type == "cuda" else ("eager",), 0.2 if args.quick else 0.5,
        check_only=args.interpret, seed=args.seed,
    )  # fmt: skip
    record = suite_record("tune", provenance(device), ["tune"], None)
    folder = args.output or Path("benchmarks/results") / slug(device_name(device))
    findings, wrong = [], False
    scale = plan.scale_for(device, args.quick, args.interpret)
    for one in _chosen(interpreter_classes() if args.interpret else classes(args.quick), args):
        if args.budget is not None and time.monotonic() - started > args.budget:
            record["not_measured"].append({"case": str(one), "reason": f"time budget of {args.budget:g} s"})
            continue
        case, providers = plan.build(one.spec, scale, device, compile=False, quick=True)
        provider = next(p for p in providers if p.name == one.provider)
        tiles = _distinct_blocks(one.kernel) if args.interpret else one.tiles
        print(f"\n{one}", end="", flush=True)
        found, rows = tune_class(case, provider, one.kernel, tiles, settings)
        print_case(rows)
        record["rows"] += rows
        findings.append(found)
        bad = [row for row in rows if row.status in ("wrong", "failed")]
        wrong |= any(args.interpret or row.label == "present" for row in bad)
        if not args.interpret and not args.no_save:
            record["findings"] = [dataclasses.asdict(f) for f in findings]
            save(record, folder)
    for left in record["not_measured"]:
        print(f"not measured: {left['case']}: {left['reason']}")
    if not args.interpret:
        _report(findings, record["provenance"], table, args.write)
        if not args.no_save and findings:
            print(f"results: {folder / 'tune.json'}")
    return int(wrong)


def _chosen(found: list[Class], args: argparse.Namespace) -> list[Class]:
    names = ("precision", "mode", "batch", "model", "padding", "kind", "dropout")
    wanted = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return [one for one in found if all(getattr(one.spec, name) in values for name, values in wanted.items())]


def _distinct_blocks(kernel: str) -> list[Tile]:
    """Of all candidates of `kernel` one for each tile size."""
    tiles = [tile for (name, _), tiles in CANDIDATES.items() if name == kernel for tile in tiles]
    blocks = {tuple(value for name, value in tile.items() if name.startswith("BLOCK")): tile for tile in tiles}
    return list(blocks.values())


def _report(findings: list[Finding], where: dict, table: Path, write: bool) -> None:
    """Prints present, chosen and gain, and the table's new entries, which `write` puts into `table`."""
    lines = [("kernel", "class", "present", "chosen", "gain")]
    for found in findings:
        words = " ".join(f"{name}={value}" for name, value in found.conditions.items())
        gain = "" if not (found.present_ms and found.chosen_ms) else f"{found.present_ms / found.chosen_ms:.2f}x"
        chosen = "nothing is right" if found.chosen is None else tile_name(found.chosen)
        lines.append((found.kernel, words, tile_name(found.present), "=" if gain == "1.00x" else chosen, gain))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    print()
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    day = datetime.date.fromisoformat(where["date"][:10])
    origin = f"{where['device']}, triton {where['triton']}, {(where['git_sha'] or 'unknown')[:9]}, {day}"
    text = source(measured_entries(findings, origin))
    if write:
        replace_between(table, "measured", text)
        print(f"\n{table}: MEASURED written; run make gate and the GPU tests before you commit it")
    else:
        print(f"\nfor {table} (or run again with --write):\n{text}")
