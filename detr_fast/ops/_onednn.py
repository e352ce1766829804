"""oneDNN called by name, where PyTorch would not choose it or would not fuse: on x86 CPUs.

PyTorch gives float32 matrix products to MKL, which takes twice oneDNN's time or more on CPUs of AMD, and on one thread
1x1 convolutions of small batches to a loop over such products.
"""

import platform

import torch
from torch import Tensor

_OPS = ("_linear_pointwise", "_convolution_pointwise", "_convolution_pointwise_")
# torch 2.11's fused convolution fails in some basic blocks ("could not create a memory"); tested from 2.14 on.
HAS_ONEDNN = (
    torch.__version__ >= (2, 14)
    and platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and all(hasattr(torch.ops.mkldnn, name) for name in _OPS)
)

# Multiplications from which a product is oneDNN's: with fewer, starting takes as long as multiplying.
_FEWEST = 2**22


def takes_product(rows: int, a: Tensor, b: Tensor) -> bool:
    """Whether `product` is to compute a of so many rows with b: plain float32 tensors on an x86 CPU, large enough."""
    return (
        HAS_ONEDNN
        and rows * b.numel() >= _FEWEST
        and a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and torch.backends.mkldnn.enabled
    )


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [..., K] times b [N, K] transposed, plus bias [N]: [..., N], contiguous. Not differentiable."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def convolves_slowly(x: Tensor, weight: Tensor, stride, padding, groups: int) -> bool:
    """Whether PyTorch computes this convolution without oneDNN, which is faster: 1x1, one thread, few images."""
    return (
        HAS_ONEDNN
        and x.device.type == "cpu"
        and torch.get_num_threads() == 1
        and weight.shape[2:] == (1, 1)
        and (*stride, *padding, groups) == (1, 1, 0, 0, 1)
        and x.shape[0] < 16
        and takes_product(x.shape[0] * x.shape[2] * x.shape[3], x, weight)
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The 1x1 convolution of stride 1. Not differentiable."""
    return torch.ops.aten.mkldnn_convolution(x, weight, bias, (0, 0), (1, 1), (1, 1), 1)


def convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, x_needed: bool, weight_needed: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of `convolve` in x and weight; None for one that is not needed."""
    grad_x = grad_weight = None
    if x_needed:
        grad_x = convolve(grad, weight.transpose(0, 1).contiguous(), None)
    if weight_needed:
        first, *others = (product(g, pixels) for g, pixels in zip(grad.flatten(2), x.flatten(2), strict=True))
        for other in others:
            first += other
        grad_weight = first[:, :, None, None]
    return grad_x, grad_weight
