"""Small models with random weights."""

import torch

from detr_fast.config import Config
from detr_fast.data.categories import Categories
from detr_fast.tasks import task_of

TINY = {
    "backbone": "resnet18", "backbone_weights": "none", "hidden_dim": 32, "nheads": 8, "enc_layers": 1, "dec_layers": 1,
    "dim_feedforward": 32, "num_queries": 5, "image_size": 64, "device": "cpu", "backbone_norm": "frozen",
}  # fmt: skip
CATEGORIES = Categories((5, 9), ("dot", "bar"), contiguous=True)


def checkpoint_of(**settings):
    """A checkpoint of ours with random weights, as training writes it."""
    config = Config(**{**TINY, "num_classes": 2, **settings})
    torch.manual_seed(0)
    model = task_of(config).build(config)[0]
    # At random a model says nearly the same of every query and image; this one does not.
    for name, parameter in model.named_parameters():
        name = name.removeprefix("detr.")
        if name.startswith("transformer.decoder") and parameter.ndim > 1:
            parameter.data *= 2
        elif name.startswith("input_proj"):
            parameter.data *= 3
        elif name.startswith("class_embed.weight") or ".layers.2.weight" in name:
            parameter.data *= 4
    return {"model": model.state_dict(), "args": config.to_dict(), "categories": CATEGORIES.to_dict(), "version": 1}
