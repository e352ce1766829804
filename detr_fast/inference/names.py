"""The names of COCO's categories, for weights that name no classes."""

from collections.abc import Mapping
from typing import Any

from detr_fast.data.categories import Categories

# Of stuff in COCO's panoptic data, by category id.
_STUFF = {
    92: "banner", 93: "blanket", 95: "bridge", 100: "cardboard", 107: "counter", 109: "curtain", 112: "door-stuff",
    118: "floor-wood", 119: "flower", 122: "fruit", 125: "gravel", 128: "house", 130: "light", 133: "mirror-stuff",
    138: "net", 141: "pillow", 144: "platform", 145: "playingfield", 147: "railroad", 148: "river", 149: "road",
    151: "roof", 154: "sand", 155: "sea", 156: "shelf", 159: "snow", 161: "stairs", 166: "tent", 168: "towel",
    171: "wall-brick", 175: "wall-stone", 176: "wall-tile", 177: "wall-wood", 178: "water-other", 180: "window-blind",
    181: "window-other", 184: "tree-merged", 185: "fence-merged", 186: "ceiling-merged", 187: "sky-other-merged",
    188: "cabinet-merged", 189: "table-merged", 190: "floor-other-merged", 191: "pavement-merged",
    192: "mountain-merged", 193: "grass-merged", 194: "dirt-merged", 195: "paper-merged", 196: "food-other-merged",
    197: "building-other-merged", 198: "rock-merged", 199: "wall-other-merged", 200: "rug-merged",
}  # fmt: skip
# The original's numbers of classes: of things, and of things and stuff.
_THINGS_CLASSES, _PANOPTIC_CLASSES = 91, 250


def coco_names(num_classes: int | None) -> dict[int, str]:
    """Category id → name for a model with the original's number of classes; empty for any other number."""
    if num_classes not in (_THINGS_CLASSES, _PANOPTIC_CLASSES):
        return {}
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    things = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    names = {number: name for number, name in enumerate(things) if name not in ("__background__", "N/A")}
    return names | (_STUFF if num_classes == _PANOPTIC_CLASSES else {})


def with_names(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpoint with "categories": COCO's, with their ids as labels, where it names none and has as many classes."""
    bias = next((value for name, value in checkpoint["model"].items() if name.endswith("class_embed.bias")), ())
    names = coco_names(len(bias) - 1)
    if "categories" in checkpoint or not names:
        return checkpoint
    return {**checkpoint, "categories": Categories(tuple(names), tuple(names.values())).to_dict()}
