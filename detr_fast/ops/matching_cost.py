"""`matching_cost`: what it costs to match each query to each target of its image, for all decoder layers at once."""

import torch

from detr_fast.ops._boxes import box_cxcywh_to_xyxy, paired_generalized_box_iou
from detr_fast.ops._checks import check_numbers, check_tensor
from detr_fast.ops._dispatch import calls_plainly, use_kernel


def matching_cost(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    target_boxes: torch.Tensor,
    offsets: torch.Tensor,
    cost_class: float = 1,
    cost_bbox: float = 1,
    cost_giou: float = 1,
) -> torch.Tensor:
    """The matcher's costs, ``cost_bbox * L1 - cost_class * probability - cost_giou * GIoU``.

    Computed in float32, or in float64 for float64 predictions (in plain PyTorch on every device). Values are not
    checked, so that nothing waits for the GPU: a pair costs NaN if its label is not among the K classes, its target's
    width or height is negative, or its cost is not finite. Not differentiable.

    Args:
        logits: [L, B, Q, K] floating point: layers, images, queries, classes (no-object included).
        boxes: [L, B, Q, 4] floating point, cx, cy, w, h in 0..1.
        labels: [T] int64, the targets of all images one after another.
        target_boxes: [T, 4] floating point, cx, cy, w, h in 0..1.
        offsets: [B + 1] int64: image b has the targets offsets[b] to offsets[b + 1] - 1; from 0 to T, not checked.
        cost_class: weight of the (negative) softmax probability of the target's class.
        cost_bbox: weight of the L1 distance of the boxes in cx, cy, w, h.
        cost_giou: weight of the (negative) generalised IoU of the boxes.

    Returns:
        [L, T, Q] contiguous: each target against the queries of its own image.

    Raises:
        TypeError: an argument is not a tensor, a weight not a number, or a dtype does not fit.
        ValueError: a shape or device does not fit.

    Source: Carion et al. 2020, equation 1; facebookresearch/detr `models/matcher.py`.
    """
    arguments = _check(logits, boxes, labels, target_boxes, offsets)
    function = _forward if calls_plainly(arguments[0]) else _matching_cost
    return function(*arguments, *_weights(cost_class=cost_class, cost_bbox=cost_bbox, cost_giou=cost_giou))


def matching_cost_reference(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    target_boxes: torch.Tensor,
    offsets: torch.Tensor,
    cost_class: float = 1,
    cost_bbox: float = 1,
    cost_giou: float = 1,
) -> torch.Tensor:
    """`matching_cost` in plain PyTorch: same arguments, results and errors."""
    arguments = _check(logits, boxes, labels, target_boxes, offsets)
    return _reference(*arguments, *_weights(cost_class=cost_class, cost_bbox=cost_bbox, cost_giou=cost_giou))


def _weights(**weights) -> list[float]:
    check_numbers(**weights)
    return [float(weight) for weight in weights.values()]


def _check(logits, boxes, labels, target_boxes, offsets) -> tuple[torch.Tensor, ...]:
    """Check the arguments; return them detached, the floating ones in the dtype to compute in."""
    arguments = dict(logits=logits, boxes=boxes, labels=labels, target_boxes=target_boxes, offsets=offsets)
    for name, tensor in arguments.items():
        check_tensor(name, tensor)
    for name, tensor in (("logits", logits), ("boxes", boxes), ("target_boxes", target_boxes)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point; got {tensor.dtype}")
    for name, tensor in (("labels", labels), ("offsets", offsets)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64; got {tensor.dtype}")
    if logits.dim() != 4 or boxes.shape != (*logits.shape[:3], 4):
        raise ValueError(
            "logits must be [layers, images, queries, classes] and boxes [layers, images, queries, 4]; "
            f"got shapes {tuple(logits.shape)} and {tuple(boxes.shape)}"
        )
    if labels.dim() != 1 or target_boxes.shape != (labels.shape[0], 4) or offsets.shape != (logits.shape[1] + 1,):
        raise ValueError(
            f"labels must be [targets], target_boxes [targets, 4] and offsets [images + 1] = [{logits.shape[1] + 1}]; "
            f"got shapes {tuple(labels.shape)}, {tuple(target_boxes.shape)} and {tuple(offsets.shape)}"
        )
    tensors = (logits, boxes, labels, target_boxes, offsets)
    if len({tensor.device for tensor in tensors}) != 1:
        raise ValueError(f"all tensors must be on one device; got {', '.join(str(t.device) for t in tensors)}")
    dtype = torch.promote_types(torch.promote_types(logits.dtype, boxes.dtype), torch.float32)
    return tuple(t.detach().to(dtype) if t.is_floating_point() else t for t in tensors)


def _reference(logits, boxes, labels, target_boxes, offsets, cost_class, cost_bbox, cost_giou):
    _, num_images, _, num_classes = logits.shape
    # The image of each target, without asking the device how many there are.
    image = torch.arange(num_images, device=offsets.device)
    image = torch.repeat_interleave(image, offsets.diff(), output_size=labels.shape[0])
    is_allowed = (labels >= 0) & (labels < num_classes) & (target_boxes[:, 2:] >= 0).all(dim=-1)
    labels = labels.clamp(0, num_classes - 1)
    target_boxes = target_boxes[:, None]  # [T, 1, 4]
    # Coordinates first in memory: on the CPU, operations on rows of Q are much faster than on rows of 4.
    both = torch.cat((boxes, box_cxcywh_to_xyxy(boxes)), dim=-1).movedim(-1, 0).contiguous()
    boxes, corners = both[:, :, image].movedim(0, -1).split(4, dim=-1)  # [L, T, Q, 4]

    probability = logits.softmax(dim=-1).permute(1, 3, 0, 2)[image, labels].transpose(0, 1)  # [L, T, Q]
    l1 = (boxes - target_boxes).abs().sum(dim=-1)
    giou = paired_generalized_box_iou(corners, box_cxcywh_to_xyxy(target_boxes))
    cost = cost_bbox * l1 - cost_class * probability - cost_giou * giou
    return torch.where(is_allowed[:, None] & (cost.abs() < torch.inf), cost, torch.nan).contiguous()


def _forward(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    target_boxes: torch.Tensor,
    offsets: torch.Tensor,
    cost_class: float,
    cost_bbox: float,
    cost_giou: float,
) -> torch.Tensor:
    if not use_kernel(logits.device, "matching_cost") or logits.dtype != torch.float32:
        return _reference(logits, boxes, labels, target_boxes, offsets, cost_class, cost_bbox, cost_giou)
    from detr_fast.kernels.matching_cost import matching_cost_forward

    cost = _empty_cost(logits, labels)
    tensors = [t.contiguous() for t in (logits, boxes, labels, target_boxes, offsets)]
    matching_cost_forward(*tensors, cost_class, cost_bbox, cost_giou, cost=cost)
    return cost


_matching_cost = torch.library.custom_op("detr_fast::matching_cost", _forward, mutates_args=())


@_matching_cost.register_fake
def _matching_cost_fake(logits, boxes, labels, target_boxes, offsets, cost_class, cost_bbox, cost_giou):
    return _empty_cost(logits, labels)


def _empty_cost(logits, labels) -> torch.Tensor:
    """[L, T, Q], contiguous."""
    return logits.new_empty((logits.shape[0], labels.shape[0], logits.shape[2]))


@_matching_cost.register_vmap
def _matching_cost_vmap(info, in_dims, *args):
    raise NotImplementedError("matching_cost does not support vmap: it takes layers and images as they are")
