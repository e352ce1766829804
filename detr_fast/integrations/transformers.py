"""For models of Hugging Face's transformers: this package's attention, criterion, position embedding and frozen norm.

    from detr_fast.integrations.transformers import register

    register()
    model = DetrForObjectDetection.from_pretrained("facebook/detr-resnet-50", attn_implementation="detr_fast")

transformers (5.17 or newer, the extra `hf`) is imported by `register` alone.
"""

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.criterion import HungarianMatcher, SetCriterion
from detr_fast.layers import FrozenBatchNorm2d
from detr_fast.ops import attention, sine_position

NAME = "detr_fast"


def register() -> None:
    """Makes this package known to transformers, for models that are loaded or switched over later.

    - ``attn_implementation="detr_fast"``, in `from_pretrained` and in `model.set_attn_implementation`, runs
      `detr_fast.attention` in every model whose attention goes through transformers' attention interface.
    - Models that `from_pretrained` builds get this package's position embedding and frozen norm, and an encoder layer
      that does not wait for the GPU, in place of DETR's and Conditional DETR's own, with the same names of weights.
    - The losses of DETR, Table Transformer and YOLOS, with and without masks, come from `SetCriterion`, which matches
      on the GPU; those of all models, also of those that exist.

    Calling it again changes nothing. A model keeps its modules when `unregister` is called, or when it is saved: what
    `save_pretrained` writes is the same with and without.

    Raises:
        ImportError: transformers is absent or too old.
    """
    interfaces, patching, losses = _transformers()
    functions = (attention_forward, padding_mask)
    for interface, function in zip(interfaces, functions, strict=True):
        interface.register(NAME, function)
    patching.register_patch_mapping(_patches(), overwrite=True)
    for name, kind in _LOSSES.items():
        if not isinstance(losses[name], kind):
            losses[name] = kind(losses[name])


def unregister() -> None:
    """Undoes `register`; without it, nothing happens.

    A model that was switched to "detr_fast" has to be switched back with `model.set_attn_implementation`.

    Raises:
        ImportError: transformers is absent or too old.
    """
    interfaces, patching, losses = _transformers()
    for interface in interfaces:
        interface._global_mapping.pop(NAME, None)
    mapping = patching.get_patch_mapping()
    patching.unregister_patch_mapping([name for name, ours in _patches().items() if mapping.get(name) is ours])
    for name, kind in _LOSSES.items():
        if isinstance(losses[name], kind):
            losses[name] = losses[name].original


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function as transformers calls it.

    `detr_fast.attention` computes what needs a padding mask at most. Weights that are asked for come from plain
    PyTorch; causal attention, other masks, and heads that share keys go to transformers' function for SDPA.

    Args:
        query, key, value: [B, H, L, D], any strides.
        attention_mask: [B, Lk] bool, True = keep; or whatever SDPA takes; or None.
        dropout: on the weights.
        scaling: multiplies q kᵀ; None: D ** -0.5.
        is_causal: None: the module's own `is_causal`, or True where it has none, as transformers does.
        kwargs: "output_attentions" is read, the rest is for SDPA.

    Returns:
        [B, Lq, H, Dv], and the weights [B, H, Lq, Lk] if `output_attentions`, in kwargs or in the module's
        configuration, asks for them.
    """
    q_len, k_len = query.shape[2], key.shape[2]
    keep = _key_mask(attention_mask, key.shape[0], k_len)
    # SDPA would read [B, Lk] as [Lq, Lk].
    mask = attention_mask if keep is None else keep[:, None, None]
    # As for SDPA, the flag decides only where there is no mask.
    causal = mask is None and q_len > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    same_heads = query.shape[1] == key.shape[1]
    if same_heads and kwargs.get("position_bias") is None and kwargs.get("softcap") is None:
        if _wants_weights(module, kwargs):
            if causal:
                mask = torch.ones(q_len, k_len, dtype=torch.bool, device=query.device).tril(k_len - q_len)
            return _with_weights(query, key, value, mask, dropout, scaling)
        if not causal and (mask is None or keep is not None):
            out, _ = attention(query, key, value, None if keep is None else ~keep, dropout, scale=scaling)
            return out.transpose(1, 2), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """A mask function as transformers calls it. Without one, a model drops its padding mask without a word.

    Returns:
        Where only padding is masked, `attention_mask` as it came: [B, Lk] bool, True = keep, or None. Otherwise the
        mask that transformers makes for SDPA.
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    fits = attention_mask is None or attention_mask.shape == (batch_size, kv_length)
    if mask_function is bidirectional_mask_function and fits:
        return attention_mask
    return sdpa_mask(
        batch_size, q_length, kv_length, *args, mask_function=mask_function, attention_mask=attention_mask, **kwargs
    )


