"""Each kernel compared with plain PyTorch on small inputs: for a GPU, driver or Triton that nobody has measured.

`use_kernel` asks `is_trusted` before an op's first launch on a GPU. A kernel that does not compile, runs out of shared
memory or gives other numbers is replaced by plain PyTorch for the rest of the process, and one printed line says so.
Verdicts are kept in a file, so that the next process does not compare again. ``DETR_FAST_SELFCHECK=0`` skips all this;
``1`` compares once in every process, with Triton's interpreter as well, and reads and writes no file.

A kernel that reads memory out of bounds may end the process; that cannot be caught.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from detr_fast import __version__
from detr_fast.ops import _dispatch

# Largest |kernel - exact| allowed, as a share of the largest |exact|: a few times what rounding gives (of float32
# products TF32's). A wrong index, mask, scale or tile gives far more.
_TOLERANCES = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Outputs = list[torch.Tensor]


@dataclass(frozen=True)
class Check:
    """How an op is compared.

    Attributes:
        run: (dtype, device) → outputs and gradients, the same numbers in float64 whatever the dtype.
        dtypes: what its kernel takes.
        exact_dtype: in which plain PyTorch computes what is right.
    """

    run: Callable[[torch.dtype, torch.device], Outputs]
    dtypes: tuple[torch.dtype, ...]
    exact_dtype: torch.dtype | None = torch.float64


@dataclass(frozen=True)
class Verdict:
    """What a comparison found.

    Attributes:
        op, dtype: what was compared.
        error: largest difference, as a share of the largest value; None where the kernel failed.
        problem: why the kernel is not to be used; empty if it is.
        seconds, reference_seconds: of a second call each, kernel and plain PyTorch; None where the kernel failed.
    """

    op: str
    dtype: str
    error: float | None
    problem: str
    seconds: float | None = None
    reference_seconds: float | None = None


def compare(op: str, device: torch.device, dtype: torch.dtype) -> Verdict:
    """Runs an op's kernel and plain PyTorch on small inputs. What the kernel raises is part of the verdict."""
    check, name = CHECKS[op], str(dtype).removeprefix("torch.")
    exact_dtype = check.exact_dtype or dtype
    with _forced("torch"):
        exact = _in_fresh_thread(check.run, exact_dtype, device)
        reference_seconds = _seconds(check, dtype, device)
    try:
        with _forced("triton"):
            found = _in_fresh_thread(check.run, dtype, device)
            seconds = _seconds(check, dtype, device)
    except Exception as error:  # the compiler, the launcher and the driver each raise their own
        first_line = (str(error).strip().splitlines() or [""])[0]
        return Verdict(op, name, None, f"{type(error).__name__}: {first_line}"[:300])
    error = max(_error(*pair) for pair in zip(found, exact, strict=True))
    limit = _TOLERANCES[dtype]
    problem = "" if error <= limit else f"differs from plain PyTorch by {error:.2g} of the largest value, limit {limit}"
    return Verdict(op, name, error, problem, seconds, reference_seconds)


def dtypes_of(op: str, device: torch.device) -> list[torch.dtype]:
    """Those in which an op's kernel is compared on a device: bfloat16 only where the GPU has it."""
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return [dtype for dtype in CHECKS[op].dtypes if has_bf16 or dtype != torch.bfloat16]


