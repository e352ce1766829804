"""`patch`: the fused modules inside somebody else's built model, where they compute the same.

A module is swapped by giving the instance another class: a subclass of its own with our `forward`. Nothing is stored
on the instance, so that parameters, state-dict, hooks and the printed model stay what they are.
"""

import copy
import functools
import inspect
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from detr_fast.layers.attention import MultiheadAttention
from detr_fast.layers.norm import FrozenBatchNorm2d
from detr_fast.nested_tensor import is_nested_tensor
from detr_fast.ops.attention import attention
from detr_fast.ops.sine_position import sine_position

_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


class PatchError(RuntimeError):
    """The patched model as a whole did not equal the original; the model has been restored. `report` says more."""

    def __init__(self, message: str, report: "PatchReport"):
        super().__init__(message)
        self.report = report


@dataclass
class ModuleReport:
    """What became of one module.

    Args:
        name: as in `model.named_modules()`.
        class_name: of the original.
        kind: "attention", "position" or "norm".
        taken: whether our forward runs in it.
        reason: why, or why not.
        error: largest difference on tiny inputs, outputs and gradients, relative to the largest value where that is
            above 1; inf where shapes or dtypes differ; None where nothing could be compared.
        ms_before, ms_after: milliseconds of its calls in one forward of the example; None where it is not called.
    """

    name: str
    class_name: str
    kind: str
    taken: bool = False
    reason: str = ""
    error: float | None = None
    ms_before: float | None = None
    ms_after: float | None = None


@dataclass
class PatchReport:
    """One line per module, and the whole model; printing it shows a table. Errors are measured as in `ModuleReport`."""

    modules: list[ModuleReport]
    output_error: float = 0.0
    gradient_error: float = 0.0
    ms_before: float = 0.0
    ms_after: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def taken(self) -> list[str]:
        """Names of the modules that run our forward."""
        return [module.name for module in self.modules if module.taken]

    def __str__(self) -> str:
        head = ("module", "class", "taken or refused", "error", "ms before", "ms after", "why")
        rows = [
            (
                module.name or "(the model)",
                module.class_name,
                "taken" if module.taken else "refused",
                _text(module.error, ".1e"),
                _text(module.ms_before, ".3f"),
                _text(module.ms_after, ".3f"),
                module.reason,
            )
            for module in self.modules
        ]
        whole = max(self.output_error, self.gradient_error)
        rows.append(
            ("whole model", "", "", f"{whole:.1e}", f"{self.ms_before:.3f}", f"{self.ms_after:.3f}",
             f"outputs {self.output_error:.1e}, gradients {self.gradient_error:.1e}")
        )  # fmt: skip
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
        return "\n".join(line.rstrip() for line in (*table, *self.notes))


def patch(model: nn.Module, example: Any, *, tolerance: float = 1e-5) -> PatchReport:
    """Swap attention, sine position embeddings and frozen batch norms for ours, each where it computes the same.

    Modules are found by what they compute, not by their name. Each is compared on tiny inputs, outputs and gradients;
    then the whole model on `example`, in eval mode. Keys of the state dict, parameters, hooks, deepcopy, pickling and
    DDP are as before; `unpatch` undoes it.

    A patched attention that is called without `need_weights` gives None instead of the weights, unless a forward hook
    on it might read them. With `need_weights=True`, an `attn_mask` or a float mask its own forward runs.

    Args:
        model: on its device, in float32 or float64 (convert it afterwards).
        example: its input. A tuple holds positional arguments, a dict keyword arguments; anything else is the one
            argument. It should hold padding, as from images of two sizes.
        tolerance: largest allowed error, as in `ModuleReport`.

    Returns:
        The report; print it.

    Raises:
        ValueError: the model is patched already, has parameters of another dtype, or returns no tensors.
        PatchError: the whole differs, or fails, with the swapped modules. The model is what it was.
    """
    _check_model(model)
    with _evaluating(model):
        names = {module: name for name, module in model.named_modules()}
        before = _run(model, example, names)
        if not _tensors(before.output):
            raise ValueError(f"the model returned a {type(before.output).__name__}; expected tensors to compare")
        report = PatchReport([], ms_before=before.ms)
        if not before.padded:
            report.notes.append("The example has no padding: padded inputs were not compared on the whole model.")
        swaps: dict[nn.Module, type] = {}
        for module, name in names.items():
            call = before.calls.get(module)
            kind = _kind(module, call)
            if kind is None:
                continue
            line = ModuleReport(name, type(module).__name__, kind, ms_before=before.module_ms.get(module))
            report.modules.append(line)
            swap = _judge(module, kind, call, tolerance, line)
            if swap is not None:
                swaps[module] = swap
        try:
            for module, cls in swaps.items():
                module.__class__ = cls
            after = _run(model, example, names)
            report.ms_after = after.ms
            for line in report.modules:
                line.ms_after = after.module_ms.get(model.get_submodule(line.name)) if line.taken else None
            report.output_error = _error(after.output, before.output)
            report.gradient_error = _error(after.gradients, before.gradients)
            if not max(report.output_error, report.gradient_error) <= tolerance:
                raise _restored(
                    f"the patched model differs: outputs by {report.output_error:.1e}, gradients by "
                    f"{report.gradient_error:.1e}; allowed are {tolerance:.1e}",
                    report,
                )
        except Exception as error:
            unpatch(model)
            if isinstance(error, PatchError):
                raise
            raise _restored(f"the patched model fails with {_first_line(error)}", report) from error
        except BaseException:
            unpatch(model)
            raise
    return report


