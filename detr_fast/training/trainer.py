"""A training run, from arguments to a trained model, its logs and its checkpoints.

Source: facebookresearch/detr, main.py.
"""

import datetime
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from detr_fast.config import Config, check_for_training, usage_errors, with_output_dir
from detr_fast.data.categories import Categories
from detr_fast.distributed import (
    all_gather,
    barrier,
    get_rank,
    get_world_size,
    is_dist_avail_and_initialized,
    is_main_process,
    say,
)
from detr_fast.errors import InterruptedRun, UsageError
from detr_fast.evaluation import Evaluator
from detr_fast.models.weights import load_model, load_weights
from detr_fast.tasks import task_of
from detr_fast.tasks.paths import check_data, with_data
from detr_fast.tasks.pictures import draw_sheet
from detr_fast.training.callbacks import Callback, Callbacks, callbacks_of
from detr_fast.training.checkpoint import (
    averaged_weights,
    check_resumable,
    read_checkpoint,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from detr_fast.training.classes import known_classes, say_known
from detr_fast.training.curves import draw_curves
from detr_fast.training.ema import ModelEma
from detr_fast.training.engine import evaluate, run_epoch
from detr_fast.training.folder import (
    check_space,
    is_full,
    locked,
    megabytes,
    new_folder_of_all,
    remove_left_overs,
    size_of,
    space_needed,
)
from detr_fast.training.interrupt import GO_ON, SAVE, Interruption, NoBatch, ignore_signals, signal_of
from detr_fast.training.log import Metrics, RunLog
from detr_fast.training.memory import probe_memory
from detr_fast.training.optim import build_scheduler, load_optimizer, steps_every
from detr_fast.training.report import annotated_image, write_report
from detr_fast.training.resume import check_same_run
from detr_fast.training.setup import build, chosen_for_gpu, loader_for, size_divisor, start, with_norm
from detr_fast.training.step import build_step, distributed

_SAMPLE_THRESHOLD = 0.5  # lowest score of what is drawn in samples/

# Gives the configuration with what the weights say of their model, and the checkpoint, as `read_checkpoint` does; None
# where the run continues from another one.
ReadWeights = Callable[[Config], tuple[Config, Mapping | None]]


def train(config: Config, *, callbacks: Sequence[Callback] = (), read_weights: ReadWeights | None = None) -> dict:
    """Trains as the configuration says and evaluates on the way.

    Args:
        config: without an `output_dir` a new folder, ``outputs/<date>_<time>``, is made; "none" saves nothing.
        callbacks: are told of each epoch, beside those of `log_to`; see `detr_fast.training.callbacks`.
        read_weights: reads what `weights` names, and describes the model accordingly. None: `weights` is a checkpoint
            file or an https address, and the configuration describes the model.

    Returns:
        The last epoch's log row; its "test_coco_eval_bbox" are pycocotools' twelve numbers, and so are, with masks,
        "test_coco_eval_masks".

    Raises:
        UsageError: the configuration, the data or a checkpoint do not fit; the message is for the user.
        NonFiniteLossError: the loss or a gradient became NaN or infinite.
        InterruptedRun: SIGTERM, SIGINT or SIGHUP came; the run's state is saved.
        OSError: a file could not be written, for instance because the disk is full; what is kept is said.
        CallbackError: a callback failed.
    """
    with usage_errors():
        task_of(config)
        check_for_training(config)
        check_data(config)
        callbacks = [*callbacks, *callbacks_of(config)]
        config, device = start(config, training=True)
        weights: Mapping | None = None
        if read_weights is not None and config.weights:
            config, weights = read_weights(config)
        task_of(config).check_image_size(config)
        is_new = not config.output_dir
        config = with_output_dir(replace(config, output_dir=new_folder_of_all()) if is_new else config)
        folder = Path(config.output_dir) if config.output_dir and is_main_process() else None
    try:
        with locked(folder):
            with usage_errors():
                trainer = Trainer(config, device, weights=weights, callbacks=callbacks)
            if is_new:
                say(f"no --output_dir: everything is saved in {config.output_dir}")
            return trainer.run()
    finally:
        if is_new and folder is not None and not any(folder.iterdir()):  # the run was refused
            folder.rmdir()


class Trainer:
    """All that a training run holds; `run` trains.

    Args:
        config: as `start` returned it. What the data say about the classes is added.
        device: where to train.
        weights: the checkpoint that `config.weights` names, where it has been read already.
        callbacks: are told of each epoch.

    Attributes:
        config: see above; what a checkpoint keeps.
        task: what is trained.
        epoch: the next epoch.
        steps: optimiser steps so far.
        best: the best score so far (see `Task.score`), None before the first evaluation.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        *,
        weights: Mapping | None = None,
        callbacks: Sequence[Callback] = (),
    ):
        self.callbacks = Callbacks(callbacks if is_main_process() else ())
        self.task, self.device = task_of(config), device
        config = with_data(with_output_dir(config))
        self.output_dir = Path(config.output_dir) if config.output_dir else None
        self.dataset_train: Any = self.task.build_dataset("train", config, uint8=True)
        self.categories: Categories = self.dataset_train.categories
        self.dataset_val: Any = self.task.build_dataset("val", config, categories=self.categories, uint8=True)
        self.annotations = self.task.annotations(self.dataset_val, config)
        config = replace(config, **self.task.classes(self.dataset_train))
        config, checkpoint = self._resume_from(config)
        self.loader_train = loader_for(self.task, self.dataset_train, config, train=True)
        self.loader_val = loader_for(self.task, self.dataset_val, config, train=False)
        self.loader_train.worker_init_fn = self.loader_val.worker_init_fn = ignore_signals
        self.config = config = with_norm(config)
        if weights is None and config.weights and checkpoint is None:
            weights = read_checkpoint(config.weights)
        frozen = read_checkpoint(config.frozen_weights) if config.frozen_weights and checkpoint is None else None

        self.model, self.criterion, self.postprocessors = build(
            self.task, config, own_weights=bool(checkpoint or weights or frozen)
        )
        self.n_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if weights is not None:
            known = known_classes(self.categories, weights)
            for line in load_weights(self.model, averaged_weights(weights), config.weights, classes=known):
                say(f"--weights: not taken, starts fresh: {line}")
            if known:
                say(f"--weights: {say_known(self.categories, known)}")
        if frozen is not None:
            self.task.load_frozen(self.model, averaged_weights(frozen), f"--frozen_weights {config.frozen_weights}")
        self.step = build_step(self.model, self.criterion, config, device, say)
        self.optimizer, self.scaler = self.step.optimizer, self.step.scaler
        self.steps_per_epoch = math.ceil(len(self.loader_train) / config.accumulate_steps)
        self.scheduler = build_scheduler(self.optimizer, config, self.steps_per_epoch)
        self.ema = ModelEma(self.model, config.ema_decay) if config.ema_decay else None

        self.epoch, self.steps, self.best = config.start_epoch, 0, None
        self._stale = 0  # evaluations since the best one
        self._unevaluated: dict | None = None  # training numbers of an epoch whose evaluation was interrupted
        self._inside: dict | None = None  # where in the epoch a checkpoint was made
        self._began = time.perf_counter()
        self._seconds_before: float | None = None  # what a resumed run's earlier pieces took
        if checkpoint is not None:
            self._continue(checkpoint)
        self._kept = f"{config.resume} is" if checkpoint is not None else "no checkpoint is"
        self.log = None
        if self.output_dir is None:
            say("--output_dir none: nothing is saved")
        elif checkpoint is None and (self.output_dir / "checkpoint.pth").is_file():
            say(f"{self.output_dir} has an earlier run, which this one replaces; --resume auto would go on with it")
        if self.output_dir is not None and is_main_process():
            remove_left_overs(self.output_dir)
            warning = check_space(
                self.output_dir, self._checkpoint_bytes(), sum(map(self._is_numbered, range(self.epoch, config.epochs)))
            )
            if warning is not None:
                say(warning)
            self.log = RunLog(self.output_dir, self.epoch - (self._unevaluated is not None), config.tensorboard)

        if config.probe_memory == "on" or (config.probe_memory == "auto" and device.type == "cuda"):
            say(probe_memory(self.step, self.loader_train, self.epoch))
        if is_dist_avail_and_initialized():
            distributed(self.step)
            # The wrapper has given all processes the first one's weights; the average was made of each one's own.
            for value in self.ema.values.values() if self.ema is not None else ():
                dist.broadcast(value, 0)

    def run(self) -> dict:
        """Trains to the end that the configuration sets. Returns the last epoch's log row, empty if none was left."""
        try:
            loaders = self.loader_train, self.loader_val
            with self.callbacks, Interruption(self.config.checkpoint_every, loaders) as self._interruption:
                self.callbacks.start(self.config)
                return self._run()
        except NoBatch as stop:
            where = f"stopped by {signal.Signals(stop.signal).name} after step {self.steps}, while no batch came"
            advice = self._how_to_go_on() if self.output_dir is not None else ""
            raise InterruptedRun(f"{where}; {self._kept} kept", stop.signal, advice) from stop
        except OSError as error:
            if self.output_dir is None or not is_full(error):
                raise
            needed = megabytes(space_needed(self.output_dir, self._checkpoint_bytes()))
            raise OSError(
                f"the disk of {self.output_dir} is full ({error.strerror}) after step "
                f"{self.steps}; {self._kept} kept. Make {needed} free and continue with --output_dir {self.output_dir} "
                "--resume auto"
            ) from error
        finally:
            self.loader_train.close()
            self.loader_val.close()
            if self.log is not None:
                self.log.close()

    def _run(self) -> dict:
        config, row = self.config, {}
        say(
            f"{self.n_parameters} trained parameters, {len(self.dataset_train)} training and {len(self.dataset_val)} "
            f"validation images, {self.config.num_classes} classes, {self.steps_per_epoch} steps per epoch"
        )
        divisor = size_divisor(config, train=True)
        if divisor > 1:
            say(f"training batches are padded to multiples of {divisor} pixels (--size_divisor)")
        if self._unevaluated is not None:
            row = self._finish(self.epoch - 1, self._unevaluated)
        elif self._stops_early() and self._inside is None:
            say(
                f"nothing is left to train: {config.resume} was stopped by --early_stop after {self.epoch} epochs. To "
                "train on, give a larger one, or 0"
            )
        elif self.epoch >= config.epochs or (self._at_last_step() and self._inside is None):
            limit = f"--max_steps {config.max_steps}" if self._at_last_step() else f"--epochs {config.epochs}"
            say(
                f"nothing is left to train: {config.resume} has {self.epoch} epochs, {self.steps} steps, and the run "
                f"ends at {limit}. To train longer, give a larger one; to evaluate, use detr-fast eval"
            )
        while self.epoch < config.epochs and (
            self._inside is not None or not (self._at_last_step() or self._stops_early())
        ):
            stats = self._train_epoch()
            self.epoch += 1
            row = self._finish(self.epoch - 1, stats)
        if row and self._stops_early() and self.epoch < config.epochs and not self._at_last_step():
            best = "" if self.output_dir is None else f", which {self.output_dir / 'checkpoint_best.pth'} has"
            say(
                f"stopped after epoch {self.epoch - 1}: {self._stale} evaluations without a better score than "
                f"{self.best:.4f}{best} (--early_stop {config.early_stop})"
            )
        say(f"training took {self._duration()}")
        if self.output_dir is not None and row:
            say(f"saved in {self.output_dir}; to use it: detr-fast predict IMAGES --weights {self.output_dir}")
        return row

    def _seconds(self) -> float:
        """What this piece of the run has taken so far."""
        return time.perf_counter() - self._began

    def _duration(self) -> str:
        piece = datetime.timedelta(seconds=int(self._seconds()))
        if self._seconds_before is None:
            return str(piece)
        whole = datetime.timedelta(seconds=int(self._seconds_before + self._seconds()))
        return f"{whole}, {piece} of it since it was resumed"

    def _train_epoch(self) -> dict[str, float]:
        """Trains the next epoch, or the rest of one that was begun. Returns its averages."""
        config, metrics, first = self.config, Metrics(), 0
        if self._inside is not None:
            first = self._inside["batches"]
            metrics.load_state(self._inside["metrics"][get_rank()])
            self._inside = None
        before = self.steps - math.ceil(first / config.accumulate_steps)
        self.loader_train.set_epoch(self.epoch, first)

        def on_step(batches: int, check: Callable[[], None]) -> None:
            self.steps += 1
            agreed = self._interruption.after_step(self.steps)
            # At the end of an epoch a checkpoint is made anyway.
            if agreed == GO_ON or (agreed == SAVE and batches == len(self.loader_train)):
                return
            check()
            if batches % config.print_freq == 0:
                metrics.latest()  # as it happens after this step: sums of other groups differ in their last bits
            inside = {"batches": batches, "metrics": all_gather(metrics.state()), **self._order()}
            self._save(self.epoch - 1, inside=inside)
            self._stop_if(agreed)

        stats = run_epoch(
            self.step,
            self.loader_train,
            self.epoch,
            accumulate_steps=config.accumulate_steps,
            step_scheduler=self.scheduler if steps_every(config) == "step" else None,
            ema=self.ema,
            # Where more has been done than a resumed run is asked for, the epoch ends here.
            max_steps=max(config.max_steps, self.steps) - before if config.max_steps else None,
            print_freq=config.print_freq,
            first_batch=first,
            metrics=metrics,
            on_step=on_step,
        )
        if steps_every(config) == "epoch":
            self.scheduler.step()
        return stats

    def _order(self) -> dict[str, Any]:
        """What the batches of an epoch, and the names of its averages, depend on: with other values a position in the
        epoch means nothing."""
        names = ("batch_size", "accumulate_steps", "seed", "group_by_size", "augmentation", "aux_loss")
        values = {name: getattr(self.config, name) for name in names}
        return {**values, "processes": get_world_size(), "images": len(self.dataset_train)}

    def _stop_if(self, agreed: int) -> None:
        """Ends the run if that is what the processes have agreed upon; everything is saved."""
        if agreed <= SAVE:
            return
        number = signal_of(agreed)
        where = f"stopped by {signal.Signals(number).name} after step {self.steps}"
        if self.output_dir is None:
            raise InterruptedRun(f"{where}; nothing is kept (--output_dir none)", number)
        path = self.output_dir / "checkpoint.pth"
        raise InterruptedRun(f"{where}; saved in {path}", number, self._how_to_go_on())

    def _how_to_go_on(self) -> str:
        return f"To go on: the same command with --output_dir {self.output_dir} --resume auto"

    def _at_last_step(self) -> bool:
        return bool(self.config.max_steps) and self.steps >= self.config.max_steps

    def _stops_early(self) -> bool:
        return bool(self.config.early_stop) and self._stale >= self.config.early_stop

    def _share_buffers(self) -> None:
        """Gives all processes the first one's batch norm statistics: each has seen other images."""
        if is_dist_avail_and_initialized():
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
            if self.ema is not None:
                self.ema.copy_buffers(self.model)

    def _finish(self, epoch: int, train_stats: Mapping[str, float]) -> dict:
        """Saves, evaluates if it is time, and logs. Returns the log row."""
        config = self.config
        self._share_buffers()
        is_last = self.epoch >= config.epochs or self._at_last_step()
        row = {f"train_{name}": value for name, value in train_stats.items()}
        stats: dict[str, Any] = {}
        evaluator = None
        if is_last or (epoch + 1) % config.eval_every == 0:
            # Saved before as well: an evaluation that fails costs no training.
            self._save(epoch, unevaluated=dict(train_stats))
            stats, evaluator = self._evaluate(epoch)
            row.update({f"test_{name}": value for name, value in stats.items()})
        score = self.task.score(stats)
        is_best = score is not None and (self.best is None or score > self.best)
        if is_best:
            self.best, self._stale = score, 0
        elif score is not None:
            self._stale += 1
        if self.log is not None and evaluator is not None and (is_last or self._stops_early()):
            write_report(self.output_dir, self.task, evaluator, self.dataset_val, self.annotations)
        row.update(epoch=epoch, n_parameters=self.n_parameters)
        if self.log is not None:
            self.log.append(row)
            if not draw_curves(self.output_dir):
                say("no curves.png: matplotlib is not installed (pip install matplotlib)")
        self._save(epoch, is_best=is_best, numbered=self._is_numbered(epoch))
        self.callbacks.epoch(row)
        return row

    def _is_numbered(self, epoch: int) -> bool:
        return (epoch + 1) % self.config.lr_drop == 0 or (epoch + 1) % 100 == 0

    def _checkpoint_bytes(self) -> int:
        """About what a checkpoint takes: weights, AdamW's two averages of the trained ones, and averaged weights."""
        weights = size_of(self.model.state_dict())
        moments = 2 * sum(p.nbytes for p in self.model.parameters() if p.requires_grad)
        return weights + moments + (weights if self.ema is not None else 0)

    def _evaluate(self, epoch: int) -> tuple[dict[str, Any], Evaluator]:
        samples: dict[int, dict[str, Any]] = {}

        def keep(results):
            self._stop_if(self._interruption.while_evaluating())
            for image_id, result in results.items():
                # Those of the smallest ids, in whatever order they come: every evaluation shows the same.
                samples[image_id] = result
                if len(samples) > self.config.sample_images:
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
                save_checkpoint(evaluator.state(), folder / name)
            if samples:
                folder = self.output_dir / "samples"
                folder.mkdir(exist_ok=True)
                self._draw(folder / f"epoch{epoch:04}.png", dict(sorted(samples.items())))
        return stats, evaluator

    def _evaluate_model(self, on_results):
        return evaluate(
            self.model,
            self.criterion,
            self.postprocessors,
            self.loader_val,
            self.annotations,
            self.device,
            self.config.output_dir,
            task=self.task,
            categories=self.categories,
            precision=self.config.precision,
            print_freq=self.config.print_freq,
            on_results=on_results,
            backend=self.config.eval_backend,
        )

    def _draw(self, path: Path, results: Mapping[int, Mapping[str, Any]]) -> None:
        """Writes a picture with a row for each image: what is annotated, and what is predicted."""
        coco, rows = self.annotations, []
        names = {c["id"]: str(c.get("name", c["id"])) for c in coco.loadCats(coco.getCatIds())}
        for image_id, result in results.items():
            _, image = annotated_image(image_id, self.dataset_val, coco)
            truth = [entry for entry in coco.loadAnns(coco.getAnnIds(image_id)) if not entry.get("iscrowd", 0)]
            rows.append(self.task.draw_sample(image, truth, result, names, _SAMPLE_THRESHOLD, coco))
        draw_sheet(path, rows)

    def _save(
        self,
        epoch: int,
        *,
        is_best: bool = False,
        numbered: bool = False,
        unevaluated: dict | None = None,
        inside: dict | None = None,
    ) -> None:
        """Writes checkpoint.pth, and checkpoint_best.pth and checkpoint0123.pth if asked for.

        Args:
            epoch: the last one that is finished; -1: none.
            is_best, numbered: what is to be written beside checkpoint.pth.
            unevaluated: averages of this epoch's training, if it is still to be evaluated.
            inside: position and averages of the epoch after it, if that has begun.
        """
        if self.output_dir is None:
            return
        generators = all_gather(rng_state(self.device))
        if is_main_process():
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "lr_scheduler": self.scheduler.state_dict(),
                "epoch": epoch,
                "args": self.config.to_dict(),
                "categories": self.categories.to_dict(),
                "steps": self.steps,
                "best": self.best,
                "stale": self._stale,
                "seconds": (self._seconds_before or 0.0) + self._seconds(),
                "rng": generators,
                "unevaluated": unevaluated,
                "inside": inside,
                "version": 1,
            }
            if self.scaler is not None:
                state["scaler"] = self.scaler.state_dict()
            if self.ema is not None:
                state["ema"] = self.ema.state_dict()
            names = ["checkpoint_best.pth"] if is_best else []
            names += [f"checkpoint{epoch:04}.pth"] if numbered else []
            # The one to resume from comes last: killed before it, the run does this epoch's end, and the others, again.
            for name in [*names, "checkpoint.pth"]:
                save_checkpoint(state, self.output_dir / name)
            self._kept = f"{self.output_dir / 'checkpoint.pth'} of step {self.steps} is"
        self._interruption.saved()
        barrier()

    def _resume_from(self, config: Config) -> tuple[Config, dict | None]:
        """The checkpoint to continue from, or None, and the configuration with its path and with everything chosen."""
        path: str | Path = config.resume
        if path == "auto":
            path = self.output_dir / "checkpoint.pth"
            if not path.is_file():
                say(f"--resume auto: there is no {path} yet, starting anew")
                path = ""
        checkpoint = read_checkpoint(path) if path else None
        if self.device.type == "cuda":
            config = chosen_for_gpu(config, self.device, {} if checkpoint is None else checkpoint.get("args", {}))
        if checkpoint is None:
            return config, None
        config = replace(config, resume=str(path))
        if config.backbone_norm is None:
            config = replace(config, backbone_norm=checkpoint.get("args", {}).get("backbone_norm"))
        for name in ("weights", "frozen_weights"):
            if getattr(config, name):
                say(f"--{name} is not read again: the run continues from {path}")
        check_same_run(config, checkpoint, self.categories)
        return config, checkpoint

    def _continue(self, checkpoint: dict) -> None:
        """Takes over a checkpoint's state, as far as it has one."""
        source = self.config.resume
        check_resumable(checkpoint, source)
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
        if self.config.start_epoch not in (0, self.epoch):
            say(f"--start_epoch {self.config.start_epoch} has no effect: {source} continues with epoch {self.epoch}")
        self.steps = checkpoint.get("steps", self.epoch * self.steps_per_epoch)
        self.best, self._stale = checkpoint.get("best"), checkpoint.get("stale", 0)
        self._seconds_before = checkpoint.get("seconds")
        self._unevaluated = checkpoint.get("unevaluated")
        self._inside = checkpoint.get("inside")
        if self.scaler is not None and "scaler" in checkpoint:
            self.scaler.load_state_dict(checkpoint["scaler"])
        if self.ema is not None and "ema" in checkpoint:
            self.ema.load_state_dict(checkpoint["ema"])
        elif self.ema is not None:
            self.ema = ModelEma(self.model, self.config.ema_decay)
            say(f"--ema_decay: {source} holds no averaged weights; the average starts from its weights")
        where = f"epoch {self.epoch}"
        if self._unevaluated is not None:
            where = f"the evaluation of epoch {self.epoch - 1}"
        if self._inside is not None:
            changed = {name: value for name, value in self._order().items() if self._inside[name] != value}
            if changed:
                text = ", ".join(f"{name} was {self._inside[name]} and is {changed[name]}" for name in changed)
                say(f"--resume: {text}: epoch {self.epoch} begins anew with the weights of step {self.steps}")
                self._inside = None
            else:
                where += f", batch {self._inside['batches']}"
        generators = checkpoint.get("rng", [])
        if len(generators) == get_world_size():
            set_rng_state(generators[get_rank()], self.device)
            say(f"continuing {source} with {where}")
        else:
            say(
                f"continuing {source} with {where}; it holds random states of {len(generators)} processes "
                f"and there are {get_world_size()}: not the very same numbers as without the interruption"
            )
