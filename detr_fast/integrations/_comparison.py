"""A model or module run on an example, and how far two results are from each other."""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from detr_fast.integrations._swapped import attends_to_projected, mask_of
from detr_fast.nested_tensor import is_nested_tensor


def gradients_of(output: Any, sources: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Of the output times random numbers, for every source that requires a gradient; zeros where none arrives."""
    outputs = [x for x in tensors_in(output) if x.requires_grad]
    sources = [x for x in sources if x.requires_grad]
    if not outputs or not sources:
        return []
    cotangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) for x in outputs]
    found = torch.autograd.grad(outputs, sources, cotangents, allow_unused=True)
    return [torch.zeros_like(x) if gradient is None else gradient for gradient, x in zip(found, sources, strict=True)]


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in dicts, lists, tuples, dataclasses and NestedTensors, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    if is_nested_tensor(value):
        return tensors_in([value.tensors, value.mask])
    return tensors_in(vars(value)) if is_dataclass(value) and not isinstance(value, type) else []


def difference(ours: Any, theirs: Any) -> float:
    """Largest difference relative to max(1, largest value); inf where number, shape, dtype or NaNs differ."""
    ours, theirs = tensors_in(ours), tensors_in(theirs)
    if len(ours) != len(theirs):
        return math.inf
    largest = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return math.inf
        if torch.equal(a, b) or a.numel() == 0:
            continue
        if not a.is_floating_point():
            return math.inf
        a, b = (x.detach().double() for x in (a, b))
        distance = torch.where((a == b) | (a.isnan() & b.isnan()), 0, (a - b).abs())
        relative = distance.max() / b.nan_to_num(0, 0, 0).abs().max().clamp(min=1)
        largest = max(largest, float(relative.nan_to_num(math.inf)))
    return largest


@dataclass
class Call:
    args: tuple
    kwargs: dict
    output: Any


@dataclass
class Run:
    """One forward with its gradients, and the times of another one."""

    output: Any = None
    gradients: list[Tensor] = field(default_factory=list)
    ms: float = 0.0
    module_ms: dict[nn.Module, float] = field(default_factory=dict)
    calls: dict[nn.Module, Call] = field(default_factory=dict)
    padded: bool = False


def run_of(model: nn.Module, example: Any, names: Mapping[nn.Module, str]) -> Run:
    args = example if type(example) is tuple else () if isinstance(example, dict) else (example,)
    kwargs = example if isinstance(example, dict) else {}
    run = Run()
    device = device_of(model)
    starts: dict[nn.Module, float] = {}

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() * 1e3

    def start(module, _):
        if module in names:
            starts[module] = now()

    def stop(module, call_args, call_kwargs, output):
        if module not in names:
            return
        run.module_ms[module] = run.module_ms.get(module, 0.0) + now() - starts[module]
        mask = call_kwargs.get("key_padding_mask")
        if len(call_args) > 3 and (isinstance(module, nn.MultiheadAttention) or attends_to_projected(module)):
            mask = call_args[3]
        position_mask = mask_of(call_args, call_kwargs)
        if position_mask is not None:
            run.calls.setdefault(module, Call(call_args, call_kwargs, output))
            mask = position_mask
        run.padded |= isinstance(mask, Tensor) and mask.dtype == torch.bool and bool(mask.any())

    def forward() -> Any:
        torch.manual_seed(0)
        return model(*args, **kwargs)

    with torch.random.fork_rng():
        # Once with gradients, which also warms up; once for the time of the whole; once for that of its modules. Global
        # hooks: with hooks of their own, torch's modules would run other code.
        with torch.enable_grad():
            output = forward()
            run.gradients = gradients_of(output, list(model.parameters()), torch.Generator().manual_seed(1))
            run.output = output
        with torch.no_grad():
            begun = now()
            forward()
            run.ms = now() - begun
            handles = [register_module_forward_pre_hook(start), register_module_forward_hook(stop, with_kwargs=True)]
            try:
                forward()
            finally:
                for handle in handles:
                    handle.remove()
    return run


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and full float32 precision; afterwards each module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    # Not `set_float32_matmul_precision`: its getter raises where somebody has set these.
    products = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    precisions = [product.fp32_precision for product in products]
    model.eval()
    for product in products:
        product.fp32_precision = "ieee"
    try:
        yield
    finally:
        for product, precision in zip(products, precisions, strict=True):
            product.fp32_precision = precision
        for module, training in modes.items():
            module.training = training


def device_of(module: nn.Module) -> torch.device:
    tensor = next(iter([*module.parameters(), *module.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device
