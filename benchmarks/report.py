"""The tables of measurements in README.md and NOTES.md, written from the results files between two markers."""

from pathlib import Path

from .harness.markers import replace_between
from .harness.results import load, load_record

# What the README quotes: suite, kind or task, model, padding, precision, mode, dropout; batch 16.
QUOTED = [
    ("pad_collate", "uint8", "R50", "none", "bf16", "forward", None),
    ("pad_collate", "uint8", "R50", "coco", "bf16", "forward", None),
    ("pad_collate", "float", "R50", "coco", "fp32", "forward", None),
    ("sine_position", None, "R50", "coco", "fp32", "forward", None),
    ("sine_position", None, "DC5", "coco", "fp32", "forward", None),
    ("attention", "encoder", "R50", "none", "bf16", "forward", 0.0),
    ("attention", "encoder", "R50", "none", "bf16", "forward", 0.1),
    ("attention", "encoder", "R50", "none", "bf16", "both", 0.1),
    ("attention", "encoder", "R50", "coco", "bf16", "forward", 0.1),
    ("attention", "encoder", "R50", "coco", "bf16", "both", 0.1),
    ("attention", "encoder", "DC5", "none", "bf16", "both", 0.1),
    ("attention", "encoder", "DC5", "coco", "bf16", "both", 0.1),
    ("attention", "cross", "R50", "coco", "bf16", "forward", 0.1),
    ("attention", "decoder", "R50", "coco", "bf16", "forward", 0.1),
    ("multihead_attention", "encoder", "R50", "coco", "bf16", "both", 0.1),
    ("folded_conv", "3x3", "R50", "none", "bf16", "both", None),
    ("folded_conv", "residual", "R50", "none", "bf16", "both", None),
    ("pointwise_conv", "expand", "R50", "none", "bf16", "both", None),
    ("matching_cost", None, "R50", "none", "fp32", "forward", None),
    ("assign", "boxes", "R50", "none", "fp32", "forward", None),
    ("joint_softmax", None, "R50", "coco", "bf16", "both", None),
]
# The provider that does what the original does, where it is not named "as shipped".
SHIPPED = {"pad_collate": "original loop", "sine_position": "original, eager"}
# Peers that answer less than the question: no padding, no mask, or inputs packed for free.
PARTIAL = {"SDPA flash, no mask", "flash varlen, packed", "torchvision batch_images"}

# The ways in which `python -m benchmarks.studies.same_training` asks.
QUESTIONS = {
    "free": "ours against the reference, both train freely",
    "resync": "ours against the reference, from the same weights in every step",
    "control": "the reference against itself, from weights a last bit away",
    "dropout": "what is reached with dropout {dropout:g}, over seeds",
}


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
    original = SHIPPED.get(suite, "as shipped")
    peers = [row for row in peers if row["provider"] != original]
    peer, shipped = min(peers, key=lambda row: row["median_ms"], default=None), times.get(original)
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


def training_lines(record: dict) -> list[str]:
    """Markdown: a table for every case of a record of the suite train, the fastest variant first."""
    cases: dict[tuple, list[dict]] = {}
    for row in record["steps"]:
        cases.setdefault((row["model"], row["batch"], row["size"], row["padding"]), []).append(row)
    lines = []
    for (model, batch, size, padding), rows in cases.items():
        timed = sorted((row for row in rows if row["median_ms"] is not None), key=lambda row: row["median_ms"])
        counts = list(next((row["counts"] for row in timed if row["counts"]), {}))
        shipped = next((row for row in timed if row["provider"] == "as shipped"), None)
        words = {"none": "no padding", "coco": "padding of real COCO sizes"}
        lines.append(f"Training step, {model}, batch {batch}, {size}, {words.get(padding, padding)}:\n")
        head = [
            "variant",
            "ms",
            "20 % to 80 %",
            "img/s",
            "times as shipped",
            *(name.replace("_", " ") for name in counts),
        ]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in timed:
            gain = f"{shipped['median_ms'] / row['median_ms']:.2f}" if shipped else "–"
            name = f"**{row['provider']}**" if row["provider"] == "detr_fast" else row["provider"]
            cells = [name, f"{row['median_ms']:.1f}", f"{row['p20_ms']:.1f} – {row['p80_ms']:.1f}"]
            cells += [f"{row['images_per_s']:.1f}", gain]
            cells += [str((row["counts"] or {}).get(name, "–")) for name in counts]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        lines += [f"{row['provider']}: {row['status']}, {row['reason']}\n" for row in rows if row["median_ms"] is None]
    return lines


def _commits(records: list[dict]) -> str:
    commits = sorted({(record["provenance"]["git_sha"] or "unknown")[:9] for record in records})
    changed = " with uncommitted changes" if any(record["provenance"]["git_dirty"] for record in records) else ""
    dates = sorted({record["provenance"]["date"][:10] for record in records})
    return f"commit {', '.join(commits)}{changed}, {', '.join(dates)}"


