"""Which cases a suite measures, most telling first: a time budget cuts the tail off."""

import dataclasses
import itertools
from dataclasses import dataclass

import torch

from .harness.case import Case, Provider
from .shapes import BatchShape, nominal_batch, shrunk_batch, typical_real_batch
from .suites import attention, multihead_attention, pad_collate, sine_position

ATTENTION = ("attention", "multihead_attention")
KINDS = {suite: ("encoder", "cross", "decoder") for suite in ATTENTION} | {"pad_collate": pad_collate.TASKS}
PADDINGS = ("none", "coco", "coco-dense")


@dataclass(frozen=True)
class Spec:
    """One case in words.

    Attributes:
        kind: a value of `KINDS[suite]`; "" for position.
        padding: "none" (800 x 1216), "coco" (a typical drawn batch), "coco-dense" (its size, no padding), or "validNN"
            (800 x 1216 with about NN % of the tokens valid).
    """

    suite: str
    kind: str = ""
    model: str = "R50"
    batch: int = 16
    padding: str = "coco"
    precision: str = "bf16"
    mode: str = "forward"
    dropout: float = 0.0
    head_dim: int = attention.HEAD_DIM

    def __str__(self) -> str:
        parts = [self.suite, self.kind, self.model, f"B{self.batch}", self.padding, self.precision, self.mode]
        parts.append(f"p={self.dropout:g}" if self.dropout else "")
        parts.append(f"d={self.head_dim}" if self.head_dim != attention.HEAD_DIM else "")
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Scale:
    """How large the cases are: `image` scales both sides of the images, `heads` replaces the 8 heads in `attention`."""

    image: float = 1.0
    heads: int = attention.HEADS


def _both_modes(*specs: Spec) -> list[Spec]:
    return [dataclasses.replace(s, mode=mode) for s in specs for mode in ("forward", "both")]


def gpu_plan(suite: str, quick: bool) -> list[Spec]:
    """The cases for a GPU at full size."""
    S = Spec
    if suite == "pad_collate":
        specs = [S(suite, task, padding=padding) for task in ("uint8", "packed") for padding in ("none", "coco")]
        specs += [S(suite, "float", padding=padding, precision="fp32") for padding in ("none", "coco")]
        if quick:
            return specs
        specs += [
            S(suite, "float", precision="fp32", mode="both"),
            S(suite, "float", precision="fp32", mode="backward"),
        ]
        specs += [S(suite, "uint8", precision=precision) for precision in ("fp16", "fp32")]
        return specs + [S(suite, "uint8", batch=batch) for batch in (1, 2, 4, 8, 32, 64)]
    if suite == "sine_position":
        specs = [S(suite, model=m, padding=p, precision="fp32") for m in ("R50", "DC5") for p in ("none", "coco")]
        if quick:
            return specs
        specs += [
            S(suite, model=model, precision=precision) for model in ("R50", "DC5") for precision in ("bf16", "fp16")
        ]
        return specs + [S(suite, model="DC5", batch=batch, precision="fp32") for batch in (1, 2, 4, 8, 32, 64)]

    encoder = S(suite, "encoder")
    none, dense = dataclasses.replace(encoder, padding="none"), dataclasses.replace(encoder, padding="coco-dense")
    drop = [dataclasses.replace(s, dropout=0.1) for s in (none, encoder)]
    small = [S(suite, kind, dropout=0.1) for kind in ("cross", "decoder")]
    specs = [none, encoder, dense] + _both_modes(*drop) + _both_modes(*small)
    if quick:
        return specs
    dc5 = [S(suite, "encoder", "DC5", padding=padding, dropout=p) for padding in ("none", "coco") for p in (0.0, 0.1)]
    specs += _both_modes(*dc5)
    specs += [dataclasses.replace(s, mode="backward") for s in (*drop, *dc5)]
    if suite == "attention":
        specs += [dataclasses.replace(encoder, padding=f"valid{share}") for share in (80, 60, 50, 40, 30, 20)]
    precisions = ("fp16", "tf32", "fp32")
    specs += _both_modes(*(S(suite, "encoder", precision=precision, dropout=0.1) for precision in precisions))
    batches = [
        S(suite, "encoder", batch=b, padding=p, dropout=0.1) for b in (1, 2, 4, 8, 32, 64) for p in ("none", "coco")
    ]
    return specs + batches + [S(suite, "encoder", "DC5", batch=b, padding="none") for b in (1, 2, 4, 8, 32, 64)]


