"""The terminal's tables."""

from .case import Row
from .ceilings import Ceilings

COLUMNS = (
    "provider",
    "launch",
    "median ms",
    "p20-p80",
    "GB/s",
    "TFLOP/s",
    "% limit",
    "peak MiB",
    "max error",
    "note",
)


def print_ceilings(ceilings: Ceilings, device: str) -> None:
    matmul = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in ceilings.matmul.items())
    print(
        f"{device}, measured now: copy {ceilings.copy / 1e9:.4g} GB/s (read + written), matrix product {matmul} "
        f"TFLOP/s, exp {ceilings.exp / 1e9:.4g} G/s"
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"


def _time(milliseconds: float) -> str:
    return f"{milliseconds:.4f}" if milliseconds < 10 else f"{milliseconds:.1f}"


def cells(row: Row) -> list[str]:
    """A row as text, in the order of `COLUMNS`. A row without a time says why in its last cell."""
    if row.status in ("ok", "limit"):
        spread = "" if row.p20_ms is None else f"{_time(row.p20_ms)}-{_time(row.p80_ms)}"
        timing = [_time(row.median_ms), spread]
        note = row.label
    else:
        words = {"wrong": "WRONG", "failed": "FAILED", "unavailable": "not available", "checked": "right, not timed"}
        timing, note = ["", ""], f"{words[row.status]}: {row.reason}" if row.reason else words[row.status]
    rates = [_number(row.gb_per_s, 4), _number(row.tflop_per_s, 4), _number(row.percent_of_ceiling)]
    return [row.provider, row.launch, *timing, *rates, _number(row.peak_memory_mib, 4), _number(row.max_error, 2), note]


def print_case(rows: list[Row]) -> None:
    """One case: a heading, then its rows, fastest first within each launch mode."""
    if not rows:
        return
    first = rows[0]
    valid = first.shape.get("valid")
    shares = f"; valid tokens {valid['tokens']:.0%}, pairs {valid['pairs']:.0%}" if valid else ""
    print(f"\n{first.suite}: {first.case}, {first.precision}, {first.mode}{shares}")
    order = {"limit": 0, "ok": 1, "checked": 2, "wrong": 3, "failed": 4, "unavailable": 5}
    ordered = sorted(rows, key=lambda r: (order[r.status], r.launch, r.median_ms or 0.0))
    lines = [list(COLUMNS)] + [cells(row) for row in ordered]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        print("  " + "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip(), flush=True)
