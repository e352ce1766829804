"""Inference on a CPU, ours beside the others': `python -m benchmarks infer`.

The same weights and images go through

- as shipped: the original's path: frozen norms as modules, attention with need_weights=True, padded batches;
- Hugging Face: `DetrForObjectDetection` with scaled_dot_product_attention, padded batches;
- Faster R-CNN: torchvision's, with weights of its own, as a yardstick of what detectors cost;
- detr_fast: images of one size together, the others one by one, as `Detector.predict` computes them; and in bfloat16
  where the CPU has its instructions.

With `--compile yes` also each compiled: the whole model as shipped, the parts that `--compile` compiles of ours. Times
are of the network alone, with one thread or as many as OMP_NUM_THREADS says. Before anything is timed, outputs are
compared with those as shipped: ours with each image alone, the others' with the padded batch.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from detr_fast.config import Config
from detr_fast.inference.loading import cpu_has_bf16
from detr_fast.integrations.huggingface import convert
from detr_fast.layers import MultiheadAttention
from detr_fast.models import DETR
from detr_fast.nested_tensor import NestedTensor
from detr_fast.tasks import task_of
from detr_fast.training.checkpoint import save_checkpoint
from detr_fast.training.regions import compile_regions

from ..harness.measure import reason_of
from ..harness.provenance import device_name, provenance, slug
from ..harness.results import load_record, save, suite_record
from ..harness.timing import clock_for, interleave, quantiles
from ..shapes import BatchShape
from .same_training import plausible_norms
from .train import room_to_compile
from .training_step import _WithWeights

SIDES = (800, 1066, 1200)
AS_SHIPPED = "as shipped"
# Largest difference of outputs, as a share of the largest value.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}

Output = tuple[Tensor, Tensor]  # logits [B, Q, K], boxes [B, Q, 4]


@dataclass
class Row:
    """One provider on one case; `status`: ok, checked (right, not timed), wrong, failed or unavailable."""

    case: str
    sizes: list[tuple[int, int]]
    valid: float  # share of the padded batch's pixels
    provider: str
    status: str = "checked"
    reason: str = ""
    difference: float | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    speed_up_of_ours: float | None = None  # median of the rounds' ratios, detr_fast's time being 1


def cases(scale: float) -> list[BatchShape]:
    """One image, four of one size, and two upright beside two lying ones, of which two fifths are padding."""
    short, middle, long = (max(32, round(side * scale)) for side in SIDES)
    one, mixed = ((short, middle),), ((short, middle), (middle, short), (short, long), (long, short))
    return [BatchShape(*named) for named in (("one", 32, one), ("four", 32, one * 4), ("mixed", 32, mixed))]


def build_model(name: str) -> tuple[DETR, Config]:
    """A DETR of random weights with plausible norms: R50, or "tiny" for tests."""
    kind: dict = {"backbone": "resnet50"}
    if name == "tiny":
        kind = {"backbone": "resnet18", "backbone_level": 1, "hidden_dim": 32, "nheads": 2, "num_queries": 9}
        kind |= {"enc_layers": 2, "dec_layers": 2, "dim_feedforward": 48, "num_classes": 4}
    own = {"backbone_weights": "none", "backbone_norm": "frozen", "aux_loss": False, "device": "cpu"}
    config = Config(**kind, **own)
    model = task_of(config).build(config)[0].eval()
    plausible_norms(model.backbone)
    return model, config


def padded(images: Sequence[Tensor], shape: BatchShape) -> NestedTensor:
    batch = torch.zeros(len(images), 3, *shape.padded)
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return NestedTensor(batch, shape.mask())


def grouped(images: Sequence[Tensor]) -> list[tuple[list[int], NestedTensor]]:
    """The images of each size, and their indices."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(tuple(image.shape), []).append(index)
    batches = []
    for indices in groups.values():
        batch = torch.stack([images[i] for i in indices])
        mask = torch.zeros(len(indices), *batch.shape[2:], dtype=torch.bool)
        batches.append((indices, NestedTensor(batch, mask)))
    return batches


def in_groups(model: nn.Module, batches: list[tuple[list[int], NestedTensor]]) -> Output:
    """Outputs in the images' order."""
    outputs = [model(batch) for _, batch in batches]
    order = torch.tensor([i for indices, _ in batches for i in indices]).argsort()
    return tuple(torch.cat([out[name] for out in outputs])[order] for name in ("pred_logits", "pred_boxes"))


