"""Masked attention with dropout, without the projections: ours against everything stock PyTorch offers.

Question: out = dropout(softmax(q·kᵀ/√D, padded keys at -inf))·v for q, k, v of [B, 8, L, 32], strided views of
[B, L, 8, 32] as a projection leaves them. Operations are counted for all queries (padded queries are part of the
answer) and valid keys only.
"""

import dataclasses
import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from detr_fast.ops import attention, attention_reference

from ..harness.case import Case, Inputs, Outputs, Provider, Unavailable, needs_compile
from ..harness.ceilings import PRECISIONS, Work
from ..harness.spec import BATCHES, HEAD_DIM, HEADS, Scale, Spec, both_modes, shape_of
from ..shapes import BatchShape

KINDS = ("encoder", "cross", "decoder")
QUERIES = 100


def options(kind: str) -> tuple[str, ...]:
    return ("precision", "mode", "model", "padding", "dropout")


def gpu_specs(quick: bool) -> list[Spec]:
    specs = specs_of("attention", quick)
    if not quick:
        specs += [Spec("attention", "encoder", padding=f"valid{share}") for share in (80, 60, 50, 40, 30, 20)]
    return specs


def specs_of(suite: str, quick: bool) -> list[Spec]:
    """The cases that this suite and multihead_attention have in common."""
    encoder = Spec(suite, "encoder")
    none, dense = dataclasses.replace(encoder, padding="none"), dataclasses.replace(encoder, padding="coco-dense")
    drop = [dataclasses.replace(s, dropout=0.1) for s in (none, encoder)]
    small = [Spec(suite, kind, dropout=0.1) for kind in ("cross", "decoder")]
    specs = [none, encoder, dense] + both_modes(*drop) + both_modes(*small)
    if quick:
        return specs
    dc5 = [
        Spec(suite, "encoder", "DC5", padding=padding, dropout=p) for padding in ("none", "coco") for p in (0.0, 0.1)
    ]
    specs += both_modes(*dc5)
    specs += [dataclasses.replace(s, mode="backward") for s in (*drop, *dc5)]
    precisions = ("fp16", "tf32", "fp32")
    specs += both_modes(*(Spec(suite, "encoder", precision=precision, dropout=0.1) for precision in precisions))
    specs += [
        Spec(suite, "encoder", batch=batch, padding=padding, dropout=0.1)
        for batch in BATCHES
        for padding in ("none", "coco")
    ]
    return specs + [Spec(suite, "encoder", "DC5", batch=batch, padding="none") for batch in BATCHES]


def build(spec: Spec, scale: Scale, device: torch.device, *, compile: bool, quick: bool) -> tuple[Case, list[Provider]]:
    built = case(
        spec.kind, shape_of(spec, scale), spec.precision, spec.mode, spec.dropout, device,
        heads=scale.heads, head_dim=spec.head_dim, compile=compile,
    )  # fmt: skip
    # Autotuning takes half a minute per shape: for the two batches that the README quotes, not for the sweeps.
    quoted = spec.model == "R50" and spec.batch == 16 and spec.precision == "bf16" and spec.mode == "forward"
    return built, providers(max_autotune=not quick and quoted and spec.padding in ("none", "coco"))


def _mask(inputs: Inputs) -> torch.Tensor | None:
    return inputs["key_padding_mask"]


def textbook(q, k, v, mask) -> torch.Tensor:
    """softmax(q·kᵀ/√D)·v in the inputs' own precision, every intermediate rounded to it."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None, :], float("-inf"))
    return scores.softmax(-1) @ v


def _image_by_image(function, inputs: Inputs, mask: torch.Tensor | None) -> Outputs:
    """Recomputes in the backward, so that one image's score matrices are all that is kept at a time."""
    parts = []
    for i in range(inputs["query"].shape[0]):
        one = slice(i, i + 1)
        arguments = [inputs[n][one] for n in ("query", "key", "value")] + [None if mask is None else mask[one]]
        if torch.is_grad_enabled():
            parts.append(checkpoint(function, *arguments, use_reentrant=False))
        else:
            parts.append(function(*arguments))
    return (torch.cat(parts),)


def _reference_one(q, k, v, mask):
    return attention_reference(q, k, v, mask)[0]


def reference(inputs: Inputs) -> Outputs:
    return _image_by_image(_reference_one, inputs, _mask(inputs))


def reference_without_mask(inputs: Inputs) -> Outputs:
    return _image_by_image(_reference_one, inputs, None)