def unpatch(model: nn.Module) -> None:
    """Give every module that `patch` swapped its own class back."""
    for module in model.modules():
        if isinstance(module, _Patched):
            module.__class__ = type(module)._original


class _Patched:
    """A swapped module. The class, not the instance, knows what it was."""

    _kind: str
    _original: type
    _settings: tuple

    def __reduce_ex__(self, protocol):
        # The class is made at run time: a copy, or another process, makes it again from the original one.
        _, (cls, *args), *rest = super().__reduce_ex__(max(int(protocol), 2))
        return _new, (cls._kind, cls._original, cls._settings, *args), *rest


class _Attention(_Patched, MultiheadAttention):
    def forward(
        self, query, key, value, key_padding_mask=None, need_weights=None, attn_mask=None,
        average_attn_weights=True, is_causal=False,
    ):  # fmt: skip
        if not _fused(self, query, key, value, key_padding_mask, need_weights, attn_mask) or is_causal:
            need_weights = need_weights is None or need_weights
            # Past MultiheadAttention: the original's own forward.
            return super(MultiheadAttention, self).forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        return super().forward(query, key, value, key_padding_mask)


class _ProjectedAttention(_Patched):
    """Of queries and keys [L, B, embed_dim] and values [L, B, vdim] that are projected already."""

    def forward(self, query, key, value, key_padding_mask=None, need_weights=None, attn_mask=None):
        if not _fused(self, query, key, value, key_padding_mask, need_weights, attn_mask):
            need_weights = need_weights is None or need_weights
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask)
        # [L, B, H * D] to [B, H, L, D]
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3) for x in (query, key, value))
        out, _ = attention(q, k, v, key_padding_mask, self.dropout if self.training else 0.0)
        return self.out_proj(out.permute(2, 0, 1, 3).flatten(2)), None


class _SinePosition(_Patched):
    def forward(self, *args, **kwargs):
        mask = _mask_of(args, kwargs)
        if mask is None:
            return super().forward(*args, **kwargs)
        return sine_position(mask, None, *self._settings)[0]


class _Norm(_Patched):
    def forward(self, x):
        # Others were not compared: ours broadcasts over [B, C, H, W] alone.
        return FrozenBatchNorm2d.forward(self, x) if x.dim() == 4 else super().forward(x)  # type: ignore[arg-type]


_CLASSES = {
    "attention": _Attention,
    "projected attention": _ProjectedAttention,
    "position": _SinePosition,
    "norm": _Norm,
}


@functools.cache
def _patched_class(kind: str, original: Any, settings: tuple = ()) -> Any:
    names = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_kind": kind,
        "_original": original,
        "_settings": settings,
    }
    return type(original.__name__, (_CLASSES[kind], original), names)


def _new(kind: str, original: type, settings: tuple) -> nn.Module:
    cls = _patched_class(kind, original, settings)
    return nn.Module.__new__(cls)