def as_shipped(model: DETR) -> DETR:
    model = copy.deepcopy(model)
    model.backbone[0].body.fused = False
    for module in model.modules():
        if type(module) is MultiheadAttention:
            module.__class__ = _WithWeights
    return model


def hugging_face(model: DETR, config: Config) -> nn.Module:
    """Hugging Face's model with these weights.

    Raises:
        ImportError: transformers, or timm, which its backbone comes from, is not installed.
    """
    import timm  # noqa: F401
    from transformers import DetrForObjectDetection

    with tempfile.TemporaryDirectory() as folder:
        checkpoint, converted = Path(folder) / "model.pth", Path(folder) / "hf"
        save_checkpoint({"model": model.state_dict(), "args": config.to_dict()}, checkpoint)
        convert(str(checkpoint), str(converted))
        return DetrForObjectDetection.from_pretrained(converted, attn_implementation="sdpa").eval()


def faster_rcnn() -> nn.Module:
    from torchvision.models.detection import fasterrcnn_resnet50_fpn

    model = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).eval()
    model.transform.resize = lambda image, target=None: (image, target)  # they have their size
    return model


Call = Callable[[list[Tensor], BatchShape], Callable[[], Output | None]]


def providers(model: DETR, config: Config, compile: bool) -> dict[str, tuple[Call, bool]]:
    """Name → (what makes a case's call, whether it computes every image as if it were alone).

    A model that cannot be had raises when its call is made.
    """

    def of_ours(network: nn.Module, dtype: torch.dtype | None = None) -> Call:
        def prepare(images, shape):
            batches = grouped(images)

            def call():
                with torch.autocast("cpu", dtype, enabled=dtype is not None):
                    return in_groups(network, batches)

            return call

        return prepare

    def of_padded(network: nn.Module) -> Call:
        def prepare(images, shape):
            samples = padded(images, shape)

            def call():
                out = network(samples)
                return out["pred_logits"], out["pred_boxes"]

            return call

        return prepare

    def of_theirs(make: Callable[[], nn.Module]) -> Call:
        made: list[nn.Module] = []

        def prepare(images, shape):
            if not made:
                made.append(make())
            samples = padded(images, shape)
            pixel_mask = (~samples.mask).long()

            def call():
                out = made[0](pixel_values=samples.tensors, pixel_mask=pixel_mask)
                return out.logits, out.pred_boxes

            return call

        return prepare

    def of_yardstick(images, shape):
        network = faster_rcnn()

        def call():
            network(images)

        return call

    def compiled(network: nn.Module) -> nn.Module:
        network.compile(dynamic=False)
        return network

    theirs = as_shipped(model)
    chosen = {
        AS_SHIPPED: (of_padded(theirs), False),
        "Hugging Face (sdpa)": (of_theirs(lambda: hugging_face(model, config)), False),
        "torchvision Faster R-CNN": (of_yardstick, False),
        "detr_fast": (of_ours(model), True),
    }
    if cpu_has_bf16():
        chosen["detr_fast, bf16"] = of_ours(model, torch.bfloat16), True
    if compile:
        regions = copy.deepcopy(model)
        compile_regions(regions, print)
        chosen[f"{AS_SHIPPED}, compiled"] = of_padded(compiled(copy.deepcopy(theirs))), False
        chosen["Hugging Face (sdpa), compiled"] = of_theirs(lambda: compiled(hugging_face(model, config))), False
        chosen["detr_fast, compiled"] = of_ours(regions), True
    return chosen


def difference(value: Output, expected: Output) -> float:
    """The largest, of logits and boxes, as a share of the largest value."""
    return max(((v.float() - e).abs().max() / e.abs().max()).item() for v, e in zip(value, expected, strict=True))