def plain(inputs: Inputs) -> Outputs:
    return _image_by_image(textbook, inputs, _mask(inputs))


def plain_without_mask(inputs: Inputs) -> Outputs:
    return _image_by_image(textbook, inputs, None)


# -- providers ---------------------------------------------------------------------------------------------------------


def _ours(state: Inputs) -> Outputs:
    q, k, v, mask = (state[name] for name in ("query", "key", "value", "key_padding_mask"))
    return attention(q, k, v, mask, state["dropout_p"], seed=state["seed"])[:1]


def _skipped_state(inputs: Inputs) -> Inputs:
    if not inputs["self_attention"] or _mask(inputs) is None:
        raise Unavailable("no query is padding")
    return dict(inputs)


def _padded_queries_skipped(state: Inputs) -> Outputs:
    q, k, v, mask = (state[name] for name in ("query", "key", "value", "key_padding_mask"))
    return attention(q, k, v, mask, state["dropout_p"], seed=state["seed"], query_padding_mask=mask)[:1]


def _as_shipped(state: Inputs) -> Outputs:
    """F.multi_head_attention_forward between its projections with need_weights=True, the weights' mean included."""
    q, k, v = (state[n].flatten(0, 1) for n in ("query", "key", "value"))
    batch, heads = state["query"].shape[:2]
    bias = state["bias"]
    scores = q * q.shape[-1] ** -0.5
    scores = torch.bmm(scores, k.transpose(1, 2)) if bias is None else torch.baddbmm(bias, scores, k.transpose(1, 2))
    weights = F.dropout(scores.softmax(-1), state["dropout_p"])
    out = torch.bmm(weights, v).unflatten(0, (batch, heads))
    weights.unflatten(0, (batch, heads)).mean(1)
    return (out,)


def _with_bias(inputs: Inputs) -> Inputs:
    """The additive mask that nn.MultiheadAttention makes of key_padding_mask on every call; here made beforehand."""
    mask, q = _mask(inputs), inputs["query"]
    if mask is None:
        return inputs | {"bias": None}
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, float("-inf"))
    bias = bias[:, None, None, :].expand(-1, q.shape[1], q.shape[2], -1).flatten(0, 1)
    return inputs | {"bias": bias}


def _sdpa(state: Inputs, backend: SDPBackend, masked: bool) -> Outputs:
    mask = _mask(state) if masked else None
    keep = None if mask is None else ~mask[:, None, None, :]
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(
            state["query"], state["key"], state["value"], attn_mask=keep, dropout_p=state["dropout_p"]
        )
    return (out,)


def _half_only(inputs: Inputs, name: str) -> Inputs:
    q = inputs["query"]
    if q.device.type != "cuda":
        raise Unavailable(f"{name} needs a CUDA GPU")
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise Unavailable(f"{name} takes fp16 and bf16 only")
    return dict(inputs)


def _cuda_only(inputs: Inputs, name: str) -> Inputs:
    if inputs["query"].device.type != "cuda":
        raise Unavailable(f"{name} is measured on a CUDA GPU only")
    return dict(inputs)


