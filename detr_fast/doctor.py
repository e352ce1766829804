"""What is installed, what the machine has, and whether every kernel computes what plain PyTorch does on it."""

import importlib.metadata
import platform

import torch

from detr_fast import __version__
from detr_fast.config import choose_device
from detr_fast.ops._dispatch import HAS_TRITON, kernels_chosen
from detr_fast.ops.selfcheck import CHECKS, Verdict, compare, dtypes_of

_PACKAGES = ("torch", "torchvision", "triton", "numpy", "scipy", "pillow", "pycocotools")


def doctor(device_name: str = "auto") -> int:
    """Prints the environment, then a line for each op and dtype that its kernel takes.

    Args:
        device_name: "auto", "cpu" or "cuda".

    Returns:
        0; 1 if a kernel fails or gives other numbers.
    """
    device = torch.device(choose_device(device_name))
    for line in environment(device):
        print(line)
    if not kernels_chosen(device):
        print(
            f"\nno kernel runs on {device.type} here: plain PyTorch does. To run the kernels without a GPU, through "
            "Triton's interpreter, set TRITON_INTERPRET=1"
        )
        return 0
    print(f"\n{'op':16}{'dtype':10}{'kernel ms':>12}{'PyTorch ms':>12}{'error':>10}  verdict")
    failed = 0
    for op in CHECKS:
        for dtype in dtypes_of(op, device):
            verdict = compare(op, device, dtype)
            failed += bool(verdict.problem)
            print(_row(verdict), flush=True)
    print("\nevery kernel agrees with plain PyTorch" if not failed else f"\n{failed} of the comparisons failed")
    if device.type == "cuda":
        print("times are of small inputs, forward and backward, with the CPU's part; detr-fast bench measures kernels")
    return int(failed > 0)


def environment(device: torch.device) -> list[str]:
    """Versions and hardware, a line each."""
    lines = [f"detr_fast {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"{name} {_version(name)}" for name in _PACKAGES]
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        lines.append(f"GPU {found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB")
        lines.append(f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    else:
        lines.append(f"no GPU is used; {torch.get_num_threads()} threads")
    return lines


def _version(package: str) -> str:
    if package == "triton" and HAS_TRITON:  # the package may have another name than the module
        import triton

        return triton.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"


def _row(verdict: Verdict) -> str:
    start = f"{verdict.op:16}{verdict.dtype:10}"
    if verdict.error is None:
        return f"{start}{'':34}  FAILED: {verdict.problem}"
    times = f"{1e3 * verdict.seconds:12.2f}{1e3 * verdict.reference_seconds:12.2f}{verdict.error:10.1e}"
    return f"{start}{times}  {'WRONG: ' + verdict.problem if verdict.problem else 'right'}"
