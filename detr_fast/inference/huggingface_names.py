"""Names of weights: the original's, which this package has, and those of Hugging Face's DETR.

Source of the names: transformers, models/detr and conversion_mapping.py; facebookresearch/detr, models/.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from detr_fast.models.weights import DETECTOR, has_masks

# Beginnings of names: the original's, and those in a folder's file. transformers 5 calls some of them otherwise in
# memory, see `_NEWER`, but still writes and reads these.
_BEGINNINGS = {
    "backbone.0.body.": "model.backbone.conv_encoder.model.",
    "backbone.1.row_embed.": "model.position_embedding.row_embeddings.",
    "backbone.1.col_embed.": "model.position_embedding.column_embeddings.",
    "input_proj.": "model.input_projection.",
    "query_embed.": "model.query_position_embeddings.",
    "transformer.decoder.norm.": "model.decoder.layernorm.",
    "class_embed.": "class_labels_classifier.",
    "bbox_embed.": "bbox_predictor.",
}
# The parts of a layer. `in_proj` is cut into its three.
_PARTS = {
    "encoder": {
        "self_attn": "self_attn",
        "linear1": "fc1",
        "linear2": "fc2",
        "norm1": "self_attn_layer_norm",
        "norm2": "final_layer_norm",
    },
    "decoder": {
        "self_attn": "self_attn",
        "multihead_attn": "encoder_attn",
        "linear1": "fc1",
        "linear2": "fc2",
        "norm1": "self_attn_layer_norm",
        "norm2": "encoder_attn_layer_norm",
        "norm3": "final_layer_norm",
    },
}
_THIRDS = ("q_proj", "k_proj", "v_proj")
# What transformers 5 calls in memory, and what that is in a file.
_NEWER = (
    (r"(^|\.)model\.backbone\.model\.", r"\1model.backbone.conv_encoder.model."),
    (r"(^|\.)model\.backbone\.position_embedding\.", r"\1model.position_embedding."),  # transformers 4
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.(fc[12])\.", r".\1."),
    (r"^bbox_attention\.([qk])_proj\.", r"bbox_attention.\1_linear."),
    (r"^mask_head\.conv([12])\.conv\.", r"mask_head.lay\1."),
    (r"^mask_head\.conv([12])\.norm\.", r"mask_head.gn\1."),
    (r"^mask_head\.output_conv\.", "mask_head.out_lay."),
    *(
        (rf"^mask_head\.fpn_stages\.{i}\.{theirs}\.", f"mask_head.{ours}.")
        for i in range(3)
        for theirs, ours in (
            ("fpn_adapter", f"adapter{i + 1}"),
            (r"refine\.conv", f"lay{i + 3}"),
            (r"refine\.norm", f"gn{i + 3}"),
        )
    ),
)
_MASK_HEAD = ("bbox_attention.", "mask_head.")


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names that Hugging Face's files have, which every version of transformers reads.

    Args:
        state: of a `DETR` or a `DETRsegm`, under the original's names.

    Returns:
        The same values; the attentions' `in_proj` cut into query, key and value.

    Raises:
        ValueError: a name has no counterpart; the message says which.
    """
    masks, out, unknown = has_masks(state), {}, []
    for name, value in state.items():
        if masks and name.startswith(_MASK_HEAD):
            out[name] = value.contiguous()  # safetensors takes no channels-last weights, as a training run leaves them
            continue
        theirs = _their_names(name.removeprefix(DETECTOR))
        if not theirs or masks != name.startswith(DETECTOR):
            unknown.append(name)
            continue
        for their, part in zip(theirs, value.chunk(len(theirs)), strict=True):
            # Separate memory: safetensors refuses tensors that share it.
            out[f"{DETECTOR if masks else ''}{their}"] = part.clone(memory_format=torch.contiguous_format)
    _refuse_unknown(unknown, "Hugging Face's DETR")
    return out


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`to_huggingface` backwards; takes the names of a file and those of transformers 5 in memory.

    Raises:
        ValueError: a name has no counterpart, or a query, key or value projection lacks the others.
    """
    masks, out, unknown = has_masks(state), {}, []
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        for pattern, replacement in _NEWER:
            name = re.sub(pattern, replacement, name)
        if masks and name.startswith(_MASK_HEAD):
            out[name] = value
            continue
        our = _our_name(name.removeprefix(DETECTOR))
        if our is None or masks != name.startswith(DETECTOR):
            unknown.append(name)
            continue
        our, third = our
        our = f"{DETECTOR if masks else ''}{our}"
        if third is None:
            out[our] = value
        else:
            # Entered now, so that the order of the names stays.
            thirds.setdefault(our, {})[third] = out[our] = value
    _refuse_unknown(unknown, "the original")
    for our, parts in thirds.items():
        if set(parts) != set(_THIRDS):
            raise ValueError(f"{our} needs {', '.join(_THIRDS)}; there is only {', '.join(parts)}")
        out[our] = torch.cat([parts[third] for third in _THIRDS])
    return out


def is_huggingface(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has Hugging Face's names."""
    return any(name.removeprefix(DETECTOR) == "class_labels_classifier.bias" for name in state)


def _their_names(name: str) -> tuple[str, ...]:
    """Of the whole tensor, or of its three parts; empty: there is none."""
    for ours, theirs in _BEGINNINGS.items():
        if name.startswith(ours):
            return (theirs + name.removeprefix(ours),)
    found = re.fullmatch(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.(\w+)\.(.+)", name)
    if not found or found[3] not in _PARTS[found[1]]:
        return ()
    side, layer, part, rest = found.groups()
    beginning = f"model.{side}.layers.{layer}.{_PARTS[side][part]}."
    if rest.startswith("in_proj_"):
        return tuple(f"{beginning}{third}.{rest.removeprefix('in_proj_')}" for third in _THIRDS)
    return (beginning + rest,)


def _our_name(name: str) -> tuple[str, str | None] | None:
    """Our name, and which third of that tensor it is, if it is one; None: there is none."""
    for ours, theirs in _BEGINNINGS.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs), None
    found = re.fullmatch(r"model\.(encoder|decoder)\.layers\.(\d+)\.(\w+)\.(.+)", name)
    if not found:
        return None
    side, layer, part, rest = found.groups()
    parts = {theirs: ours for ours, theirs in _PARTS[side].items()}
    if part not in parts:
        return None
    beginning = f"transformer.{side}.layers.{layer}.{parts[part]}."
    third, _, kind = rest.partition(".")
    return (f"{beginning}in_proj_{kind}", third) if third in _THIRDS else (beginning + rest, None)


def _refuse_unknown(names: list[str], where: str) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"{', '.join(names[:3])}{more} have no counterpart in {where}")