@torch.inference_mode()
def measure_case(
    shape: BatchShape, chosen: dict[str, tuple[Call, bool]], *, timed: bool, seed: int, seconds: float, min_rounds: int
) -> list[Row]:
    """Checks every provider, and with `timed` measures the right ones interleaved. `chosen` starts as shipped."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(3, *size, generator=generator) for size in shape.sizes]
    first = chosen[AS_SHIPPED][0]
    alone = [
        first([image], BatchShape("alone", 32, (size,)))() for image, size in zip(images, shape.sizes, strict=True)
    ]
    expected = {True: tuple(map(torch.cat, zip(*alone, strict=True))), False: first(images, shape)()}
    valid = shape.valid_shares()["pixels"]
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], Output | None]] = {}
    for name, (prepare, by_itself) in chosen.items():
        row = rows[name] = Row(shape.name, list(shape.sizes), valid, name)
        try:
            call = prepare(images, shape)
            value = call()
        except ImportError as error:
            row.status, row.reason = "unavailable", str(error)
            continue
        except Exception as error:  # a peer's, or no compiler: a row of its own
            row.status, row.reason = "failed" if name.startswith("detr_fast") else "unavailable", reason_of(error)
            continue
        if value is None:
            row.reason = "another model: not compared"
        else:
            row.difference = difference(value, expected[by_itself])
            if not row.difference <= TOLERANCE["bf16" if "bf16" in name else "fp32"]:
                row.status, row.reason = "wrong", f"differs by {row.difference:.2g}"
                continue
        calls[name] = call
    if not timed:
        return list(rows.values())
    clock = clock_for(torch.device("cpu"))
    measured = interleave(calls, 1, clock, budget=seconds, min_rounds=min_rounds, max_rounds=50)
    for name, samples in measured.items():
        row = rows[name]
        row.status = "ok"
        row.median_ms, row.p20_ms, row.p80_ms = (1e3 * value for value in quantiles(samples))
        if "detr_fast" in measured:
            ratios = [theirs / ours for theirs, ours in zip(samples, measured["detr_fast"], strict=True)]
            row.speed_up_of_ours = quantiles(ratios)[0]
    return list(rows.values())


def cases_before(path: Path, provenance: dict) -> list[dict]:
    """The rows of an earlier run that differs from this one in nothing but its date and cases."""
    if not path.is_file():
        return []
    before = load_record(path)
    same = before["provenance"] | {"date": None} == provenance | {"date": None}
    return before["inference"] if same else []


def print_rows(rows: list[Row]) -> None:
    sizes = ", ".join(f"{height}x{width}" for height, width in rows[0].sizes)
    print(f"\ninfer: {rows[0].case}: {sizes}; {1 - rows[0].valid:.0%} of the padded batch is padding")
    for row in rows:
        apart = "" if row.difference is None else f"differs by {row.difference:.1e}"
        if row.median_ms is None:
            print(f"  {row.provider:30} {row.status}: {row.reason or apart}")
            continue
        ratio = "" if row.speed_up_of_ours is None else f"{row.speed_up_of_ours:5.2f} times detr_fast's"
        print(
            f"  {row.provider:30} {row.median_ms:9.1f} ms ({row.p20_ms:.1f}-{row.p80_ms:.1f}) {ratio}; "
            f"{row.reason or apart}"
        )


def run_infer(args: argparse.Namespace, device: torch.device) -> int:
    """Measures what `args` (of the command line) asks for; returns 1 if a provider of ours is wrong or fails.

    Raises:
        ValueError: a device other than the CPU.
    """
    if device.type != "cpu":
        raise ValueError("infer: measured on CPUs; expected --device cpu")
    print(f"CPU ({device_name(device)}), {torch.get_num_threads()} threads; leave the machine alone meanwhile.")
    started = time.monotonic()
    torch.manual_seed(args.seed)
    model, config = build_model("tiny" if args.quick else "R50")
    record = suite_record("infer", provenance(device), ["infer"], None) | {"inference": []}
    folder = args.output or Path("benchmarks/results") / slug(device_name(device))
    if args.case and not (args.no_save or args.check_only):
        record["inference"] = cases_before(folder / "infer.json", record["provenance"])
    with room_to_compile():
        chosen = providers(model, config, args.compile == "yes")
        if args.provider:
            parts = [part.lower() for part in args.provider]
            chosen = {n: p for n, p in chosen.items() if n == AS_SHIPPED or any(part in n.lower() for part in parts)}
        for shape in cases(0.1 if args.quick else 1.0):
            if (args.batch and shape.batch not in args.batch) or (args.case and shape.name not in args.case):
                continue
            if args.budget is not None and time.monotonic() - started > args.budget:
                record["not_measured"].append({"case": shape.name, "reason": f"time budget of {args.budget:g} s"})
                print(f"not measured: {shape.name}: time budget of {args.budget:g} s")
                continue
            rows = measure_case(
                shape, chosen, timed=not args.check_only, seed=args.seed,
                seconds=1.0 if args.quick else 60.0, min_rounds=3 if args.quick else 5,
            )  # fmt: skip
            print_rows(rows)
            others = [row for row in record["inference"] if row["case"] != shape.name]
            record["inference"] = others + [asdict(row) for row in rows]
            if not args.no_save and not args.check_only:
                print(f"results: {save(record, folder)}")
    ours = [row for row in record["inference"] if row["provider"].startswith("detr_fast")]
    return int(any(row["status"] in ("wrong", "failed") for row in ours))
