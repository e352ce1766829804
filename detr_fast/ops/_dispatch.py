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
from torch.autograd import forward_ad

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


def is_plain_eager(*tensors: torch.Tensor) -> bool:
    """Whether plain tensors meet an op outside every compiler, tracer, dispatch mode and transform.

    Then the op's autograd function may be called without the dispatcher, which costs a custom op of Python's about a
    tenth of a millisecond of the host's time, forward and backward.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.jit.is_tracing()
        and all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
    )


def refuse_transforms(op: str, *tensors: torch.Tensor) -> None:
    """Raise where `op` would lose the tangents of forward-mode differentiation or fail inside `torch.func`.

    An op with a backward formula alone gives tangents of zero without a word.

    Raises:
        NotImplementedError: a tensor carries a tangent, or is one of `torch.func`'s or `torch.vmap`'s.
    """
    if torch.compiler.is_compiling():
        return
    wrapped = torch._C._functorch
    if any(wrapped.is_batchedtensor(tensor) or wrapped.is_gradtrackingtensor(tensor) for tensor in tensors) or (
        forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    ):
        raise NotImplementedError(
            f"{op} does not support vmap, forward-mode derivatives or torch.func's transforms (grad, jvp, jacrev, "
            "...); expected plain tensors: differentiate with torch.autograd"
        )
