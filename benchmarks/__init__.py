"""Benchmarks of the fused ops against their peers and the physical limit.

`python -m benchmarks attention` or `detr-fast bench attention`. `suites/` has one file per op, `harness/` what they are
measured with, `studies/` questions larger than one op; NOTES.md explains the figures, `results/` holds them. Importable
as `detr_fast.benchmarks`, too, so that an installed package can measure itself.
"""

SUITES = (
    "pad_collate", "sine_position", "attention", "multihead_attention", "folded_conv", "matching_cost", "assign",
    "joint_softmax", "pointwise_conv",
)  # fmt: skip
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
