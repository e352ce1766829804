"""How the kernels are launched: tile sizes, warps and pipeline stages, per GPU family and shape class.

`configuration` looks a launch up. The launchers call it through the module (``_configurations.configuration(...)``), so
that `python -m benchmarks tune` can replace it by candidates. It takes the first entry whose conditions all hold: first
from `MEASURED`, which that command has timed on a GPU and written here, then from `RULES`, the particular before the
general. An entry leaves out the conditions that do not matter to it; a kernel's last rule has none and is its fallback.

Families: sm_80 (A100), sm_86 (8.6 to 8.9: RTX 30 and 40, A10, L4, L40; like sm_120, with 99 KiB of shared memory per
block), sm_90 (H100, H200), sm_100 (B200, B300), sm_120 (RTX 50). A newer GPU counts as sm_120; an older one, or none,
as sm_80: what these two launch needs little shared memory and no instruction of one family alone.

Conditions of the attention kernels:

    family      see above
    precision   "16-bit" (fp16, bf16), "tf32" or "ieee" (float32, with and without TF32)
    block_d     head dimension of the wider of key and value, rounded up to a power of two: 16, 32, 64, 128
    ragged      whether a head dimension is narrower than its tile, so that loads are masked along it
    mask        whether there is a key padding mask
    dropout     whether there is dropout
    lengths     "few x few", "few x many" or "many": queries x keys, few being at most 128

BLOCK_M is queries per tile (forward, gradient of queries) or per step (gradient of keys and values). BLOCK_N is keys
per block, a multiple of 64, since dropout's bytes are dealt out over 64 columns.

Conditions of pointwise_conv: family, precision (as of attention), ragged (input channels no multiple of 64), narrow (at
most 64 output channels). BLOCK_M is pixels, BLOCK_N output channels, BLOCK_K input channels per step.

Conditions of pad_collate: family, source_bytes and batch_bytes (sizes of an element), channels_last. Conditions of
sine_position: family, bytes (of the embedding's element), tokens.
"""

import functools

import torch

from detr_fast.kernels import _target

FEW = 128

Conditions = dict[str, object]
Entry = tuple  # kernel, conditions, configuration; measured ones also: what was measured where

# Written by `python -m benchmarks tune --write`; these entries name every condition.
# measured:begin
MEASURED: tuple[Entry, ...] = ()
# measured:end

_FORWARD, _GRAD_QUERY, _GRAD_KEY_VALUE = "attention_forward", "attention_grad_query", "attention_grad_key_value"


def _tile(block_m: int, warps: int, stages: int, block_n: int = 64) -> dict[str, int]:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


def _product(block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}


# Families whose 16-bit matrix products are whole warp groups' (wgmma, tcgen05) and take at least 64 rows.
_WARP_GROUPS = {"family": ("sm_90", "sm_100")}
_DETR = {"block_d": 32, "ragged": False}
_16_BIT, _TF32, _IEEE = ({"precision": precision} for precision in ("16-bit", "tf32", "ieee"))
_MANY, _FEW = {"lengths": "many"}, {"lengths": "few x few"}

