"""Triton kernels and their launchers, one file per op. Reached as `detr_fast.kernels`."""
