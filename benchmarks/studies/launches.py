"""Operators, launches and bytes of a training step on a GPU, without one: `python -m benchmarks.studies.launches`.

The trainer's loop runs one step of R50 on tensors that say they are on a GPU and have no values (FakeTensor). Counted
are, for each stage,

- operators: whatever the dispatcher is asked for, one call from Python or autograd each;
- launches: kernels that these start, at least: one per operator that touches values, more where that is known
  (`_KERNELS`; multi-tensor operators by their chunks);
- MiB: what the operators' arguments and results measure, each read or written once. Products and convolutions may
  be limited by arithmetic instead, and take longer;
- ms: these bytes at 4.0 TB/s.

`--save LABEL` keeps what was counted under that name in benchmarks/results/launches.json and writes the table of all
names into NOTES.md.
"""

import argparse
import contextlib
import heapq
import io
import itertools
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from detr_fast.config import Config
from detr_fast.criterion import HungarianMatcher
from detr_fast.criterion.target_batch import TargetBatch
from detr_fast.data import PackedBatch
from detr_fast.data.prefetch import copy_batch
from detr_fast.models import build_model
from detr_fast.nested_tensor import NestedTensor
from detr_fast.training import casts, engine
from detr_fast.training.log import Metrics
from detr_fast.training.step import PRECISIONS, build_step

from ..harness.markers import NOTES, replace_between
from ..harness.provenance import ROOT, provenance
from ..shapes import BatchShape, nominal_batch
from .training_step import make_batch

STAGES = (
    "input", "weights' casts", "backbone", "position", "encoder", "decoder", "heads", "matcher", "criterion",
    "loss, logging", "backward", "clipping", "optimiser",
)  # fmt: skip
BATCH = 16
BYTES_PER_MS = 4.0e9
RESULTS = ROOT / "benchmarks" / "results" / "launches.json"

# Kernels of an operator where they are more than one.
_KERNELS = {
    "detr_fast::attention_backward": 2,
    "detr_fast::packed_attention_backward": 2,
    "detr_fast::folded_conv": 2,  # the folded weight, and one kernel for the rest
    "detr_fast::folded_conv_backward": 4,  # the folded weight, two gradients, and the unfolded weight's
    "aten::native_layer_norm_backward": 2,
    "aten::convolution_backward": 2,
}
# Multi-tensor kernels take so many tensors per launch, by the number of lists (ATen's MultiTensorApply.cuh).
_TENSORS_PER_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
# These touch no values, beside views.
_NO_KERNEL = {
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::_unsafe_view", "aten::lift_fresh", "aten::set_", "aten::resize_", "aten::record_stream",
}  # fmt: skip