def _fused(module, query, key, value, key_padding_mask, need_weights, attn_mask) -> bool:
    """Whether a call is one that the fused op computes."""
    if need_weights or attn_mask is not None or any(x.is_nested for x in (query, key, value)):
        return False
    if need_weights is None and module._forward_hooks:
        return False  # the default is to give weights, and a hook may read them
    return key_padding_mask is None or key_padding_mask.dtype == torch.bool


def _mask_of(args: tuple, kwargs: Mapping) -> Tensor | None:
    """The mask [B, h, w] in a call with a NestedTensor, a mask, or features and a mask; None for any other call."""
    values = [*args, *kwargs.values()]
    if len(values) == 1 and is_nested_tensor(values[0]):
        values = [values[0].mask]
    elif len(values) == 2 and isinstance(values[0], Tensor) and values[0].is_floating_point():
        values = values[1:]
    if len(values) != 1 or not isinstance(values[0], Tensor):
        return None
    mask = values[0]
    return mask if mask.dtype == torch.bool and mask.dim() == 3 else None


def _kind(module: nn.Module, call: "_Call | None") -> str | None:
    """What the module may be; whether it is, the comparison decides."""
    if isinstance(module, MultiheadAttention | FrozenBatchNorm2d | torch.jit.ScriptModule):
        return None
    if isinstance(module, nn.MultiheadAttention) or _attends_to_projected(module):
        return "attention"
    norm = [x for name in _NORM_TENSORS if isinstance(x := getattr(module, name, None), Tensor) and x.dim() == 1]
    if len(norm) == len(_NORM_TENSORS) and len({len(x) for x in norm}) == 1:
        return "norm"
    if call is None or next(module.parameters(), None) is not None or next(module.children(), None) is not None:
        return None
    mask, out = _mask_of(call.args, call.kwargs), call.output
    if mask is not None and isinstance(out, Tensor) and out.dim() == 4 and out.is_floating_point():
        return "position" if (len(out), *out.shape[2:]) == mask.shape and out.shape[1] % 2 == 0 else None
    return None


def _attends_to_projected(module: nn.Module) -> bool:
    out = getattr(module, "out_proj", None)
    if not isinstance(out, nn.Linear) or list(module.parameters()) != list(out.parameters()):
        return False
    return all(isinstance(getattr(module, name, None), int) for name in ("num_heads", "embed_dim", "vdim"))


def _judge(module: nn.Module, kind: str, call: "_Call | None", tolerance: float, line: ModuleReport) -> type | None:
    """The class to give the module, or None; `line` says why."""
    if "forward" in vars(module):
        line.reason = "its forward is replaced on the instance"
        return None
    try:
        if kind == "attention":
            cls, line.error, where = _judge_attention(module, tolerance)
        elif kind == "norm":
            cls, line.error, where = _judge_norm(module, tolerance)
        else:
            assert call is not None  # `_kind` has seen it
            cls, line.error, where = _judge_position(module, call, tolerance)
    except Exception as error:
        line.reason = f"cannot be compared: {_first_line(error)}"
        return None
    if not line.error <= tolerance:
        line.reason = f"differs {where}: by {line.error:.1e}" if math.isfinite(line.error) else f"differs {where}"
        return None
    line.taken, line.reason = True, where
    if line.ms_before is None:
        line.reason += "; not called by the example"
    return cls


