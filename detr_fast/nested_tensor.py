"""NestedTensor: a padded batch of images with its padding mask, and the collate functions that make it.

Source: facebookresearch/detr, `util/misc.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from detr_fast.ops.pad_collate import pad_collate


class NestedTensor:
    """A batch and its padding mask.

    It crosses loader workers, `pin_memory=True` loaders, torch.compile and torch.export.

    Args:
        tensors: [B, ..., H, W], usually images or feature maps [B, C, H, W].
        mask: [B, H, W] bool on the same device, True = padding; or None where nobody needs it.
        no_padding: the mask is known to be all False, without reading it. Then it may be None: it is made when somebody
            asks for it.

    Attributes:
        no_padding: as given, until somebody asks for the mask, and may write in it. A model that knows computes without
            a mask.

    Raises:
        ValueError: a mask of another shape or on another device.
        TypeError: `tensors` is not a tensor, the mask is not a bool tensor.
    """

    def __init__(self, tensors: Tensor, mask: Tensor | None, *, no_padding: bool = False):
        if not isinstance(tensors, Tensor):
            raise TypeError(f"tensors is a {type(tensors).__name__}; expected a tensor [B, C, H, W]")
        if mask is not None:
            if not isinstance(mask, Tensor):
                raise TypeError(f"mask is a {type(mask).__name__}; expected a bool tensor [B, H, W] or None")
            if mask.dtype != torch.bool:
                raise TypeError(f"mask has dtype {mask.dtype}; expected torch.bool, True = padding")
            if tensors.ndim < 3 or mask.shape != tensors.shape[:1] + tensors.shape[-2:]:
                raise ValueError(
                    f"mask has shape {tuple(mask.shape)}, tensors {tuple(tensors.shape)}; expected mask [B, H, W] and "
                    "tensors [B, C, H, W]"
                )
            if mask.device != tensors.device:
                raise ValueError(f"mask is on {mask.device}, tensors on {tensors.device}; expected one device")
        self.tensors = tensors
        self._mask = mask
        self.no_padding = no_padding

    def __setstate__(self, state: dict) -> None:
        if "mask" in state:  # pickled when it was an attribute
            state = {"tensors": state["tensors"], "_mask": state["mask"], "no_padding": False}
        self.__dict__.update(state)

    @property
    def mask(self) -> Tensor | None:
        """[B, H, W] bool, True = padding, or None."""
        if self.no_padding:
            if self._mask is None:
                shape = (*self.tensors.shape[:1], *self.tensors.shape[-2:])
                self._mask = torch.zeros(shape, dtype=torch.bool, device=self.tensors.device)
            self.no_padding = False
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        self._mask = mask
        self.no_padding = False

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "NestedTensor":
        """Both parts on `device`; `non_blocking` from pinned memory does not wait for the copy."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "NestedTensor":
        """Both parts in page-locked memory. `DataLoader(pin_memory=True)` calls it."""
        return self._map(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tells the allocator that `stream` uses both parts (see `torch.Tensor.record_stream`)."""
        self.tensors.record_stream(stream)
        if self._mask is not None:
            self._mask.record_stream(stream)

    def decompose(self) -> tuple[Tensor, Tensor | None]:
        """(tensors, mask)"""
        return self.tensors, self.mask

    def __repr__(self) -> str:
        return str(self.tensors)

    def _map(self, function) -> "NestedTensor":
        mask = None if self._mask is None or self.no_padding else function(self._mask)
        return NestedTensor(function(self.tensors), mask, no_padding=self.no_padding)


def is_nested_tensor(value) -> bool:
    """Whether it is a batch with a mask: ours, or the class of code that carries a copy of the original's."""
    return isinstance(value, NestedTensor) or (hasattr(value, "tensors") and hasattr(value, "mask"))


def is_unpadded(nested) -> bool:
    """Whether a batch, ours or another's, is known to have no padding."""
    return getattr(nested, "no_padding", False)


def nested_tensor_from_tensor_list(
    tensor_list: Sequence[Tensor] | Tensor,
    *,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
    size_divisor: int = 1,
) -> NestedTensor:
    """Pads images [C_i, H_i, W_i] to the largest of all three axes; True in the mask is padding.

    Args:
        tensor_list: images, or masks [n_i, H_i, W_i], or a batched tensor [B, C, H, W]. The latter, without further
            arguments, is not copied: it becomes `tensors` as it is.
        mean, std, dtype, channels_last, size_divisor: as in `detr_fast.pad_collate`.

    Raises:
        ValueError, TypeError: as `detr_fast.pad_collate`.
    """
    is_batch = isinstance(tensor_list, Tensor) and tensor_list.ndim == 4 and tensor_list.shape[0] > 0
    if is_batch and mean is std is dtype is None and not channels_last and size_divisor == 1:
        # Without a loop over the batch, so that torch.compile and torch.export can leave its size open.
        return NestedTensor(tensor_list, None, no_padding=True)
    tensors, mask = pad_collate(
        tensor_list, mean=mean, std=std, dtype=dtype, channels_last=channels_last, size_divisor=size_divisor
    )
    # A compiled graph is for images of any sizes, also of the same.
    if not torch.compiler.is_compiling() and all(image.shape[-2:] == tensors.shape[-2:] for image in tensor_list):
        return NestedTensor(tensors, None, no_padding=True)
    return NestedTensor(tensors, mask)


def collate_fn(batch: Sequence[tuple]) -> tuple:
    """Collates samples (image, target, ...) into (NestedTensor, targets, ...); targets stay a tuple of B items.

    Raises:
        TypeError: not a list of tuples.
        ValueError: an empty batch, and as `nested_tensor_from_tensor_list`.
    """
    if not isinstance(batch, Sequence) or not all(isinstance(sample, Sequence) for sample in batch):
        kinds = type(batch).__name__
        if isinstance(batch, Sequence):
            kinds += f" of {', '.join(sorted({type(sample).__name__ for sample in batch}))}"
        raise TypeError(f"got a {kinds}; expected a list of samples (image, target, ...)")
    if len(batch) == 0:
        raise ValueError("got an empty batch; expected samples (image, target, ...)")
    images, *rest = zip(*batch, strict=True)
    return (nested_tensor_from_tensor_list(images), *rest)


def _flatten(nested: NestedTensor):
    return [nested.tensors, nested.mask], None


def _flatten_with_keys(nested: NestedTensor):
    return [(pytree.GetAttrKey("tensors"), nested.tensors), (pytree.GetAttrKey("mask"), nested.mask)], None


def _unflatten(children, context) -> NestedTensor:
    # Unchecked: the tree utilities put placeholders here that are not tensors.
    nested = NestedTensor.__new__(NestedTensor)
    nested.tensors, nested.mask = children
    return nested


pytree.register_pytree_node(
    NestedTensor,
    _flatten,
    _unflatten,
    serialized_type_name="detr_fast.NestedTensor",
    flatten_with_keys_fn=_flatten_with_keys,
)
