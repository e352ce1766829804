"""Position embeddings of a feature map."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from detr_fast.nested_tensor import is_nested_tensor
from detr_fast.ops.sine_position import check_num_pos_feats, sine_position, sine_position_without_padding


def _check_nested(tensor_list) -> None:
    if not is_nested_tensor(tensor_list):
        raise TypeError(
            f"got a {type(tensor_list).__name__}; expected a NestedTensor, which has tensors [B, C, h, w] and mask "
            "[B, h, w]; for a mask alone call from_mask"
        )


def _mask_of(tensor_list) -> torch.Tensor:
    _check_nested(tensor_list)
    if tensor_list.mask is None:
        raise ValueError("the position embedding needs the padding mask; got a NestedTensor whose mask is None")
    return tensor_list.mask


class PositionEmbeddingSine(nn.Module):
    """Sine embedding of the running counts of valid (unpadded) cells along y and x.

    Args:
        num_pos_feats: F, features per axis; even. DETR uses hidden_dim / 2.
        temperature: base of the geometric row of periods.
        normalize: scale the counts of each column and row to 0..`scale`. DETR does.
        scale: with `normalize` only; None means 2 pi.

    Raises:
        ValueError: `num_pos_feats` is odd or not positive; `scale` is passed without `normalize`.

    Source: facebookresearch/detr `models/position_encoding.py`.
    """

    def __init__(
        self, num_pos_feats: int = 64, temperature: float = 10000, normalize: bool = False, scale: float | None = None
    ):
        super().__init__()
        check_num_pos_feats(num_pos_feats)
        if scale is not None and not normalize:
            raise ValueError(f"normalize should be True if scale is passed; got scale={scale}, normalize={normalize}")
        self.num_pos_feats = num_pos_feats
        self.temperature = temperature
        self.normalize = normalize
        self.scale = 2 * math.pi if scale is None else scale

    def forward(self, tensor_list) -> torch.Tensor:
        """Embedding [B, 2F, h, w] float32 of a NestedTensor whose mask has the feature map's size.

        Raises:
            TypeError: not a NestedTensor.
            ValueError: the NestedTensor has no mask.
        """
        return self.from_mask(_mask_of(tensor_list))[0]

    def from_mask(
        self,
        mask: torch.Tensor,
        size: tuple[int, int] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        layout: str = "nchw",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedding and resized mask, straight from the batch's full-resolution mask.

        Args:
            mask: [B, H, W] bool, True = padding.
            size: (h, w) of the feature map; None keeps the mask's own.
            dtype: of the embedding.
            layout: "nchw" gives [B, 2F, h, w], "tokens" [B, h * w, 2F].

        Returns:
            The embedding and the mask resized to [B, h, w].
        """
        scale = self.scale if self.normalize else None
        return sine_position(
            mask, size, self.num_pos_feats, self.temperature, self.normalize, scale, dtype, layout=layout
        )

    def without_padding(self, features: torch.Tensor) -> torch.Tensor:
        """Embedding of features [B, C, h, w] without padding, in their dtype: [B, h * w, 2F], all images in one memory.

        The same numbers as those of a mask without a True. Not to be written to.
        """
        scale = self.scale if self.normalize else None
        pos = sine_position_without_padding(features, self.num_pos_feats, self.temperature, self.normalize, scale)
        return pos.expand(features.shape[0], -1, -1)


class PositionEmbeddingLearned(nn.Module):
    """Learned embedding of the row and the column, up to 50 of each.

    Args:
        num_pos_feats: F, features per axis.

    Source: facebookresearch/detr `models/position_encoding.py`.
    """

    def __init__(self, num_pos_feats: int = 256):
        super().__init__()
        self.row_embed = nn.Embedding(50, num_pos_feats)
        self.col_embed = nn.Embedding(50, num_pos_feats)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, tensor_list) -> torch.Tensor:
        """Embedding [B, 2F, h, w] of a NestedTensor's tensors [B, C, h, w]; x features come before y features.

        Raises:
            TypeError: not a NestedTensor.
            ValueError: the feature map has more than 50 rows or columns.
        """
        _check_nested(tensor_list)
        batch, _, height, width = tensor_list.tensors.shape
        return self._embed(batch, height, width)  # [B, 2F, h, w]

    def from_mask(
        self,
        mask: torch.Tensor,
        size: tuple[int, int] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        layout: str = "nchw",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `PositionEmbeddingSine.from_mask`."""
        if layout not in ("nchw", "tokens"):
            raise ValueError(f"layout must be 'nchw' or 'tokens'; got {layout!r}")
        if not isinstance(mask, torch.Tensor) or mask.dim() != 3:
            got = f"shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
            raise ValueError(f"mask must be a tensor [batch, height, width]; got {got}")
        if size is not None:
            mask = F.interpolate(mask[:, None].float(), size=tuple(size))[:, 0].to(torch.bool)
        pos = self._embed(*mask.shape).to(dtype)
        return (pos.flatten(2).transpose(1, 2).contiguous() if layout == "tokens" else pos), mask

    def without_padding(self, features: torch.Tensor) -> torch.Tensor:
        """As `PositionEmbeddingSine.without_padding`, in memory of its own."""
        batch, _, height, width = features.shape
        return self._embed(batch, height, width).to(features.dtype).flatten(2).transpose(1, 2).contiguous()

    def _embed(self, batch: int, height: int, width: int) -> torch.Tensor:
        if height > 50 or width > 50:
            raise ValueError(
                f"the learned position embedding has 50 rows and 50 columns; got a feature map of {height} x {width}"
            )
        x = self.col_embed.weight[:width].t()[:, None, :].expand(-1, height, -1)
        y = self.row_embed.weight[:height].t()[:, :, None].expand(-1, -1, width)
        return torch.cat([x, y])[None].repeat(batch, 1, 1, 1)
