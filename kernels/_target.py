"""What a launcher may know of the GPU it launches on.

Launchers ask here and nowhere else, through the module (``_target.compute_capability(device)``), so that the compile
gate can answer for GPUs that are absent.
"""

import functools

import torch


@functools.cache
def compute_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of `device`, such as (9, 0) for an H100; (0, 0) for anything but a CUDA device."""
    if device.type != "cuda":
        return (0, 0)
    return torch.cuda.get_device_capability(device)
