"""The whole training step, ours beside the original's: `python -m benchmarks train`.

On the same batches, from the same weights:

- as shipped: the original's step: float32 (TF32 as PyTorch's defaults have it), frozen norms as modules, attention with
  need_weights=True, every decoder layer matched by SciPy, losses read (`.item()`) in every step, AdamW per parameter;
- tuned stock: the best of stock parts: bf16 autocast, channels_last, scaled_dot_product_attention with the mask,
  torch.compile, fused AdamW; the reference criterion;
- detr_fast, and detr_fast with one technique switched off at a time.

Before anything is timed each variant's loss is compared with the first's, dropout off; a wrong one has no time. The
operations are counted for the padded size; "% of limit" is operations / measured matrix rate / time: nothing is granted
for bytes, so that even a perfect step stays below 100 %.
"""

import argparse
import contextlib
import copy
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from detr_fast.criterion import HungarianMatcher
from detr_fast.data import PackedBatch, PackedCollate
from detr_fast.layers import MultiheadAttention, PositionEmbeddingSine
from detr_fast.models import DETR, Backbone, Joiner, Transformer
from detr_fast.nested_tensor import NestedTensor
from detr_fast.training.regions import compile_regions

from ..harness.ceilings import Ceilings, measure_ceilings
from ..harness.measure import _peak_memory, _reason
from ..harness.provenance import device_name, provenance, slug
from ..harness.results import save, suite_record
from ..harness.timing import clock_for, interleave, quantiles
from ..shapes import BatchShape, nominal_batch, typical_real_batch
from .same_training import LayerByLayer, criterion, plausible_norms, reference_ops

STAGES = ("input", "backbone", "encoder", "decoder", "criterion", "backward", "optimiser")
MODELS = {"R50": ("resnet50", False), "R101": ("resnet101", False), "DC5": ("resnet50", True)}
CLASSES = 91


@dataclass(frozen=True)
class Variant:
    """One way to make a step; the defaults are ours.

    Attributes:
        attention: "ours", "sdpa" (nn.MultiheadAttention without weights) or "weights" (with them).
        compile: "no", "regions" or "model".
        kernels: False: plain PyTorch for every op.
        one_pass: match and judge all decoder layers at once instead of one by one with SciPy.
        packed: uint8 images in one buffer, normalised and padded on the device; else a float batch is copied.
        read_losses: wait for the losses' values in every step.
    """

    name: str
    bf16: bool = True
    channels_last: bool = True
    fused_backbone: bool = True
    attention: str = "ours"
    kernels: bool = True
    compile: str = "regions"
    one_pass: bool = True
    packed: bool = True
    fused_adamw: bool = True
    read_losses: bool = False


OURS = Variant("detr_fast")
AS_SHIPPED = Variant("as shipped", False, False, False, "weights", False, "no", False, False, False, True)
TUNED = Variant("tuned stock", True, True, False, "sdpa", False, "model", False, False, True, False)
OFF = {
    "bf16": {"bf16": False},
    "channels_last": {"channels_last": False},
    "fused backbone": {"fused_backbone": False},
    "kernels": {"kernels": False},
    "compile by regions": {"compile": "no"},
    "criterion in one pass": {"one_pass": False},
    "packed input": {"packed": False},
    "fused AdamW": {"fused_adamw": False},
    "deferred logging": {"read_losses": True},
}


def variants(device: torch.device, compile: bool) -> list[Variant]:
    """All of them as they can run on `device`. On a CPU everything is float32, since few CPUs compute in bf16."""
    ablations = [replace(OURS, name=f"detr_fast without {name}", **change) for name, change in OFF.items()]
    chosen = [AS_SHIPPED, TUNED, OURS, *ablations]
    if not compile:
        chosen = [replace(v, compile="no") for v in chosen if v.name != "detr_fast without compile by regions"]
    if device.type == "cpu":
        # There is one memory format for all, and the kernels' place is taken by the references anyway.
        skipped = ("bf16", "channels_last", "kernels")
        chosen = [replace(v, bf16=False, channels_last=False) for v in chosen if not v.name.endswith(tuple(skipped))]
    return chosen


class _WithWeights(MultiheadAttention):
    def forward(self, query, key, value, key_padding_mask=None, need_weights=False, **options):
        return nn.MultiheadAttention.forward(self, query, key, value, key_padding_mask, True, **options)


