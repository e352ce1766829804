"""ResNet backbones of torchvision, and the module that joins one with a position embedding.

Source: facebookresearch/detr, models/backbone.py.
"""

import contextlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from detr_fast.layers import BatchNorm2d, FrozenBatchNorm2d, PositionEmbeddingLearned, PositionEmbeddingSine
from detr_fast.layers.linear import is_altered
from detr_fast.layers.norm import frozen_affines
from detr_fast.layers.packed_conv import NotFinite, PackedConvs, runs_packed
from detr_fast.models.weights import load_file, load_url
from detr_fast.nested_tensor import NestedTensor, is_nested_tensor, is_unpadded
from detr_fast.ops._dispatch import refuse_transforms
from detr_fast.ops.folded_conv import Affine, folded_conv, forked_folded_conv

STAGES = ("layer1", "layer2", "layer3", "layer4")
_TRAINED_STAGES = STAGES[1:]

# Made of BasicBlock, which torchvision cannot dilate.
_BASIC_RESNETS = ("resnet18", "resnet34")
_RESNETS = (
    *_BASIC_RESNETS,
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
_POSITION_EMBEDDINGS = (PositionEmbeddingSine, PositionEmbeddingLearned)
_NORMS = {"frozen": FrozenBatchNorm2d, "batch": BatchNorm2d, "group": partial(nn.GroupNorm, 32)}

# The modules that a fused body computes without calling them. With any other in it, all are called one by one.
_FUSABLE = {nn.Sequential, nn.Conv2d, FrozenBatchNorm2d, nn.ReLU, nn.MaxPool2d, BasicBlock, Bottleneck}

# For pooling with a stride, torch 2.11 compiles one graph for even and another for odd sizes, and refuses to export a
# range of sizes. 2.14 does neither.
_POOL_GUARDS_PARITY = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)


