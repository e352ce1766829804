"""What this device can do at most, measured in the same run: copy bandwidth, matrix products, exponentials.

A row's limit is the largest of bytes / copy rate, operations / matrix rate and exponentials / exp rate, stage by stage;
its "% of ceiling" is limit / measured time.
"""

from dataclasses import dataclass

import torch

from .timing import clock_for

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton: only CPU ceilings, which do without
    triton = None

PRECISIONS = {
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
}


@dataclass(frozen=True)
class Work:
    """What one stage of an op cannot avoid: bytes moved, matrix-product operations (2 per multiply-add), exps."""

    bytes: float = 0.0
    flops: float = 0.0
    exps: float = 0.0


@dataclass(frozen=True)
class Ceilings:
    """Measured rates per second: `copy` bytes read plus written, `matmul` operations by precision, `exp` exps."""

    copy: float
    matmul: dict[str, float]
    exp: float

    def limit_seconds(self, stages: list[Work], precision: str) -> float:
        return sum(
            max(s.bytes / self.copy, s.flops / self.matmul[precision] if s.flops else 0.0, s.exps / self.exp)
            for s in stages
        )


class set_precision:
    """Context in which float32 matrix products and convolutions use TF32 exactly when `precision` is "tf32"."""

    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)

    def __init__(self, precision: str):
        self.precision = "tf32" if PRECISIONS[precision][1] else "ieee"

    def __enter__(self):
        # Not allow_tf32, which cannot be read once somebody has set this.
        self.saved = [backend.fp32_precision for backend in self.backends]
        for backend in self.backends:
            backend.fp32_precision = self.precision

    def __exit__(self, *_):
        for backend, saved in zip(self.backends, self.saved, strict=True):
            backend.fp32_precision = saved


if triton is not None:

    @triton.jit
    def _exp_rate_kernel(out_ptr, REPEATS: tl.constexpr, BLOCK: tl.constexpr):
        """Every thread takes exp2 of its numbers over and over; nothing but the exp unit can be the limit."""
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        x = offs.to(tl.float32) * 1e-9
        for _ in tl.static_range(REPEATS):
            x = tl.exp2(-x)
        tl.store(out_ptr + offs, x)


def _best(function, device: torch.device, repeats: int) -> float:
    """Shortest of `repeats` times, in seconds, after two warm-ups: a ceiling is what was reached at best."""
    function(), function()
    clock = clock_for(device)
    return min(clock.time(function) for _ in range(repeats))


def measure_ceilings(device: torch.device, precisions: list[str], quick: bool = False) -> Ceilings:
    """Measures the ceilings of `device` for the given precisions (about a second on a GPU)."""
    cuda = device.type == "cuda"
    repeats = 10 if quick else 30
    copy = _copy_rate(device, repeats)
    matmul = {}
    n = 8192 if cuda else 512
    for precision in precisions:
        a = torch.randn(n, n, device=device).to(PRECISIONS[precision][0])
        b, c = torch.randn_like(a), torch.empty_like(a)
        with set_precision(precision):
            matmul[precision] = 2 * n**3 / _best(lambda a=a, b=b, c=c: torch.mm(a, b, out=c), device, repeats)
    return Ceilings(copy, matmul, _exp_rate(device, repeats))


def _copy_rate(device: torch.device, repeats: int) -> float:
    source = torch.ones(2**29 if device.type == "cuda" else 2**25, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best(lambda: target.copy_(source), device, repeats)


def _exp_rate(device: torch.device, repeats: int) -> float:
    if device.type == "cuda":
        block, steps = 1024, 256
        programs = 32 * torch.cuda.get_device_properties(device).multi_processor_count
        out = torch.empty(programs * block, device=device)

        def run():
            _exp_rate_kernel[(programs,)](out, REPEATS=steps, BLOCK=block, num_warps=4)

        return out.numel() * steps / _best(run, device, repeats)
    x = torch.rand(2**13, device=device)
    y = torch.empty_like(x)

    def run():
        for _ in range(100):
            torch.exp2(x, out=y)

    return 100 * x.numel() / _best(run, device, repeats)