def cpu_training(results: Path) -> str:
    """Markdown: the training step on every CPU with results."""
    parts = []
    for record in load(results):
        where = record["provenance"]
        if where["device_type"] == "cpu" and record["suite"] == "train":
            parts.append(f"**{where['device']}**, torch {where['torch']}, {_commits([record])}; float32.\n")
            parts += training_lines(record)
    return "\n".join(parts).rstrip() or "No CPU has been measured; `python -m benchmarks train --device cpu` does it."


def padding_share(results: Path) -> str:
    """Markdown: attention's time with the padding of real batches, as a share of its time without, on every device."""
    lines = []
    for record in load(results):
        if record["suite"] != "attention":
            continue
        rows = [row for row in record["rows"] if row["status"] == "ok" and row["shape"]["kind"] == "encoder"]

        def case(row: dict, padding: str, provider: str = "detr_fast") -> tuple:
            shape = row["shape"] | {"padding": padding, "valid": None}
            return provider, row["precision"], row["mode"], row["launch"], repr(sorted(shape.items()))

        times = {case(row, row["shape"]["padding"], row["provider"]): row["median_ms"] for row in rows}
        for row in rows:
            dense = times.get(case(row, "coco-dense"))
            if row["provider"] != "detr_fast" or row["shape"]["padding"] != "coco" or dense is None:
                continue
            skipped = times.get(case(row, "coco", "detr_fast, padded queries skipped"))
            parts = (f"{x:.4g} ({x / dense:.0%})" if x else "–" for x in (row["median_ms"], skipped))
            shape, where = row["shape"], record["provenance"]
            name = (
                f"{shape['q_len']} tokens, batch {shape['batch']}, {row['precision']}, {row['mode']}, {row['launch']}"
            )
            name += f", p={shape['dropout']:g}" if shape["dropout"] else ""
            cells = (
                where["device"],
                name,
                f"{shape['valid']['pairs']:.0%}",
                f"{dense:.4g}",
                *parts,
                _commits([record]),
            )
            lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return "Not measured."
    head = "| device | encoder | valid pairs | without padding, ms | keys left out | queries, too | |"
    return "\n".join([head, "|---" * 7 + "|", *lines])


def same_training(results: Path) -> str:
    """Markdown: what `python -m benchmarks.studies.same_training --save` has found, on every device."""
    parts = []
    for record in load(results):
        if record["suite"] != "same_training":
            continue
        where = record["provenance"]
        parts.append(f"**{where['device']}**, torch {where['torch']}, {where['date'][:10]}:\n")
        parts += ["| question | images | dtype | steps | found | commit |", "|---|---|---|---|---|---|"]
        for found in record["comparisons"]:
            if found["way"] == "dropout":
                ours, reference = (", ".join(f"{x:.3f}" for x in found[name]) for name in ("ours", "reference"))
                answer = f"means differ by {found['difference']:.3f}, the reference's seeds by {found['spread']:.3f} "
                answer += f"(ours {ours}; reference {reference})"
            else:
                answer = f"largest relative difference {found['difference']:.1e}, in step {found['at_step']}"
                if "from_float64" in found:
                    answer += "; from the loss in float64 ours {:.1e}, the reference {:.1e}".format(
                        *found["from_float64"]
                    )
            question = QUESTIONS[found["way"]].format(dropout=found["dropout"])
            height, width = found["image_size"]
            images = f"{found['images']}, {height} to {width}, batch {found['batch']}"
            cells = (question, images, found["dtype"], str(found["steps"]), answer, (found["commit"] or "unknown")[:9])
            parts.append("| " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts).rstrip() or "Not yet asked; `python -m benchmarks.studies.same_training --save` does it."


def versions(results: Path) -> str:
    """Markdown: what `python -m benchmarks.studies.versions` has found, on every device."""
    parts = []
    for path in sorted(results.glob("*/versions.json")):
        record = load_record(path)
        where = record["provenance"]
        commits = f"{record['before'][:9]} → {(where['git_sha'] or 'unknown')[:9]}"
        parts.append(f"**{where['device']}**, torch {where['torch']}, {where['date'][:10]}, {commits}:\n")
        parts += ["| | before, ms | now, ms | now / before | 25 % to 75 % | rounds |", "|---|---|---|---|---|---|"]
        for row in record["rows"]:
            low, high = row["ratio_25_to_75"]
            cells = (
                f"{row['before_ms']:.1f}",
                f"{row['now_ms']:.1f}",
                f"{row['ratio']:.2f}",
                f"{low:.2f} – {high:.2f}",
            )
            parts.append(f"| {row['case']} | {' | '.join(cells)} | {row['rounds']} |")
        parts.append("")
    return "\n".join(parts).rstrip() or "Not measured."


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
        parts.append(
            f"**{device}**, driver {where['driver']}, torch {where['torch']}, triton {where['triton']}, "
            f"{_commits(records)}; µs, median, batch 16, the better of eager "
            "launch and CUDA graph.\n"
        )
        parts.append("| op | limit | ours | of limit | best stock peer that answers the question | as shipped |")
        parts.append("|---|---|---|---|---|---|")
        parts += lines + [""]
        for record in records:
            if record["suite"] == "train":
                parts += training_lines(record)
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