class ResNetBody(nn.Module):
    """The layers of a torchvision ResNet up to a stage, under their names, returning some of the stages.

    With frozen batch norm throughout, each convolution is computed together with the norm, residual and ReLU after it
    (`detr_fast.ops.folded_conv`), on CUDA in channels-last memory, without calling the modules. They are called one by
    one, with the same results up to rounding, if a norm is trained, a module has a hook or is not torchvision's, under
    torch.compile and torch.export (whose own fusion is kept), and with `fused` False.

    In evaluation mode on a CPU without gradients, oneDNN computes each of these steps in one call, in channels-last
    memory, with folded weights that are kept from call to call (`PackedConvs`).

    Attributes:
        fused: may be set to False.

    Args:
        resnet: a `torchvision.models.ResNet`.
        return_layers: stage → name of its output, such as {"layer4": "0"}. What follows the last stage is dropped.
    """

    def __init__(self, resnet: nn.Module, return_layers: dict[str, str]):
        super().__init__()
        self.fused = True
        self._packed = PackedConvs()
        self.return_layers = dict(return_layers)
        missing = set(return_layers)
        for name, layer in resnet.named_children():
            if not missing:
                break
            self.add_module(name, layer)
            missing.discard(name)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] → {name: [B, C, h, w]}, in the order of the stages."""
        if self.fused and not torch.compiler.is_compiling() and self._is_fusable(x):
            return self._forward_fused(x)
        out = {}
        for name, layer in self.named_children():
            if name == "maxpool" and _POOL_GUARDS_PARITY and torch.compiler.is_compiling():
                x = _pool_of_any_size(x, layer)
            else:
                x = layer(x)
            if name in self.return_layers:
                out[self.return_layers[name]] = x
        return out

    def _forward_fused(self, x: Tensor) -> dict[str, Tensor]:
        if not self.training and runs_packed(x):
            with contextlib.suppress(NotFinite):
                return self._forward_folded(x, packed=True)
        return self._forward_folded(x, packed=False)

    def _forward_folded(self, x: Tensor, *, packed: bool) -> dict[str, Tensor]:
        norms = [module for module in self._parts() if type(module) is FrozenBatchNorm2d]
        affines = dict(zip(norms, frozen_affines(norms), strict=True))
        if packed:
            refuse_transforms("folded_conv", x, *self.parameters())
            if torch.is_autocast_enabled("cpu"):
                x = x.to(torch.get_autocast_dtype("cpu"))
        if packed or x.device.type == "cuda":
            x = x.contiguous(memory_format=torch.channels_last)
        x = _pool_channels_last((self._packed if packed else _conv)(x, self.conv1, affines[self.bn1]), self.maxpool)
        out = {}
        # Whether x is a ReLU's output that only the next block reads: then that block masks the gradient.
        masks_input_grad = False
        stages = [name for name in STAGES if hasattr(self, name)]
        for name in stages:
            returned = name in self.return_layers
            for block in (blocks := getattr(self, name)):
                if packed:
                    # A stage's input may have been returned.
                    x = _packed_block(x, block, affines, self._packed, overwrite=block is not blocks[0])
                    continue
                is_read_once = block is not blocks[-1] or not (returned or name == stages[-1])
                x = _block(x, block, affines, masks_input_grad=masks_input_grad, grad_is_masked=is_read_once)
                masks_input_grad = is_read_once
            if returned:
                out[self.return_layers[name]] = x
        return out

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_packed", PackedConvs())  # modules pickled before there was one

    def train(self, mode: bool = True) -> "ResNetBody":
        if mode:
            self._packed.clear()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> "ResNetBody":
        self._packed.clear()  # of another device or dtype
        return super()._apply(*args, **kwargs)

    def _is_fusable(self, x: Tensor) -> bool:
        """Whether skipping the modules' calls goes unnoticed: known modules alone, frozen norms, no hooks."""
        for module in self._parts():
            if type(module) not in _FUSABLE or is_altered(module):
                return False
            if type(module) is nn.Conv2d and (module.bias is not None or module.padding_mode != "zeros"):
                return False
            if type(module) is FrozenBatchNorm2d and module._parameters:  # somebody made constants trainable
                return False
        # Without autocast, an input of another dtype than the weights must get the convolution's own error.
        return torch.is_autocast_enabled(x.device.type) or x.dtype == self.conv1.weight.dtype

    def _parts(self) -> list[nn.Module]:
        """All modules below this one; `modules`, which also looks for those met twice, takes four times as long."""
        parts: list[nn.Module] = [self]
        for module in parts:
            parts += [child for child in module._modules.values() if child is not None]
        return parts[1:]


def _pool_of_any_size(x: Tensor, pool: nn.MaxPool2d) -> Tensor:
    """The result of `pool`, computed at stride 1 and then subsampled."""
    return F.max_pool2d(x, pool.kernel_size, 1, pool.padding)[:, :, :: pool.stride, :: pool.stride]


def _pool_channels_last(x: Tensor, pool: nn.MaxPool2d) -> Tensor:
    """The result of `pool`, in x's memory format. In the contiguous one a CPU takes 19 times as long."""
    if x.device.type != "cpu" or not x.is_contiguous():
        return pool(x)
    return pool(x.contiguous(memory_format=torch.channels_last)).contiguous()


def _conv(x: Tensor, conv: nn.Conv2d, affine: Affine, residual: Tensor | None = None, **options: Any) -> Tensor:
    return folded_conv(x, conv.weight, *affine, residual, **_geometry(conv), **options)


def _geometry(conv: nn.Conv2d) -> dict[str, Any]:
    return {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}


def _pairs(block: BasicBlock | Bottleneck) -> list[tuple[nn.Conv2d, FrozenBatchNorm2d]]:
    """The convolutions and their norms, one after another."""
    pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
    return pairs + [(block.conv3, block.bn3)] if type(block) is Bottleneck else pairs


