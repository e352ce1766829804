"""The whole attention module, projections included: ours against nn.MultiheadAttention and stock parts.

Inputs are (L, B, 256) as the original passes them; in the encoder query and key are the same tensor, values another.
Weights are in the inputs' precision; their gradients are part of the backward.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from detr_fast.layers import MultiheadAttention

from ..harness.case import Case, Inputs, Outputs, Provider, Unavailable
from ..harness.ceilings import PRECISIONS, Work
from ..harness.spec import HEADS, Scale, Spec, shape_of
from ..shapes import BatchShape
from . import attention as attention_suite
from .attention import KINDS, options

EMBED = 256
WEIGHTS = ("in_proj_weight", "in_proj_bias", "out_weight", "out_bias")
__all__ = ["KINDS", "build", "case", "gpu_specs", "options", "providers"]


def gpu_specs(quick: bool) -> list[Spec]:
    return attention_suite.specs_of("multihead_attention", quick)


def build(spec: Spec, scale: Scale, device: torch.device, *, compile: bool, quick: bool) -> tuple[Case, list[Provider]]:
    built = case(spec.kind, shape_of(spec, scale), spec.precision, spec.mode, spec.dropout, device)
    return built, providers()


def _functional(query, key, value, mask, weights) -> torch.Tensor:
    """PyTorch's own multi_head_attention_forward on its materialising path, without dropout."""
    in_weight, in_bias, out_weight, out_bias = weights
    return F.multi_head_attention_forward(
        query, key, value, query.shape[-1], HEADS, in_weight, in_bias, None, None, False, 0.0, out_weight, out_bias,
        key_padding_mask=mask, need_weights=True,
    )[0]  # fmt: skip


def _key(state: Inputs) -> torch.Tensor:
    return state["query"] if state["self_attention"] else state["key"]


