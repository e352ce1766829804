"""Which query each target gets, for all images and decoder layers: ours against SciPy on the host.

Kinds: `boxes` (100 queries, 1 to 20 targets an image, as DETR) and `lines` (1000 queries, 1 to 180 targets, as LETR).
The costs are on the device; on a GPU SciPy's time includes the way to the host and back. The cheapest assignment of
random costs is unique, so that every provider must give the same queries. The limit counts the costs read once; an
assignment is one long chain of small steps, so that nobody comes near it.
"""

import torch
from scipy.optimize import linear_sum_assignment

from detr_fast.ops import assign, assign_reference

from ..harness.case import Case, Inputs, Outputs, Provider
from ..harness.ceilings import PRECISIONS, Work
from ..harness.spec import BATCHES, Scale, Spec
from ..shapes import target_counts

KINDS = ("boxes", "lines")
QUERIES = {"boxes": 100, "lines": 1000}
MOST_TARGETS = {"boxes": 20, "lines": 180}


def options(kind: str) -> tuple[str, ...]:
    return ()


def gpu_specs(quick: bool) -> list[Spec]:
    specs = [Spec("assign", kind, padding="none", precision="fp32") for kind in KINDS]
    if quick:
        return specs
    return specs + [Spec("assign", "boxes", batch=batch, padding="none", precision="fp32") for batch in BATCHES]


def build(spec: Spec, scale: Scale, device: torch.device, *, compile: bool, quick: bool) -> tuple[Case, list[Provider]]:
    return case(spec.kind, spec.batch, scale.layers, spec.precision, device), providers()


def _ours(state: Inputs) -> Outputs:
    return assign(state["cost"], state["offsets"], max(state["counts"]))


def reference(inputs: Inputs) -> Outputs:
    return assign_reference(inputs["cost"], inputs["offsets"], max(inputs["counts"]))


def _layer_by_layer(state: Inputs) -> Outputs:
    """A copy to the host for each layer, SciPy for each image, the matched queries back to the device."""
    layers = []
    for cost in state["cost"]:
        queries = []
        for image in cost.cpu().split(state["counts"]):
            rows, columns = linear_sum_assignment(image.T.numpy())
            query = torch.full((len(image),), -1)
            query[torch.as_tensor(columns)] = torch.as_tensor(rows)
            queries.append(query)
        layers.append(torch.cat(queries).to(cost.device))
    return (torch.stack(layers),)


def _queries_only(outputs: Outputs, inputs: Inputs) -> Outputs:
    return outputs[:1]


def providers() -> list[Provider]:
    host = "SciPy runs on the host and waits for the costs"
    return [
        Provider("detr_fast", "all layers and images at once", _ours, ours=True),
        Provider(
            "as shipped", "SciPy image by image, one copy to the host and back per layer", _layer_by_layer,
            compare=_queries_only, eager_only=host,
        ),
        Provider("SciPy, one copy", "SciPy image by image, one copy for all layers", reference, eager_only=host),
    ]  # fmt: skip


def case(kind: str, batch: int, layers: int, precision: str, device: torch.device) -> Case:
    """`kind`: one of `KINDS`."""
    counts = target_counts(batch, MOST_TARGETS[kind])
    total, queries, dtype = sum(counts), QUERIES[kind], PRECISIONS[precision][0]
    offsets = torch.tensor([0, *counts]).cumsum(0).to(device)
    image = torch.arange(batch).repeat_interleave(torch.tensor(counts)).to(device)

    def inputs(seed: int) -> Inputs:
        """Distances of random boxes less random probabilities: nearby targets compete for the same queries."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*size):
            return torch.rand(*size, generator=generator, device=device)

        predicted, targets = draw(layers, batch, queries, 4), draw(total, 1, 4)
        distance = (predicted[:, image] - targets).abs().sum(-1)
        cost = 5 * distance - draw(layers, total, queries)
        return {"cost": cost.to(dtype), "offsets": offsets, "counts": counts}

    return Case(
        suite="assign",
        name=f"{kind} L{layers} B{batch} T{total}",
        precision=precision,
        mode="forward",
        inputs=inputs,
        reference=reference,
        plain=reference,
        # The costs read, the queries (int64) and statuses (int32) written.
        work=[Work(layers * (total * (4 * queries + 8) + 4 * batch))],
        shape={"kind": kind, "batch": batch, "layers": layers, "queries": queries, "targets": total},
    )
