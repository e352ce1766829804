"""A bf16 residual stream: what it saves and costs in numbers (`python -m benchmarks.studies.residual_stream`).

Autocast computes a layer norm in float32 and returns float32, so the sums that go from layer to layer of the
transformer are float32, too. The other choice, "bf16 stream": norms take and give bf16 (statistics in float32, as their
kernels have them), and the sums between them are bf16.

- `--part count`: operators, launches and bytes of a training step on a GPU with either, see `launches`.
- `--part deviation`: outputs and gradients of a model of six and six layers, each against float32.
- `--part train --stream NAME`: the losses of 300 steps on generated shapes from the same weights and batches, without
  dropout, for several seeds.

On a CPU autocast leaves norms alone; here they are computed as a GPU's autocast has them.
"""

import argparse
import contextlib
import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detr_fast.config import Config
from detr_fast.criterion import HungarianMatcher
from detr_fast.layers import PositionEmbeddingSine
from detr_fast.models import DETR, Backbone, Joiner, Transformer
from detr_fast.training import casts
from detr_fast.training.step import TrainingStep, build_step, optimizer_step

from ..shapes import nominal_batch
from . import launches
from .same_training import CLASSES, criterion, loaded_batches, plausible_norms

STREAMS = ("float32", "autocast", "bf16")


@contextlib.contextmanager
def stream(name: str) -> Iterator[None]:
    """Within, layer norms give what the stream is to be; "float32" leaves them alone."""

    def norm(self: nn.LayerNorm, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps)

    with contextlib.ExitStack() as stack:
        if name != "float32":
            stack.enter_context(mock.patch.object(nn.LayerNorm, "forward", norm))
        if name == "bf16":  # their weights are cast with the others
            stack.enter_context(mock.patch.dict(casts._WEIGHTS, {nn.LayerNorm: ("weight", "bias")}))
        yield


def count() -> None:
    for name in STREAMS[1:]:
        with stream(name):
            rows = launches.totals(launches.count(nominal_batch("R50", launches.BATCH)))
        for stage in ("weights' casts", "encoder", "decoder", "heads", "backward", "all"):
            row = rows[stage]
            mib, ms = row["bytes"] / 2**20, row["bytes"] / launches.BYTES_PER_MS
            print(f"| {stage} | {name} | {row['operators']} | {row['launches']} | {mib:.0f} | {ms:.2f} |", flush=True)


def build(seed: int, layers: int = 6) -> DETR:
    """A small DETR with a ResNet-18's first stage and as many layers as the published ones."""
    torch.manual_seed(seed)
    backbone = Backbone("resnet18", True, False, False, weights=None, norm="frozen", level=1)
    plausible_norms(backbone)
    backbone.freeze(train_backbone=True)
    transformer = Transformer(64, 4, layers, layers, 128, 0.0, return_intermediate_dec=True)
    return DETR(Joiner(backbone, PositionEmbeddingSine(32, normalize=True)), transformer, CLASSES, 12, True)


def step_of(model: DETR, name: str, lr: float = 1e-4) -> TrainingStep:
    precision = "fp32" if name == "float32" else "bf16"
    losses = criterion(HungarianMatcher, model.transformer.decoder.num_layers)
    return build_step(
        model.train(), losses, Config(lr=lr, lr_backbone=lr, precision=precision), torch.device("cpu"), print
    )


def deviation(batches: list[tuple], seed: int) -> None:
    """How far each stream's outputs and gradients are from float32's.

    Printed are the largest difference of any tensor, relative to its largest value, and of the tensors' relative
    Euclidean differences the middle and the largest.
    """
    model = build(seed)
    found: dict[str, tuple[dict, dict]] = {}
    for name in STREAMS:
        with stream(name):
            step = step_of(copy.deepcopy(model), name)
            outputs = step.outputs(batches[0][0])
            generator = torch.Generator().manual_seed(1)
            heads = {
                f"{key} of layer {i}": layer[key].float()
                for i, layer in enumerate([*outputs["aux_outputs"], outputs])
                for key in ("pred_logits", "pred_boxes")
            }
            # A fixed cotangent: the matching may choose another pair where costs are almost equal.
            sum((value * torch.randn(value.shape, generator=generator)).sum() for value in heads.values()).backward()
        gradients = {key: p.grad.float() for key, p in step.model.named_parameters() if p.grad is not None}
        found[name] = {key: value.detach() for key, value in heads.items()}, gradients
    for name in STREAMS[1:]:
        for what, got, right in zip(("outputs", "gradients"), found[name], found["float32"], strict=True):
            # Without gradients that are zero: of the first decoder layer's self-attention, whose values are all alike.
            right = {key: value for key, value in right.items() if value.any()}
            errors = {key: float((got[key] - right[key]).abs().max() / right[key].abs().max()) for key in right}
            norms = [float((got[key] - right[key]).norm() / right[key].norm()) for key in right]
            worst = max(errors, key=errors.__getitem__)
            middle = sorted(norms)[len(norms) // 2]
            print(
                f"| {name} | {seed} | {what} | {errors[worst]:.1e}, {worst} | {middle:.1e} | {max(norms):.1e} |",
                flush=True,
            )


def train(batches: list[tuple], name: str, steps: int, seeds: int) -> None:
    """Means of the loss over each sixth of the steps, for every seed."""
    for seed in range(seeds):
        values = []
        with stream(name):
            step = step_of(build(seed), name)
            for i in range(steps):
                samples, targets = batches[i % len(batches)]
                loss = step.losses(step.outputs(samples), targets).total
                step.backward(loss)
                optimizer_step(step)
                step.optimizer.zero_grad()
                values.append(loss.detach())
        means = torch.stack(values).double().view(6, -1).mean(dim=1).tolist()
        print(f"| {name} | {seed} | {' | '.join(f'{mean:.3f}' for mean in means)} |", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.residual_stream", description=__doc__)
    parser.add_argument("--part", choices=("count", "deviation", "train"), default="count")
    parser.add_argument("--stream", choices=STREAMS, default="bf16", help="of --part train")
    parser.add_argument("--steps", type=int, default=300, help="a multiple of six")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args(argv)
    if args.part == "count":
        count()
        return 0
    with tempfile.TemporaryDirectory() as root:
        batches = loaded_batches(Path(root), 100, 2, (48, 64), seed=0)
        if args.part == "deviation":
            for seed in range(args.seeds):
                deviation(batches, seed)
        else:
            train(batches, args.stream, args.steps, args.seeds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
