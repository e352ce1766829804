"""Every Triton kernel compiled for GPUs that are not there: `python -m benchmarks.compile_gate`."""
