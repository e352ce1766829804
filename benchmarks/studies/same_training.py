"""The same training? Ours against the reference path, step by step: `python -m benchmarks.studies.same_training`.

Two models start from the same weights and see the same batches of generated shapes, dropout off:

- ours: the trainer's step (`build_step`): ops as they are on the device (kernels on a GPU), fused backbone, all decoder
  layers matched and judged in one pass, fused AdamW;
- reference: plain PyTorch for every op (`DETR_FAST_KERNELS=torch`), the backbone's modules one by one, every decoder
  layer matched by SciPy and judged on its own, AdamW with a launch per step and parameter.

Printed is the largest relative difference of their losses; the exit status is 1 where it exceeds the tolerance. The
backbone's norms are frozen, with statistics that matter.

Rounding does not stay small in float32: AdamW divides small gradients by their own size, and two queries of almost
equal cost are matched one way or the other. So there are three ways to ask beside letting both train freely in float32:

- `--dtype float64`: both train freely; rounding has no time to grow.
- `--resync`: the reference takes over our weights after every step, in any dtype: each step alone. Both are also
  compared with the loss that the reference path has in float64: what is rounding, both are away from it.
- `--control`: the reference against itself from weights that differ in their last bit: how far float32 drifts anyhow.

`--dropout 0.1` compares what the two reach, since their dropout masks differ: the loss over all batches after the last
step, without dropout, for several seeds. The two means may differ by no more than the reference's own results do.

`--bf16` has ours computed under bf16 autocast, the reference in float32 all the same; what they may differ by is then
bf16's rounding (`--tolerance` 3e-2 unless given). `--coco_path` takes COCO's validation images in place of shapes.

`--save` keeps what was found in benchmarks/results/<device>/same_training.json, one entry per way to ask;
`python -m benchmarks report` writes them into NOTES.md.
"""

import argparse
import contextlib
import copy
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from detr_fast.config import Config
from detr_fast.criterion import HungarianMatcher, SetCriterion
from detr_fast.data import build_dataset, make_shapes_dataset
from detr_fast.layers import PositionEmbeddingSine
from detr_fast.models import DETR, Backbone, Joiner, Transformer
from detr_fast.nested_tensor import NestedTensor, collate_fn
from detr_fast.training.step import build_step, optimizer_step

from ..harness.provenance import device_name, provenance, slug
from ..harness.results import load_record, save, suite_record

WEIGHTS = {"loss_ce": 1, "loss_bbox": 5, "loss_giou": 2}
CLASSES, COCO_CLASSES = 4, 91


class LayerByLayer(HungarianMatcher):
    """A matcher of its own class: `SetCriterion` then takes the layers one by one and asks SciPy for each."""


@contextlib.contextmanager
def reference_ops() -> Iterator[None]:
    """Within, every op is plain PyTorch on every device."""
    before = os.environ.get("DETR_FAST_KERNELS")
    os.environ["DETR_FAST_KERNELS"] = "torch"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DETR_FAST_KERNELS"]
        else:
            os.environ["DETR_FAST_KERNELS"] = before