def _judge_attention(module: Any, tolerance: float) -> tuple[type, float, str]:
    original: Any = type(module)
    projected = not isinstance(module, nn.MultiheadAttention)
    cls = _patched_class("projected attention" if projected else "attention", original)
    expected, got = (list(inspect.signature(c.forward).parameters) for c in (cls, original))
    if got != expected:
        raise TypeError(f"its forward takes {', '.join(got[1:])}; expected {', '.join(expected[1:])}")
    if inspect.signature(original.forward).parameters["need_weights"].default is not True:
        raise TypeError("its forward gives no weights unless asked; expected need_weights=True as the default")
    if not isinstance(module.dropout, float | int):
        raise TypeError(f"its dropout is a {type(module.dropout).__name__}; expected a probability")

    generator = torch.Generator().manual_seed(0)
    theirs = _tiny_copy(module, generator)
    theirs.dropout = 0.0  # dropped elements differ; everything else is the same in training
    batch_first = getattr(module, "batch_first", False)
    widths = (module.embed_dim, module.embed_dim if projected else module.kdim, module.vdim)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])  # [B, Lk], True = padding
    largest, worst = 0.0, ""
    for name, lengths, mask, options in (
        ("without padding", (3, 5, 5), None, {}),
        ("with padded keys", (3, 5, 5), padding, {}),
        ("with queries as long as keys", (5, 5, 5), padding, {}),
        ("with weights", (3, 5, 5), padding, {"need_weights": True}),
    ):
        inputs = [
            torch.randn((2, n, width) if batch_first else (n, 2, width), generator=generator)
            for n, width in zip(lengths, widths, strict=True)
        ]
        mask = None if mask is None else mask.to(_device(module))
        arguments = {"key_padding_mask": mask, "need_weights": False, **options}
        for training in (False, True):
            error = _compare(theirs.train(training), cls, inputs, generator, **arguments)
            if error >= largest:
                largest, worst = error, f"{name} in {'training' if training else 'eval'} mode"
    what = "projected queries and keys" if projected else "batch first" if batch_first else "length first"
    return cls, largest, what if largest <= tolerance else worst


def _judge_norm(module: Any, tolerance: float) -> tuple[type, float, str]:
    generator = torch.Generator().manual_seed(0)
    theirs = _tiny_copy(module, generator)
    channels = len(module.weight)
    cls = _patched_class("norm", module.__class__)
    largest, worst = 0.0, ""
    for training in (False, True):
        x = torch.randn(2, channels, 3, 4, generator=generator)
        with torch.no_grad():  # small variances, beside which eps counts
            theirs.running_var.copy_(torch.logspace(-6, 0, channels))
        error = _compare(theirs.train(training), cls, [x], generator)
        if error >= largest:
            largest, worst = error, f"in {'training' if training else 'eval'} mode"
    return cls, largest, "frozen" if largest <= tolerance else worst


def _judge_position(module: Any, call: "_Call", tolerance: float) -> tuple[type, float, str]:
    features = call.output.shape[1] // 2
    temperatures = [getattr(module, name, None) for name in ("temperature", "temperatureH")] + [10000]
    normalizes = [module.normalize] if isinstance(getattr(module, "normalize", None), bool) else [True, False]
    scale = getattr(module, "scale", None)
    scale = float(scale) if isinstance(scale, float | int) else 2 * math.pi
    masks = [torch.zeros(3, 7, 9, dtype=torch.bool), torch.ones(3, 7, 9, dtype=torch.bool)]
    for image, (height, width) in enumerate([(7, 5), (4, 9), (1, 1)]):
        masks[1][image, :height, :width] = False
    best, best_error, where = type(module), math.inf, "for every setting tried"
    for temperature in dict.fromkeys(float(t) for t in temperatures if isinstance(t, float | int)):
        for normalize in normalizes:
            settings = (features, temperature, normalize, scale if normalize else None)
            cls = _patched_class("position", module.__class__, settings)
            theirs = _tiny_copy(module, None)
            ours = _as_class(theirs, cls)
            error = 0.0
            for mask in masks:
                for dtype in (torch.float32, torch.bfloat16):  # of the features, which may decide the output's
                    args, kwargs = _tiny_call(call, mask.to(call.output.device), dtype)
                    error = max(error, _error(ours(*args, **kwargs), theirs(*args, **kwargs)))
            if error < best_error:
                best, best_error = cls, error
                where = f"temperature {temperature:g}, " + (f"scale {scale:.4g}" if normalize else "not normalized")
    return best, best_error, where if best_error <= tolerance else f"from the sine embedding ({where})"


def _tiny_copy(module: nn.Module, generator: torch.Generator | None) -> Any:
    """A copy without hooks, in float32, with random parameters: zeros, as some begin with, would hide differences."""
    twin = copy.deepcopy(module).float()
    for part in twin.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(part, name).clear()
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers()] if generator is not None else []:
            if tensor.is_floating_point():
                values = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(values * tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else values)
    return twin


def _as_class(module: nn.Module, cls: type) -> Any:
    ours = copy.deepcopy(module)
    ours.__class__ = cls
    return ours


