"""The attention weights of a detector's transformer, and pictures of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

# The largest weight of a map is drawn in this colour.
_COLOUR = (255, 220, 0)


class AttentionMaps:
    """What `capture_attention` found in the last batch.

    Letters: B batch, Q queries, L = h*w pixels of the feature map; with `average_heads=False` each tensor has the heads
    as its second dimension.

    Attributes:
        encoder: of each encoder layer [B, L, L]: from the row's pixel to the column's.
        decoder_self: of each decoder layer [B, Q, Q]: among the queries.
        decoder: of each decoder layer [B, Q, L]: from the queries to the pixels.
        size: (h, w) of the feature map.
        mask: [B, h, w] bool, True = padding, or None for no padding. The weights from padded pixels mean nothing.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """As before the first batch."""
        self.encoder: list[Tensor] = []
        self.decoder_self: list[Tensor] = []
        self.decoder: list[Tensor] = []
        self.size = (0, 0)
        self.mask: Tensor | None = None

    def queries(self, layer: int = -1) -> Tensor:
        """[B, Q, h, w] (or [B, H, Q, h, w]): where a decoder layer's queries look."""
        return self._layer(self.decoder, layer).unflatten(-1, self.size)

    def pixels(self, layer: int = -1) -> Tensor:
        """[B, h, w, h, w] (or [B, H, h, w, h, w]): where an encoder layer's pixels look."""
        return self._layer(self.encoder, layer).unflatten(-1, self.size).unflatten(-3, self.size)

    def picture(
        self,
        image: Image.Image,
        *,
        query: int | None = None,
        point: tuple[float, float] | None = None,
        layer: int = -1,
        index: int = 0,
    ) -> Image.Image:
        """An image under the map of one query or one point; the mean over the heads.

        Args:
            image: any size; the picture that the model saw, before normalisation and padding.
            query: whose attention to the image is drawn (`queries`), or:
            point: x and y in 0..1 of the image, whose attention in the encoder is drawn (`pixels`).
            layer: of the decoder or the encoder; -1 is the last.
            index: which image of the batch it is.

        Returns:
            A picture of the image's size: grey where the weights are low, yellow where they are high.

        Raises:
            ValueError: neither or both of query and point, one outside its range, or nothing was captured.
        """
        if (query is None) == (point is None):
            raise ValueError(f"got query {query} and point {point}; expected one of them")
        maps = self.queries(layer) if point is None else self.pixels(layer)
        if not -len(maps) <= index < len(maps):
            raise ValueError(f"index is {index}; expected an image of the batch, 0 to {len(maps) - 1}")
        # The rows and columns that are no padding: all of the image.
        valid = torch.ones(self.size, dtype=torch.bool) if self.mask is None else ~self.mask[index].cpu()
        height, width = int(valid.any(dim=1).sum()), int(valid.any(dim=0).sum())
        found = maps[index].detach().float().cpu()
        if point is None:
            if not 0 <= query < found.shape[-3]:
                raise ValueError(f"query is {query}; expected 0 to {found.shape[-3] - 1}")
            found = found[..., query, :, :]
        else:
            if not (0 <= point[0] <= 1 and 0 <= point[1] <= 1):
                raise ValueError(f"point is {point}; expected x and y in 0..1")
            y, x = (min(int(p * n), n - 1) for p, n in ((point[1], height), (point[0], width)))
            found = found[..., y, x, :, :]
        found = found.reshape(-1, *self.size).mean(dim=0)[:height, :width]
        return _overlay(image, found.numpy())

    def _layer(self, layers: list[Tensor], layer: int) -> Tensor:
        if not layers:
            raise ValueError("no attention was captured; call the model inside `with capture_attention(model)`")
        if not -len(layers) <= layer < len(layers):
            raise ValueError(f"layer is {layer}; expected 0 to {len(layers) - 1}")
        return layers[layer]


@contextmanager
def capture_attention(model: nn.Module, *, average_heads: bool = True) -> Iterator[AttentionMaps]:
    """Keeps the attention weights of every layer while the model runs.

        with capture_attention(model) as attention, torch.no_grad():
            outputs = model(images)
        attention.decoder[-1]  # [B, Q, h*w]
        attention.picture(image, query=outputs["pred_logits"][0, :, :-1].max(-1).values.argmax().item()).save("map.png")

    What is kept is the last call's, as it is: [B, heads, h*w, h*w] numbers are computed for each encoder layer, and
    without `torch.no_grad` their graph is kept, too.

    Args:
        model: a detector with one transformer, such as `DETR`, `DETRsegm` or `LETR`, or the transformer itself, ours or
            the original's; in a wrapper or not.
        average_heads: the mean over the heads; False keeps them.

    Raises:
        TypeError: not a module.
        ValueError: it has no transformer, or more than one.
    """
    transformer = _transformer(model)
    maps, handles = AttentionMaps(), []

    def start(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        maps.clear()
        src, mask = (kwargs.get(name, args[i] if i < len(args) else None) for i, name in enumerate(("src", "mask")))
        maps.size, maps.mask = tuple(src.shape[-2:]), mask

    def ask(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "need_weights": True, "average_attn_weights": average_heads}

    def keep(module: nn.Module, name: str) -> None:
        handles.append(module.register_forward_pre_hook(ask, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda module, args, out: getattr(maps, name).append(out[1])))

    try:
        handles.append(transformer.register_forward_pre_hook(start, with_kwargs=True))
        for layer in transformer.encoder.layers:
            keep(layer.self_attn, "encoder")
        for layer in transformer.decoder.layers:
            keep(layer.self_attn, "decoder_self")
            keep(layer.multihead_attn, "decoder")
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def _transformer(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; expected a detector, a torch.nn.Module")
    # By its parts, so that the original's is found, too.
    found = [
        module
        for module in model.modules()
        if all(hasattr(getattr(module, part, None), "layers") for part in ("encoder", "decoder"))
    ]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} transformers with encoder.layers and decoder.layers; expected "
            "one: pass the transformer itself"
        )
    return found[0]


def _overlay(image: Image.Image, weights: Sequence) -> Image.Image:
    """The image in grey, with the colour as opaque as the weights [h, w] are large."""
    weights = np.asarray(weights)
    opacity = Image.fromarray(np.uint8(255 * weights / max(weights.max(), np.finfo(np.float32).tiny)))
    grey = image.convert("L").convert("RGB")
    return Image.composite(Image.new("RGB", image.size, _COLOUR), grey, opacity.resize(image.size, Image.BILINEAR))