def cpu_plan(suite: str, quick: bool) -> list[Spec]:
    """A few cases for a CPU, float32; `scale_for` makes them small."""
    kinds = KINDS.get(suite, ("",))
    specs = [Spec(suite, kind, batch=2, precision="fp32") for kind in kinds]
    if quick:
        return specs
    specs += [dataclasses.replace(s, padding="none") for s in specs]
    if suite in ATTENTION:
        specs += [dataclasses.replace(s, mode="both") for s in specs]
        specs.append(Spec(suite, "encoder", batch=2, precision="fp32", mode="both", dropout=0.1))
    return specs


def interpreter_plan(suite: str) -> list[Spec]:
    """Tiny cases for the kernels through Triton's interpreter: correctness only."""
    specs = [Spec(suite, kind, "DC5", 2, "valid60", "fp32") for kind in KINDS.get(suite, ("",))]
    if suite in ATTENTION:
        specs += [dataclasses.replace(s, mode="both") for s in specs]
        specs.append(dataclasses.replace(specs[0], dropout=0.1))
    if suite in ("pad_collate", "sine_position"):
        specs += [dataclasses.replace(s, precision="fp16") for s in specs]
    return specs


def scale_for(device: torch.device, quick: bool, interpret: bool) -> Scale:
    if interpret:
        return Scale(image=0.1, heads=2)
    if device.type == "cuda":
        return Scale()
    return Scale(image=0.25 if quick else 0.5)


def chosen_plan(suite: str, base: list[Spec], chosen: dict[str, list]) -> list[Spec]:
    """`base`, or where options were chosen every combination of them, the rest as in the first spec of `base`."""
    if not chosen:
        return base
    if "kind" in chosen:
        kinds = [kind for kind in chosen["kind"] if kind in KINDS.get(suite, ())]
        if not kinds:
            return []
        chosen = chosen | {"kind": kinds}
    modes_apply = suite in ATTENTION or (suite == "pad_collate" and chosen.get("kind") == ["float"])
    idle = {"dropout": suite not in ATTENTION, "mode": not modes_apply}
    chosen = {name: values for name, values in chosen.items() if not idle.get(name)}
    combinations = itertools.product(*chosen.values())
    return [dataclasses.replace(base[0], **dict(zip(chosen, values, strict=True))) for values in combinations]


def shape_of(spec: Spec, scale: Scale) -> BatchShape:
    if spec.padding == "none":
        return nominal_batch(spec.model, spec.batch, scale.image)
    if spec.padding.startswith("valid"):
        return shrunk_batch(spec.model, spec.batch, int(spec.padding[5:]) / 100, scale.image)
    drawn = typical_real_batch(spec.model, spec.batch, scale.image)
    return drawn.without_padding() if spec.padding == "coco-dense" else drawn


def build(spec: Spec, scale: Scale, device: torch.device, *, compile: bool, quick: bool) -> tuple[Case, list[Provider]]:
    """The case of `spec`, and who is asked."""
    case, providers = _build(spec, scale, device, compile=compile, quick=quick)
    return dataclasses.replace(case, shape={"model": spec.model, "padding": spec.padding} | case.shape), providers


def _build(spec, scale, device, *, compile, quick) -> tuple[Case, list[Provider]]:
    shape = shape_of(spec, scale)
    if spec.suite == "pad_collate":
        return pad_collate.case(spec.kind, shape, spec.precision, spec.mode, device), pad_collate.providers(spec.kind)
    if spec.suite == "sine_position":
        return sine_position.case(shape, spec.precision, device, compile=compile), sine_position.providers()
    arguments = (spec.kind, shape, spec.precision, spec.mode, spec.dropout, device)
    if spec.suite == "multihead_attention":
        return multihead_attention.case(*arguments), multihead_attention.providers()
    case = attention.case(*arguments, heads=scale.heads, head_dim=spec.head_dim, compile=compile)
    # Autotuning takes half a minute per shape: for the two batches that the README quotes, not for the sweeps.
    tuned = (
        not quick and spec.model == "R50" and spec.batch == 16 and spec.precision == "bf16" and spec.mode == "forward"
    )
    return case, attention.providers(max_autotune=tuned and spec.padding in ("none", "coco"))
