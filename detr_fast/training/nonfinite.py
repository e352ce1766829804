"""Finding where NaN or infinity comes from, and noticing it without waiting for the device."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from detr_fast.nested_tensor import NestedTensor


class FiniteWatch:
    """Collects one flag per step and reads it two steps later, when it has long been computed: nobody waits.

    Args:
        device: where the flags are. On the CPU they are read at once.
    """

    def __init__(self, device: torch.device):
        self._lag = 2 if device.type == "cuda" else 0
        self._pending = deque()

    def add(self, finite: Tensor, batch: tuple) -> tuple | None:
        """Notes a step and its batch. Returns the batch of an earlier step that was not finite, or None.

        Args:
            finite: 0-dimensional bool.
            batch: whatever is needed to explain the step.
        """
        event = None
        if finite.device.type == "cuda":
            host = torch.empty((), dtype=torch.bool, pin_memory=True)
            host.copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            finite = host
        self._pending.append((finite, event, batch))
        return self._oldest() if len(self._pending) > self._lag else None

    def drain(self) -> tuple | None:
        """As `add`, for the steps that are still to be read."""
        while self._pending:
            bad = self._oldest()
            if bad is not None:
                return bad
        return None

    def _oldest(self) -> tuple | None:
        finite, event, batch = self._pending.popleft()
        if event is not None:
            event.synchronize()
        return None if finite.item() else batch


def explain_non_finite(model: nn.Module, samples: NestedTensor, targets: Sequence[Mapping[str, Tensor]]) -> str | None:
    """The first thing that is not finite: an image, a target, a parameter, or else the output of a module.

    Runs the model forward once more (under the caller's autocast), looking at the output of every module.

    Args:
        model: without a wrapper for distributed training, so that names are those of its state dict.
        samples: the batch, normalised images and mask.
        targets: one dict for each image.

    Returns:
        One sentence, or None if all is finite.
    """
    for i, image in enumerate(samples.tensors):
        if not _finite(image):
            return f"image {i} of the batch{_image_id(targets, i)} has {_count(image)}"
    for i, target in enumerate(targets):
        for name, value in target.items():
            if not _finite(value):
                return f"{name!r} of the target of image {i}{_image_id(targets, i)} has {_count(value)}"
    # Not the buffers: the step in question has already put its NaN into batch norm's statistics.
    for name, value in model.named_parameters():
        if not _finite(value):
            return f"the model's parameter {name} has {_count(value)}"

    found: list[str] = []

    def look(name: str, module: nn.Module):
        def hook(_module, _inputs, outputs):
            if not found:
                bad = [value for value in _tensors(outputs) if not _finite(value)]
                if bad:
                    found.append(
                        f"the first module whose output is not finite is {name or 'the model itself'} "
                        f"({type(module).__name__}): {_count(bad[0])}"
                    )

        return hook

    # A module's hook runs when it is done: the innermost comes first.
    handles = [module.register_forward_hook(look(name, module)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            model(samples)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def explain_gradients(model: nn.Module) -> str | None:
    """The first parameters whose gradient is not finite, or None."""
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    if not bad:
        return None
    return f"the gradients of {len(bad)} parameters are not finite, the first are {', '.join(bad[:3])}"


def _finite(value) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return True
    return bool(torch.isfinite(value).all())


def _count(value: Tensor) -> str:
    nan, inf = int(torch.isnan(value).sum()), int(torch.isinf(value).sum())
    return f"{nan} NaN and {inf} infinite of {value.numel()} values"


def _tensors(tree) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf


def _image_id(targets: Sequence[Mapping[str, Tensor]], index: int) -> str:
    if index < len(targets) and "image_id" in targets[index]:
        return f" (image id {int(targets[index]['image_id'])})"
    return ""
