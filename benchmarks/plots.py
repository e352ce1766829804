"""Pictures of a results file: time against tokens, time against the share of padding, and how far from the ceilings."""

from collections import Counter, defaultdict
from pathlib import Path

# One colour per provider, the same in every picture: ours first, then in the order of the suites' lists.
COLOURS = ("#d62728", "#7f7f7f", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#ff7f0e")
PANELS = 4


def _measured(record: dict) -> list[dict]:
    """Rows with a time, of one launch mode: CUDA graphs where there are any, else eager launches."""
    rows = [row for row in record["rows"] if row["status"] == "ok"]
    launch = "graph" if any(row["launch"] == "graph" for row in rows) else "eager"
    return [row for row in rows if row["launch"] == launch]


def _limits(record: dict) -> list[dict]:
    return [row for row in record["rows"] if row["status"] == "limit"]


def _colours(record: dict) -> dict[str, str]:
    names = dict.fromkeys(row["provider"] for row in record["rows"] if row["status"] == "ok")
    ordered = sorted(names, key=lambda name: not name.startswith("detr_fast"))
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(ordered)} | {"limit": "black"}


def _size(row: dict) -> int:
    """Tokens, pixels or images of the padded batch, see `_unit`."""
    shape = row["shape"]
    if "k_len" in shape:
        return shape["batch"] * max(shape["q_len"], shape["k_len"])
    if "height" not in shape:
        return shape["batch"]
    height, width = shape.get("feature", (shape["height"], shape["width"]))
    return shape["batch"] * height * width


def _unit(record: dict) -> str:
    shape = record["rows"][0]["shape"] if record["rows"] else {}
    if "k_len" in shape or "feature" in shape:
        return "tokens"
    return "pixels" if "height" in shape else "images"


def _padded_share(row: dict) -> float:
    return 1 - row["shape"]["valid"]["tokens"] if "valid" in row["shape"] else 0.0


def _what(row: dict) -> str:
    """Kind or task, model, dropout, precision and mode, for a heading."""
    shape = row["shape"]
    parts = [shape.get("kind") or shape.get("task"), shape["model"], row["precision"], row["mode"]]
    dropout = f", p={shape['dropout']:g}" if shape.get("dropout") else ""
    return " ".join(part for part in parts if part) + dropout


def _series(rows: list[dict], group, x) -> list[tuple[str, list[dict]]]:
    """Groups with at least two different x, those with most of them first."""
    groups = defaultdict(list)
    for row in rows:
        groups[group(row)].append(row)
    wide = [(title, members) for title, members in groups.items() if len({x(row) for row in members}) > 1]
    return sorted(wide, key=lambda item: -len({x(row) for row in item[1]}))[:PANELS]


def _line_panels(record: dict, group, x, xlabel: str, path: Path, *, log: bool) -> Path | None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    rows = _measured(record)
    panels = _series(rows, group, x)
    if not panels:
        return None
    colours, limits = _colours(record), _limits(record)
    figure, axes = plt.subplots(1, len(panels), figsize=(5.2 * len(panels), 5.4), squeeze=False, layout="constrained")
    for axis, (title, members) in zip(axes[0], panels, strict=True):
        cases = {(row["case"], row["precision"], row["mode"]) for row in members}
        members = members + [row for row in limits if (row["case"], row["precision"], row["mode"]) in cases]
        for provider in dict.fromkeys(row["provider"] for row in members):
            line = sorted((row for row in members if row["provider"] == provider), key=x)
            ours = provider.startswith("detr_fast")
            axis.plot(
                [x(row) for row in line], [row["median_ms"] for row in line], marker="o", markersize=4,
                color=colours[provider], label=provider, linestyle="--" if provider == "limit" else "-",
                linewidth=2.5 if ours else 1.3, zorder=3 if ours else 2,
            )  # fmt: skip
        if log:
            axis.set(xscale="log", yscale="log")
        else:
            axis.set_ylim(bottom=0)
            axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.set(title=title, xlabel=xlabel, ylabel="median time, ms")
        axis.grid(True, which="both", alpha=0.25)
    _finish(figure, axes[0], record)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _finish(figure, axes, record: dict) -> None:
    labels = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=min(6, 2 * len(axes)), fontsize=8)
    launches = "CUDA graph" if any(row["launch"] == "graph" for row in _measured(record)) else "eager"
    where = record["provenance"]
    figure.suptitle(
        f"{record['suite']} on {where['device']}, {launches}, torch {where['torch']}, {where['date'][:10]}", fontsize=10
    )