def _pack(tensor: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """[B, H, L, D] → the kept tokens as [T, H, D]."""
    return tensor.transpose(1, 2).flatten(0, 1)[keep]


def _lengths(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Indices of the valid tokens, cumulative lengths, longest length (waits for the GPU)."""
    lengths = (~mask).sum(1, dtype=torch.int32)
    cumulative = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return (~mask).flatten().nonzero().squeeze(1), cumulative, int(lengths.max())


def _packing_plan(inputs: Inputs) -> Inputs:
    """Which query and key rows there are, and where each image's begin."""
    state = _half_only(inputs, "flash varlen")
    batch, _, q_len, _ = state["query"].shape
    mask = _mask(state)
    if mask is None:
        mask = torch.zeros(batch, state["key"].shape[2], dtype=torch.bool, device=state["key"].device)
    state["keep_k"], state["cum_k"], state["max_k"] = _lengths(mask)
    if state["self_attention"]:
        state["keep_q"], state["cum_q"], state["max_q"] = state["keep_k"], state["cum_k"], state["max_k"]
    else:
        state["keep_q"] = torch.arange(batch * q_len, device=mask.device)
        state["cum_q"] = torch.arange(0, (batch + 1) * q_len, q_len, dtype=torch.int32, device=mask.device)
        state["max_q"] = q_len
    return state


def _packed(inputs: Inputs) -> Inputs:
    state = _packing_plan(inputs)
    state["query"] = _pack(state["query"], state["keep_q"])
    for name in ("key", "value"):
        state[name] = _pack(state[name], state["keep_k"])
    return state | {"batch": inputs["query"].shape[0], "q_len": inputs["query"].shape[2]}


def _varlen(state: Inputs) -> Outputs:
    out = torch.ops.aten._flash_attention_forward(
        state["query"], state["key"], state["value"], state["cum_q"], state["cum_k"], state["max_q"], state["max_k"],
        state["dropout_p"], False, False,
    )[0]  # fmt: skip
    return (out,)


def _unpack(state: Inputs, outputs: Outputs) -> Outputs:
    """[T, H, D] → [B, H, Lq, D], zeros where nothing was computed."""
    (packed,) = outputs
    rows = packed.new_zeros(state["batch"] * state["q_len"], *packed.shape[1:]).index_copy(0, state["keep_q"], packed)
    return (rows.unflatten(0, (state["batch"], state["q_len"])).transpose(1, 2),)


def _varlen_with_packing(state: Inputs) -> Outputs:
    packed = _packed(state)
    return _unpack(packed, _varlen(packed))


def _valid_queries(outputs: Outputs, inputs: Inputs) -> Outputs:
    """Self-attention by packed tokens answers valid queries only."""
    mask = _mask(inputs)
    if mask is None or not inputs["self_attention"]:
        return outputs
    return (outputs[0].masked_fill(mask[:, None, :, None], 0),)


@functools.cache
def _compiled_flex(max_autotune: bool):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs" if max_autotune else None)


@functools.cache
def _compiled_block_mask():
    from torch.nn.attention.flex_attention import create_block_mask

    return torch.compile(create_block_mask)


def _block_mask(state: Inputs):
    mask, q = _mask(state), state["query"]
    if mask is None:
        return None

    def valid(b, h, q_idx, kv_idx):
        return ~mask[b, kv_idx]

    return _compiled_block_mask()(valid, q.shape[0], None, q.shape[2], mask.shape[1], device=mask.device)


def _flex_state(inputs: Inputs, with_mask: bool) -> Inputs:
    state = _cuda_only(inputs, "FlexAttention")
    needs_compile(inputs)
    if inputs["dropout_p"] > 0:
        raise Unavailable("FlexAttention has no dropout; see the case without")
    if with_mask:
        state["block_mask"] = _block_mask(state)
    return state


def _flex(state: Inputs, max_autotune: bool) -> Outputs:
    return (_compiled_flex(max_autotune)(state["query"], state["key"], state["value"], block_mask=state["block_mask"]),)


def _flex_with_mask(state: Inputs) -> Outputs:
    return _flex(state | {"block_mask": _block_mask(state)}, False)


def providers(max_autotune: bool = False) -> list[Provider]:
    """Ours first, then the peers, each with the settings that suit it best."""
    sdpa = functools.partial
    flex = functools.partial(_flex, max_autotune=max_autotune)
    return [
        Provider("detr_fast", "padding honoured, dropout", _ours, ours=True),
        Provider(
            "detr_fast, padded queries skipped", "rows of padded queries are zeros, not computed; dropout",
            _padded_queries_skipped, _skipped_state, compare=_valid_queries, ours=True,
        ),
        Provider(
            "as shipped", "nn.MultiheadAttention's core, need_weights=True; padding as bias made beforehand, dropout",
            _as_shipped, _with_bias,
        ),
        Provider(
            "SDPA efficient", "padding as attn_mask, dropout",
            sdpa(_sdpa, backend=SDPBackend.EFFICIENT_ATTENTION, masked=True),
            functools.partial(_cuda_only, name="SDPA efficient"),
        ),
        Provider(
            "SDPA flash, no mask", "padding NOT honoured, dropout",
            sdpa(_sdpa, backend=SDPBackend.FLASH_ATTENTION, masked=False),
            functools.partial(_half_only, name="SDPA flash"),
            reference=reference_without_mask, plain=plain_without_mask,
        ),
        Provider(
            "flash varlen, packed", "valid tokens only, dropout; packing NOT included",
            _varlen, _packed, _unpack, compare=_valid_queries,
        ),
        Provider(
            "flash varlen + packing", "valid tokens only, dropout; packing and unpacking included",
            _varlen_with_packing, functools.partial(_half_only, name="flash varlen"), compare=_valid_queries,
            eager_only="waits for the GPU to learn how many tokens are valid",
        ),
        Provider(
            "SDPA cuDNN", "padding as attn_mask, dropout; plan built beforehand",
            sdpa(_sdpa, backend=SDPBackend.CUDNN_ATTENTION, masked=True),
            functools.partial(_half_only, name="SDPA cuDNN"),
        ),
        Provider(
            "FlexAttention", f"BlockMask built beforehand, no dropout{'; max-autotune' if max_autotune else ''}",
            flex, functools.partial(_flex_state, with_mask=True),
        ),
        Provider(
            "FlexAttention + mask", "BlockMask built in the call, no dropout",
            _flex_with_mask, functools.partial(_flex_state, with_mask=False),
            eager_only="its mask is built by code that may wait for the GPU",
        ),
        Provider(
            "SDPA math", "padding as attn_mask, dropout",
            sdpa(_sdpa, backend=SDPBackend.MATH, masked=True),
        ),
        Provider(
            "SDPA on CPU", "PyTorch's own choice; padding as attn_mask, dropout",
            lambda state: (
                F.scaled_dot_product_attention(
                    state["query"], state["key"], state["value"], dropout_p=state["dropout_p"],
                    attn_mask=None if _mask(state) is None else ~_mask(state)[:, None, None, :],
                ),
            ),
            _cpu_only,
        ),
    ]  # fmt: skip


def _cpu_only(inputs: Inputs) -> Inputs:
    if inputs["query"].device.type != "cpu":
        raise Unavailable("for CPU runs; on a GPU each backend is a row of its own")
    return dict(inputs)


# -- cases -------------------------------------------------------------------------------------------------------------


def case(
    kind: str,
    shape: BatchShape,
    precision: str,
    mode: str,
    dropout: float,
    device: torch.device,
    *,
    heads: int = HEADS,
    head_dim: int = HEAD_DIM,
    compile: bool = False,
) -> Case:
    """`kind`: "encoder" (tokens x tokens), "cross" (100 queries x tokens) or "decoder" (100 x 100, no padding)."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected 'encoder', 'cross' or 'decoder'")
    batch, tokens = shape.batch, shape.tokens
    q_len = tokens if kind == "encoder" else QUERIES
    k_len = QUERIES if kind == "decoder" else tokens
    mask = shape.key_padding_mask().to(device) if shape.has_padding and kind != "decoder" else None
    dtype = PRECISIONS[precision][0]

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(length):
            rows = torch.randn(batch, length, heads, head_dim, generator=generator, device=device)
            return rows.to(dtype).transpose(1, 2)

        return {
            "query": draw(q_len),
            "key": draw(k_len),
            "value": draw(k_len),
            "key_padding_mask": mask,
            "seed": torch.tensor([seed], dtype=torch.int64, device=device),
            "self_attention": kind == "encoder",
            "compile": compile,
        }

    valid_keys = batch * k_len if mask is None else int((~mask).sum())
    shares = shape.valid_shares() if mask is not None else {"pixels": 1.0, "tokens": 1.0, "pairs": 1.0}
    return Case(
        suite="attention",
        name=f"{kind} {shape.name} p={dropout:g}",
        precision=precision,
        mode=mode,
        inputs=inputs,
        reference=reference,
        plain=plain,
        leaves=("query", "key", "value"),
        work=work(mode, batch * q_len, valid_keys, q_len * valid_keys, heads, dtype.itemsize, head_dim),
        dropout=dropout,
        shape={
            "kind": kind, "batch": batch, "heads": heads, "head_dim": head_dim, "q_len": q_len, "k_len": k_len,
            "dropout": dropout, "valid": shares,
        },
    )  # fmt: skip


def work(
    mode: str, queries: int, keys: int, pairs: int, heads: int, itemsize: int, head_dim: int = HEAD_DIM
) -> list[Work]:
    """Forward: 2 products and an exp per pair; backward: 5 products and an exp, q, k, v, out and dout read again."""
    row = heads * head_dim * itemsize
    forward = Work(row * (2 * queries + 2 * keys), 4 * head_dim * heads * pairs, heads * pairs)
    backward = Work(row * (4 * queries + 4 * keys), 10 * head_dim * heads * pairs, heads * pairs)
    return {"forward": [forward], "backward": [backward], "both": [forward, backward]}[mode]
