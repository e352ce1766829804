"""`patch`: the fused modules inside somebody else's built model, where they compute the same.

A module is swapped by giving the instance another class: a subclass of its own with our `forward`. Nothing is stored
on the instance, so that parameters, state-dict, hooks and the printed model stay what they are.
"""

import copy
import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.integrations._comparison import Call, device_of, difference, evaluating, gradients_of, run_of, tensors_in
from detr_fast.integrations._swapped import Patched, attends_to_projected, mask_of, patched_class
from detr_fast.layers.attention import MultiheadAttention
from detr_fast.layers.norm import FrozenBatchNorm2d

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
    with evaluating(model):
        names = {module: name for name, module in model.named_modules()}
        before = run_of(model, example, names)
        if not tensors_in(before.output):
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
            after = run_of(model, example, names)
            report.ms_after = after.ms
            for line in report.modules:
                line.ms_after = after.module_ms.get(model.get_submodule(line.name)) if line.taken else None
            report.output_error = difference(after.output, before.output)
            report.gradient_error = difference(after.gradients, before.gradients)
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
        if isinstance(module, Patched):
            module.__class__ = type(module)._original


def _kind(module: nn.Module, call: Call | None) -> str | None:
    """What the module may be; whether it is, the comparison decides."""
    if isinstance(module, MultiheadAttention | FrozenBatchNorm2d | torch.jit.ScriptModule):
        return None
    if isinstance(module, nn.MultiheadAttention) or attends_to_projected(module):
        return "attention"
    norm = [x for name in _NORM_TENSORS if isinstance(x := getattr(module, name, None), Tensor) and x.dim() == 1]
    if len(norm) == len(_NORM_TENSORS) and len({len(x) for x in norm}) == 1:
        return "norm"
    if call is None or next(module.parameters(), None) is not None or next(module.children(), None) is not None:
        return None
    mask, out = mask_of(call.args, call.kwargs), call.output
    if mask is not None and isinstance(out, Tensor) and out.dim() == 4 and out.is_floating_point():
        return "position" if (len(out), *out.shape[2:]) == mask.shape and out.shape[1] % 2 == 0 else None
    return None


def _judge(module: nn.Module, kind: str, call: Call | None, tolerance: float, line: ModuleReport) -> type | None:
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
    cls = patched_class("projected attention" if projected else "attention", original)
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
        mask = None if mask is None else mask.to(device_of(module))
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
    cls = patched_class("norm", module.__class__)
    largest, worst = 0.0, ""
    for training in (False, True):
        x = torch.randn(2, channels, 3, 4, generator=generator)
        with torch.no_grad():  # small variances, beside which eps counts
            theirs.running_var.copy_(torch.logspace(-6, 0, channels))
        error = _compare(theirs.train(training), cls, [x], generator)
        if error >= largest:
            largest, worst = error, f"in {'training' if training else 'eval'} mode"
    return cls, largest, "frozen" if largest <= tolerance else worst


def _judge_position(module: Any, call: Call, tolerance: float) -> tuple[type, float, str]:
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
            cls = patched_class("position", module.__class__, settings)
            theirs = _tiny_copy(module, None)
            ours = _as_class(theirs, cls)
            error = 0.0
            for mask in masks:
                for dtype in (torch.float32, torch.bfloat16):  # of the features, which may decide the output's
                    args, kwargs = _tiny_call(call, mask.to(call.output.device), dtype)
                    error = max(error, difference(ours(*args, **kwargs), theirs(*args, **kwargs)))
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


def _tiny_call(call: Call, mask: Tensor, dtype: torch.dtype) -> tuple[tuple, dict]:
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
        arrived = [x.to(device_of(module)).requires_grad_() for x in inputs]
        output = module(*arrived, **arguments)
        gradients = gradients_of(output, [*arrived, *module.parameters()], generator)
        results.append((output, gradients, list(module.buffers())))
    return difference(*results)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected an nn.Module")
    if any(isinstance(module, Patched) for module in model.modules()):
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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