def _roofline(record: dict, path: Path) -> Path | None:
    """Rate against operations per byte under the measured ceilings; for ops without products, bandwidth as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = _measured(record)
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(8, 5.6), layout="constrained")
    colours, ceilings = _colours(record), record["ceilings"]
    if any(row["tflop_per_s"] for row in rows):
        # One precision and mode, those with most rows: the ceilings of several would lie on top of each other.
        (precision, mode), _ = Counter((row["precision"], row["mode"]) for row in rows).most_common(1)[0]
        rows = [row for row in rows if (row["precision"], row["mode"]) == (precision, mode)]
        points = [(1e3 * row["tflop_per_s"] / row["gb_per_s"], row["tflop_per_s"], row["provider"]) for row in rows]
        for provider in dict.fromkeys(p for _, _, p in points):
            chosen = [(i, t) for i, t, p in points if p == provider]
            axis.scatter(*zip(*chosen, strict=True), s=22, color=colours[provider], label=provider, zorder=3)
        low, high = min(i for i, _, _ in points) / 2, max(i for i, _, _ in points) * 2
        top = ceilings["matmul"][precision] / 1e12
        knee = top * 1e12 / ceilings["copy"]
        xs = [low, min(max(knee, low), high), high]
        axis.plot(xs, [min(top, i * ceilings["copy"] / 1e12) for i in xs], color="black", linewidth=1.2)
        axis.annotate(f"copy, then {precision} matrix product", (high, top), ha="right", va="bottom", fontsize=8)
        axis.set_title(f"{precision}, {mode}", fontsize=10)
        if record["suite"] == "attention" and mode == "forward":
            # Forward: 4 · head_dim operations per exponential.
            top = ceilings["exp"] * 4 * rows[0]["shape"]["head_dim"] / 1e12
            axis.axhline(top, color="black", linestyle=":", linewidth=1)
            axis.annotate("exp", (low, top), ha="left", va="bottom", fontsize=8)
        axis.set(xscale="log", yscale="log", xlabel="operations per byte that must be moved", ylabel="TFLOP/s")
        axis.grid(True, which="both", alpha=0.25)
    else:
        best = max(rows, key=lambda row: row["gb_per_s"])
        rows = [row for row in rows if row["case"] == best["case"] and row["precision"] == best["precision"]]
        rows = sorted((row for row in rows if row["mode"] == best["mode"]), key=lambda row: row["gb_per_s"])
        axis.barh(
            [row["provider"] for row in rows], [row["gb_per_s"] for row in rows],
            color=[colours[row["provider"]] for row in rows],
        )  # fmt: skip
        axis.axvline(ceilings["copy"] / 1e9, color="black", linestyle="--", label="device copy, measured")
        axis.set(xlabel="GB/s of the bytes that must be moved", title=f"{best['case']}, {best['precision']}")
    _finish(figure, [axis], record)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def plot_suite(record: dict, folder: Path) -> list[Path]:
    """Writes the pictures that `record` has the numbers for; returns their paths."""
    suite = record["suite"]
    unit = _unit(record)

    def by_size(row):
        return f"{_what(row)}\npadding: {row['shape']['padding']}"

    def by_padding(row):
        shape = row["shape"]
        names = ("q_len", "k_len") if "k_len" in shape else ("height", "width")
        return f"{_what(row)}\nbatch {shape['batch']}, {' x '.join(str(shape.get(name)) for name in names)}"

    pictures = [
        _line_panels(record, by_size, _size, f"{unit} of the padded batch", folder / f"{suite}-{unit}.png", log=True),
        _line_panels(
            record, by_padding, _padded_share, "share of padded tokens", folder / f"{suite}-padding.png", log=False
        ),
        _roofline(record, folder / f"{suite}-roofline.png"),
    ]
    return [path for path in pictures if path is not None]
