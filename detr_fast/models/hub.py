"""The published models by name, with their published weights.

Source: facebookresearch/detr, hubconf.py.
"""

import os
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, cast, overload

from torch import nn

from detr_fast.layers import PositionEmbeddingSine
from detr_fast.models.backbone import Backbone, Joiner
from detr_fast.models.detr import DETR
from detr_fast.models.segmentation import DETRsegm
from detr_fast.models.transformer import Transformer
from detr_fast.models.weights import load_url

_URL = "https://dl.fbaipublicfiles.com/detr/"
_CHECKPOINTS = {
    "detr_resnet50": "detr-r50-e632da11.pth",
    "detr_resnet50_dc5": "detr-r50-dc5-f0fb7ef5.pth",
    "detr_resnet101": "detr-r101-2c7b67e5.pth",
    "detr_resnet101_dc5": "detr-r101-dc5-a2e86def.pth",
    "detr_resnet50_panoptic": "detr-r50-panoptic-00ce5173.pth",
    "detr_resnet50_dc5_panoptic": "detr-r50-dc5-panoptic-da08f1b1.pth",
    "detr_resnet101_panoptic": "detr-r101-panoptic-40021d53.pth",
}
_CHECKPOINT_CLASSES = {"detection": 91, "panoptic": 250}
# COCO's category ids: those of things end here, those of stuff begin after it.
LAST_THING = 90

_Weights: TypeAlias = str | os.PathLike | None
_Model_co = TypeVar("_Model_co", bound=nn.Module, covariant=True)
_Pair: TypeAlias = tuple[_Model_co, nn.Module]


class _BuildsDetector(Protocol[_Model_co]):
    """The type of `detr_resnet50` and its like: what is returned depends on `return_postprocessor`."""

    @overload
    def __call__(
        self,
        pretrained: bool = False,
        num_classes: int = 91,
        return_postprocessor: Literal[False] = False,
        *,
        weights: _Weights = "imagenet",
        norm: str | None = None,
    ) -> _Model_co: ...
    @overload
    def __call__(
        self,
        pretrained: bool = False,
        num_classes: int = 91,
        *,
        return_postprocessor: Literal[True],
        weights: _Weights = "imagenet",
        norm: str | None = None,
    ) -> _Pair[_Model_co]: ...
    @overload
    def __call__(
        self,
        pretrained: bool,
        num_classes: int,
        return_postprocessor: Literal[True],
        *,
        weights: _Weights = "imagenet",
        norm: str | None = None,
    ) -> _Pair[_Model_co]: ...
    @overload
    def __call__(
        self,
        pretrained: bool = False,
        num_classes: int = 91,
        return_postprocessor: bool = False,
        *,
        weights: _Weights = "imagenet",
        norm: str | None = None,
    ) -> _Model_co | _Pair[_Model_co]: ...


class _BuildsPanoptic(Protocol[_Model_co]):
    """The same of `detr_resnet50_panoptic` and its like, which have a threshold."""

    @overload
    def __call__(
        self,
        pretrained: bool = False,
        num_classes: int = 250,
        threshold: float = 0.85,
        return_postprocessor: Literal[False] = False,
        *,
        weights: _Weights = "imagenet",
        norm: str | None = None,
    ) -> _Model_co: ...
    @overload
    def __call__(
        self,
        pretrained: bool = False,
        num_classes: int = 250,
        threshold: float = 0.85,
        *,
        return_postprocessor: Literal[True],
        weights: _Weights = "imagenet",
        norm: str | None = None,
    ) -> _Pair[_Model_co]: ...
    @overload
    def __call__(
        self,
        pretrained: bool,
        num_classes: int,
        threshold: float,
        return_postprocessor: Literal[True],
        *,
        weights: _Weights = "imagenet",
        norm: str | None = None,
    ) -> _Pair[_Model_co]: ...
    @overload
    def __call__(
        self,
        pretrained: bool = False,
        num_classes: int = 250,
        threshold: float = 0.85,
        return_postprocessor: bool = False,
        *,
        weights: _Weights = "imagenet",
        norm: str | None = None,
    ) -> _Model_co | _Pair[_Model_co]: ...


def _builds_detector(function: Callable[..., Any]) -> _BuildsDetector[DETR]:
    return cast(_BuildsDetector[DETR], function)


def _builds_panoptic(function: Callable[..., Any]) -> _BuildsPanoptic[DETRsegm]:
    return cast(_BuildsPanoptic[DETRsegm], function)


def published() -> dict[str, str]:
    """Name of a published model → address of its weights."""
    return {name: _URL + file for name, file in _CHECKPOINTS.items()}