class Counter(TorchDispatchMode):
    """Counts operators, their launches and bytes under the stage that is on top of `stages`.

    Attributes:
        rows: by stage {"operators", "launches", "bytes"}.
        names: how often each operator was asked for, by its name, such as "detr_fast::attention".
    """

    def __init__(self):
        super().__init__()
        self.stages: list[str] = []
        self.rows: dict[str, dict[str, int]] = defaultdict(lambda: {"operators": 0, "launches": 0, "bytes": 0})
        self.names: dict[str, int] = defaultdict(int)
        self.by_stage: dict[tuple[str, str], int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith("prim::"):  # questions about a tensor
            return out
        row = self.rows[self.stages[-1] if self.stages else "loss, logging"]
        row["operators"] += 1
        self.names[name] += 1
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        on_gpu = [tensor for tensor in tensors if tensor.device.type == "cuda"]
        if on_gpu and name not in _NO_KERNEL and not _is_view(func):
            launches = self._launches(func, args)
            row["launches"] += launches
            row["bytes"] += sum(tensor.nbytes for tensor in on_gpu)
            self.by_stage[self.stages[-1] if self.stages else "loss, logging", name] += launches
        return out

    def _launches(self, func, args: tuple) -> int:
        lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
        name = func._schema.name
        if lists and ("_foreach" in name or "_fused_adam" in name):
            return -(-len(lists[0]) // _TENSORS_PER_LAUNCH[min(5, len(lists))])
        return _KERNELS.get(name, 1)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.stages.append(name)
        try:
            yield
        finally:
            self.stages.pop()

    def within(self, name: str, function: Callable) -> Callable:
        """`function`, counted as a part of the stage."""

        def counted(*args, **kwargs):
            with self.stage(name):
                return function(*args, **kwargs)

        return counted

    def hook(self, module: nn.Module, name: str) -> None:
        """Counts what `module` computes as a part of the stage."""
        module.register_forward_pre_hook(lambda *_: self.stages.append(name))
        module.register_forward_hook(lambda *_: self.stages.pop() and None)


def _is_view(func) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _laid_out(module: nn.Module, *args, memory_format: torch.memory_format | None = None, **kwargs) -> nn.Module:
    """In the place of ``module.to``: tensors without values cannot be moved, and are made where they belong."""
    for parameter in module.parameters() if memory_format is not None else ():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)
    return module


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within, tensors have no values and "cuda" is a device that computes in bf16."""
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.object(Tensor, "pin_memory", lambda self: self),
            mock.patch.object(nn.Module, "to", _laid_out),
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_: True),
        ):
            stack.enter_context(patch)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def walk_backward(loss: Tensor) -> None:
    """``loss.backward()`` node by node, in the order of torch's engine, which refuses a device that is not there."""
    gradients: dict = {loss.grad_fn: [torch.ones_like(loss)]}
    waiting: dict = defaultdict(int)
    seen, stack = {loss.grad_fn}, [loss.grad_fn]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                waiting[node] += 1
                if node not in seen:
                    seen.add(node)
                    stack.append(node)
    ready, order = [(0, 0, loss.grad_fn)], itertools.count(1)
    with torch.no_grad():
        while ready:
            _, _, node = heapq.heappop(ready)
            results = _run_node(node, gradients.pop(node, []))
            edges = [edge for edge in node.next_functions if edge[0] is not None]
            for (following, slot), gradient in zip(edges, results, strict=True):
                if gradient is not None:
                    expected = following._input_metadata[slot]
                    if tuple(gradient.shape) != tuple(expected.shape):
                        gradient = gradient.sum_to_size(expected.shape)
                    gradient = gradient.to(expected.dtype)
                    slots = gradients.setdefault(following, [])
                    slots.extend([None] * (slot + 1 - len(slots)))
                    slots[slot] = gradient if slots[slot] is None else slots[slot] + gradient
                waiting[following] -= 1
                if waiting[following] == 0:
                    # A parameter's gradient is put into place at once, else what was computed last comes first.
                    first = -math.inf if hasattr(following, "variable") else -following._sequence_nr()
                    heapq.heappush(ready, (first, next(order), following))


def _run_node(node, gradients: list) -> tuple:
    """What a node hands on, to the nodes that follow, for the gradients of its results (those at the end may lack)."""
    gradients = gradients + [None] * (len(node._input_metadata) - len(gradients))
    if all(gradient is None for gradient in gradients):
        return tuple(None for following, _ in node.next_functions if following is not None)
    if hasattr(node, "variable"):
        _put_into_place(node.variable, gradients[0])
        return ()
    if isinstance(node, BackwardCFunction):
        if getattr(node, "fills_in_zeros", True):
            gradients = [
                torch.zeros(m.shape, dtype=m.dtype, device=m.device) if gradient is None else gradient
                for gradient, m in zip(gradients, node._input_metadata, strict=True)
            ]
        results, needed = node.apply(*gradients), node.needs_input_grad
    else:
        results, needed = node(*gradients), [following is not None for following, _ in node.next_functions]
    results = results if isinstance(results, tuple) else (results,)
    return tuple(result for result, is_needed in zip(results, needed, strict=False) if is_needed)


def _put_into_place(parameter: Tensor, gradient: Tensor) -> None:
    """A parameter's first gradient is taken as it is, or copied where its memory is laid out in another way."""
    if parameter.grad is not None:
        parameter.grad = parameter.grad + gradient
    elif gradient.stride() == parameter.stride():
        parameter.grad = gradient.detach()
    else:
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def _set_materialize_grads(ctx, value: bool) -> None:
    """In the place of the context's own, whose setting cannot be read: the node remembers it."""
    ctx.materialize_grads = ctx.fills_in_zeros = value


class _Unread:
    """In the place of `FiniteWatch`: no value is read."""

    def __init__(self, device):
        pass

    def add(self, finite, batch):
        return None

    def drain(self):
        return None


def _on_gpu(loader, device, counter: Counter):
    """In the place of `Prefetcher`, which needs streams: its copies, then what it does on arrival."""
    for batch in loader:
        with counter.stage("input"):
            samples, *rest = copy_batch(batch, device)
            samples = samples.padded()
        yield samples, *rest


class _Loader(list):
    """One batch; the progress line wants a length."""


def _as_of_coco(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """A target with the keys that `CocoDetection` gives."""
    count = len(target["labels"])
    pair = torch.tensor([800, 1216])
    more = {"image_id": torch.tensor([1]), "area": torch.ones(count), "iscrowd": torch.zeros(count, dtype=torch.int64)}
    return {**target, **more, "orig_size": pair, "size": pair}


def count(shape: BatchShape, precision: str = "bf16", flags: tuple[str, ...] = ()) -> Counter:
    """One step of the trainer's loop on a batch of the shape."""
    device = torch.device("cuda")
    backbone = ("--backbone_weights", "none", "--backbone_norm", "frozen")
    config = Config.from_arguments([*backbone, "--device", "cuda", "--precision", precision, *flags])
    packed, _, targets = make_batch(shape, torch.device("cpu"), 0)
    targets = TargetBatch(list(map(_as_of_coco, targets)))
    options = {"channels_last": True, "dtype": PRECISIONS[precision]}
    counter = Counter()
    with pretended_gpu(), contextlib.ExitStack() as stack:
        with device:
            model, criterion, _ = build_model(config)
            model.backbone[0].freeze(train_backbone=True)
            step = build_step(model, criterion, config, device, print)
            optimizer = step.optimizer
            # As after the first step, in which AdamW makes its averages.
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                averages = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.zeros(()), **averages}
        for module, name in (
            (model, "heads"), (model.class_embed, "heads"), (model.bbox_embed, "heads"), (criterion, "criterion"),
            (model.backbone, "position"), (model.backbone[0], "backbone"), (model.input_proj, "encoder"),
            (model.transformer, "encoder"), (model.transformer.decoder, "decoder"),
        ):  # fmt: skip
            counter.hook(module, name)
        for owner, name, stage in (
            (HungarianMatcher, "match_layers", "matcher"),
            (nn.utils, "clip_grad_norm_", "clipping"),
            (casts, "cast_together", "weights' casts"),
        ):
            stack.enter_context(mock.patch.object(owner, name, counter.within(stage, getattr(owner, name))))
        optimizer.step = counter.within("optimiser", optimizer.step)
        optimizer.zero_grad = counter.within("optimiser", optimizer.zero_grad)
        for owner, name, value in (
            (nn.utils.clip_grad, "_has_foreach_support", lambda tensors, device: True),  # they are no plain tensors
            (FunctionCtx, "set_materialize_grads", _set_materialize_grads),
            (Tensor, "backward", counter.within("backward", walk_backward)),
            (engine, "FiniteWatch", _Unread),
            (engine, "Prefetcher", lambda loader, device: _Loader(_on_gpu(loader, device, counter))),
            (Metrics, "latest", lambda self: {}),
            (Metrics, "averages", lambda self, device: {}),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        loader = _Loader([(PackedBatch(packed.buffer, packed.header, packed.options | options), targets)])
        with counter, contextlib.redirect_stdout(io.StringIO()):  # the progress line
            engine.run_epoch(step, loader, 0, print_freq=10**6)
    return counter


def kept_per_pixel(config: Config, size: tuple[int, int]) -> float:
    """Bytes that autograd keeps of a forward pass, per pixel of another image of `size` (height, width)."""
    device, kept = torch.device("cuda"), []
    with pretended_gpu():
        with device:
            model, _, _ = build_model(config)
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        for batch in (1, 2):
            storages = {}

            def keep(tensor: Tensor, storages=storages) -> Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    storages[storage._cdata] = storage
                return tensor

            images = torch.empty(batch, 3, *size, dtype=PRECISIONS[config.precision], device=device)
            samples = NestedTensor(images, torch.empty(batch, *size, dtype=torch.bool, device=device))
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            enabled = config.precision != "fp32"
            with hooks, torch.autocast("cuda", PRECISIONS[config.precision], enabled=enabled):
                out = model.train()(samples)
            kept.append(sum(storage.nbytes() for storage in storages.values()))
            del out
    return (kept[1] - kept[0]) / (size[0] * size[1])


def totals(counter: Counter) -> dict[str, dict[str, int]]:
    """The rows of all stages and their sum, "all"."""
    rows = {stage: dict(counter.rows[stage]) for stage in STAGES}
    return rows | {
        "all": {name: sum(row[name] for row in rows.values()) for name in ("operators", "launches", "bytes")}
    }


def markdown(kept: dict[str, dict]) -> str:
    """The table of everything that was kept, by its name."""
    lines = [f"R50, batch {BATCH} of 800 x 1216 without padding, bf16, one step:", ""]
    lines += [
        f"- {name}: commit {entry['commit']}, torch {entry['torch']}, {entry['date']}" for name, entry in kept.items()
    ]
    columns = [f"{name}: {what}" for name in kept for what in ("operators", "launches", "MiB", "ms at 4 TB/s")]
    lines += ["", f"| stage | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for stage in (*STAGES, "all"):
        cells = []
        for entry in kept.values():
            row = entry["stages"].get(stage)  # older counts have fewer
            if row is None:
                cells += 4 * ["–"]
                continue
            mib, ms = row["bytes"] / 2**20, row["bytes"] / BYTES_PER_MS
            cells += [row["operators"], row["launches"], f"{mib:.0f}", f"{ms:.2f}"]
        lines.append(f"| {stage} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.launches", description=__doc__.split("\n")[0])
    parser.add_argument("--save", metavar="LABEL", help="keep the result under this name and write the table")
    parser.add_argument("--operators", action="store_true", help="also print every operator's launches by stage")
    args = parser.parse_args(argv)
    counter = count(nominal_batch("R50", BATCH))
    where = provenance(torch.device("cpu"))
    found = {"commit": where["git_sha"], "torch": where["torch"], "date": where["date"], "stages": totals(counter)}
    print(markdown({"now": found}))
    if args.operators:
        for (stage, name), launches in sorted(counter.by_stage.items(), key=lambda item: (item[0][0], -item[1])):
            print(f"{stage:14} {launches:5} {name}")
    if args.save is None:
        return 0
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    kept[args.save] = found
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return 0 if replace_between(NOTES, "launches", markdown(kept)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
