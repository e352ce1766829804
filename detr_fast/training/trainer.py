"""A training run, from arguments to a trained model, its logs and its checkpoints.

Source: facebookresearch/detr, main.py.
"""

import argparse
import datetime
import math
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler

from detr_fast.data.categories import Categories
from detr_fast.data.coco import CocoDetection, build_dataset
from detr_fast.data.lines import LineDetection, make_line_transforms
from detr_fast.data.panoptic import CocoPanoptic
from detr_fast.data.transforms import Compose, RandomHorizontalFlip, make_coco_transforms
from detr_fast.distributed import all_gather, barrier, get_rank, is_main_process, say
from detr_fast.models.letr import LETRstack, load_first_stage
from detr_fast.training.checkpoint import (
    load_model,
    load_weights,
    plain_args,
    read_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from detr_fast.training.config import UsageError, check_train_args, make_output_dir, usage_errors
from detr_fast.training.ema import ModelEma
from detr_fast.training.engine import evaluate, train_one_epoch
from detr_fast.training.inference import save_evaluation
from detr_fast.training.log import RunLog
from detr_fast.training.optim import build_optimizer, build_scheduler, load_optimizer, steps_every
from detr_fast.training.pictures import draw_curves, draw_samples
from detr_fast.training.regions import compile_regions
from detr_fast.training.setup import MODEL_ARGS, box_annotations, build, loader_for, start

# COCO's panoptic ids end at 200; the original's models, and so its checkpoints, have this many classes.
_COCO_PANOPTIC_CLASSES = 250
_LAST_COCO_THING = 90


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
        self.output_dir = make_output_dir(args.output_dir) if args.output_dir else None
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
        self.loader_train = loader_for(self.dataset_train, args, train=True)
        self.loader_val = loader_for(self.dataset_val, args, train=False)
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
        """Trains up to `args.epochs` or `args.max_steps`. Returns the last epoch's log row, empty if none was left."""
        args, row = self.args, {}
        say(
            f"{self.n_parameters} trained parameters, {len(self.dataset_train)} training and {len(self.dataset_val)} "
            f"validation images, {self.args.num_classes} classes, {self.steps_per_epoch} steps per epoch"
        )
        began = time.perf_counter()
        if self._unevaluated is not None:
            row = self._finish(self.epoch - 1, self._unevaluated)
        elif self.epoch >= args.epochs or self._at_last_step():
            limit = f"--max_steps {args.max_steps}" if self._at_last_step() else f"--epochs {args.epochs}"
            say(
                f"nothing is left to train: {args.resume} has {self.epoch} epochs, {self.steps} steps, and the run "
                f"ends at {limit}. To train longer, give a larger one; to evaluate, use detr-fast eval"
            )
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
                # Those of the smallest ids, in whatever order they come: every evaluation shows the same.
                samples[image_id] = result
                if len(samples) > self.args.sample_images:
                    del samples[max(samples)]

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
                draw_samples(
                    folder / f"epoch{epoch:04}.png",
                    self.coco_val,
                    _image_folder(self.dataset_val),
                    dict(sorted(samples.items())),
                )
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
        for name in ("weights", "frozen_weights"):
            if getattr(self.args, name):
                say(f"--{name} is not read again: the run continues from {path}")
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
        if self.args.start_epoch not in (0, self.epoch):
            say(f"--start_epoch {self.args.start_epoch} has no effect: {source} continues with epoch {self.epoch}")
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
