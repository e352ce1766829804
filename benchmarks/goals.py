"""Predicted against measured: the table in NOTES.md, from the same counts of work that the suites use."""

import torch

from .harness.ceilings import Ceilings
from .harness.spec import Scale, Spec
from .plan import build
from .report import best_times, quoted_key

# An NVIDIA H200's device copy and bf16 matrix product as others measured them; exp: 16 a clock and multiprocessor.
H200 = Ceilings(copy=4.3e12, matmul={"bf16": 790e12, "fp32": 50e12}, exp=16 * 132 * 1.83e9)

# What is predicted, and the goal in microseconds on an H200.
GOALS = [
    (Spec("pad_collate", "uint8", padding="none"), 42),
    (Spec("pad_collate", "uint8"), None),
    (Spec("pad_collate", "float", padding="none", precision="fp32"), 102),
    (Spec("sine_position", padding="none", precision="fp32"), 5),
    (Spec("sine_position", model="DC5", padding="none", precision="fp32"), 17),
    (Spec("attention", "encoder", padding="none"), 45),
    (Spec("attention", "encoder", padding="none", dropout=0.1), 53),
    (Spec("attention", "encoder", padding="none", dropout=0.1, mode="both"), 190),
    (Spec("attention", "encoder", padding="coco-dense"), None),
    (Spec("attention", "encoder", padding="coco"), None),
    (Spec("attention", "encoder", "DC5", padding="none"), 590),
    (Spec("attention", "encoder", "DC5", padding="none", dropout=0.1), 720),
    (Spec("attention", "cross", dropout=0.1), 6),
    (Spec("attention", "decoder", dropout=0.1), 4),
    (Spec("pointwise_conv", "reduce", padding="none"), None),
    (Spec("pointwise_conv", "expand", padding="none"), None),
    (Spec("pointwise_conv", "expand-deep", padding="none"), None),
    (Spec("multihead_attention", "encoder", padding="none", dropout=0.1, mode="both"), None),
]


def _bound(case, ceilings: Ceilings) -> str:
    """What bounds the stage that takes longest."""
    times = [(stage.bytes / ceilings.copy, "memory") for stage in case.work] + [
        (stage.flops / ceilings.matmul[case.precision], "products") for stage in case.work if stage.flops
    ]
    times += [(stage.exps / ceilings.exp, "exp") for stage in case.work]
    return max(times)[1]


def table(records: list[dict]) -> str:
    """Markdown. `records`: results files; only those of an H200 fill the last column."""
    rows = [row for r in records if "H200" in r["provenance"]["device"] for row in r["rows"]]
    lines = [
        "| case, batch 16 | MB | GFLOP | G exp | bound by | limit, µs | goal, µs | measured, µs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for spec, goal in GOALS:
        case, _ = build(spec, Scale(), torch.device("cpu"), compile=False, quick=True)
        total = [sum(getattr(stage, name) for stage in case.work) for name in ("bytes", "flops", "exps")]
        key = quoted_key({"suite": spec.suite, "precision": spec.precision, "mode": spec.mode, "shape": case.shape})
        same = [row for row in rows if quoted_key(row) == key and row["shape"]["batch"] == spec.batch]
        ours = best_times(same).get("detr_fast")
        lines.append(
            f"| {spec} | {total[0] / 1e6:.1f} | {total[1] / 1e9:.1f} | {total[2] / 1e9:.3f} | {_bound(case, H200)} | "
            f"{1e6 * H200.limit_seconds(case.work, spec.precision):.1f} | {goal or '–'} | "
            f"{'not yet' if ours is None else format(1e3 * ours['median_ms'], '.1f')} |"
        )
    return "\n".join(lines)
