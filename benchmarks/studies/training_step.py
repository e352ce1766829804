"""The training step in its variants: as shipped, the best of stock parts, ours, and ours less one technique."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from detr_fast.config import Config
from detr_fast.criterion import HungarianMatcher
from detr_fast.data import PackedBatch, PackedCollate
from detr_fast.layers import MultiheadAttention, PositionEmbeddingSine
from detr_fast.models import DETR, Backbone, Joiner, Transformer
from detr_fast.nested_tensor import NestedTensor
from detr_fast.training.step import build_step, optimizer_step

from ..shapes import BatchShape
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
        graphs: replay CUDA graphs of the model's passes.
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
    graphs: bool = False
    one_pass: bool = True
    packed: bool = True
    fused_adamw: bool = True
    read_losses: bool = False


OURS = Variant("detr_fast")
AS_SHIPPED = Variant(
    "as shipped", bf16=False, channels_last=False, fused_backbone=False, attention="weights", kernels=False,
    compile="no", one_pass=False, packed=False, fused_adamw=False, read_losses=True,
)  # fmt: skip
TUNED = Variant(
    "tuned stock", fused_backbone=False, attention="sdpa", kernels=False, compile="model", one_pass=False, packed=False
)
GRAPHS = replace(OURS, name="detr_fast with CUDA graphs", graphs=True)
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
    chosen = [AS_SHIPPED, TUNED, OURS, GRAPHS, *ablations]
    if not compile:
        chosen = [replace(v, compile="no") for v in chosen if v.name != "detr_fast without compile by regions"]
    if device.type == "cpu":
        chosen.remove(GRAPHS if compile else replace(GRAPHS, compile="no"))
        # The kernels' place is taken by the references anyway.
        chosen = [replace(v, bf16=False) for v in chosen if not v.name.endswith(("bf16", "kernels"))]
        # Which memory format stock convolutions are faster in depends on the images' sizes.
        chosen[1:2] = [
            replace(chosen[1], channels_last=False),
            replace(chosen[1], name="tuned stock, channels_last"),
        ]
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


def make_batch(shape: BatchShape, device: torch.device, seed: int) -> tuple[PackedBatch, NestedTensor, Sequence[dict]]:
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
        packed, floats, targets = packed.pin_memory(), floats.pin_memory(), targets.pin_memory()
    return packed, floats, targets


class Step:
    """A variant ready to train.

    Attributes:
        mark: called with a stage's name when it has ended.
        fell_back: what torch.compile could not do.
    """

    def __init__(self, variant: Variant, model: DETR, device: torch.device):
        self.variant, self.device = variant, device
        self.fell_back: list[str] = []
        self.mark: Callable[[str], None] = lambda stage: None
        matcher = HungarianMatcher if variant.one_pass else LayerByLayer
        model.backbone[0].body.fused = variant.fused_backbone
        if variant.attention != "ours":
            for module in model.modules():
                if type(module) is MultiheadAttention:
                    module.__class__ = _WithWeights if variant.attention == "weights" else _Sdpa
        self.step = build_step(
            model.train(),
            criterion(matcher, model.transformer.decoder.num_layers, CLASSES),
            Config(
                precision="bf16" if variant.bf16 else "fp32",
                compile=variant.compile == "regions",
                graphs=variant.graphs,
            ),
            device,
            self.fell_back.append,
            channels_last=variant.channels_last,
        )
        self.model = self.step.model
        if not variant.fused_adamw:
            groups = [{"params": group["params"], "lr": group["lr"]} for group in self.step.optimizer.param_groups]
            self.step.optimizer = torch.optim.AdamW(groups, weight_decay=1e-4, foreach=False)
        if variant.compile == "model":
            model.compile(dynamic=False)  # one shape is measured; tracing for all takes minutes

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
        outputs = self.step.outputs(samples)
        self.mark("decoder")
        losses = self.step.losses(outputs, targets)
        if self.variant.read_losses:
            for value in losses.by_name.values():
                value.detach().item()
        self.mark("criterion")
        return losses.total

    def __call__(self, batch) -> None:
        with self.ops():
            loss = self.loss(batch)
            self.step.backward(loss)
        self.mark("backward")
        if self.variant.fused_adamw:
            optimizer_step(self.step)
        else:  # which cannot skip a step without asking the host
            nn.utils.clip_grad_norm_(self.step.parameters, self.step.max_norm)
            self.step.optimizer.step()
        self.step.optimizer.zero_grad()
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