def _block(
    x: Tensor,
    block: BasicBlock | Bottleneck,
    affines: dict[nn.Module, tuple[Tensor, Tensor]],
    *,
    masks_input_grad: bool,
    grad_is_masked: bool,
) -> Tensor:
    """A torchvision block, fused: each convolution with its norm, the last one also with residual and ReLU.

    Arguments as `folded_conv`'s, of x and of the result. Within the block each convolution masks its input's gradient.
    """
    (first, first_norm), *middle, (last, last_norm) = _pairs(block)
    if x.requires_grad and torch.is_grad_enabled():
        y, residual = forked_folded_conv(
            x, first.weight, *affines[first_norm], **_geometry(first), masks_input_grad=masks_input_grad
        )
    else:
        y, residual = _conv(x, first, affines[first_norm], grad_is_masked=True), x
    for conv, norm in middle:
        y = _conv(y, conv, affines[norm], masks_input_grad=True, grad_is_masked=True)
    residual, affine = _shortcut(residual, block, affines, affines[last_norm], _conv)
    return _conv(y, last, affine, residual, masks_input_grad=True, grad_is_masked=grad_is_masked)


def _packed_block(
    x: Tensor,
    block: BasicBlock | Bottleneck,
    affines: dict[nn.Module, tuple[Tensor, Tensor]],
    conv: PackedConvs,
    *,
    overwrite: bool,
) -> Tensor:
    """`_block` without gradients; with `overwrite` nobody else reads x."""
    *pairs, (last, last_norm) = _pairs(block)
    residual, affine = _shortcut(x, block, affines, affines[last_norm], conv)
    for convolution, norm in pairs:
        x = conv(x, convolution, affines[norm])
    return conv(x, last, affine, residual, overwrite=overwrite or block.downsample is not None)