def plausible_norms(model: nn.Module, seed: int = 3) -> None:
    """Gives a backbone's frozen norms statistics and affine parameters as trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_buffers():
        noise = torch.rand(value.shape, generator=generator).to(value)
        if name.endswith("running_var"):
            value.copy_(0.5 + 1.5 * noise)
        elif name.endswith("weight"):
            value.copy_(0.2 + 0.6 * noise)
        else:
            value.copy_(0.4 * noise - 0.2)


def tiny_detr(level: int = 1, dropout: float = 0.0, classes: int = CLASSES) -> DETR:
    """A small DETR with a frozen-norm ResNet-18 up to `level`."""
    backbone = Backbone("resnet18", True, False, False, weights=None, norm="frozen", level=level)
    plausible_norms(backbone)
    backbone.freeze(train_backbone=True)
    transformer = Transformer(64, 4, 2, 2, 128, dropout, return_intermediate_dec=True)
    return DETR(Joiner(backbone, PositionEmbeddingSine(32, normalize=True)), transformer, classes, 12, True)


def criterion(matcher: type[HungarianMatcher], layers: int, classes: int = CLASSES) -> SetCriterion:
    weights = dict(WEIGHTS)
    weights.update({f"{name}_{i}": value for i in range(layers - 1) for name, value in WEIGHTS.items()})
    return SetCriterion(classes, matcher(1, 5, 2), weights, 0.1, ["labels", "boxes", "cardinality"])


def loaded_batches(
    root: Path, count: int, batch: int, image_size: tuple[int, int], seed: int, generate: bool = True
) -> list[tuple]:
    """`count` batches (NestedTensor, targets) of the images under `root`, as the evaluation's transforms give them.

    With `generate` shapes are written there first. Where there are too few images they come again.
    """
    if generate:
        make_shapes_dataset(root, num_train=1, num_val=count * batch, image_size=image_size, seed=seed)
    args = Namespace(coco_path=root, masks=False, image_size=image_size[0], max_size=2 * image_size[1])
    dataset = build_dataset("val", args)
    return [collate_fn([dataset[(i * batch + j) % len(dataset)] for j in range(batch)]) for i in range(count)]


class Trained:
    """One way to train: a model, its criterion and its optimiser."""

    def __init__(self, model: nn.Module, ours: bool, device: torch.device, lr: float, bf16: bool = False):
        self.model, self.ours = model.train(), ours
        model.backbone[0].body.fused = ours
        matcher = HungarianMatcher if ours else LayerByLayer
        classes = model.class_embed.out_features - 1
        losses = criterion(matcher, model.transformer.decoder.num_layers, classes)
        if ours:
            config = Config(lr=lr, lr_backbone=lr, precision="bf16" if bf16 else "fp32")
            self.built = build_step(model, losses, config, device, print)
            return
        self.model, self.criterion = model.to(device), losses.to(device)
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=1e-4, foreach=False)

    def ops(self):
        return contextlib.nullcontext() if self.ours else reference_ops()

    def loss(self, samples: NestedTensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """The weighted loss, 0-dimensional."""
        if self.ours:
            return self.built.losses(self.built.outputs(samples), targets).total
        losses = self.criterion(self.model(samples), targets)
        return sum(value * self.criterion.weight_dict.get(name, 0) for name, value in losses.items())

    def step(self, samples: NestedTensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """The loss before the step."""
        optimizer = self.built.optimizer if self.ours else self.optimizer
        with self.ops():
            loss = self.loss(samples, targets)
            optimizer.zero_grad()
            loss.backward()
        if self.ours:
            optimizer_step(self.built)
        else:
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
            optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def loss_in_float64(self, samples: NestedTensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """Of a model in float64."""
        targets = [{k: v.double() if v.is_floating_point() else v for k, v in target.items()} for target in targets]
        mask = None if samples.no_padding else samples.mask  # who asks for it makes padding possible
        with self.ops():
            return self.loss(NestedTensor(samples.tensors.double(), mask, no_padding=samples.no_padding), targets)

    @torch.no_grad()
    def mean_loss(self, batches: list[tuple]) -> float:
        """Over `batches`, without dropout."""
        self.model.eval()
        with self.ops():
            return float(torch.stack([self.loss(*batch) for batch in batches]).mean())


def _batches(
    steps: int, batch: int, image_size, seed: int, device: torch.device, dtype: torch.dtype, coco_path: Path | None
) -> list[tuple]:
    """Batches on `device` for `steps` steps: at most 50 different ones."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) if coco_path is None else coco_path
        loaded = loaded_batches(root, min(steps, 50), batch, image_size, seed, generate=coco_path is None)
    batches = []
    for samples, targets in loaded:
        samples = samples.to(device)
        samples.tensors = samples.tensors.to(dtype)
        batches.append((samples, [{key: value.to(device) for key, value in target.items()} for target in targets]))
    return batches


def compare(
    steps: int,
    *,
    device: str = "cpu",
    batch: int = 2,
    image_size: tuple[int, int] = (48, 64),
    lr: float = 1e-4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    resync: bool = False,
    control: bool = False,
    bf16: bool = False,
    coco_path: Path | None = None,
) -> list[tuple[float, ...]]:
    """(ours, reference): both losses of every step, without dropout; with `resync` and the loss in float64.

    Args:
        resync: from the same weights in every step.
        control: the reference in place of ours, from weights a last bit away.
        bf16: ours under bf16 autocast.
        coco_path: COCO's folder, for its images in place of generated shapes.
    """
    device = torch.device(device)
    torch.manual_seed(seed)
    model = tiny_detr(classes=CLASSES if coco_path is None else COCO_CLASSES).to(dtype)
    first, reference = (Trained(copy.deepcopy(model), ours, device, lr, bf16) for ours in (not control, False))
    if control:
        with torch.no_grad():
            for parameter in first.model.parameters():
                parameter.copy_(torch.nextafter(parameter, parameter.new_full((), torch.inf)))
    batches = _batches(steps, batch, image_size, seed, device, dtype, coco_path)
    exact = Trained(copy.deepcopy(model).double(), False, device, lr) if resync else None
    losses = []
    for i in range(steps):
        samples, targets = batches[i % len(batches)]
        in_float64 = []
        if exact is not None:
            exact.model.load_state_dict(first.model.state_dict())
            in_float64.append(exact.loss_in_float64(samples, targets))
        losses.append([path.step(samples, targets) for path in (first, reference)] + in_float64)
        if resync:
            reference.model.load_state_dict(first.model.state_dict())
    return [tuple(map(float, step)) for step in losses]


