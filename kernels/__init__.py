"""Triton kernels and their launchers, one file per op. Reached as `detr_fast.kernels`."""

from detr_fast.kernels import _compile_log

_compile_log.install()