class SinePositionEmbedding(nn.Module):
    """The sine embedding of transformers' DETR, with its arguments, on `detr_fast.sine_position`.

    It computes in float32 whatever the dtype of the pixels is; transformers' own counts cells in that dtype.
    """

    def __init__(
        self,
        num_position_features: int = 64,
        temperature: int = 10000,
        normalize: bool = False,
        scale: float | None = None,
    ):
        super().__init__()
        if scale is not None and not normalize:
            raise ValueError(f"normalize should be True if scale is passed; got scale={scale}")
        self.num_position_features = num_position_features
        self.temperature = temperature
        self.normalize = normalize
        self.scale = scale

    def forward(
        self, shape: torch.Size, device: torch.device | str, dtype: torch.dtype, mask: Tensor | None = None
    ) -> Tensor:
        """[B, 2 F, h, w] of a feature map.

        Args:
            shape: of the feature map, [B, C, h, w].
            device, dtype: of the embedding.
            mask: [B, h, w], nonzero = valid; None: all of it is.
        """
        if mask is None:
            padding = torch.zeros(shape[0], *shape[-2:], dtype=torch.bool, device=device)
        else:
            padding = ~mask.to(device=device, dtype=torch.bool)
        features = self.num_position_features
        return sine_position(padding, None, features, self.temperature, self.normalize, self.scale, dtype)[0]