class Trust:
    """Which ops' kernels have been found right on which devices; see the module.

    Args:
        folder: where verdicts are kept between processes; None for nowhere.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder
        self._verdicts: dict[tuple[str, str], bool] = {}
        self._lock = threading.Lock()

    def __call__(self, op: str, device: torch.device) -> bool:
        """Whether to launch an op's kernel. Compares it with plain PyTorch if that is not known yet."""
        if device.type == "cuda" and not torch.cuda.is_available():
            return True  # fake tensors: nothing is launched
        key = op, _name_of(device)
        if key in self._verdicts:
            return self._verdicts[key]
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return True  # nothing may be launched beside what is captured
        with self._lock:
            if key not in self._verdicts:
                self._verdicts[key] = self._known(op, device) or self._compare(op, device)
        return self._verdicts[key]

    def _known(self, op: str, device: torch.device) -> bool:
        path = self._path(device)
        try:
            return path is not None and op in json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            return False

    def _compare(self, op: str, device: torch.device) -> bool:
        verdicts = [compare(op, device, dtype) for dtype in dtypes_of(op, device)]
        bad = [verdict for verdict in verdicts if verdict.problem]
        if bad:
            print(
                f"detr_fast: the {op} kernel does not work on {_name_of(device)} ({bad[0].dtype}: {bad[0].problem}); "
                "plain PyTorch takes its place. Please report this with the output of `detr-fast doctor`.",
                file=sys.stderr,
                flush=True,
            )
            return False
        path = self._path(device)
        if path is not None:
            with contextlib.suppress(OSError, ValueError, TypeError):
                known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
                path.parent.mkdir(parents=True, exist_ok=True)
                temporary = path.with_suffix(f".{os.getpid()}")
                temporary.write_text(json.dumps(sorted({*known, op})), encoding="utf-8")
                temporary.replace(path)
        return True

    def _path(self, device: torch.device) -> Path | None:
        if self._folder is None or device.type != "cuda" or os.environ.get("DETR_FAST_SELFCHECK") == "1":
            return None
        import triton  # its version is the module's: the package may have another name

        parts = (_name_of(device), _driver(), triton.__version__, torch.__version__, __version__)
        return self._folder / ("-".join(part.replace("/", "_").replace(" ", "_") for part in parts) + ".json")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "detr_fast" / "selfcheck"


def _name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton's interpreter"


def _driver() -> str:
    return str(torch._C._cuda_getDriverVersion()) if hasattr(torch._C, "_cuda_getDriverVersion") else "unknown"


@contextlib.contextmanager
def _forced(choice: str) -> Iterator[None]:
    """Inside, all ops take their kernels, or none does."""
    former, _dispatch.forced = _dispatch.forced, choice
    try:
        yield
    finally:
        _dispatch.forced = former


