"""The matcher's costs of all decoder layers: ours against the original's, which compares every query with every target.

[6, B, 100, 92] logits and boxes, 1 to 20 targets an image. Ours computes the pairs of one image only, which is all that
the assignment reads. No gradient, and float32: the criterion casts what autocast gives it.
"""

import functools

import torch
from torchvision.ops import generalized_box_iou

from detr_fast.geometry.boxes import box_cxcywh_to_xyxy
from detr_fast.ops import matching_cost, matching_cost_reference

from ..harness.case import Case, Inputs, Outputs, Provider, needs_compile
from ..harness.ceilings import PRECISIONS, Work
from ..harness.spec import BATCHES, Scale, Spec
from ..shapes import target_counts

KINDS = ("",)
QUERIES, CLASSES, MOST_TARGETS = 100, 92, 20
WEIGHTS = {"cost_class": 1.0, "cost_bbox": 5.0, "cost_giou": 2.0}
TENSORS = ("logits", "boxes", "labels", "target_boxes", "offsets")


def options(kind: str) -> tuple[str, ...]:
    return ()


def gpu_specs(quick: bool) -> list[Spec]:
    batches = (16,) if quick else (16, *BATCHES)
    return [Spec("matching_cost", batch=batch, padding="none", precision="fp32") for batch in batches]


def build(spec: Spec, scale: Scale, device: torch.device, *, compile: bool, quick: bool) -> tuple[Case, list[Provider]]:
    return case(spec.batch, scale.layers, spec.precision, device, compile=compile), providers()


def original(logits: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[B, Q, T] of one layer, as the original computes it (without its assertions, which wait for the GPU)."""
    batch, queries = logits.shape[:2]
    probability, boxes = logits.flatten(0, 1).softmax(-1), boxes.flatten(0, 1)
    cost = WEIGHTS["cost_bbox"] * torch.cdist(boxes, targets, p=1) - WEIGHTS["cost_class"] * probability[:, labels]
    giou = generalized_box_iou(box_cxcywh_to_xyxy(boxes), box_cxcywh_to_xyxy(targets))
    return (cost - WEIGHTS["cost_giou"] * giou).view(batch, queries, -1)


def _original(state: Inputs) -> Outputs:
    logits, boxes, labels, targets, _ = (state[name] for name in TENSORS)
    return tuple(original(*layer, labels, targets) for layer in zip(logits, boxes, strict=True))


def _own_images(state: Inputs, outputs: Outputs) -> Outputs:
    """[L, T, Q]: of all pairs those within one image."""
    images = torch.arange(len(state["counts"]))
    image = images.repeat_interleave(torch.tensor(state["counts"])).to(outputs[0].device)
    target = torch.arange(len(image), device=image.device)
    return (torch.stack([layer[image, :, target] for layer in outputs]),)


def _ours(state: Inputs) -> Outputs:
    return (matching_cost(*(state[name] for name in TENSORS), **WEIGHTS),)


def reference(inputs: Inputs) -> Outputs:
    return (matching_cost_reference(*(inputs[name] for name in TENSORS), **WEIGHTS),)


@functools.lru_cache(maxsize=1)
def _compiled_reference():
    return torch.compile(matching_cost_reference)


def _compiled(state: Inputs) -> Outputs:
    return (_compiled_reference()(*(state[name] for name in TENSORS), **WEIGHTS),)


def providers() -> list[Provider]:
    return [
        Provider("detr_fast", "pairs within an image, all layers at once", _ours, ours=True),
        Provider("as shipped", "softmax, cdist and GIoU of all pairs, layer by layer", _original, finish=_own_images),
        Provider("reference, eager", "pairs within an image, all layers at once, op by op", reference),
        Provider("reference, compiled", "the same; torch.compile", _compiled, needs_compile),
    ]


def case(batch: int, layers: int, precision: str, device: torch.device, *, compile: bool = False) -> Case:
    counts = target_counts(batch, MOST_TARGETS)
    total, dtype = sum(counts), PRECISIONS[precision][0]
    offsets = torch.tensor([0, *counts]).cumsum(0).to(device)

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)

        def boxes(*size):
            """Centre and size such that every box lies within the image."""
            made = torch.rand(*size, 4, generator=generator, device=device)
            return torch.cat((0.25 + 0.5 * made[..., :2], 0.05 + 0.45 * made[..., 2:]), -1).to(dtype)

        return {
            "logits": torch.randn(layers, batch, QUERIES, CLASSES, generator=generator, device=device).to(dtype),
            "boxes": boxes(layers, batch, QUERIES),
            "labels": torch.randint(0, CLASSES - 1, (total,), generator=generator, device=device),
            "target_boxes": boxes(total),
            "offsets": offsets,
            "counts": counts,
            "compile": compile,
        }

    rows = layers * batch * QUERIES
    return Case(
        suite="matching_cost",
        name=f"L{layers} B{batch} T{total}",
        precision=precision,
        mode="forward",
        inputs=inputs,
        reference=reference,
        plain=reference,
        # Logits and boxes read, labels and boxes of the targets read, the costs written; one softmax.
        work=[Work(4 * (rows * (CLASSES + 4) + layers * total * QUERIES) + 24 * total, exps=rows * CLASSES)],
        shape={"batch": batch, "layers": layers, "queries": QUERIES, "classes": CLASSES, "targets": total},
    )
