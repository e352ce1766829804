"""The mask head's softmax over heads and keys together, forward and backward: ours against stock PyTorch.

Scores [B, 100, 8, L] as the mask head hands them over, a transposed view of [B, 8, 100, L], with padded keys left out.
Bytes are counted for all keys (the weights of padded keys are part of the answer), exponentials for valid ones.
"""

import functools

import torch

from detr_fast.ops import joint_softmax, joint_softmax_reference

from ..harness.case import Case, Inputs, Outputs, Provider, needs_compile
from ..harness.ceilings import PRECISIONS, Work
from ..harness.spec import BATCHES, HEADS, Scale, Spec, both_modes, shape_of
from ..shapes import BatchShape

KINDS = ("",)
QUERIES = 100


def options(kind: str) -> tuple[str, ...]:
    return ("precision", "mode", "model", "padding")


def gpu_specs(quick: bool) -> list[Spec]:
    specs = both_modes(*(Spec("joint_softmax", padding=padding) for padding in ("none", "coco")))
    if quick:
        return specs
    specs += both_modes(*(Spec("joint_softmax", precision=precision) for precision in ("fp16", "fp32")))
    specs += both_modes(Spec("joint_softmax", model="DC5"))
    return specs + [Spec("joint_softmax", batch=batch) for batch in BATCHES]


def build(spec: Spec, scale: Scale, device: torch.device, *, compile: bool, quick: bool) -> tuple[Case, list[Provider]]:
    return case(shape_of(spec, scale), spec.precision, spec.mode, device, compile=compile), providers()


def original(scores: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """As the original's MHAttentionMap: padded scores to -inf, then one softmax over the flattened heads and keys."""
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None], float("-inf"))
    return scores.flatten(2).softmax(-1).view(scores.shape)


@functools.lru_cache(maxsize=1)
def _compiled_original():
    return torch.compile(original)


def _ours(state: Inputs) -> Outputs:
    return (joint_softmax(state["scores"], state["mask"]),)


def _original(state: Inputs) -> Outputs:
    return (original(state["scores"], state["mask"]),)


def _compiled(state: Inputs) -> Outputs:
    return (_compiled_original()(state["scores"], state["mask"]),)


def reference(inputs: Inputs) -> Outputs:
    return (joint_softmax_reference(inputs["scores"], inputs["mask"]),)


def providers() -> list[Provider]:
    return [
        Provider("detr_fast", "padding honoured", _ours, ours=True),
        Provider("as shipped", "masked_fill, flatten, softmax", _original),
        Provider("original, compiled", "the same; torch.compile", _compiled, needs_compile),
    ]


def case(shape: BatchShape, precision: str, mode: str, device: torch.device, *, compile: bool = False) -> Case:
    dtype = PRECISIONS[precision][0]
    mask = shape.key_padding_mask().to(device) if shape.has_padding else None

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        scores = torch.randn(shape.batch, HEADS, QUERIES, shape.tokens, generator=generator, device=device)
        return {"scores": scores.to(dtype).transpose(1, 2), "mask": mask, "compile": compile}

    shares = shape.valid_shares()
    weights = shape.batch * QUERIES * HEADS * shape.tokens
    forward = Work(2 * weights * dtype.itemsize, exps=weights * shares["tokens"])
    backward = Work(3 * weights * dtype.itemsize)  # gradient and weights read, the scores' gradient written
    return Case(
        suite="joint_softmax",
        name=shape.name,
        precision=precision,
        mode=mode,
        inputs=inputs,
        reference=reference,
        plain=_original,
        leaves=("scores",),
        work={"forward": [forward], "backward": [backward], "both": [forward, backward]}[mode],
        shape={"batch": shape.batch, "heads": HEADS, "q_len": QUERIES, "k_len": shape.tokens, "valid": shares},
    )