def _in_fresh_thread(run: Callable, *args):
    """In the midst of an op autograd is off, and modes may be on; both are a thread's own."""
    results, errors = [], []

    def body() -> None:
        try:
            results.append(run(*args))
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _seconds(check: Check, dtype: torch.dtype, device: torch.device) -> float:
    began = time.perf_counter()
    _in_fresh_thread(check.run, dtype, device)  # its results are read: nothing is left to wait for
    return time.perf_counter() - began


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference as a share of the largest value; infinite where one is not finite and the other is."""
    found, exact = found.double().cpu(), exact.double().cpu()
    if found.shape != exact.shape:
        return torch.inf
    finite = exact.isfinite()
    if not torch.allclose(found[~finite], exact[~finite], equal_nan=True) or not found[finite].isfinite().all():
        return torch.inf
    largest = exact[finite].abs().max().item() if finite.any() else 0.0
    difference = (found - exact)[finite].abs().max().item() if finite.any() else 0.0
    return difference / largest if largest else (0.0 if difference == 0 else torch.inf)


# The inputs: drawn on the CPU with a generator of their own, so that a comparison leaves the global one alone, and
# rounded to bfloat16, so that every dtype holds the same numbers.


def _drawn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator).bfloat16().double()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _padding(lengths: tuple[int, ...], length: int, device: torch.device) -> torch.Tensor:
    return torch.arange(length, device=device) >= torch.tensor(lengths, device=device)[:, None]


def _with_gradients(outputs: Outputs, inputs: Outputs) -> Outputs:
    weights = [_drawn(_generator(), *output.shape).to(output) for output in outputs]
    gradients = torch.autograd.grad(outputs, inputs, weights)
    return [x.detach().cpu() for x in (*outputs, *gradients)]


def _attention(dtype: torch.dtype, device: torch.device) -> Outputs:
    from detr_fast.ops.attention import attention

    generator = _generator()
    shapes = ((2, 1, 65, 32), (2, 1, 130, 32), (2, 1, 130, 32))
    inputs = [_drawn(generator, *shape).to(device, dtype).requires_grad_() for shape in shapes]
    keys, queries = _padding((130, 71), 130, device), _padding((65, 40), 65, device)
    results: Outputs = []
    for dropout, rows in ((0.0, None), (0.1, queries)):
        seed = torch.tensor([5], device=device)
        out, logsumexp = attention(*inputs, keys, dropout, seed=seed, query_padding_mask=rows)
        results += [*_with_gradients([out], inputs), logsumexp.detach().cpu()]
    return results


def _sine_position(dtype: torch.dtype, device: torch.device) -> Outputs:
    from detr_fast.ops.sine_position import sine_position

    mask = torch.ones(2, 37, 50, dtype=torch.bool, device=device)
    mask[0, :37, :41], mask[1, :20, :50] = False, False
    position, resized = sine_position(mask, (9, 13), 16, normalize=True, dtype=dtype)
    return [position.cpu(), resized.cpu()]


def _pad_collate(dtype: torch.dtype, device: torch.device) -> Outputs:
    from detr_fast.ops.pad_collate import pad_collate

    generator, mean, std = _generator(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    sizes = ((3, 33, 70), (3, 40, 21))
    pixels = [torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(device) for size in sizes]
    packed = pad_collate(pixels, mean=mean, std=std, dtype=dtype, channels_last=True, size_divisor=8)
    images = [_drawn(generator, *size).to(device, dtype).requires_grad_() for size in sizes]
    batch, mask = pad_collate(images, mean=mean, std=std)
    return [*(x.cpu() for x in packed), mask.cpu(), *_with_gradients([batch], images)]


def _joint_softmax(dtype: torch.dtype, device: torch.device) -> Outputs:
    from detr_fast.ops.joint_softmax import joint_softmax

    scores = _drawn(_generator(), 2, 5, 3, 77).to(device, dtype).requires_grad_()
    return _with_gradients([joint_softmax(scores, _padding((77, 31), 77, device))], [scores])


def _pointwise_conv(dtype: torch.dtype, device: torch.device) -> Outputs:
    from detr_fast.ops.pointwise_conv import pointwise_conv, pointwise_conv_input_grad

    generator, results = _generator(), []
    # A ragged tile, a narrow output, whole steps: the launcher's configurations.
    for channels, filters in ((40, 72), (64, 64), (64, 136)):
        shapes = ((2, channels, 9, 11), (filters, channels, 1, 1), (filters,), (2, filters, 9, 11))
        inputs = [_drawn(generator, *shape).to(device, dtype) for shape in shapes]
        inputs = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in inputs]
        inputs = [t.requires_grad_() for t in inputs]
        # Gradients without the ReLU: rounding decides on which side of zero a sum lies.
        results += _with_gradients([pointwise_conv(*inputs, relu=False)], inputs)
        results.append(pointwise_conv(*inputs).detach().cpu())
        gate, weight, _, grad = (t.detach() for t in inputs)
        results.append(pointwise_conv_input_grad(grad, weight, gate.flip(3), gate).cpu())
    return results


def _problem(dtype: torch.dtype, device: torch.device) -> Outputs:
    generator = _generator()
    logits = _drawn(generator, 2, 2, 20, 6).to(device, dtype)
    boxes = torch.rand(2, 2, 20, 4, generator=generator).to(device, dtype) * 0.5 + 0.1
    labels = torch.randint(0, 5, (12,), generator=generator).to(device)
    target_boxes = torch.rand(12, 4, generator=generator).to(device, dtype) * 0.5 + 0.1
    return [logits, boxes, labels, target_boxes, torch.tensor([0, 7, 12], device=device)]


def _matching_cost(dtype: torch.dtype, device: torch.device) -> Outputs:
    from detr_fast.ops.matching_cost import matching_cost

    return [matching_cost(*_problem(dtype, device), 1.0, 5.0, 2.0).cpu()]


def _assign(dtype: torch.dtype, device: torch.device) -> Outputs:
    from detr_fast.ops.assignment import assign

    cost = _drawn(_generator(), 2, 12, 20).to(device, dtype)
    query, status = assign(cost, torch.tensor([0, 7, 12], device=device), 7)
    # Where costs tie, the choice may differ, the total may not.
    total = cost.double().gather(2, query[:, :, None].clamp(min=0)).sum(dim=1)
    return [total.cpu(), status.cpu(), (query >= 0).cpu()]


_ALL = (torch.float32, torch.bfloat16, torch.float16)

CHECKS = {
    "pad_collate": Check(_pad_collate, _ALL),
    "sine_position": Check(_sine_position, _ALL),
    "attention": Check(_attention, _ALL),
    "joint_softmax": Check(_joint_softmax, _ALL),
    "pointwise_conv": Check(_pointwise_conv, _ALL),
    "matching_cost": Check(_matching_cost, (torch.float32,), exact_dtype=torch.float32),
    "assign": Check(_assign, (torch.float32,), exact_dtype=torch.float32),
}

is_trusted = Trust(_cache_folder())