# A condition's value may be a tuple: any of them. Chosen by what the compiler makes of the kernels: no spills, warp
# groups' products, few registers. Nothing here has been timed. DETR's head dimension has tiles of its own; the others
# share one for each precision, the largest that spills at none of them on sm_90 (but float32 without TF32 at 128).
RULES: tuple[Entry, ...] = (
    (_FORWARD, _DETR | _IEEE, _tile(32, 8, 3)),
    (_FORWARD, _DETR | _TF32, _tile(32, 8, 2)),
    # Where keys are gathered, five stages fetch them a step ahead, as three do otherwise, and their rows another one.
    (_FORWARD, _DETR | _WARP_GROUPS | _MANY | {"mask": True}, _tile(128, 4, 5)),
    (_FORWARD, _DETR | _WARP_GROUPS | _MANY, _tile(128, 4, 3)),
    # The decoder's self-attention: all keys in one block, so that nothing is done twice one after the other.
    (_FORWARD, _DETR | _WARP_GROUPS | _FEW, _tile(64, 4, 1, block_n=128)),
    (_FORWARD, _DETR | {"mask": True}, _tile(64, 4, 5)),
    (_FORWARD, _DETR, _tile(64, 4, 3)),
    (_FORWARD, _IEEE, _tile(16, 8, 1)),
    (_FORWARD, _TF32, _tile(32, 8, 1)),
    (_FORWARD, {}, _tile(64, 8, 2)),
    #
    (_GRAD_QUERY, _DETR | _IEEE, _tile(32, 8, 1)),
    (_GRAD_QUERY, _DETR | _WARP_GROUPS | _16_BIT | _FEW, _tile(64, 4, 1, block_n=128)),
    # As in the forward: two stages would wait for a step's copies at once.
    (_GRAD_QUERY, _DETR | _16_BIT | {"mask": True}, _tile(64, 4, 5)),
    (_GRAD_QUERY, _DETR | _16_BIT, _tile(64, 4, 3)),
    (_GRAD_QUERY, _WARP_GROUPS | _16_BIT, _tile(64, 8, 2)),
    (_GRAD_QUERY, _16_BIT, _tile(32, 8, 2)),
    (_GRAD_QUERY, {}, _tile(16, 8, 1)),
    #
    (_GRAD_KEY_VALUE, _DETR | _TF32, _tile(32, 8, 1)),
    # With one stage the compiler spills here, and only here.
    (_GRAD_KEY_VALUE, _DETR | _IEEE | {"family": "sm_100", "dropout": True}, _tile(16, 8, 2)),
    # Its steps go over queries, which are gathered only where there are many and some of them are padding.
    (_GRAD_KEY_VALUE, _DETR | _WARP_GROUPS | _16_BIT | _MANY | {"mask": True}, _tile(64, 4, 5)),
    (_GRAD_KEY_VALUE, _DETR | _WARP_GROUPS | _16_BIT, _tile(64, 4, 3)),
    (_GRAD_KEY_VALUE, _DETR | _16_BIT | _MANY | {"mask": True}, _tile(32, 4, 5)),
    (_GRAD_KEY_VALUE, _DETR | _16_BIT, _tile(32, 4, 3)),
    (_GRAD_KEY_VALUE, _16_BIT, _tile(32, 8, 2)),
    (_GRAD_KEY_VALUE, {}, _tile(16, 8, 1)),
    # The products are bound by memory: the whole width of the output in few tiles, so that pixels are read seldom.
    ("pointwise_conv_forward", _IEEE, _product(64, 64, 16, 8, 3)),
    # With whole tiles the compiler spills here, and only here.
    ("pointwise_conv_forward", _TF32 | {"family": "sm_100"}, _product(64, 64, 32, 4, 3)),
    ("pointwise_conv_forward", _TF32, _product(128, 64, 32, 8, 3)),
    ("pointwise_conv_forward", {"ragged": True}, _product(64, 64, 32, 4, 3)),
    ("pointwise_conv_forward", {"narrow": True} | _WARP_GROUPS, _product(128, 64, 64, 4, 3)),
    ("pointwise_conv_forward", {"narrow": True}, _product(128, 64, 32, 4, 4)),
    ("pointwise_conv_forward", _WARP_GROUPS, _product(128, 128, 64, 8, 3)),
    ("pointwise_conv_forward", {}, _product(128, 128, 32, 8, 3)),
    #
    # 32 elements a thread: with 64, triton 3.6 spills and 3.8 needs over 200 registers.
    ("pad_collate_forward", {}, {"BLOCK_H": 16, "BLOCK_W": 256, "num_warps": 4}),
    ("pad_collate_backward", {}, {"BLOCK_H": 16, "BLOCK_W": 256, "num_warps": 4}),
    #
    ("sine_position_forward", {"tokens": True}, {"BLOCK_T": 32, "BLOCK_F": 32, "num_warps": 4}),
    ("sine_position_forward", {}, {"BLOCK_T": 128, "BLOCK_F": 8, "num_warps": 4}),
)


def family(device: torch.device) -> str:
    """The family that `device` counts to, such as "sm_90"; see above for GPUs that are not known."""
    major, minor = _target.compute_capability(device)
    if major < 9:
        return "sm_86" if (major, minor) >= (8, 6) else "sm_80"
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_120")


@functools.cache
def configuration(kernel: str, **conditions) -> dict[str, int]:
    """Block sizes, warps and stages, as keyword arguments of the launch; not to be changed.

    Args:
        kernel: its name without the leading underscore and `_kernel`, such as "attention_forward".
        conditions: every condition of that kernel, as listed above; `device` in place of `family` is looked up.
    """
    return _first(MEASURED, kernel, conditions) or by_rule(kernel, conditions)


def by_rule(kernel: str, conditions: Conditions) -> dict[str, int]:
    """`configuration` without what has been measured."""
    found = _first(RULES, kernel, conditions)
    if found is None:
        raise KeyError(f"no configuration of kernel {kernel!r}")
    return found


def _first(entries: tuple[Entry, ...], kernel: str, conditions: Conditions) -> dict[str, int] | None:
    for entry_kernel, entry, chosen, *_ in entries:
        if entry_kernel == kernel and all(_holds(value, conditions[name]) for name, value in entry.items()):
            return chosen
    return None


def _holds(wanted: object, given: object) -> bool:
    return given in wanted if isinstance(wanted, tuple) else given == wanted


def attention_conditions(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, precision: str, block_d: int, mask: bool, dropout: bool
) -> Conditions:
    """The conditions of a launch of one of the attention kernels.

    Args:
        query, key, value: [B, H, L, D].
        precision: of float32 matrix products, "ieee" or "tf32".
        block_d: width of the wider tile.
    """
    lengths = "many"
    if query.shape[2] <= FEW:
        lengths = "few x few" if key.shape[2] <= FEW else "few x many"
    return {
        "family": family(query.device),
        "precision": precision if query.dtype == torch.float32 else "16-bit",
        "block_d": block_d,
        "ragged": not query.shape[3] == value.shape[3] == block_d,
        "mask": mask,
        "dropout": dropout,
        "lengths": lengths,
    }
