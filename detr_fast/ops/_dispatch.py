"""Which implementation an op runs: its Triton kernel or plain PyTorch.

The rule, in one place for all ops:

- CUDA tensors run the kernel, unless ``DETR_FAST_KERNELS=torch``, Triton is not installed (macOS, Windows), or the
  kernel was found wrong on this GPU (see `detr_fast.ops.selfcheck`).
- CPU tensors run plain PyTorch, unless ``TRITON_INTERPRET=1`` was set before Triton was imported: then they run the
  same kernel through Triton's interpreter.
- Tensors on any other device run plain PyTorch.
"""

import importlib.util
import os

import torch
from torch.autograd import forward_ad

HAS_TRITON = importlib.util.find_spec("triton") is not None

_CHOICES = ("", "triton", "torch")
_SELFCHECKS = ("", "0", "1")

# While kernels are compared with plain PyTorch: "triton" or "torch", in the place of the environment's choice. Of the
# whole process: a backward runs in a thread of autograd's. Other threads follow it for as long as a comparison takes.
forced: str | None = None


def kernels_chosen(device: torch.device) -> bool:
    """True if ops on `device` are to run their Triton kernels, as far as the environment says.

    Raises:
        ValueError: ``DETR_FAST_KERNELS`` is neither unset, ``triton`` nor ``torch``.
        RuntimeError: ``DETR_FAST_KERNELS=triton`` where Triton is not installed.
    """
    choice = os.environ.get("DETR_FAST_KERNELS", "") if forced is None else forced
    if choice not in _CHOICES:
        raise ValueError(f"DETR_FAST_KERNELS is {choice!r}; expected 'triton', 'torch' or unset")
    if choice == "torch":
        return False
    if not HAS_TRITON:
        if choice == "triton":
            raise RuntimeError("DETR_FAST_KERNELS=triton, but the package triton is not installed")
        return False
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")


def use_kernel(device: torch.device, op: str) -> bool:
    """True if `op` runs its Triton kernel on `device`, False if it runs plain PyTorch.

    Args:
        device: of the op's tensors.
        op: a key of `detr_fast.ops.selfcheck.CHECKS`.

    Raises:
        ValueError, RuntimeError: see `kernels_chosen`; ``DETR_FAST_SELFCHECK`` is neither unset, ``0`` nor ``1``.
    """
    if not kernels_chosen(device):
        return False
    selfcheck = os.environ.get("DETR_FAST_SELFCHECK", "")
    if selfcheck not in _SELFCHECKS:
        raise ValueError(f"DETR_FAST_SELFCHECK is {selfcheck!r}; expected '0', '1' or unset")
    is_checked = selfcheck != "0" if device.type == "cuda" else selfcheck == "1"
    if not is_checked or forced is not None:
        return True
    from detr_fast.ops.selfcheck import is_trusted  # it calls the ops

    return is_trusted(op, device)


def calls_plainly(tensor: torch.Tensor) -> bool:
    """True if an op on `tensor` is to call its plain PyTorch itself (in an autograd function if it has gradients).

    Kernels and whatever traces need an op of torch's library. In eager mode on a CPU its layers of Python only cost
    time: more than a small image's convolution.
    """
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0  # fake tensors, counters of operators
        and not torch._C._are_functorch_transforms_active()  # vmap and the like, which ops refuse
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)  # gradients of `is_grads_batched`
        and not kernels_chosen(tensor.device)
    )


def refuse_transforms(op: str, *tensors: torch.Tensor) -> None:
    """Raise where `op` would lose the tangents of forward-mode differentiation or fail inside `torch.func`.

    An op with a backward formula alone gives tangents of zero without a word.

    Raises:
        NotImplementedError: a tensor carries a tangent, or is one of `torch.func`'s or `torch.vmap`'s.
    """
    if torch.compiler.is_compiling():
        return
    if not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0:
        return
    for tensor in tensors:
        # `debug_unwrap` gives back any tensor but a transform's, which it opens.
        if torch.func.debug_unwrap(tensor) is not tensor or forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                f"{op} does not support vmap, forward-mode derivatives or torch.func's transforms (grad, jvp, jacrev, "
                "...); expected plain tensors: differentiate with torch.autograd"
            )
