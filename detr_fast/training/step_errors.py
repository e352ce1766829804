"""Steps that cannot be computed: too large for the memory, or too small for batch norm."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from detr_fast.errors import UsageError
from detr_fast.nested_tensor import NestedTensor


@contextmanager
def step_errors(samples: NestedTensor, what: str = "a step") -> Iterator[None]:
    """Inside, what the size of a batch makes impossible becomes a UsageError that names the batch and the flags.

    That is running out of memory, and batch norm that is trained on a single value for each channel.

    Args:
        samples: the batch that is computed.
        what: is done with it.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UsageError(
            f"{what} with {described(samples)}, leaves batch norm a single value for each channel, which has no "
            "variance: raise --image_size or --batch_size, or use --backbone_norm frozen or group"
        ) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        lower = "--image_size or --max_size"
        if len(samples.tensors) > 1:
            lower = f"--batch_size, {lower}"
        device, total = samples.tensors.device, ""
        if device.type == "cuda":
            total = f" ({torch.cuda.get_device_properties(device).total_memory / 1e9:.1f} GB)"
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"{what} with {described(samples)}, does not fit into the memory of {device}{total}: lower {lower}, or "
            f"compute in --precision bf16. ({reason})"
        ) from error


def described(samples: NestedTensor) -> str:
    """How many images there are in a batch, and their padded size."""
    batch, _, height, width = samples.tensors.shape
    return f"{'1 image' if batch == 1 else f'{batch} images'}, padded to {height}x{width} pixels (height x width)"


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU's memory, or the CPU's, was not enough."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
