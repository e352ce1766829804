"""Which cases a suite measures, most telling first: a time budget cuts the tail off.

A suite is a module in `suites/` with

- `KINDS`: the kinds of case it has, `("",)` for one;
- `options(kind)`: which of `CHOICES` make a difference to it, beside the batch size;
- `gpu_specs(quick)`: its cases for a GPU at full size;
- `build(spec, scale, device, compile=…, quick=…)`: the case in numbers and the providers that are asked.
"""

import dataclasses
import importlib
import itertools
from types import ModuleType

import torch

from .harness.case import Case, Provider
from .harness.spec import Scale, Spec

CHOICES = ("precision", "mode", "batch", "model", "padding", "kind", "dropout")


def suite_module(suite: str) -> ModuleType:
    return importlib.import_module(f".suites.{suite}", __package__)


def gpu_plan(suite: str, quick: bool) -> list[Spec]:
    """The cases for a GPU at full size."""
    return suite_module(suite).gpu_specs(quick)


def _each_kind(suite: str, **fields) -> list[Spec]:
    """One spec for each kind of the suite, without padding where the suite knows none."""
    module = suite_module(suite)
    specs = [Spec(suite, kind, precision="fp32", **fields) for kind in module.KINDS]
    return [s if "padding" in module.options(s.kind) else dataclasses.replace(s, padding="none") for s in specs]


def _with_gradients(specs: list[Spec]) -> list[Spec]:
    return [dataclasses.replace(s, mode="both") for s in specs if "mode" in suite_module(s.suite).options(s.kind)]


def cpu_plan(suite: str, quick: bool) -> list[Spec]:
    """A few cases for a CPU, float32; `scale_for` makes them small."""
    specs = _each_kind(suite, batch=2)
    if quick:
        return specs
    specs += [dataclasses.replace(s, padding="none") for s in specs if s.padding != "none"]
    specs += _with_gradients(specs)
    if "dropout" in suite_module(suite).options(specs[0].kind):
        specs.append(dataclasses.replace(specs[0], mode="both", dropout=0.1))
    return specs


def interpreter_plan(suite: str) -> list[Spec]:
    """Tiny cases for the kernels through Triton's interpreter: correctness only."""
    if suite == "folded_conv":
        return []  # `pointwise_conv` has its products; its other kernels are cuDNN's
    specs = _each_kind(suite, model="DC5", batch=2, padding="valid60")
    options = suite_module(suite).options(specs[0].kind)
    specs += _with_gradients(specs)
    if "dropout" in options:
        specs.append(dataclasses.replace(specs[0], dropout=0.1))
    elif "precision" in options:
        specs += [dataclasses.replace(s, precision="fp16") for s in specs]
    return specs


def scale_for(device: torch.device, quick: bool, interpret: bool) -> Scale:
    if interpret:
        return Scale(image=0.1, heads=2, layers=2)
    if device.type == "cuda":
        return Scale()
    return Scale(image=0.25 if quick else 0.5)


def chosen_plan(suite: str, base: list[Spec], chosen: dict[str, list]) -> list[Spec]:
    """`base`, or where options were chosen every combination of them, the rest as in the first spec of `base`.

    A choice that makes no difference to a case is left out of it.
    """
    module = suite_module(suite)
    kinds = [kind for kind in chosen.get("kind", module.KINDS) if kind in module.KINDS]
    if not chosen or not base or not kinds:
        return base if not chosen else []
    chosen = chosen | ({"kind": kinds} if "kind" in chosen else {})
    specs = []
    for values in itertools.product(*chosen.values()):
        fields = dict(zip(chosen, values, strict=True))
        options = {"batch", "kind", *module.options(fields.get("kind", base[0].kind))}
        specs.append(dataclasses.replace(base[0], **{name: v for name, v in fields.items() if name in options}))
    return list(dict.fromkeys(specs))


def build(spec: Spec, scale: Scale, device: torch.device, *, compile: bool, quick: bool) -> tuple[Case, list[Provider]]:
    """The case of `spec`, and who is asked."""
    case, providers = suite_module(spec.suite).build(spec, scale, device, compile=compile, quick=quick)
    return dataclasses.replace(case, shape={"model": spec.model, "padding": spec.padding} | case.shape), providers
