"""The detector: backbone, transformer and two heads.

Source: facebookresearch/detr, models/detr.py.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from detr_fast.layers import MLP
from detr_fast.layers.linear import apply_linear, apply_projection
from detr_fast.models.transformer import mask_for, set_skip_padded_queries
from detr_fast.nested_tensor import NestedTensor, is_nested_tensor, nested_tensor_from_tensor_list


class DETR(nn.Module):
    """Detects objects: one class distribution and one box for each of `num_queries` queries.

    Args:
        backbone: NestedTensor → (features, positions) as `Joiner`, with an attribute `num_channels`.
        transformer: as `Transformer`, with an attribute `d_model`. What its memory holds under the mask is not read,
            so its encoder's attentions get `skip_padded_queries`, unless a subclass or another's part may read it.
        num_classes: number of classes without no-object; with COCO's category ids the highest id + 1 = 91.
        num_queries: the most objects that can be found in one image.
        aux_loss: return the outputs of the earlier decoder layers too.
    """

    def __init__(
        self, backbone: nn.Module, transformer: nn.Module, num_classes: int, num_queries: int, aux_loss: bool = False
    ):
        super().__init__()
        self.num_queries = num_queries
        self.transformer = transformer
        hidden_dim = transformer.d_model
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.bbox_embed = MLP(hidden_dim, hidden_dim, 4, 3)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.input_proj = nn.Conv2d(backbone.num_channels, hidden_dim, kernel_size=1)
        self.backbone = backbone
        self.aux_loss = aux_loss
        set_skip_padded_queries(transformer, self)

    def forward(self, samples: NestedTensor | Tensor | Sequence[Tensor]) -> dict:
        """Detections of a batch.

        Args:
            samples: a NestedTensor of images [B, 3, H, W] and mask [B, H, W] bool, True = padding; or a tensor
                [B, 3, H, W] without padding; or a list of images [3, H_i, W_i]. Floating point, normalised.

        Returns:
            A dict with
            "pred_logits": [B, num_queries, num_classes + 1], no-object last;
            "pred_boxes": [B, num_queries, 4], cx, cy, w, h in 0..1 of each image's own width and height (no padding);
            "aux_outputs", with `aux_loss`: a list of dicts with the same two keys, of all decoder layers but the last.

        Raises:
            TypeError, ValueError: samples of another kind, shape or dtype; the message says what came.
        """
        samples = as_nested(samples)
        features, positions = self.backbone(samples)
        src, mask = features[-1].tensors, mask_for(self.transformer, features[-1])
        query_embed = self.query_embed.weight
        return self.outputs(
            self.transformer(apply_projection(self.input_proj, src), mask, query_embed, positions[-1])[0]
        )

    def outputs(self, hs: Tensor) -> dict:
        """What `forward` returns, from the decoder's outputs hs [layers, B, num_queries, d_model]."""
        return head_outputs(
            hs, self.class_embed, self.bbox_embed, "pred_boxes", self._set_aux_loss if self.aux_loss else None
        )

    def _set_aux_loss(self, outputs_class: Tensor, outputs_coord: Tensor) -> list[dict[str, Tensor]]:
        """ "aux_outputs" from all layers' logits [layers, B, Q, K] and boxes [layers, B, Q, 4]; the original's name."""
        return aux_outputs(outputs_class, outputs_coord, "pred_boxes")


def head_outputs(
    hs: Tensor,
    class_embed: nn.Module,
    embed: nn.Module,
    name: str,
    set_aux_loss: Callable[[Tensor, Tensor], list] | None,
) -> dict:
    """Predictions from the decoder's outputs, as a detector returns them.

    Args:
        hs: [layers, B, Q, C].
        class_embed: [..., C] → class logits.
        embed: [..., C] → four numbers, of which the sigmoid is taken.
        name: the key of those numbers, such as "pred_boxes".
        set_aux_loss: makes "aux_outputs" of all layers' logits and numbers; None for none.
    """
    if set_aux_loss is None:
        hs = hs[-1:]
    logits = apply_linear(class_embed, hs)
    values = embed(hs).sigmoid()
    out = {"pred_logits": logits[-1], name: values[-1]}
    if set_aux_loss is not None:
        out["aux_outputs"] = set_aux_loss(logits, values)
    return out


def aux_outputs(logits: Tensor, values: Tensor, name: str) -> list[dict[str, Tensor]]:
    """The predictions of all decoder layers but the last, one dict for each; both [layers, ...]."""
    earlier = zip(logits[:-1].unbind(), values[:-1].unbind(), strict=True)
    return [{"pred_logits": a, name: b} for a, b in earlier]


def as_nested(samples: NestedTensor | Tensor | Sequence[Tensor]) -> NestedTensor:
    """A batch as `DETR.forward` takes it: as it is, without padding, or padded; see there."""
    if isinstance(samples, Tensor):
        if samples.dim() != 4:
            raise ValueError(f"images are {list(samples.shape)}; expected [B, 3, H, W], or a list of [3, H, W]")
        samples = NestedTensor(samples, None, no_padding=True)
    elif isinstance(samples, (list, tuple)):
        samples = nested_tensor_from_tensor_list(samples)
    elif not is_nested_tensor(samples):
        raise TypeError(
            f"expected a NestedTensor, a tensor [B, 3, H, W] or a list of [3, H, W], got {type(samples).__name__}"
        )
    return samples
