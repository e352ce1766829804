"""Cost of matching queries to targets, for all decoder layers and images in one launch.

    cost[l, t, q] = cost_bbox * |box_q - box_t|_1 - cost_class * softmax(logits_q)[label_t] - cost_giou * GIoU(q, t)

for the targets t of each image and its own queries q. Each block of queries computes its softmax once, then loops over
its image's targets. Only logits, boxes and the result touch memory; plain PyTorch writes the softmax over all classes
and some thirty tensors of the result's size.

Source: Carion et al. 2020, equation 1; facebookresearch/detr `models/matcher.py`.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _corners(boxes_ptr, index, mask):
    """cx, cy, w, h and x0, y0, x1, y1 of boxes [..., 4]."""
    cx = tl.load(boxes_ptr + index * 4, mask=mask, other=0.0).to(tl.float32)
    cy = tl.load(boxes_ptr + index * 4 + 1, mask=mask, other=0.0).to(tl.float32)
    w = tl.load(boxes_ptr + index * 4 + 2, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(boxes_ptr + index * 4 + 3, mask=mask, other=0.0).to(tl.float32)
    return cx, cy, w, h, cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h


@triton.jit
def _divide(numerator, denominator):
    """Quotient where 0 / 0 is 0."""
    return tl.div_rn(numerator, tl.where(denominator == 0, 1.0, denominator))


@triton.jit(do_not_specialize=["num_images", "num_targets", "num_queries"])
def _matching_cost_kernel(
    logits_ptr,  # [layers, num_images, num_queries, num_classes] float32, contiguous
    boxes_ptr,  # [layers, num_images, num_queries, 4] float32, contiguous; cx, cy, w, h
    labels_ptr,  # [num_targets] int64
    target_boxes_ptr,  # [num_targets, 4] float32, contiguous
    offsets_ptr,  # [num_images + 1] int64
    cost_ptr,  # [layers, num_targets, num_queries] float32
    num_images,
    num_targets,
    num_queries,
    num_classes,
    cost_class,
    cost_bbox,
    cost_giou,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program (image of a layer, block of queries)."""
    layer = (tl.program_id(0) // num_images).to(tl.int64)
    image = tl.program_id(0) % num_images
    start = tl.load(offsets_ptr + image)
    stop = tl.load(offsets_ptr + image + 1)
    offs_q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    mask_q = offs_q < num_queries
    query = (layer * num_images + image) * num_queries + offs_q  # among all layers and images

    # Row maximum and sum of exponentials over the classes, in one pass (online softmax).
    logits_ptrs = logits_ptr + query * num_classes
    highest = tl.full([BLOCK_Q], float("-inf"), dtype=tl.float32)
    total = tl.full([BLOCK_Q], 0, dtype=tl.float32)
    for first in range(0, num_classes, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        inside = mask_q[:, None] & (offs_k < num_classes)[None, :]
        logits = tl.load(logits_ptrs[:, None] + offs_k[None, :], mask=inside, other=float("-inf"))  # [BLOCK_Q, BLOCK_K]
        before = highest
        highest = tl.maximum(before, tl.max(logits, axis=1))
        # A row of -inf alone has no finite maximum to subtract: -inf - -inf would be NaN.
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(before - shift) + tl.sum(tl.exp(logits - shift[:, None]), axis=1)

    # [1, BLOCK_Q] for queries and [BLOCK_T, 1] for targets broadcast to [BLOCK_T, BLOCK_Q], the result's memory order.
    q_cx, q_cy, q_w, q_h, q_x0, q_y0, q_x1, q_y1 = _corners(boxes_ptr, query[None, :], mask_q[None, :])
    q_area = (q_x1 - q_x0) * (q_y1 - q_y0)
    for first in range(start, stop, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        mask_t = offs_t < stop
        mask = mask_t[:, None] & mask_q[None, :]  # [BLOCK_T, BLOCK_Q]
        label = tl.load(labels_ptr + offs_t, mask=mask_t, other=0)
        t_cx, t_cy, t_w, t_h, t_x0, t_y0, t_x1, t_y1 = _corners(target_boxes_ptr, offs_t[:, None], mask_t[:, None])
        # A class or box that no cost is defined for gives NaN; the label is clamped so that its load stays inside.
        is_refused = ((label < 0) | (label >= num_classes))[:, None] | (t_w < 0) | (t_h < 0)
        label = tl.minimum(tl.maximum(label, 0), num_classes - 1)
        logit = tl.load(logits_ptrs[None, :] + label[:, None], mask=mask, other=0.0)
        probability = tl.div_rn(tl.exp(logit - highest[None, :]), total[None, :])

        # L1 distance, in centres and sizes.
        l1 = tl.abs(q_cx - t_cx) + tl.abs(q_cy - t_cy) + tl.abs(q_w - t_w) + tl.abs(q_h - t_h)

        # Generalised IoU, in corners: IoU minus the part of the hull that neither box covers.
        width = tl.maximum(tl.minimum(q_x1, t_x1) - tl.maximum(q_x0, t_x0), 0.0)
        height = tl.maximum(tl.minimum(q_y1, t_y1) - tl.maximum(q_y0, t_y0), 0.0)
        intersection = width * height
        union = q_area + (t_x1 - t_x0) * (t_y1 - t_y0) - intersection
        hull_width = tl.maximum(tl.maximum(q_x1, t_x1) - tl.minimum(q_x0, t_x0), 0.0)
        hull_height = tl.maximum(tl.maximum(q_y1, t_y1) - tl.minimum(q_y0, t_y0), 0.0)
        hull = hull_width * hull_height
        giou = _divide(intersection, union) - _divide(hull - union, hull)

        # An infinite cost would make the assignment infeasible; NaN is reported as an invalid one.
        cost = cost_bbox * l1 - cost_class * probability - cost_giou * giou
        cost = tl.where(is_refused | (tl.abs(cost) == float("inf")), float("nan"), cost)
        cost_ptrs = cost_ptr + (layer * num_targets + offs_t)[:, None] * num_queries + offs_q[None, :]
        tl.store(cost_ptrs, cost, mask=mask)


def matching_cost_forward(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    target_boxes: torch.Tensor,
    offsets: torch.Tensor,
    cost_class: float,
    cost_bbox: float,
    cost_giou: float,
    *,
    cost: torch.Tensor,
) -> None:
    """Launch the kernel.

    Args:
        logits: [layers, images, queries, classes] float32, contiguous.
        boxes: [layers, images, queries, 4] float32, contiguous.
        labels: [targets] int64, contiguous.
        target_boxes: [targets, 4] float32, contiguous.
        offsets: [images + 1] int64, where each image's targets start.
        cost_class, cost_bbox, cost_giou: weights.
        cost: [layers, targets, queries] float32, contiguous; written.
    """
    if cost.numel() == 0:
        return
    layers, num_images, num_queries, num_classes = logits.shape
    num_targets = labels.shape[0]
    block_q = 32
    with torch.cuda.device_of(logits):
        _matching_cost_kernel[(layers * num_images, triton.cdiv(num_queries, block_q))](
            logits_ptr=logits,
            boxes_ptr=boxes,
            labels_ptr=labels,
            target_boxes_ptr=target_boxes,
            offsets_ptr=offsets,
            cost_ptr=cost,
            num_images=num_images,
            num_targets=num_targets,
            num_queries=num_queries,
            num_classes=num_classes,
            cost_class=float(cost_class),
            cost_bbox=float(cost_bbox),
            cost_giou=float(cost_giou),
            BLOCK_Q=block_q,
            BLOCK_T=8,
            BLOCK_K=64,
            num_warps=4,
        )