def _tiny_call(call: "_Call", mask: Tensor, dtype: torch.dtype) -> tuple[tuple, dict]:
    """The recorded call with a tiny mask, and features of its size."""

    def tiny(value):
        if not isinstance(value, Tensor):  # a NestedTensor
            nested = copy.copy(value)
            nested.tensors, nested.mask = tiny(value.tensors), mask
            return nested
        if value.dtype == torch.bool:
            return mask
        return torch.zeros(len(mask), value.shape[1], *mask.shape[1:], dtype=dtype, device=value.device)

    return tuple(tiny(value) for value in call.args), {name: tiny(value) for name, value in call.kwargs.items()}


def _compare(theirs: nn.Module, cls: type, inputs: list[Tensor], generator: torch.Generator, **arguments) -> float:
    """Largest error of outputs and of gradients of inputs and parameters."""
    ours = _as_class(theirs, cls)
    state = generator.get_state()
    results = []
    for module in (ours, theirs):
        generator.set_state(state)
        arrived = [x.to(_device(module)).requires_grad_() for x in inputs]
        output = module(*arrived, **arguments)
        gradients = _gradients(output, [*arrived, *module.parameters()], generator)
        results.append((output, gradients, list(module.buffers())))
    return _error(*results)


def _gradients(output: Any, sources: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Of the output times random numbers, for every source that requires a gradient; zeros where none arrives."""
    outputs = [x for x in _tensors(output) if x.requires_grad]
    sources = [x for x in sources if x.requires_grad]
    if not outputs or not sources:
        return []
    cotangents = [torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) for x in outputs]
    found = torch.autograd.grad(outputs, sources, cotangents, allow_unused=True)
    return [torch.zeros_like(x) if gradient is None else gradient for gradient, x in zip(found, sources, strict=True)]


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor in dicts, lists, tuples, dataclasses and NestedTensors, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    if is_nested_tensor(value):
        return _tensors([value.tensors, value.mask])
    return _tensors(vars(value)) if is_dataclass(value) and not isinstance(value, type) else []


def _error(ours: Any, theirs: Any) -> float:
    """Largest difference relative to max(1, largest value); inf where number, shape, dtype or NaNs differ."""
    ours, theirs = _tensors(ours), _tensors(theirs)
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
        difference = torch.where((a == b) | (a.isnan() & b.isnan()), 0, (a - b).abs())
        relative = difference.max() / b.nan_to_num(0, 0, 0).abs().max().clamp(min=1)
        largest = max(largest, float(relative.nan_to_num(math.inf)))
    return largest


@dataclass
class _Call:
    args: tuple
    kwargs: dict
    output: Any


@dataclass
class _Run:
    """One forward with its gradients, and the times of another one."""

    output: Any = None
    gradients: list[Tensor] = field(default_factory=list)
    ms: float = 0.0
    module_ms: dict[nn.Module, float] = field(default_factory=dict)
    calls: dict[nn.Module, _Call] = field(default_factory=dict)
    padded: bool = False


def _run(model: nn.Module, example: Any, names: Mapping[nn.Module, str]) -> _Run:
    args = example if type(example) is tuple else () if isinstance(example, dict) else (example,)
    kwargs = example if isinstance(example, dict) else {}
    run = _Run()
    device = _device(model)
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
        if len(call_args) > 3 and (isinstance(module, nn.MultiheadAttention) or _attends_to_projected(module)):
            mask = call_args[3]
        position_mask = _mask_of(call_args, call_kwargs)
        if position_mask is not None:
            run.calls.setdefault(module, _Call(call_args, call_kwargs, output))
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
            run.gradients = _gradients(output, list(model.parameters()), torch.Generator().manual_seed(1))
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
def _evaluating(model: nn.Module) -> Iterator[None]:
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


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected an nn.Module")
    if any(isinstance(module, _Patched) for module in model.modules()):
        raise ValueError("the model is patched already; call unpatch(model) first")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {parameter.dtype}; expected float32, in which outputs are compared: patch the model first, "
                "convert it afterwards"
            )


def _restored(message: str, report: PatchReport) -> PatchError:
    for line in report.modules:
        line.taken = False
        line.reason = line.reason if line.ms_after is None else f"{line.reason}; restored, as the whole differs"
    return PatchError(f"{message}. The model is restored: nothing is patched", report)


def _device(module: nn.Module) -> torch.device:
    tensor = next(iter([*module.parameters(), *module.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