class _Sdpa(MultiheadAttention):
    def forward(self, query, key, value, key_padding_mask=None, need_weights=False, **options):
        return nn.MultiheadAttention.forward(self, query, key, value, key_padding_mask, False, **options)


def build_model(name: str, dropout: float) -> DETR:
    """DETR with a frozen-norm backbone with plausible statistics; "tiny" for a machine without a GPU."""
    if name == "tiny":
        backbone = Backbone("resnet18", True, False, False, weights=None, norm="frozen", level=1)
        transformer, features, queries = Transformer(64, 4, 2, 2, 128, dropout, return_intermediate_dec=True), 64, 12
    else:
        backbone = Backbone(MODELS[name][0], True, False, MODELS[name][1], weights=None, norm="frozen")
        transformer, features, queries = Transformer(256, dropout=dropout, return_intermediate_dec=True), 256, 100
    plausible_norms(backbone)
    backbone.freeze(train_backbone=True)
    joiner = Joiner(backbone, PositionEmbeddingSine(features // 2, normalize=True))
    return DETR(joiner, transformer, CLASSES, queries, aux_loss=True)


def make_batch(shape: BatchShape, device: torch.device, seed: int) -> tuple[PackedBatch, NestedTensor, list[dict]]:
    """Images of the shape's sizes as both kinds of loader send them, and targets with 1 to 20 boxes."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for height, width in shape.sizes:
        count = int(torch.randint(1, 21, (1,), generator=generator))
        boxes = torch.rand(count, 4, generator=generator) * torch.tensor([0.6, 0.6, 0.3, 0.3]) + 0.1
        labels = torch.randint(0, CLASSES, (count,), generator=generator)
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        samples.append((image, {"boxes": boxes, "labels": labels}))
    packed, targets = PackedCollate()(samples)
    floats = packed.to("cpu")
    if device.type == "cuda":
        packed, floats = packed.pin_memory(), floats.pin_memory()
    return packed, floats, list(targets)


class Step:
    """A variant ready to train.

    Attributes:
        mark: called with a stage's name when it has ended.
        fell_back: what torch.compile could not do.
    """

    def __init__(self, variant: Variant, model: DETR, device: torch.device):
        self.variant, self.device = variant, device
        self.model = model.to(device).train()
        if variant.channels_last:
            self.model.to(memory_format=torch.channels_last)
        model.backbone[0].body.fused = variant.fused_backbone
        if variant.attention != "ours":
            for module in model.modules():
                if type(module) is MultiheadAttention:
                    module.__class__ = _WithWeights if variant.attention == "weights" else _Sdpa
        matcher = HungarianMatcher if variant.one_pass else LayerByLayer
        self.criterion = criterion(matcher, model.transformer.decoder.num_layers, CLASSES).to(device)
        groups = [
            {"params": [p for n, p in model.named_parameters() if p.requires_grad and "backbone" not in n]},
            {"params": [p for n, p in model.named_parameters() if p.requires_grad and "backbone" in n], "lr": 1e-5},
        ]
        how = {"fused": True} if variant.fused_adamw else {"foreach": False}
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-4, **how)
        self.parameters = [p for group in groups for p in group["params"]]
        self.mark: Callable[[str], None] = lambda stage: None
        self.fell_back: list[str] = []
        if variant.compile == "regions":
            compile_regions(model, self.fell_back.append)
        elif variant.compile == "model":
            model.compile(dynamic=True)

    def ops(self):
        return contextlib.nullcontext() if self.variant.kernels else reference_ops()

    def loss(self, batch) -> Tensor:
        packed, samples, targets = batch
        if self.variant.packed:
            options = {"channels_last": self.variant.channels_last}
            if self.variant.bf16:
                options["dtype"] = torch.bfloat16
            samples = PackedBatch(packed.buffer, packed.header, packed.options | options)
        samples = samples.to(self.device, non_blocking=True)
        if self.variant.channels_last:
            samples.tensors = samples.tensors.contiguous(memory_format=torch.channels_last)
        if not self.variant.one_pass:
            targets = [{k: v.to(self.device, non_blocking=True) for k, v in target.items()} for target in targets]
        self.mark("input")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.variant.bf16):
            outputs = self.model(samples)
        self.mark("decoder")
        losses = self.criterion(outputs, targets)
        weights = self.criterion.weight_dict
        loss = sum(value * weights[name] for name, value in losses.items() if name in weights)
        if self.variant.read_losses:
            for value in losses.values():
                value.detach().item()
        self.mark("criterion")
        return loss

    def __call__(self, batch) -> None:
        with self.ops():
            loss = self.loss(batch)
            loss.backward()
        self.mark("backward")
        nn.utils.clip_grad_norm_(self.parameters, 0.1)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.mark("optimiser")

    def stages(self, batch) -> dict[str, float]:
        """Seconds of each stage of one step. A model compiled whole shows its parts as one, "decoder"."""
        cuda = self.device.type == "cuda"
        marks: list[tuple[str, object]] = []

        def mark(stage: str) -> None:
            if cuda:
                event = torch.cuda.Event(enable_timing=True)
                event.record()
                marks.append((stage, event))
            else:
                marks.append((stage, time.perf_counter()))

        parts = {} if self.variant.compile == "model" else {
            "backbone": self.model.backbone, "encoder": self.model.transformer.encoder
        }  # fmt: skip
        hooks = [
            module.register_forward_hook(lambda *args, stage=stage: mark(stage)) for stage, module in parts.items()
        ]
        self.mark = mark
        try:
            mark("start")
            self(batch)
        finally:
            self.mark = lambda stage: None
            for hook in hooks:
                hook.remove()
        if cuda:
            torch.cuda.synchronize(self.device)
        seconds = {}
        for (_, before), (stage, after) in zip(marks, marks[1:], strict=False):
            seconds[stage] = before.elapsed_time(after) / 1e3 if cuda else after - before
        return seconds


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    before = []
    for module in model.modules():
        for name in ("p", "dropout"):
            if isinstance(module, (nn.Dropout, nn.MultiheadAttention)) and isinstance(
                getattr(module, name, None), float
            ):
                before.append((module, name, getattr(module, name)))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


class _Counter(TorchDispatchMode):
    """Counts operators, and those whose result the host reads."""

    def __init__(self):
        super().__init__()
        self.operators = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


def count(step: Step, batch) -> dict[str, int | None]:
    """Launches and host syncs of one step on a GPU; on a CPU operators and values that the host reads."""
    if step.device.type == "cpu":
        if step.variant.compile != "no":
            return {}
        with _Counter() as counter:
            step(batch)
        return {"operators": counter.operators, "host_reads": counter.reads}
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(step.device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step(batch)
    names = {event.key: event.count for event in profiler.key_averages()}
    launches = sum(n for name, n in names.items() if "LaunchKernel" in name or "GraphLaunch" in name)
    syncs = sum(n for name, n in names.items() if "Synchronize" in name)
    # The profiler itself synchronises once at its end.
    return {"launches": launches, "syncs": max(0, syncs - 1)}


def training_flops(model: DETR, shape: BatchShape) -> int:
    """Operations of forward and backward at the padded size, counted without computing anything."""
    twin = copy.deepcopy(model).to("meta").train()
    twin.backbone[0].body.fused = False  # the counter knows neither cuDNN's fused convolutions nor our attention
    for module in twin.modules():
        if type(module) is MultiheadAttention:
            module.__class__ = _WithWeights
    height, width = shape.padded
    images = torch.empty(shape.batch, 3, height, width, device="meta")
    mask = torch.empty(shape.batch, height, width, dtype=torch.bool, device="meta")
    with FlopCounterMode(display=False) as counter:
        out = twin(NestedTensor(images, mask))
        values = [out["pred_logits"], out["pred_boxes"], *(x for aux in out["aux_outputs"] for x in aux.values())]
        torch.autograd.backward(values, [torch.empty_like(v) for v in values])
    return counter.get_total_flops()


def tolerance(variant: Variant, device: torch.device) -> float:
    """Largest relative difference of a right loss: rounding, in TF32 too, and what it does to the matching."""
    return 3e-2 if variant.bf16 else 1e-4 if device.type == "cpu" else 5e-3


@dataclass
class Row:
    """One variant on one case; `status`: ok, checked (right, not timed), wrong, failed or unavailable."""

    model: str
    batch: int
    padding: str
    size: str  # padded, height x width
    provider: str
    status: str
    reason: str = ""
    loss: float | None = None
    loss_difference: float | None = None
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    images_per_s: float | None = None
    tflop_per_s: float | None = None
    percent_of_limit: float | None = None
    peak_memory_mib: float | None = None
    counts: dict | None = None
    stages_ms: dict | None = None


@contextlib.contextmanager
def room_to_compile() -> Iterator[None]:
    """Within, all variants' code stays compiled: the layers' one `forward` holds some entries for every variant.

    Beyond torch's limit of 8 the later ones would run uncompiled; a reset between them would have the earlier ones
    compiled anew while they are timed.
    """
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        yield


@room_to_compile()
def measure_case(
    name: str,
    shape: BatchShape,
    padding: str,
    device: torch.device,
    ceilings: Ceilings | None,
    chosen: list[Variant],
    *,
    seed: int = 0,
    seconds: float = 10.0,
    min_rounds: int = 5,
    deadline: float = float("inf"),
) -> list[Row]:
    """Checks every variant, then measures the right ones interleaved; with `ceilings` None it only checks.

    After `deadline` (of `time.monotonic`) no further variant is prepared; the first three always are.
    """
    torch.manual_seed(seed)
    model = build_model(name, dropout=0.1)
    batch = make_batch(shape, device, seed)
    flops = training_flops(model, shape)
    rows: dict[str, Row] = {}
    steps: dict[str, Step] = {}
    expected = None
    for variant in chosen:
        size = "x".join(map(str, shape.padded))
        row = rows[variant.name] = Row(name, shape.batch, padding, size, variant.name, "checked")
        if time.monotonic() > deadline and len(rows) > 3:
            row.status, row.reason = "unavailable", "time budget"
            continue
        try:
            step = Step(variant, copy.deepcopy(model), device)
            with step.ops(), without_dropout(step.model):
                row.loss = float(step.loss(batch).detach())
            expected = row.loss if expected is None else expected
            row.loss_difference = abs(row.loss - expected) / abs(expected)
            if not row.loss_difference <= tolerance(variant, device):
                row.status, row.reason = "wrong", f"the loss is {row.loss:.6g}, as shipped it is {expected:.6g}"
                continue
            row.reason = "; ".join(step.fell_back)
            if ceilings is None:
                continue
            for _ in range(3 if device.type == "cuda" else 1):
                step(batch)
            stages = [step.stages(batch) for _ in range(3)]
            row.stages_ms = {stage: 1e3 * quantiles([s.get(stage, 0.0) for s in stages])[0] for stage in STAGES}
            row.counts = count(step, batch)
            row.peak_memory_mib = _peak_memory(lambda step=step: step(batch), device)
            steps[variant.name] = step
        except Exception as error:  # out of memory, or no compiler: a row of its own
            row.status = "failed" if variant.name.startswith("detr_fast") else "unavailable"
            row.reason = _reason(error)
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    blocks = {name: (lambda step=step: step(batch)) for name, step in steps.items()}
    measured = interleave(blocks, 1, clock_for(device), budget=seconds, min_rounds=min_rounds, max_rounds=50)
    for provider, samples in measured.items():
        row = rows[provider]
        median, p20, p80 = quantiles(samples)
        row.status, row.median_ms, row.p20_ms, row.p80_ms = "ok", 1e3 * median, 1e3 * p20, 1e3 * p80
        row.images_per_s, row.tflop_per_s = shape.batch / median, flops / median / 1e12
        precision = "bf16" if steps[provider].variant.bf16 else "fp32"
        row.percent_of_limit = 100 * flops / ceilings.matmul[precision] / median
    return list(rows.values())


def cases(args: argparse.Namespace, device: torch.device) -> list[tuple[str, int, str]]:
    """(model, batch, padding), the most telling first."""
    if args.model or args.batch or args.padding:
        models = args.model or (["R50"] if device.type == "cuda" else ["tiny"])
        return [(m, b, p) for m in models for b in args.batch or [16] for p in args.padding or ["none"]]
    if device.type == "cpu":
        return [("tiny", 2, "none"), ("tiny", 2, "coco"), ("R50", 2, "none")][: 1 if args.quick else 3]
    chosen = [("R50", 16, "none"), ("R50", 16, "coco")]
    if not args.quick:
        chosen += [("DC5", 16, "none"), ("R101", 16, "none")] + [("R50", b, "none") for b in (2, 4, 8, 32, 64)]
    return chosen


def case_shape(model: str, batch: int, padding: str, device: torch.device) -> BatchShape:
    """ "none": 800 x 1216 throughout; "coco": a typical batch of real sizes.

    A tenth of that (of each side) for the tiny model, and a quarter for the others on a CPU.
    """
    scale = 0.1 if model == "tiny" else 0.25 if device.type == "cpu" else 1.0
    kind = "DC5" if model == "DC5" else "R50"
    if padding == "none":
        return nominal_batch(kind, batch, scale)
    if padding == "coco":
        return typical_real_batch(kind, batch, scale)
    raise ValueError(f"--padding {padding}: the training step is measured with none or coco")


def print_rows(rows: list[Row]) -> None:
    first = rows[0]
    print(f"\ntrain: {first.model}, batch {first.batch}, {first.size}, padding {first.padding}")
    for row in sorted(rows, key=lambda r: (r.median_ms is None, r.median_ms or 0.0)):
        if row.median_ms is None:
            print(f"  {row.provider:40} {row.status}: {row.reason or 'same loss, not timed'}")
            continue
        counts = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in row.counts.items())
        memory = "" if row.peak_memory_mib is None else f", {row.peak_memory_mib:.0f} MiB"
        print(
            f"  {row.provider:40} {row.median_ms:9.2f} ms ({row.p20_ms:.2f}-{row.p80_ms:.2f}) {row.images_per_s:7.1f} "
            f"img/s {row.tflop_per_s:7.3g} TFLOP/s {row.percent_of_limit:5.1f} % of limit{memory}; "
            f"{counts or 'not counted'}{'; ' + row.reason if row.reason else ''}"
        )
        print(" " * 43 + "  ".join(f"{stage} {value:.2f}" for stage, value in row.stages_ms.items() if value))


def run_train(args: argparse.Namespace, device: torch.device) -> int:
    """Measures what `args` (of the command line) asks for; returns 1 if a variant of ours is wrong or fails."""
    started = time.monotonic()
    cuda = device.type == "cuda"
    compile = cuda if args.compile == "auto" else args.compile == "yes"
    if not cuda:
        print(
            f"CPU ({device_name(device)}): small images in float32; leave the machine alone meanwhile. Not measured "
            "without a GPU: the kernels, cuDNN's fused convolutions, bf16, channels_last, launches, waits for the GPU "
            "and peak memory; operators and values read by the host are counted instead. Loading from disk: python -m "
            "benchmarks.studies.data."
        )
    chosen = variants(device, compile)
    if args.provider:
        # The first one is what the others' losses are compared with.
        chosen = chosen[:1] + [v for v in chosen[1:] if any(part.lower() in v.name.lower() for part in args.provider)]
    ceilings = None if args.check_only else measure_ceilings(device, ["bf16", "fp32"] if cuda else ["fp32"], args.quick)
    record = suite_record("train", provenance(device), ["train"], ceilings) | {"steps": []}
    folder = args.output or Path("benchmarks/results") / slug(device_name(device))
    for name, batch, padding in cases(args, device):
        if args.budget is not None and time.monotonic() - started > args.budget:
            record["not_measured"].append({"case": f"{name} B{batch} {padding}", "reason": "time budget"})
            print(f"not measured: train {name} B{batch} {padding}: time budget of {args.budget:g} s")
            continue
        rows = measure_case(
            name,
            case_shape(name, batch, padding, device),
            padding,
            device,
            ceilings,
            chosen,
            seed=args.seed,
            seconds=(5.0 if cuda else 1.0) if args.quick else 15.0,
            min_rounds=5 if cuda else 3 if args.quick else 9,
            deadline=float("inf") if args.budget is None else started + 0.6 * args.budget,
        )
        print_rows(rows)
        record["steps"] += [asdict(row) for row in rows]
        if not args.no_save and not args.check_only:
            print(f"results: {save(record, folder)}")
    return int(
        any(row["status"] in ("wrong", "failed") and row["provider"].startswith("detr_fast") for row in record["steps"])
    )
