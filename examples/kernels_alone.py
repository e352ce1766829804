"""The three ops without any model: what they return, how far they are from plain PyTorch, and how long they take.

    python examples/kernels_alone.py                      # on a GPU the kernels, on a CPU what stands in for them there
    TRITON_INTERPRET=1 python examples/kernels_alone.py   # the kernels on a CPU, through Triton's interpreter

Every result is compared with the op's reference in float64 on the same inputs.
"""

import os
from collections.abc import Callable

# Set before Triton is imported: BLAS threads slow its interpreter down.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch
from torch import Tensor

from detr_fast import attention, pad_collate, sine_position
from detr_fast.ops import attention_reference, pad_collate_reference, sine_position_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def report(name: str, ours: Tensor, reference: Tensor, limit: float) -> None:
    """Prints the largest error, relative to the largest value of the reference."""
    ours, reference = ours.detach(), reference.detach()
    error = float((ours.double() - reference.double()).abs().max() / reference.abs().max())
    print(f"{name:28} {str(list(ours.shape)):22} {str(ours.dtype)[6:]:9} largest error {error:.1e}")
    assert error < limit, f"{name}: error {error}, expected below {limit}"


def show_time(name: str, function: Callable[[], object]) -> None:
    """Prints the median time of a call on the GPU; nothing without one."""
    if DEVICE != "cuda":
        return
    times = []
    for step in range(30):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        if step >= 10:  # the first calls compile and warm up
            times.append(start.elapsed_time(end))
    print(f"{name:28} {1e3 * sorted(times)[len(times) // 2]:.1f} µs")


def main() -> None:
    torch.manual_seed(0)
    large = DEVICE == "cuda"
    sizes = [(800, 1066), (800, 1200), (704, 1066), (800, 800)] if large else [(64, 85), (64, 96), (56, 85), (64, 64)]

    # pad_collate: images of different sizes become one normalised batch and its padding mask, in one launch.
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, device=DEVICE) for size in sizes]
    batch, mask = pad_collate(images, mean=MEAN, std=STD, dtype=torch.float32)
    expected, expected_mask = pad_collate_reference(images, mean=MEAN, std=STD, dtype=torch.float64)
    report("pad_collate", batch, expected, 1e-6)
    assert torch.equal(mask, expected_mask)  # True = padding
    show_time("pad_collate", lambda: pad_collate(images, mean=MEAN, std=STD, dtype=torch.float32))

    # sine_position: from the mask at full resolution the position embedding and the mask at the feature map's size.
    size = (-(-batch.shape[2] // 8), -(-batch.shape[3] // 8))
    position, small_mask = sine_position(mask, size, num_pos_feats=128, normalize=True)
    expected, expected_mask = sine_position_reference(
        mask, size, num_pos_feats=128, normalize=True, dtype=torch.float64
    )
    report("sine_position", position, expected, 1e-4)
    assert torch.equal(small_mask, expected_mask)
    show_time("sine_position", lambda: sine_position(mask, size, num_pos_feats=128, normalize=True))

    # attention: padded keys are left out; memory does not grow with the number of query-key pairs.
    key_padding_mask = small_mask.flatten(1)  # [B, L]
    shape = (len(images), 8, key_padding_mask.shape[1], 32)  # [B, heads, L, head_dim]
    query, key, value = (torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(3))
    out, logsumexp = attention(query, key, value, key_padding_mask)
    gradient = torch.randn_like(out)
    out.backward(gradient)

    query64, key64, value64 = (tensor.detach().double().requires_grad_() for tensor in (query, key, value))
    expected, expected_logsumexp = attention_reference(query64, key64, value64, key_padding_mask)
    expected.backward(gradient.double())
    report("attention", out, expected, 1e-5)
    report("attention, logsumexp", logsumexp, expected_logsumexp, 1e-5)
    for name, ours, exact in (("query", query, query64), ("key", key, key64), ("value", value, value64)):
        assert ours.grad is not None and exact.grad is not None
        report(f"attention, gradient of {name}", ours.grad, exact.grad, 1e-5)
    show_time("attention", lambda: attention(query, key, value, key_padding_mask))
    show_time("attention + backward", lambda: attention(query, key, value, key_padding_mask)[0].backward(gradient))


if __name__ == "__main__":
    main()