def _named_model(
    name: str,
    pretrained: bool,
    num_classes: int,
    return_postprocessor: bool,
    weights: str | os.PathLike | None,
    norm: str | None,
    threshold: float = 0.85,
):
    """Builds one of `_CHECKPOINTS`; see `detr_resnet50` and `detr_resnet50_panoptic` for the arguments."""
    with_masks = name.endswith("_panoptic")
    if pretrained:
        classes = _CHECKPOINT_CLASSES["panoptic" if with_masks else "detection"]
        if num_classes != classes:
            raise ValueError(
                f"the pretrained {name} has {classes} classes, num_classes is {num_classes}; for other "
                "classes build it with pretrained=False and load all but class_embed"
            )
        if norm == "group":
            raise ValueError(f"the pretrained {name} has batch norm; expected norm 'frozen', 'batch' or None")
        # The checkpoint holds the backbone too.
        weights, norm = None, norm or "frozen"
    backbone = Backbone(name.split("_")[1], True, with_masks, "_dc5" in name, weights=weights, norm=norm)
    d_model = 256
    joiner = Joiner(backbone, PositionEmbeddingSine(d_model // 2, normalize=True))
    transformer = Transformer(d_model=d_model, return_intermediate_dec=True)
    model = DETR(joiner, transformer, num_classes=num_classes, num_queries=100)
    if with_masks:
        model = DETRsegm(model)
    if pretrained:
        checkpoint = load_url(published()[name], f"build an untrained one: {name}(weights=None)")
        model.load_state_dict(checkpoint["model"])
        backbone.freeze(train_backbone=True)
    if return_postprocessor:
        from detr_fast.criterion import PostProcess, PostProcessPanoptic

        if with_masks:
            is_thing_map = {i: i <= LAST_THING for i in range(num_classes)}
            return model, PostProcessPanoptic(is_thing_map, threshold=threshold)
        return model, PostProcess()
    return model


@_builds_detector
def detr_resnet50(
    pretrained: bool = False,
    num_classes: int = 91,
    return_postprocessor: bool = False,
    *,
    weights: str | os.PathLike | None = "imagenet",
    norm: str | None = None,
) -> DETR | tuple[DETR, nn.Module]:
    """DETR with ResNet-50, 6 encoder and 6 decoder layers. Published: 42.0 AP, 62.4 AP50 on COCO val.

    Args:
        pretrained: load the published detector. The backbone's own weights are then not downloaded.
        num_classes: 91 for COCO (highest category id + 1).
        return_postprocessor: return (model, PostProcess()) instead of the model.
        weights, norm: of the backbone, see `Backbone`.

    Raises:
        ValueError: pretrained with another number of classes or with group norm.
        RuntimeError: a download failed; the message says where to put the file.
    """
    return _named_model("detr_resnet50", pretrained, num_classes, return_postprocessor, weights, norm)


@_builds_detector
def detr_resnet50_dc5(
    pretrained: bool = False,
    num_classes: int = 91,
    return_postprocessor: bool = False,
    *,
    weights: str | os.PathLike | None = "imagenet",
    norm: str | None = None,
) -> DETR | tuple[DETR, nn.Module]:
    """`detr_resnet50` with a dilated last stage: features at stride 16. Published: 43.3 AP, 63.1 AP50 on COCO val."""
    return _named_model("detr_resnet50_dc5", pretrained, num_classes, return_postprocessor, weights, norm)


@_builds_detector
def detr_resnet101(
    pretrained: bool = False,
    num_classes: int = 91,
    return_postprocessor: bool = False,
    *,
    weights: str | os.PathLike | None = "imagenet",
    norm: str | None = None,
) -> DETR | tuple[DETR, nn.Module]:
    """`detr_resnet50` with ResNet-101. Published: 43.5 AP, 63.8 AP50 on COCO val."""
    return _named_model("detr_resnet101", pretrained, num_classes, return_postprocessor, weights, norm)


@_builds_detector
def detr_resnet101_dc5(
    pretrained: bool = False,
    num_classes: int = 91,
    return_postprocessor: bool = False,
    *,
    weights: str | os.PathLike | None = "imagenet",
    norm: str | None = None,
) -> DETR | tuple[DETR, nn.Module]:
    """`detr_resnet101` with a dilated last stage: features at stride 16. Published: 44.9 AP, 64.7 AP50 on COCO val."""
    return _named_model("detr_resnet101_dc5", pretrained, num_classes, return_postprocessor, weights, norm)


@_builds_panoptic
def detr_resnet50_panoptic(
    pretrained: bool = False,
    num_classes: int = 250,
    threshold: float = 0.85,
    return_postprocessor: bool = False,
    *,
    weights: str | os.PathLike | None = "imagenet",
    norm: str | None = None,
) -> DETRsegm | tuple[DETRsegm, nn.Module]:
    """`detr_resnet50` with masks, for things and stuff. Published: 43.4 PQ on COCO val.

    Args:
        pretrained: load the published model. The backbone's own weights are then not downloaded.
        num_classes: 250 for COCO's panoptic categories (ids to 90 are things).
        threshold: of the post-processor, see `PostProcessPanoptic`.
        return_postprocessor: return (model, PostProcessPanoptic) instead of the model.
        weights, norm: of the backbone, see `Backbone`.

    Raises:
        ValueError: pretrained with another number of classes or with group norm.
        RuntimeError: a download failed; the message says where to put the file.
    """
    return _named_model(
        "detr_resnet50_panoptic", pretrained, num_classes, return_postprocessor, weights, norm, threshold
    )


@_builds_panoptic
def detr_resnet50_dc5_panoptic(
    pretrained: bool = False,
    num_classes: int = 250,
    threshold: float = 0.85,
    return_postprocessor: bool = False,
    *,
    weights: str | os.PathLike | None = "imagenet",
    norm: str | None = None,
) -> DETRsegm | tuple[DETRsegm, nn.Module]:
    """`detr_resnet50_panoptic` with a dilated last stage: features at stride 16. Published: 44.6 PQ on COCO val."""
    return _named_model(
        "detr_resnet50_dc5_panoptic", pretrained, num_classes, return_postprocessor, weights, norm, threshold
    )


@_builds_panoptic
def detr_resnet101_panoptic(
    pretrained: bool = False,
    num_classes: int = 250,
    threshold: float = 0.85,
    return_postprocessor: bool = False,
    *,
    weights: str | os.PathLike | None = "imagenet",
    norm: str | None = None,
) -> DETRsegm | tuple[DETRsegm, nn.Module]:
    """`detr_resnet50_panoptic` with ResNet-101. Published: 45.1 PQ on COCO val."""
    return _named_model(
        "detr_resnet101_panoptic", pretrained, num_classes, return_postprocessor, weights, norm, threshold
    )
