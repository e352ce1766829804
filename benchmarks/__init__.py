"""Microbenchmarks of the fused ops against their peers and the physical limit.

``python -m benchmarks attention`` or ``detr-fast bench attention``; NOTES.md holds the predictions, results/ what was
measured. Reached as `detr_fast.benchmarks`, too, so that an installed package can measure itself.
"""

SUITES = ("collate", "position", "attention", "mha")
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