class _EncoderLayer:
    """Put before an encoder layer of transformers: the same values, without a wait for the GPU in training.

    There each layer asks whether all values are finite, and clamps them if not.
    """

    def forward(self, hidden_states, attention_mask, spatial_position_embeddings=None, **kwargs):
        attended, _ = self.self_attn(
            hidden_states=hidden_states,
            attention_mask=attention_mask,
            position_embeddings=spatial_position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + F.dropout(attended, self.dropout, self.training)
        hidden_states = self.self_attn_layer_norm(hidden_states)
        hidden_states = self.final_layer_norm(hidden_states + self.mlp(hidden_states))
        if not self.training:
            return hidden_states
        limit = torch.full_like(hidden_states[0, 0, 0], torch.finfo(hidden_states.dtype).max - 1000)
        limit = torch.where(hidden_states.isfinite().all(), torch.inf, limit)
        return hidden_states.clamp(-limit, limit)


_ENCODER_LAYERS = {
    "DetrEncoderLayer": "transformers.models.detr.modeling_detr",
    "ConditionalDetrEncoderLayer": "transformers.models.conditional_detr.modeling_conditional_detr",
}


@functools.cache
def _encoder_layer(name: str) -> type[nn.Module]:
    original = getattr(importlib.import_module(_ENCODER_LAYERS[name]), name)
    # transformers knows its layers by name, and pickles find this one by `__getattr__`.
    return type(name, (_EncoderLayer, original), {"__module__": __name__, "__doc__": original.__doc__})


def __getattr__(name: str) -> Any:
    if name not in _ENCODER_LAYERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _encoder_layer(name)


class DetectionLoss:
    """The loss of transformers' DETR, with its arguments and results, computed by `SetCriterion`.

    Values are equal to transformers' to rounding; 16-bit predictions are judged in float32. What `SetCriterion`
    refuses, such as predictions that are not finite (on the CPU; on a GPU the loss is NaN), goes to `original`.

    Args:
        original: transformers' function.
    """

    losses: Sequence[str] = ("labels", "boxes", "cardinality")

    def __init__(self, original: Callable):
        self.original = original

    def __call__(
        self,
        logits: Tensor,
        labels: Sequence[Mapping[str, Tensor]],
        device: torch.device | str,
        pred_boxes: Tensor,
        config: Any,
        outputs_class: Tensor | None = None,
        outputs_coord: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
        """The weighted sum, the losses by name, and the earlier decoder layers' outputs with `config.auxiliary_loss`.

        Args:
            logits: [B, Q, num_labels + 1].
            labels: B dicts, "class_labels" [n], "boxes" [n, 4], cx, cy, w, h in 0..1, with masks "masks" [n, H, W].
            device: not read; that of the logits.
            pred_boxes: [B, Q, 4].
            config: the model's, for the coefficients.
            outputs_class, outputs_coord: [layers, B, Q, …] of all decoder layers.
            kwargs: not read.
        """
        arguments = (logits, labels, device, pred_boxes, config, outputs_class, outputs_coord)
        try:
            return self._loss({"pred_logits": logits, "pred_boxes": pred_boxes}, labels, *arguments[4:])
        except (TypeError, ValueError):
            return self.original(*arguments, **kwargs)

    def _loss(self, outputs: dict[str, Any], labels, config, outputs_class, outputs_coord):
        earlier = None
        if config.auxiliary_loss:
            layers = list(zip(outputs_class[:-1], outputs_coord[:-1], strict=True))
            outputs["aux_outputs"] = [{"pred_logits": logits, "pred_boxes": boxes} for logits, boxes in layers]
            earlier = [{"logits": logits, "pred_boxes": boxes} for logits, boxes in layers]
        costs = (config.class_cost, config.bbox_cost, config.giou_cost)
        criterion = _criterion(
            config.num_labels, costs, config.eos_coefficient, tuple(self.losses), outputs["pred_logits"].device
        )
        targets = [{**target, "labels": target["class_labels"]} for target in labels]
        found = criterion(outputs, targets)
        del found["class_error"]
        total = [value * _coefficient(name, config) for name, value in found.items() if name.startswith("loss_")]
        return torch.stack(total).sum(), found, earlier


def _coefficient(name: str, config: Any) -> float:
    """Of a loss of any decoder layer: "loss_bbox", "loss_bbox_0"."""
    kind = name.split("_")[1]
    return 1.0 if kind == "ce" else getattr(config, f"{kind}_loss_coefficient")


class SegmentationLoss(DetectionLoss):
    """`DetectionLoss` with masks."""

    losses = ("labels", "boxes", "cardinality", "masks")

    def __call__(
        self, logits, labels, device, pred_boxes, pred_masks, config, outputs_class=None, outputs_coord=None, **kwargs
    ):
        """As `DetectionLoss`, and `pred_masks` [B, Q, h, w], logits."""
        outputs = {"pred_logits": logits, "pred_boxes": pred_boxes, "pred_masks": pred_masks}
        arguments = (config, outputs_class, outputs_coord)
        try:
            return self._loss(outputs, labels, *arguments)
        except (TypeError, ValueError):
            return self.original(logits, labels, device, pred_boxes, pred_masks, *arguments, **kwargs)


# By transformers' names of losses.
_LOSSES = {"ForObjectDetection": DetectionLoss, "ForSegmentation": SegmentationLoss}


@functools.lru_cache(maxsize=8)
def _criterion(
    num_classes: int, costs: tuple[float, float, float], eos: float, losses: tuple[str, ...], device: torch.device
) -> SetCriterion:
    """Kept, because its class weights would otherwise be copied to the GPU at every step."""
    return SetCriterion(num_classes, HungarianMatcher(*costs), {}, eos, losses).to(device)


def _patches() -> dict[str, type[nn.Module]]:
    """Pattern of a class name → what takes its place."""
    # Anchored: transformers searches for a pattern, and the name alone is also found in those of classes that count
    # otherwise, such as DeformableDetrSinePositionEmbedding.
    return {
        "^(Conditional)?DetrSinePositionEmbedding$": SinePositionEmbedding,
        "^(Conditional)?DetrFrozenBatchNorm2d$": FrozenBatchNorm2d,
        **{f"^{name}$": _encoder_layer(name) for name in _ENCODER_LAYERS},
    }


def _transformers() -> tuple[tuple, Any, dict[str, Callable]]:
    """transformers' two interfaces, of attentions and of their masks, its module for replacing classes, its losses."""
    try:
        from transformers import AttentionInterface, monkey_patching
        from transformers.loss.loss_utils import LOSS_MAPPING
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            f"needs transformers 5.17 or newer, pip install 'detr_fast[hf]'; importing it failed: {error}"
        ) from error
    return (AttentionInterface, AttentionMaskInterface), monkey_patching, LOSS_MAPPING


def _key_mask(mask: Tensor | None, batch: int, k_len: int) -> Tensor | None:
    """A mask that is the same for all heads and queries as [B, Lk], True = keep; None if it is another kind."""
    if mask is None or mask.dtype != torch.bool:
        return None
    if mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1 and mask.shape[3] == k_len:
        mask = mask[:, 0, 0]
    if mask.dim() != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != k_len:
        return None
    return mask.expand(batch, k_len)


def _wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    asked = kwargs.get("output_attentions")
    return bool(getattr(getattr(module, "config", None), "output_attentions", False) if asked is None else asked)


def _with_weights(query, key, value, mask, dropout, scaling) -> tuple[Tensor, Tensor]:
    """Attention as its formula reads; mask: bool, True = keep, or to be added to the scores. Broadcast over both."""
    scores = (query * (query.shape[-1] ** -0.5 if scaling is None else scaling)) @ key.transpose(-2, -1)
    if mask is None:
        weights = scores.softmax(dim=-1)
    elif mask.dtype == torch.bool:
        # A query without any key gets no weights, as in `attention`; its row is not all -inf, which would give NaN.
        lowest = torch.finfo(scores.dtype).min
        weights = scores.masked_fill(~mask, lowest).softmax(dim=-1).masked_fill(~mask, 0)
    else:
        weights = (scores + mask).softmax(dim=-1)
    weights = F.dropout(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights
