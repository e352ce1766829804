"""A whole run: from arguments to a trained model, its logs and its checkpoints; and evaluating a checkpoint.

Source: facebookresearch/detr, main.py.
"""

import argparse
import datetime
import math
import random
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from torch import Tensor, nn
from torch.amp import GradScaler

from detr_fast.data.categories import Categories
from detr_fast.data.coco import CocoDetection, build_dataset, read_annotations
from detr_fast.data.lines import LineDetection, make_line_transforms
from detr_fast.data.loader import EpochLoader, PackedCollate, build_loader
from detr_fast.data.panoptic import CocoPanoptic
from detr_fast.data.transforms import Compose, RandomHorizontalFlip, make_coco_transforms
from detr_fast.evaluation import LineEvaluator
from detr_fast.models.build import build_model
from detr_fast.models.letr import LETRstack, load_first_stage
from detr_fast.models.segmentation import DETRsegm
from detr_fast.training.checkpoint import (
    DETECTOR,
    has_masks,
    load_model,
    load_weights,
    plain_args,
    read_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from detr_fast.training.config import UsageError, check_train_args, choose_device, usage_errors
from detr_fast.training.distributed import all_gather, barrier, get_rank, init_distributed_mode, is_main_process
from detr_fast.training.ema import ModelEma
from detr_fast.training.engine import evaluate, train_one_epoch
from detr_fast.training.log import RunLog
from detr_fast.training.optim import build_optimizer, build_scheduler, load_optimizer, steps_every
from detr_fast.training.pictures import draw_curves, draw_samples
from detr_fast.training.regions import compile_regions

# The arguments that define the model and how it sees images: a checkpoint brings them along.
MODEL_ARGS = (
    "backbone", "backbone_norm", "backbone_level", "dilation", "position_embedding", "enc_layers", "dec_layers",
    "dim_feedforward", "hidden_dim", "nheads", "num_queries", "pre_norm", "masks", "image_size", "max_size",
    "layer1_num", "LETRpost", "layer2_num", "second_enc_layers", "second_dec_layers", "second_dim_feedforward",
    "second_hidden_dim", "second_nheads", "second_dropout", "second_pre_norm",
)  # fmt: skip
# COCO's panoptic ids end at 200; the original's models, and so its checkpoints, have this many classes.
_COCO_PANOPTIC_CLASSES = 250
_LAST_COCO_THING = 90


def say(text: str) -> None:
    """Prints in the first process only."""
    if is_main_process():
        print(text, flush=True)


def train(args: argparse.Namespace) -> dict:
    """Trains as the flags say (see `config.get_args_parser`) and evaluates on the way.

    Returns:
        The last epoch's log row; its "test_coco_eval_bbox" are pycocotools' twelve numbers, and so are, with masks,
        "test_coco_eval_masks".

    Raises:
        UsageError: the flags, the data or a checkpoint do not fit; the message is for the user.
        NonFiniteLossError: the loss or a gradient became NaN or infinite.
    """
    check_train_args(args)
    with usage_errors():
        trainer = Trainer(args, start(args))
    return trainer.run()


def start(args: argparse.Namespace) -> torch.device:
    """Joins torchrun's processes, if any, chooses the device and seeds the generators, each process differently."""
    asked = args.world_size
    args.device = choose_device(args.device, args.precision)
    init_distributed_mode(args)
    if asked not in (1, args.world_size):
        raise UsageError(
            f"--world_size {asked}: processes are started by torchrun --nproc-per-node {asked} -m detr_fast …"
        )
    if args.device == "cuda" and args.gpu is not None:
        args.device = f"cuda:{args.gpu}"
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    seed = args.seed + get_rank()
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    say(f"device: {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}, {args.precision}")
    return device


def build(args: argparse.Namespace, own_weights: bool) -> tuple[nn.Module, nn.Module, dict[str, nn.Module]]:
    """Model, criterion and post-processors from `args`, the model on the CPU.

    Args:
        args: as for `build_model`; `backbone_norm` is set if it is None.
        own_weights: the caller loads a checkpoint of the whole model: pretrained backbone weights are not fetched.
    """
    if args.backbone_norm is None:
        args.backbone_norm = "batch" if args.backbone_weights == "none" else "frozen"
    if not own_weights or args.backbone_weights == "none":
        try:
            return build_model(args)
        except RuntimeError as error:  # the download of the backbone's weights
            raise UsageError(f"{error} Here: --backbone_weights PATH or --backbone_weights none.") from error
    built = build_model(argparse.Namespace(**{**vars(args), "backbone_weights": "none"}))
    # Which parameters are trained is decided by where the weights once came from.
    detector_of(built[0]).backbone[0].freeze(train_backbone=args.lr_backbone > 0)
    return built


def detector_of(model: nn.Module) -> nn.Module:
    """The detector in a model with masks, or the model itself: what has the backbone."""
    return model.detr if isinstance(model, DETRsegm) else model


def box_annotations(dataset: CocoDetection | CocoPanoptic, args: argparse.Namespace) -> COCO:
    """The validation set's annotations of boxes and masks; for panoptic data those of ``coco_path``'s instances."""
    if isinstance(dataset, CocoPanoptic):
        dataset = build_dataset("val", argparse.Namespace(**{**vars(args), "dataset_file": "coco"}))
    return dataset.coco


class Trainer:
    """All that a training run holds; `run` trains.

    Args:
        args: checked flags.
        device: where to train.

    Attributes:
        epoch: the next epoch.
        steps: optimiser steps so far.
        best: the best AP so far (of masks, if there are some, otherwise of boxes; of lines sAP10), None before the
            first evaluation.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.output_dir = Path(args.output_dir) if args.output_dir else None
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        self.dataset_train = build_dataset("train", args, uint8=True)
        if args.augmentation == "flip":
            if isinstance(self.dataset_train, LineDetection):
                resize = make_line_transforms("val", scale=args.image_size, max_size=args.max_size, uint8=True)
            else:
                resize = make_coco_transforms("val", scales=args.image_size, max_size=args.max_size, uint8=True)
            transforms = "transforms" if isinstance(self.dataset_train, CocoPanoptic) else "_transforms"
            setattr(self.dataset_train, transforms, Compose([RandomHorizontalFlip(), resize]))
        self.dataset_val = build_dataset("val", args, categories=self.dataset_train.categories, uint8=True)
        self.coco_val = box_annotations(self.dataset_val, args)
        self.categories = self.dataset_train.categories
        args.num_classes = self.categories.num_classes
        if isinstance(self.dataset_train, CocoPanoptic):
            args.thing_classes = self.dataset_train.thing_classes
            if _LAST_COCO_THING < self.categories.ids[-1] < _COCO_PANOPTIC_CLASSES:
                args.num_classes = _COCO_PANOPTIC_CLASSES
        self.loader_train = _loader(self.dataset_train, args, train=True)
        self.loader_val = _loader(self.dataset_val, args, train=False)
        checkpoint = self._resume_from()
        weights = _read_weights(args.weights) if args.weights and checkpoint is None else None
        frozen = _read_weights(args.frozen_weights) if args.frozen_weights and checkpoint is None else None

        self.model, self.criterion, self.postprocessors = build(args, own_weights=bool(checkpoint or weights or frozen))
        self.model.to(device)
        self.n_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if weights is not None:
            for line in load_weights(self.model, weights, args.weights):
                say(f"--weights: not taken, starts fresh: {line}")
        if frozen is not None and isinstance(self.model, LETRstack):
            load_first_stage(self.model, frozen)
        elif frozen is not None:
            load_model(self.model.detr, frozen, f"--frozen_weights {args.frozen_weights}")
        self.optimizer = build_optimizer(self.model, args)
        self.steps_per_epoch = math.ceil(len(self.loader_train) / args.accumulate_steps)
        self.scheduler = build_scheduler(self.optimizer, args, self.steps_per_epoch)
        self.scaler = GradScaler(device.type) if args.precision == "fp16" else None
        self.ema = ModelEma(self.model, args.ema_decay) if args.ema_decay else None

        self.epoch, self.steps, self.best = args.start_epoch, 0, None
        self._unevaluated: dict | None = None  # training numbers of an epoch whose evaluation was interrupted
        if checkpoint is not None:
            self._continue(checkpoint)
        self.log = None
        if self.output_dir is not None and is_main_process():
            self.log = RunLog(self.output_dir, self.epoch - (self._unevaluated is not None), args.tensorboard)

        if args.compile:
            compile_regions(self.model, say)
        self.wrapped = self.model
        if args.distributed:
            ids = [device.index] if device.type == "cuda" else None
            self.wrapped = nn.parallel.DistributedDataParallel(self.model, device_ids=ids)

    def run(self) -> dict:
        """Trains up to `args.epochs` or `args.max_steps`. Returns the last epoch's log row."""
        args, row = self.args, {}
        say(
            f"{self.n_parameters} trained parameters, {len(self.dataset_train)} training and {len(self.dataset_val)} "
            f"validation images, {self.args.num_classes} classes, {self.steps_per_epoch} steps per epoch"
        )
        began = time.perf_counter()
        if self._unevaluated is not None:
            row = self._finish(self.epoch - 1, self._unevaluated)
        while self.epoch < args.epochs and not self._at_last_step():
            self.loader_train.set_epoch(self.epoch)
            stats = train_one_epoch(
                self.wrapped,
                self.criterion,
                self.loader_train,
                self.optimizer,
                self.device,
                self.epoch,
                args.clip_max_norm,
                precision=args.precision,
                scaler=self.scaler,
                accumulate_steps=args.accumulate_steps,
                step_scheduler=self.scheduler if steps_every(args) == "step" else None,
                ema=self.ema,
                max_steps=args.max_steps - self.steps if args.max_steps else None,
                print_freq=args.print_freq,
            )
            if steps_every(args) == "epoch":
                self.scheduler.step()
            left = args.max_steps - self.steps if args.max_steps else self.steps_per_epoch
            self.steps += min(self.steps_per_epoch, left)
            self.epoch += 1
            row = self._finish(self.epoch - 1, stats)
        if self.log is not None:
            self.log.close()
        say(f"training took {datetime.timedelta(seconds=int(time.perf_counter() - began))}")
        return row

    def _at_last_step(self) -> bool:
        return bool(self.args.max_steps) and self.steps >= self.args.max_steps

    def _share_buffers(self) -> None:
        """Gives all processes the first one's batch norm statistics: each has seen other images."""
        if self.args.distributed:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
            if self.ema is not None:
                self.ema.copy_buffers(self.model)

    def _finish(self, epoch: int, train_stats: Mapping[str, float]) -> dict:
        """Saves, evaluates if it is time, and logs. Returns the log row."""
        args = self.args
        self._share_buffers()
        is_last = self.epoch >= args.epochs or self._at_last_step()
        row = {f"train_{name}": value for name, value in train_stats.items()}
        if is_last or (epoch + 1) % args.eval_every == 0:
            # Saved before as well: an evaluation that fails costs no training.
            self._save(epoch, unevaluated=dict(train_stats))
            row.update({f"test_{name}": value for name, value in self._evaluate(epoch).items()})
        # Of masks, where there are some: a frozen detector's boxes are always the same.
        stats = row.get("test_coco_eval_masks", row.get("test_coco_eval_bbox"))
        score = row["test_line_eval"]["sAP10"] if "test_line_eval" in row else stats[0] if stats else None
        is_best = score is not None and (self.best is None or score > self.best)
        if is_best:
            self.best = score
        row.update(epoch=epoch, n_parameters=self.n_parameters)
        if self.log is not None:
            self.log.append(row)
            if not draw_curves(self.output_dir):
                say("no curves.png: matplotlib is not installed (pip install matplotlib)")
        self._save(epoch, is_best=is_best, numbered=(epoch + 1) % args.lr_drop == 0 or (epoch + 1) % 100 == 0)
        return row

    def _evaluate(self, epoch: int) -> dict:
        samples: dict[int, dict[str, Tensor]] = {}

        def keep(results):
            for image_id, result in results.items():
                if len(samples) < self.args.sample_images:
                    samples[image_id] = result

        if self.ema is not None:
            with self.ema.applied_to(self.model):
                stats, evaluator = self._evaluate_model(keep)
        else:
            stats, evaluator = self._evaluate_model(keep)
        if self.log is not None:
            folder = self.output_dir / "eval"
            folder.mkdir(exist_ok=True)
            for name in ["latest.pth"] + ([f"{epoch:03}.pth"] if epoch % 50 == 0 else []):
                save_evaluation(evaluator, folder / name)
            if samples:
                folder = self.output_dir / "samples"
                folder.mkdir(exist_ok=True)
                draw_samples(folder / f"epoch{epoch:04}.png", self.coco_val, _image_folder(self.dataset_val), samples)
        return stats

    def _evaluate_model(self, on_results):
        return evaluate(
            self.model,
            self.criterion,
            self.postprocessors,
            self.loader_val,
            self.coco_val,
            self.device,
            self.args.output_dir,
            categories=self.categories,
            precision=self.args.precision,
            print_freq=self.args.print_freq,
            on_results=on_results,
        )

    def _save(self, epoch: int, *, is_best: bool = False, numbered: bool = False, unevaluated: dict | None = None):
        """Writes checkpoint.pth, and checkpoint_best.pth and checkpoint0123.pth if asked for."""
        if self.output_dir is None:
            return
        generators = all_gather(rng_state(self.device))
        if is_main_process():
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.scheduler.state_dict(),
                "epoch": epoch,
                "args": plain_args(self.args),
                "categories": self.categories.to_dict(),
                "steps": self.steps,
                "best": self.best,
                "rng": generators,
                "unevaluated": unevaluated,
                "version": 1,
            }
            if self.scaler is not None:
                state["scaler"] = self.scaler.state_dict()
            if self.ema is not None:
                state["ema"] = self.ema.state_dict()
            names = ["checkpoint.pth"]
            names += ["checkpoint_best.pth"] if is_best else []
            names += [f"checkpoint{epoch:04}.pth"] if numbered else []
            for name in names:
                save_checkpoint(state, self.output_dir / name)
        barrier()

    def _resume_from(self) -> dict | None:
        path = self.args.resume
        if path == "auto":
            path = self.output_dir / "checkpoint.pth"
            if not path.is_file():
                say(f"--resume auto: there is no {path} yet, starting anew")
                return None
        if not path:
            return None
        checkpoint = read_checkpoint(path)
        self.args.resume = str(path)
        _check_same_run(self.args, checkpoint, self.categories)
        return checkpoint

    def _continue(self, checkpoint: dict) -> None:
        """Takes over a checkpoint's state, as far as it has one."""
        source = self.args.resume
        load_model(self.model, checkpoint["model"], source)
        if not {"optimizer", "lr_scheduler", "epoch"} <= set(checkpoint):
            say(f"--resume: {source} holds only weights; the optimiser starts fresh at epoch {self.epoch}")
            return
        try:
            load_optimizer(self.optimizer, checkpoint["optimizer"])
        except (ValueError, KeyError) as error:
            raise UsageError(f"--resume: the optimiser in {source} does not fit: {error}") from error
        self.scheduler.load_state_dict(checkpoint["lr_scheduler"])
        self.epoch = checkpoint["epoch"] + 1
        self.steps = checkpoint.get("steps", self.epoch * self.steps_per_epoch)
        self.best = checkpoint.get("best")
        self._unevaluated = checkpoint.get("unevaluated")
        if self.scaler is not None and "scaler" in checkpoint:
            self.scaler.load_state_dict(checkpoint["scaler"])
        if self.ema is not None and "ema" in checkpoint:
            self.ema.load_state_dict(checkpoint["ema"])
        elif self.ema is not None:
            self.ema = ModelEma(self.model, self.args.ema_decay)
            say(f"--ema_decay: {source} holds no averaged weights; the average starts from its weights")
        generators = checkpoint.get("rng", [])
        if len(generators) == self.args.world_size:
            set_rng_state(generators[get_rank()], self.device)
            say(f"continuing {source} with epoch {self.epoch}")
        else:
            say(
                f"continuing {source} with epoch {self.epoch}; it holds random states of {len(generators)} processes "
                f"and there are {self.args.world_size}: not the very same numbers as without the interruption"
            )


def _read_weights(path: str) -> dict[str, Tensor]:
    """A checkpoint's weights, averaged ones (EMA) where there are some."""
    checkpoint = read_checkpoint(path)
    return checkpoint.get("ema", {}).get("values", checkpoint["model"])


def _image_folder(dataset: CocoDetection | CocoPanoptic):
    return dataset.img_folder if isinstance(dataset, CocoPanoptic) else dataset.root


def _loader(dataset: CocoDetection | CocoPanoptic, args: argparse.Namespace, train: bool) -> EpochLoader:
    # A GPU's convolutions want channels-last images: padding can write them so at no cost.
    options = {"channels_last": torch.device(args.device).type == "cuda"}
    if isinstance(dataset, LineDetection):
        options |= {"mean": dataset.mean, "std": dataset.std}
    return build_loader(
        dataset,
        args.batch_size,
        train=train,
        num_workers=args.num_workers,
        distributed=args.distributed,
        seed=args.seed,
        group_by_size=None if train and args.group_by_size else False,
        collate_fn=PackedCollate(**options),
    )


def _check_same_run(args: argparse.Namespace, checkpoint: Mapping, categories: Categories) -> None:
    """Refuses to continue a checkpoint with another model or other classes; says what else differs."""
    theirs = checkpoint.get("args", {})
    differing = {
        name: (theirs[name], getattr(args, name))
        for name in theirs
        if hasattr(args, name) and theirs[name] != plain_args(args)[name]
    }
    if "backbone_norm" in differing and args.backbone_norm is None:
        del differing["backbone_norm"]  # filled in when the model is built
    model = [name for name in (*MODEL_ARGS, "dropout", "lr_schedule") if name in differing]
    if model:
        text = ", ".join(f"--{name} was {differing[name][0]} and is {differing[name][1]}" for name in model)
        raise UsageError(f"--resume {args.resume}: {text}; to start a new run from its weights, use --weights")
    if "categories" in checkpoint and checkpoint["categories"] != categories.to_dict():
        raise UsageError(
            f"--resume {args.resume}: it was trained for the categories {checkpoint['categories']['names']}, the data "
            f"has {list(categories.names)}; to start a new run from its weights, use --weights"
        )
    own = {"resume", "weights", "output_dir", "start_epoch", "rank", "gpu", "world_size", "distributed", "device"}
    changed = [name for name in differing if name not in own and name not in MODEL_ARGS]
    for name in changed:
        kept = name in ("lr", "lr_backbone", "weight_decay")
        note = "the checkpoint's is kept" if kept else "the new one counts"
        say(f"--resume: --{name} was {differing[name][0]} and is {differing[name][1]}: {note}")


def save_evaluation(evaluator, path: Path) -> None:
    """Writes pycocotools' precision and recall arrays as tensors, readable with ``weights_only=True``.

    Keys: "precision" [IoU thresholds, recalls, classes, areas, detections], "scores" likewise, "recall" without the
    second axis, "counts", and "stats", the twelve numbers; -1 where there is no object.
    Of lines there are only `LineEvaluator.stats`.
    """
    if isinstance(evaluator, LineEvaluator):
        save_checkpoint({"stats": dict(evaluator.stats)}, path)
        return
    curves = evaluator.coco_eval["bbox"].eval
    state = {name: torch.from_numpy(curves[name]) for name in ("precision", "recall", "scores")}
    state["counts"] = list(curves["counts"])
    state["stats"] = evaluator.coco_eval["bbox"].stats.tolist()
    save_checkpoint(state, path)


def load_for_inference(
    args: argparse.Namespace, given: set[str], path: str
) -> tuple[nn.Module, nn.Module, dict[str, nn.Module], Categories | None]:
    """A checkpoint's model in evaluation mode on `args.device`, described by the checkpoint itself.

    Args:
        args: parsed flags; those that define the model are overwritten by the checkpoint's, unless they were given.
        given: names of the flags that the user gave.
        path: a checkpoint of ours, of the original, or bare weights of the original. Averaged weights (EMA) are taken
            where there are some.

    Returns:
        Model, criterion, post-processors, and the categories; None where the checkpoint does not say.

    Raises:
        ValueError, FileNotFoundError: it cannot be read, or does not fit.
    """
    checkpoint = read_checkpoint(path)
    theirs = checkpoint.get("args", {})
    for name in (*MODEL_ARGS, "aux_loss", "set_cost_class", "set_cost_bbox", "set_cost_giou", "bbox_loss_coef",
                 "giou_loss_coef", "mask_loss_coef", "dice_loss_coef", "eos_coef", "thing_classes",
                 "set_cost_line", "line_loss_coef", "label_loss_func", "label_loss_params"):  # fmt: skip
        if name in theirs and name not in given:
            setattr(args, name, theirs[name])
    if "lines" in (args.dataset_file, theirs.get("dataset_file")):
        args.dataset_file = "lines"
    state = checkpoint["model"]
    if "ema" in checkpoint:
        say(f"{path}: using its averaged weights (EMA)")
        state = checkpoint["ema"]["values"]
    if args.masks and "masks" in given and not has_masks(state):
        raise ValueError(f"--masks: {path} has no mask head")
    args.masks, args.frozen_weights = has_masks(state), None
    classes = f"{DETECTOR if args.masks else ''}class_embed.bias"
    if classes not in state:
        raise ValueError(f"{path} has no {classes}; expected the weights of a DETR")
    args.num_classes = len(state[classes]) - 1
    if args.backbone_norm is None:
        args.backbone_norm = "frozen"
    args.backbone_weights, args.lr_backbone, args.dropout = "none", 0.0, 0.0
    model, criterion, postprocessors = build(args, own_weights=True)
    load_model(model, state, path)
    model.to(args.device).eval()
    if args.compile:
        compile_regions(model, say)
    categories = Categories.from_dict(checkpoint["categories"]) if "categories" in checkpoint else None
    return model, criterion, postprocessors, categories


def evaluate_checkpoint(args: argparse.Namespace, given: set[str], path: str) -> dict:
    """Evaluates a checkpoint on the validation data and prints COCO's numbers and those of each class.

    Masks are evaluated where the model has some, and with ``args.dataset_file`` "coco_panoptic" panoptic pictures.

    Args:
        args: parsed flags of ``detr-fast eval`` or ``detr-fast train --eval``.
        given: names of the flags that the user gave.
        path: the checkpoint.

    Returns:
        The losses and what `evaluate` adds to them.
    """
    with usage_errors():
        device = start(args)
        model, criterion, postprocessors, categories = load_for_inference(args, given, path)
        if categories is None and args.val_ann and args.dataset_file != "lines":
            # Without word of the contrary labels are category ids, as in the original.
            categories = Categories.from_coco(read_annotations(args.val_ann)["categories"])
        dataset = build_dataset("val", args, categories=categories, uint8=True)
        if dataset.categories.num_classes > args.num_classes:
            raise UsageError(
                f"{path} has {args.num_classes} classes, the annotations need {dataset.categories.num_classes}: "
                f"category ids up to {dataset.categories.ids[-1]}"
            )
        if "panoptic" in postprocessors:
            postprocessors["panoptic"].is_thing_map = {
                label: label in dataset.thing_classes for label in range(args.num_classes)
            }
        annotations = box_annotations(dataset, args)
        loader = _loader(dataset, args, train=False)
    stats, evaluator = evaluate(
        model,
        criterion,
        postprocessors,
        loader,
        annotations,
        device,
        args.output_dir,
        categories=dataset.categories,
        precision=args.precision,
        print_freq=args.print_freq,
    )
    if is_main_process():
        for iou_type, title in (("bbox", "category"), ("segm", "category (masks)")):
            if iou_type not in getattr(evaluator, "iou_types", ()):
                continue
            rows = evaluator.per_class(iou_type)
            width = max(len(title), *(len(name) for name in rows))
            print(f"{title:{width}}     AP   AP50")
            for name, row in rows.items():
                if not math.isnan(row["AP"]):
                    print(f"{name:{width}}  {row['AP']:.3f}  {row['AP50']:.3f}")
        if args.output_dir:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            save_evaluation(evaluator, Path(args.output_dir) / "eval.pth")
    return stats
