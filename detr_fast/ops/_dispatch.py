"""Which implementation an op runs: its Triton kernel or its plain-PyTorch reference.

The rule, in one place for all ops:

- CUDA tensors run the kernel, unless ``DETR_FAST_KERNELS=torch`` or Triton is not installed (macOS, Windows).
- CPU tensors run the reference, unless ``TRITON_INTERPRET=1`` was set before Triton was imported: then they run the
  very kernel through Triton's interpreter.
- Tensors on any other device run the reference.
"""

import importlib.util
import os

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None

_CHOICES = ("", "triton", "torch")


def use_kernel(device: torch.device) -> bool:
    """True if ops on `device` run their Triton kernel, False if they run their reference.

    Raises:
        ValueError: ``DETR_FAST_KERNELS`` is neither unset, ``triton`` nor ``torch``.
        RuntimeError: ``DETR_FAST_KERNELS=triton`` where Triton is not installed.
    """
    choice = os.environ.get("DETR_FAST_KERNELS", "")
    if choice not in _CHOICES:
        raise ValueError(f"DETR_FAST_KERNELS is {choice!r}; expected 'triton', 'torch' or unset")
    if choice == "torch":
        return False
    if not HAS_TRITON:
        if choice == "triton":
            raise RuntimeError("DETR_FAST_KERNELS=triton, but the package triton is not installed")
        return False
    if device.type == "cuda":
        return True
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