def _shortcut(
    x: Tensor,
    block: BasicBlock | Bottleneck,
    affines: dict[nn.Module, tuple[Tensor, Tensor]],
    affine: tuple[Tensor, Tensor],
    conv: Callable[..., Tensor],
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The block's residual, and `affine` with both branches' biases, which the last convolution adds at once."""
    if block.downsample is None:
        return x, affine
    residual_scale, residual_bias = affines[block.downsample[1]]
    scale, bias = affine
    return conv(x, block.downsample[0], (residual_scale, None), relu=False), (scale, bias + residual_bias)


class BackboneBase(nn.Module):
    """A ResNet body that takes and returns nested tensors.

    Args:
        backbone: a `torchvision.models.ResNet`.
        train_backbone: False freezes every parameter; True only those outside of layer2, layer3 and layer4.
        num_channels: channels of the last level.
        return_interm_layers: return all levels as "0".."3" instead of the last one as "0".
        level: 0..3, the last level.
        freeze: False leaves every parameter as it is.
    """

    def __init__(
        self,
        backbone: nn.Module,
        train_backbone: bool,
        num_channels: int,
        return_interm_layers: bool,
        *,
        level: int = 3,
        freeze: bool = True,
    ):
        super().__init__()
        if return_interm_layers:
            return_layers = {stage: str(i) for i, stage in enumerate(STAGES[: level + 1])}
            self.num_channels_per_level = [num_channels // 2**i for i in range(level, -1, -1)]
        else:
            return_layers = {STAGES[level]: "0"}
            self.num_channels_per_level = [num_channels]
        self.body = ResNetBody(backbone, return_layers)
        self.num_channels = num_channels
        if freeze:
            self.freeze(train_backbone)

    def freeze(self, train_backbone: bool) -> None:
        """Freeze the parameters that the original does not train: the stem and layer1, or all of them."""
        for name, parameter in self.body.named_parameters():
            if not train_backbone or not name.startswith(_TRAINED_STAGES):
                parameter.requires_grad_(False)

    def forward(self, tensor_list: NestedTensor, *, masks: bool = True) -> dict[str, NestedTensor]:
        """Features of a batch.

        Args:
            tensor_list: tensors [B, 3, H, W], mask [B, H, W] bool, True = padding.
            masks: give each level its mask, resized as `F.interpolate` does (nearest). False leaves it None, for a
                caller that gets the mask from `sine_position`.

        Returns:
            {name: NestedTensor of [B, C, h, w] and [B, h, w]}.

        Raises:
            TypeError, ValueError: see `check_samples`.
        """
        check_samples(tensor_list)
        no_padding = is_unpadded(tensor_list)
        out = {}
        for name, x in self.body(tensor_list.tensors).items():
            mask = None
            if masks and not no_padding:
                mask = F.interpolate(tensor_list.mask[None].float(), size=x.shape[-2:]).to(torch.bool)[0]
            out[name] = NestedTensor(x, mask, no_padding=no_padding)
        return out


class Backbone(BackboneBase):
    """A ResNet of torchvision without its classifier.

    With pretrained weights it is the original's: frozen batch norm, stem and layer1 not trained. With `weights=None` no
    parameter is frozen, whatever `train_backbone` says (frozen random layers would never learn), and the norm is
    trainable unless `norm` is "frozen".

    Args:
        name: "resnet18", "resnet34", "resnet50", "resnet101" or another ResNet of torchvision.
        train_backbone: False freezes all parameters; True the stem's and layer1's.
        return_interm_layers: return all levels, four or up to `level`, as "0".."3" instead of the last one as "0".
        dilation: stride 16 instead of 32 in the last stage (DC5).
        weights: "imagenet" (torchvision's download, IMAGENET1K_V1, as the original's), the path of a file with
            torchvision's names, plain or under "model" or "state_dict", or None for random ones.
        norm: "frozen", "batch", "group" (32 groups), or None: "frozen" with weights and "batch" without.
        level: 0..3, the last stage, at stride 4, 8, 16 or 32; None is 3.

    Attributes:
        num_channels: channels of the last level returned.
        num_channels_per_level: channels of all levels returned, in order.

    Raises:
        ValueError: an unknown `name` or `norm`; a `level` that is not 0..3, or is below 3 with `dilation`; ImageNet
            weights for group norm; a file whose tensors do not fit.
        NotImplementedError: dilation with ResNet-18 or ResNet-34.
        FileNotFoundError: no file at the path `weights`.
        RuntimeError: the download failed.
    """

    def __init__(
        self,
        name: str,
        train_backbone: bool,
        return_interm_layers: bool,
        dilation: bool,
        *,
        weights: str | os.PathLike | None = "imagenet",
        norm: str | None = None,
        level: int | None = None,
    ):
        if name not in _RESNETS:
            raise ValueError(f"unknown backbone {name!r}; expected one of {', '.join(_RESNETS)}")
        if dilation and name in _BASIC_RESNETS:
            raise NotImplementedError(f"{name} cannot be dilated (torchvision's BasicBlock); use resnet50 or deeper")
        if norm is None:
            norm = "batch" if weights is None else "frozen"
        if norm not in _NORMS:
            raise ValueError(f"unknown norm {norm!r}; expected one of {', '.join(_NORMS)}, or None")
        if level is None:
            level = len(STAGES) - 1
        elif level not in range(len(STAGES)):
            raise ValueError(f"level is {level!r}; expected 0, 1, 2 or 3")
        if dilation and level < len(STAGES) - 1:
            raise ValueError(f"dilation changes the last stage, which level={level} leaves out")
        if weights == "imagenet" and norm == "group":
            raise ValueError(
                'the ImageNet weights are for batch norm; with norm="group" expected weights=None or a path'
            )

        resnet = getattr(torchvision.models, name)(
            weights=None, replace_stride_with_dilation=[False, False, dilation], norm_layer=_NORMS[norm]
        )
        if weights == "imagenet":
            _load_resnet(resnet, load_url(_imagenet_url(name), _WITHOUT_IMAGENET), "the ImageNet weights")
        elif weights is not None:
            _load_resnet(resnet, load_file(weights), f"weights {str(weights)!r}")
        num_channels = resnet.fc.in_features // 2 ** (len(STAGES) - 1 - level)
        super().__init__(
            resnet, train_backbone, num_channels, return_interm_layers, level=level, freeze=weights is not None
        )


_WITHOUT_IMAGENET = "give Backbone(weights=…) the path of a file with such weights, or weights=None for random ones"


def _imagenet_url(name: str) -> str:
    return torchvision.models.get_model_weights(name).IMAGENET1K_V1.url


def _load_resnet(resnet: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load everything but the classifier, which a detector lacks."""
    state = {name: value for name, value in state.items() if not name.startswith("fc.")}
    try:
        missing, unexpected = resnet.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{source} do not fit this backbone: {error}") from error
    missing = [name for name in missing if not name.startswith("fc.")]
    if missing or unexpected:
        raise ValueError(
            f"{source} do not fit this backbone: {_some(missing)} missing, {_some(unexpected)} unexpected; "
            "expected the names of a torchvision ResNet of this depth and norm (conv1.weight, layer1.0.conv1.weight, …)"
        )


def _some(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def check_samples(samples: NestedTensor) -> None:
    """Check a batch of images and its mask.

    Raises:
        TypeError: not a NestedTensor, no bool mask, or images that are not floating point.
        ValueError: images that are not [B, 3, H, W], or a mask that is not [B, H, W].
    """
    if not is_nested_tensor(samples):
        raise TypeError(f"expected a NestedTensor, got {type(samples).__name__}")
    images = samples.tensors
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images are {list(images.shape)}; expected [B, 3, H, W]")
    if not images.is_floating_point():
        raise TypeError(f"images are {images.dtype}; expected floating point, normalised")
    if is_unpadded(samples):
        return
    mask = samples.mask
    if mask is None or mask.dtype != torch.bool:
        raise TypeError(f"the mask is {None if mask is None else mask.dtype}; expected torch.bool, True = padding")
    batch, _, height, width = images.shape
    if mask.dim() != 3 or mask.shape != (batch, height, width):
        raise ValueError(f"the mask is {list(mask.shape)}; expected [B, H, W] = {[batch, height, width]}")


class Joiner(nn.Sequential):
    """A backbone and a position embedding, one after the other.

    With a `Backbone` and a position embedding of `detr_fast.layers`, one op gives a level's position and resized mask.

    Args:
        backbone: NestedTensor → {name: NestedTensor}, with an attribute `num_channels`.
        position_embedding: NestedTensor → [B, C, h, w].
    """

    def __init__(self, backbone: nn.Module, position_embedding: nn.Module):
        super().__init__(backbone, position_embedding)
        self.num_channels = backbone.num_channels

    def forward(self, tensor_list: NestedTensor, *, last_only: bool = False) -> tuple[list[NestedTensor], list[Tensor]]:
        """Features and positions of a batch.

        Args:
            tensor_list: tensors [B, 3, H, W], mask [B, H, W] bool, True = padding.
            last_only: compute the position, and the mask where one op gives both, of the last level alone.

        Returns:
            The levels' features with their masks, and their positions [B, C, h, w] in the features' dtype; with
            `last_only` a list of one position. Positions are not to be written to: those of images without padding
            may share their memory.
        """
        backbone, position_embedding = self
        # The exact class: a subclass may have a forward of its own.
        fused = isinstance(backbone, BackboneBase) and type(position_embedding) in _POSITION_EMBEDDINGS
        features = backbone(tensor_list, masks=False) if fused else backbone(tensor_list)
        positions = []
        for feature in list(features.values())[-1 if last_only else 0 :]:
            x = feature.tensors
            if fused:
                size = x.shape[-2:]
                if is_unpadded(feature):
                    tokens = position_embedding.without_padding(x)
                else:
                    tokens, feature.mask = position_embedding.from_mask(
                        tensor_list.mask, size, dtype=x.dtype, layout="tokens"
                    )
                # A [B, C, h, w] view of [B, h*w, C]: the transformer flattens it to tokens without a copy.
                positions.append(tokens.transpose(1, 2).unflatten(2, size))
            else:
                positions.append(position_embedding(feature).to(x.dtype))
        return list(features.values()), positions