def reached(
    steps: int,
    dropout: float,
    seed: int,
    *,
    device: str = "cpu",
    batch: int = 2,
    image_size: tuple[int, int] = (48, 64),
    lr: float = 1e-4,
    dtype: torch.dtype = torch.float32,
    bf16: bool = False,
    coco_path: Path | None = None,
) -> tuple[float, float]:
    """(ours, reference): the loss over all batches after `steps` steps with dropout, from the same weights."""
    device = torch.device(device)
    torch.manual_seed(seed)
    model = tiny_detr(dropout=dropout, classes=CLASSES if coco_path is None else COCO_CLASSES).to(dtype)
    batches = _batches(steps, batch, image_size, 0, device, dtype, coco_path)
    order = [int(i) for i in torch.randint(len(batches), (steps,))]
    results = []
    for ours in (True, False):
        path = Trained(copy.deepcopy(model), ours, device, lr, bf16)
        for i in order:
            path.step(*batches[i])
        results.append(path.mean_loss(batches))
    return results[0], results[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.studies.same_training", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--image-size", "--image_size", type=int, nargs=2, default=(48, 64), help="short side, range")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--resync", action="store_true", help="the reference takes over our weights after every step")
    parser.add_argument("--control", action="store_true", help="the reference against itself, a last bit away")
    parser.add_argument("--dropout", type=float, default=0.0, help="compare what is reached with dropout")
    parser.add_argument("--seeds", type=int, default=3, help="with --dropout (default %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="ours under bf16 autocast")
    parser.add_argument("--coco_path", "--coco-path", type=Path, help="COCO's folder, in place of generated shapes")
    parser.add_argument("--tolerance", type=float, help="relative (default 1e-4, with --bf16 3e-2)")
    parser.add_argument("--save", action="store_true", help="keep what was found under benchmarks/results")
    parser.add_argument("--output", type=Path, help="folder for --save; default: benchmarks/results/<device>")
    args = parser.parse_args(argv)
    if args.dropout and (args.resync or args.control):
        parser.error("--resync and --control compare step by step, which --dropout does not allow")
    if args.bf16 and (args.control or args.dtype != "float32"):
        parser.error("--bf16 is a way of ours to compute in float32's place; not with --control or --dtype float64")
    # On a GPU float32 means float32 for both, not TF32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    options = dict(
        device=args.device,
        batch=args.batch,
        image_size=tuple(args.image_size),
        lr=args.lr,
        dtype=getattr(torch, args.dtype),
        bf16=args.bf16,
        coco_path=args.coco_path,
    )
    tolerance = args.tolerance
    if tolerance is None:
        tolerance = 3e-2 if args.bf16 else 1e-4
    way = "resync" if args.resync else "control" if args.control else "free"
    found = {
        "way": "dropout" if args.dropout else way,
        "images": "shapes" if args.coco_path is None else "COCO",
        "dtype": "bf16 autocast" if args.bf16 else args.dtype,
        **{name: getattr(args, name) for name in ("steps", "batch", "lr", "seed", "dropout")},
        "image_size": list(args.image_size),
    }
    if args.dropout:
        found |= _compare_reached(args.steps, args.dropout, range(args.seed, args.seed + args.seeds), options)
        if args.save:
            _keep(found, args)
        return int(not found["difference"] <= found["spread"])
    losses = compare(args.steps, seed=args.seed, resync=args.resync, control=args.control, **options)
    differences = [abs(ours - reference) / abs(reference) for ours, reference, *_ in losses]
    worst = max(range(len(losses)), key=differences.__getitem__)
    for i in sorted({0, len(losses) // 2, worst, len(losses) - 1}):
        print(f"step {i + 1}: loss {losses[i][0]:.6f}, reference {losses[i][1]:.6f}, difference {differences[i]:.1e}")
    where = f"{len(losses)} steps on {args.device}, {found['dtype']}"
    print(f"{where}: largest relative difference {differences[worst]:.2e}")
    found |= {"difference": differences[worst], "at_step": worst + 1}
    if args.resync:
        found["from_float64"] = [max(abs(x[i] - x[2]) / abs(x[2]) for x in losses) for i in (0, 1)]
        print("from the loss in float64: ours {:.2e}, the reference {:.2e}".format(*found["from_float64"]))
    if args.save:
        _keep(found, args)
    return int(not differences[worst] <= tolerance)


def _keep(found: dict, args: Namespace) -> None:
    """Adds `found` to the results of the device, in place of what was found there by the same question."""
    device = torch.device(args.device)
    folder = args.output or Path("benchmarks/results") / slug(device_name(device))
    path = folder / "same_training.json"
    before = load_record(path)["comparisons"] if path.is_file() else []
    where = provenance(device)
    found = found | {"commit": where["git_sha"]}
    asked = ("way", "images", "dtype", "steps", "batch", "lr", "seed", "dropout", "image_size")
    others = [other for other in before if any(other[name] != found[name] for name in asked)]
    record = suite_record("same_training", where, ["same_training"], None)
    print(f"results: {save(record | {'comparisons': [*others, found]}, folder)}")


def _compare_reached(steps: int, dropout: float, seeds: range, options: dict) -> dict:
    results = []
    for seed in seeds:
        ours, reference = reached(steps, dropout, seed, **options)
        print(f"seed {seed}: ours {ours:.4f}, reference {reference:.4f}", flush=True)
        results.append((ours, reference))
    ours, references = zip(*results, strict=True)
    difference = abs(sum(ours) - sum(references)) / len(results)
    spread = max(references) - min(references)
    print(
        f"loss after {steps} steps with dropout {dropout:g}: the means differ by {difference:.4f}; "
        f"the reference's seeds by {spread:.4f}"
    )
    return {"ours": list(ours), "reference": list(references), "difference": difference, "spread": spread}


if __name__ == "__main__":
    raise SystemExit(main())