def reference(inputs: Inputs) -> Outputs:
    """Some images at a time and recomputed in the backward, so that at most a GiB of weights is kept."""
    weights, mask = [inputs[name] for name in WEIGHTS], inputs["key_padding_mask"]
    query, key, value = inputs["query"], _key(inputs), inputs["value"]
    group = max(1, 2**30 // (HEADS * query.shape[0] * key.shape[0] * query.element_size()))
    parts = []
    for first in range(0, query.shape[1], group):
        q, k, v = (t[:, first : first + group] for t in (query, key, value))
        arguments = (q, k, v, None if mask is None else mask[first : first + group], weights)
        if torch.is_grad_enabled():
            parts.append(checkpoint(_functional, *arguments, use_reentrant=False))
        else:
            parts.append(_functional(*arguments))
    return (torch.cat(parts, 1),)


def _module_state(inputs: Inputs, kind: type[nn.Module]) -> Inputs:
    """A module whose parameters are the case's weights themselves, so that their gradients can be asked for."""
    module = kind(EMBED, HEADS, dropout=inputs["dropout_p"], device=inputs["query"].device, dtype=inputs["query"].dtype)
    for owner, attribute, name in (
        (module, "in_proj_weight", "in_proj_weight"),
        (module, "in_proj_bias", "in_proj_bias"),
        (module.out_proj, "weight", "out_weight"),
        (module.out_proj, "bias", "out_bias"),
    ):
        delattr(owner, attribute)
        setattr(owner, attribute, inputs[name])
    return inputs | {"module": module.train()}


def _module(state: Inputs, need_weights: bool) -> Outputs:
    return state["module"](
        state["query"],
        _key(state),
        state["value"],
        key_padding_mask=state["key_padding_mask"],
        need_weights=need_weights,
    )[:1]


def _stock_parts(state: Inputs) -> Outputs:
    in_weight, in_bias, out_weight, out_bias = (state[name] for name in WEIGHTS)
    query, key, value = state["query"], _key(state), state["value"]

    def heads(rows: torch.Tensor) -> torch.Tensor:  # (L, B, E) → [B, H, L, D]
        return rows.unflatten(-1, (HEADS, -1)).permute(1, 2, 0, 3)

    if state["self_attention"]:  # query and key are one tensor: one product for both
        q, k = F.linear(query, in_weight[: 2 * EMBED], in_bias[: 2 * EMBED]).chunk(2, -1)
    else:
        q = F.linear(query, in_weight[:EMBED], in_bias[:EMBED])
        k = F.linear(key, in_weight[EMBED : 2 * EMBED], in_bias[EMBED : 2 * EMBED])
    v = F.linear(value, in_weight[2 * EMBED :], in_bias[2 * EMBED :])
    mask = state["key_padding_mask"]
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        out = F.scaled_dot_product_attention(
            heads(q), heads(k), heads(v), attn_mask=None if mask is None else ~mask[:, None, None, :],
            dropout_p=state["dropout_p"],
        )  # fmt: skip
    return (F.linear(out.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias),)


def _cuda_only(inputs: Inputs) -> Inputs:
    if inputs["query"].device.type != "cuda":
        raise Unavailable("SDPA efficient is measured on a CUDA GPU only")
    return dict(inputs)


def providers() -> list[Provider]:
    shipped = functools.partial(_module_state, kind=nn.MultiheadAttention)
    return [
        Provider(
            "detr_fast", "padding honoured, dropout", functools.partial(_module, need_weights=False),
            functools.partial(_module_state, kind=MultiheadAttention), ours=True,
        ),
        Provider(
            "as shipped", "nn.MultiheadAttention, need_weights=True, as the original; padding, dropout",
            functools.partial(_module, need_weights=True), shipped,
        ),
        Provider(
            "nn.MultiheadAttention", "need_weights=False; padding, dropout",
            functools.partial(_module, need_weights=False), shipped,
        ),
        Provider("stock parts", "linear + SDPA efficient with attn_mask + linear; dropout", _stock_parts, _cuda_only),
    ]  # fmt: skip


def case(kind: str, shape: BatchShape, precision: str, mode: str, dropout: float, device: torch.device) -> Case:
    """`kind`: "encoder", "cross" or "decoder", as in the attention suite."""
    core = attention_suite.case(kind, shape, precision, mode, dropout, device)
    batch, q_len, k_len = (core.shape[name] for name in ("batch", "q_len", "k_len"))
    dtype = PRECISIONS[precision][0]
    mask = core.inputs(0)["key_padding_mask"]

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*size, scale=1.0):
            return (scale * torch.randn(*size, generator=generator, device=device)).to(dtype)

        made = {
            "query": draw(q_len, batch, EMBED),
            "value": draw(k_len, batch, EMBED),
            "key_padding_mask": mask,
            "self_attention": kind != "cross",
            "in_proj_weight": draw(3 * EMBED, EMBED, scale=EMBED**-0.5),
            "in_proj_bias": draw(3 * EMBED, scale=0.1),
            "out_weight": draw(EMBED, EMBED, scale=EMBED**-0.5),
            "out_bias": draw(EMBED, scale=0.1),
        }
        if kind == "cross":
            made["key"] = draw(k_len, batch, EMBED)
        return made

    rows = batch * (2 * q_len + 2 * k_len)  # through the query, key, value and output projections
    projection = Work(2 * rows * EMBED * dtype.itemsize, 2 * rows * EMBED**2)
    stages = [projection] * {"forward": 1, "backward": 2, "both": 3}[
        mode
    ]  # backward: for the inputs and for the weights
    leaves = ("query", "value") + (("key",) if kind == "cross" else ()) + WEIGHTS
    return Case(
        suite="multihead_attention",
        name=core.name,
        precision=precision,
        mode=mode,
        inputs=inputs,
        reference=reference,
        plain=reference,
        leaves=leaves,
        work=stages + core.work,
        dropout=dropout,
        shape=core.shape | {"embed_dim": EMBED},
    )
