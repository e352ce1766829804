"""The README's table of measurements, written from the results files between two markers."""

from pathlib import Path

from .markers import replace_between
from .results import load

# What the README quotes: suite, kind or task, model, padding, precision, mode, dropout; batch 16.
QUOTED = [
    ("collate", "uint8", "R50", "none", "bf16", "forward", None),
    ("collate", "uint8", "R50", "coco", "bf16", "forward", None),
    ("collate", "float", "R50", "coco", "fp32", "forward", None),
    ("position", None, "R50", "coco", "fp32", "forward", None),
    ("position", None, "DC5", "coco", "fp32", "forward", None),
    ("attention", "encoder", "R50", "none", "bf16", "forward", 0.0),
    ("attention", "encoder", "R50", "none", "bf16", "forward", 0.1),
    ("attention", "encoder", "R50", "none", "bf16", "both", 0.1),
    ("attention", "encoder", "R50", "coco", "bf16", "forward", 0.1),
    ("attention", "encoder", "R50", "coco", "bf16", "both", 0.1),
    ("attention", "encoder", "DC5", "none", "bf16", "both", 0.1),
    ("attention", "encoder", "DC5", "coco", "bf16", "both", 0.1),
    ("attention", "cross", "R50", "coco", "bf16", "forward", 0.1),
    ("attention", "decoder", "R50", "coco", "bf16", "forward", 0.1),
    ("mha", "encoder", "R50", "coco", "bf16", "both", 0.1),
]
SHIPPED = {"collate": "original loop", "position": "original, eager", "attention": "as shipped", "mha": "as shipped"}
# Peers that answer less than the question: no padding, no mask, or inputs packed for free.
PARTIAL = {"SDPA flash, no mask", "flash varlen, packed", "torchvision batch_images"}


def quoted_key(row: dict) -> tuple:
    """What a row measures: suite, kind or task, model, padding, precision, mode, dropout."""
    shape = row["shape"]
    kind = shape.get("kind") or shape.get("task")
    return row["suite"], kind, shape["model"], shape["padding"], row["precision"], row["mode"], shape.get("dropout")


def best_times(rows: list[dict]) -> dict[str, dict]:
    """provider → its best row: CUDA graph or eager, whichever is faster for it."""
    best: dict[str, dict] = {}
    for row in rows:
        if row["status"] in ("ok", "limit"):
            kept = best.get(row["provider"])
            if kept is None or row["median_ms"] < kept["median_ms"]:
                best[row["provider"]] = row
    return best


def _microseconds(row: dict | None) -> str:
    return "–" if row is None else f"{1e3 * row['median_ms']:.1f}"


def _line(key: tuple, rows: list[dict]) -> str | None:
    suite, kind, model, padding, precision, mode, dropout = key
    times = best_times(rows)
    ours = times.get("detr_fast")
    if ours is None:
        return None
    peers = [r for n, r in times.items() if n != "limit" and not n.startswith("detr_fast") and n not in PARTIAL]
    peers = [row for row in peers if row["provider"] != SHIPPED[suite]]
    peer, shipped = min(peers, key=lambda row: row["median_ms"], default=None), times.get(SHIPPED[suite])
    words = [suite, kind, model, {"none": "no padding", "coco": "COCO padding"}[padding], precision]
    words += [{"both": "forward + backward"}.get(mode, mode)] + ([f"dropout {dropout:g}"] if dropout else [])

    def gain(other: dict | None) -> str:
        return "" if other is None else f" ({other['median_ms'] / ours['median_ms']:.1f}x)"

    cells = [
        ", ".join(word for word in words if word),
        _microseconds(times.get("limit")),
        f"**{_microseconds(ours)}**",
        f"{ours['percent_of_ceiling']:.0f} %",
        f"{peer['provider']}: {_microseconds(peer)}{gain(peer)}" if peer else "–",
        f"{_microseconds(shipped)}{gain(shipped)}",
    ]
    return "| " + " | ".join(cells) + " |"


def table(results: Path) -> str:
    """Markdown: one table per device with results of a GPU, or one sentence where there are none."""
    devices: dict[str, list[dict]] = {}
    for record in load(results):
        if record["provenance"]["device_type"] == "cuda":
            devices.setdefault(record["provenance"]["device"], []).append(record)
    parts = []
    for device, records in sorted(devices.items()):
        rows = [row for record in records for row in record["rows"] if row["shape"]["batch"] == 16]
        lines = [_line(key, [row for row in rows if quoted_key(row) == key]) for key in QUOTED]
        lines = [line for line in lines if line]
        where = records[0]["provenance"]
        commits = sorted({(r["provenance"]["git_sha"] or "unknown")[:9] for r in records})
        changed = " with uncommitted changes" if any(r["provenance"]["git_dirty"] for r in records) else ""
        dates = sorted({record["provenance"]["date"][:10] for record in records})
        parts.append(
            f"**{device}**, driver {where['driver']}, torch {where['torch']}, triton {where['triton']}, "
            f"commit {', '.join(commits)}{changed}, {', '.join(dates)}; µs, median, batch 16, the better of eager "
            "launch and CUDA graph.\n"
        )
        parts.append("| op | limit | ours | of limit | best stock peer that answers the question | as shipped |")
        parts.append("|---|---|---|---|---|---|")
        parts += lines + [""]
    if not parts:
        return (
            "No GPU has been measured yet; `make gpu` measures the one at hand, and `python -m benchmarks report` "
            "writes the table here."
        )
    return "\n".join(parts).rstrip()


def update_readme(readme: Path, results: Path) -> int:
    """Writes `table` between the markers `benchmarks:begin` and `benchmarks:end` of `readme`.

    Returns:
        0; 1 if the file or its markers are missing.
    """
    if not replace_between(readme, "benchmarks", table(results)):
        return 1
    print(f"{readme}: table written from {results}")
    return 0
