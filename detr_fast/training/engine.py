"""One epoch of training, and evaluation.

Source: facebookresearch/detr, engine.py.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from detr_fast.data.categories import Categories
from detr_fast.data.packed import PackedBatch
from detr_fast.data.prefetch import Prefetcher
from detr_fast.errors import NonFiniteLossError
from detr_fast.evaluation import Evaluator
from detr_fast.nested_tensor import NestedTensor, is_unpadded
from detr_fast.tasks import Task, task_of_postprocessors
from detr_fast.training.ema import ModelEma
from detr_fast.training.log import Metrics, Progress
from detr_fast.training.nonfinite import FiniteWatch, explain_gradients, explain_non_finite
from detr_fast.training.step import LossSum, TrainingStep, autocast_dtype, outputs_of
from detr_fast.training.step import optimizer_step as _optimizer_step
from detr_fast.training.step_errors import step_errors


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    data_loader: Iterable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    max_norm: float = 0,
    *,
    precision: str = "fp32",
    scaler: GradScaler | None = None,
    accumulate_steps: int = 1,
    step_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ema: ModelEma | None = None,
    max_steps: int | None = None,
    print_freq: int = 10,
    first_batch: int = 0,
    metrics: Metrics | None = None,
    on_step: Callable[[int, Callable[[], None]], None] | None = None,
) -> dict[str, float]:
    """Trains for one pass over the loader.

    No step waits for the device: losses are read every `print_freq` steps, the check for NaN comes two steps late, and
    a step whose gradients are not finite is skipped by the (fused) optimiser on the device, so that no weight is spoilt
    in the meantime. (A criterion or matcher of another class than ours may wait.)

    Args:
        model: on `device`; may be wrapped in DistributedDataParallel.
        criterion: returns the losses by name; its `weight_dict` says which are summed, and with what weight.
        data_loader: yields (samples, targets). ``samples.to(device)`` gives a NestedTensor of normalised
            images (a NestedTensor, or a PackedBatch of `detr_fast.data`); targets are one dict of tensors per image.
        optimizer: steps once per `accumulate_steps` batches.
        device: where to train.
        epoch: for the progress line.
        max_norm: clip the gradients' norm; 0 does not clip.
        precision: "fp32", or autocast in "bf16" or "fp16".
        scaler: of the loss, needed for "fp16".
        accumulate_steps: batches per optimiser step, each with its share of the loss; the last group may be smaller.
        step_scheduler: a schedule that advances with every optimiser step.
        ema: an average to update after every optimiser step.
        max_steps: stop after so many optimiser steps of the epoch, those before `first_batch` included.
        print_freq: show and read the losses every so many batches.
        first_batch: the batch of the epoch with which the loader begins, the first of an optimiser step.
        metrics: averages of the batches before it, to be continued.
        on_step: called after every optimiser step with the number of batches of the epoch done, and with a function
            that waits until all steps so far have been found finite. What it raises ends the epoch.

    Returns:
        Means over the epoch and the processes, under the original's names: "loss", each weighted loss, each loss as it
        is with "_unscaled", "class_error", "lr"; and "padding" (share of padded pixels), "time" and "data" (seconds
        per batch).

    Raises:
        NonFiniteLossError: NaN or infinity; says where it appears first.
        ValueError: an unknown precision, or fp16 without a scaler.
    """
    step = TrainingStep(model, criterion, optimizer, device, precision, max_norm, scaler)
    return run_epoch(
        step,
        data_loader,
        epoch,
        accumulate_steps=accumulate_steps,
        step_scheduler=step_scheduler,
        ema=ema,
        max_steps=max_steps,
        print_freq=print_freq,
        first_batch=first_batch,
        metrics=metrics,
        on_step=on_step,
    )


def run_epoch(
    step: TrainingStep,
    data_loader: Iterable,
    epoch: int,
    *,
    accumulate_steps: int = 1,
    step_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    ema: ModelEma | None = None,
    max_steps: int | None = None,
    print_freq: int = 10,
    first_batch: int = 0,
    metrics: Metrics | None = None,
    on_step: Callable[[int, Callable[[], None]], None] | None = None,
) -> dict[str, float]:
    """As `train_one_epoch`, with a step that is built already."""
    model, device, optimizer = step.model, step.device, step.optimizer
    model.train()
    step.criterion.train()
    metrics, watch = Metrics() if metrics is None else metrics, FiniteWatch(device)
    batches = len(data_loader)
    # On a GPU the next batch is copied while this one is computed.
    prefetcher = Prefetcher(WithPadding(data_loader), device)
    limit = None if max_steps is None else max_steps * accumulate_steps
    progress = Progress(prefetcher, f"Epoch: [{epoch}]", metrics, print_freq, device, limit, first_batch)

    def stop(batch) -> None:
        raise NonFiniteLossError(_explain(step, batch, epoch))

    def check() -> None:
        bad = watch.drain()
        if bad is not None:
            stop(bad)

    for index, (samples, targets, padding) in enumerate(progress, first_batch):
        batch = (index, samples, targets)
        group_start = index - index % accumulate_steps
        group_size = min(accumulate_steps, batches - group_start)
        is_last_of_group = index - group_start == group_size - 1

        # Gradients are exchanged between processes once per optimiser step.
        wait = not is_last_of_group and isinstance(model, nn.parallel.DistributedDataParallel)
        with model.no_sync() if wait else torch.enable_grad(), step_errors(samples):
            outputs = step.outputs(samples)
            try:
                losses = step.losses(outputs, targets)
            except ValueError:
                # The matcher refuses NaN. Whatever else it refuses keeps its own message.
                with step.autocast():
                    if explain_non_finite(_unwrap(model), samples, targets) is None:
                        raise
                stop(batch)
            share = losses.total if group_size == 1 else losses.total / group_size
            step.backward(share)

        finite = torch.isfinite(losses.total.detach())
        if is_last_of_group:
            with step_errors(samples, "the optimiser's step after a batch"):
                finite = finite & _optimizer_step(step)
            if step_scheduler is not None:
                step_scheduler.step()
            if ema is not None:
                ema.update(_unwrap(model))
        bad = watch.add(finite, batch)
        if bad is not None:
            stop(bad)
        metrics.update({**losses.for_log(), "padding": padding, "lr": optimizer.param_groups[0]["lr"]})
        if is_last_of_group:
            optimizer.zero_grad()
            if on_step is not None:
                on_step(index + 1, check)

    check()
    stats = metrics.averages(device)
    return {**stats, "time": progress.seconds_per_step, "data": progress.data_seconds_per_step}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    criterion: nn.Module,
    postprocessors: Mapping[str, nn.Module],
    data_loader: Iterable,
    base_ds: Any,
    device: torch.device,
    output_dir: str = "",
    *,
    task: Task | None = None,
    categories: Categories | None = None,
    precision: str = "fp32",
    print_freq: int = 10,
    on_results: Callable[[dict[int, dict[str, Any]]], None] | None = None,
    backend: str = "auto",
) -> tuple[dict[str, Any], Evaluator]:
    """Losses and the task's numbers over the loader's images.

    Args:
        model, criterion, data_loader, device, precision, print_freq: as in `train_one_epoch`.
        postprocessors: by name, as the task's `build` returns them.
        base_ds: what the results are compared with, see `Task.annotations`; COCO's annotations of boxes and masks.
        output_dir: gets the files that belong to the evaluation, such as panoptic pictures; empty: they are not kept.
        task: None: the one whose post-processors these are.
        categories: maps the model's labels to category ids. None: they are the same.
        on_results: called for every batch with {image id: {"scores", "labels" (category ids), …}}.
        backend: who computes COCO's numbers, see `CocoEvaluator`.

    Returns:
        Means of the losses as in `train_one_epoch` with what the evaluator adds: "coco_eval_bbox" and, for masks,
        "coco_eval_masks" = pycocotools' twelve numbers; for panoptic pictures "PQ_all", "PQ_th" and "PQ_st" (in the
        first process); for lines "line_eval", see `LineEvaluator.stats`; and the evaluator.
    """
    dtype = autocast_dtype(precision)
    model.eval()
    criterion.eval()
    metrics, sum_of = Metrics(), LossSum(criterion.weight_dict)
    task = task_of_postprocessors(postprocessors) if task is None else task
    # Only if it was chosen: not every task has the argument.
    choice = {} if backend == "auto" else {"backend": backend}
    evaluator = task.evaluator(base_ds, data_loader.dataset, output_dir, **choice)

    prefetcher = Prefetcher(WithPadding(data_loader), device)
    for samples, targets, padding in Progress(prefetcher, "Test:", metrics, print_freq, device):
        image_ids = torch.cat([target["image_id"] for target in targets]).tolist()
        original_sizes, sizes = (torch.stack([target[key] for target in targets]) for key in ("orig_size", "size"))
        with step_errors(samples, "the evaluation of a batch"):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                outputs = outputs_of(model, samples)
            losses = sum_of(criterion(outputs, targets))
        metrics.update({**losses.for_log(), "padding": padding})

        results = task.postprocess(postprocessors, outputs, original_sizes, sizes, samples.tensors.shape[-2:])
        if categories is not None:
            results = [{**result, "labels": categories.to_id(result["labels"])} for result in results]
        by_image = dict(zip(image_ids, results, strict=True))
        evaluator.update(by_image)
        if on_results is not None:
            on_results(by_image)

    evaluator.synchronize_between_processes()
    evaluator.accumulate()
    evaluator.summarize()
    return {**metrics.averages(device), **evaluator.log_row()}, evaluator


class WithPadding:
    """The batches (samples, targets) of a loader as (samples, targets, share of padded pixels), where the sizes are
    still known to the host: a float, or a 0-dimensional tensor of masks that are on a GPU already."""

    def __init__(self, batches: Iterable):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple]:
        for samples, targets in self.batches:
            yield samples, targets, _padding(samples)


def _padding(samples: PackedBatch | NestedTensor) -> float | Tensor:
    if isinstance(samples, PackedBatch):
        return samples.padding()
    if is_unpadded(samples) or samples.mask is None:
        return 0.0
    share = samples.mask.float().mean()
    return share.item() if share.device.type == "cpu" else share


def _unwrap(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _explain(step: TrainingStep, batch, epoch: int) -> str:
    """What a step that was not finite suffers from: its batch, a module, a loss or a gradient."""
    index, samples, targets = batch
    where = f"the loss or its gradient is not finite in epoch {epoch}, batch {index}"
    model, criterion = _unwrap(step.model), step.criterion
    with step.autocast():
        reason = explain_non_finite(model, samples, targets)
        if reason is not None:
            return f"{where}: {reason}"
        model.zero_grad()
        outputs = outputs_of(model, samples)
    losses = step.losses(outputs, targets)
    bad = [name for name, value in losses.by_name.items() if not torch.isfinite(value)]
    if bad:
        reason = _refusal(criterion, outputs, targets)
        if reason is not None:
            return f"{where}: {reason}"
        return f"{where}: images, weights and all modules' outputs are finite, {', '.join(bad)} is not"
    losses.total.backward()
    reason = explain_gradients(model)
    if reason is not None:
        return f"{where}: {reason}"
    return f"{where}; computed once more, with other dropout, it is finite. A lower learning rate may help"


def _refusal(criterion, outputs, targets) -> str | None:
    """What the matcher says against the batch: on a GPU the criterion gives NaN instead of waiting to be told."""
    if not hasattr(criterion, "matcher"):
        return None
    try:
        for layer in (outputs, *outputs.get("aux_outputs", [])):
            criterion.matcher(layer, targets)
    except ValueError as error:
        return str(error)
    return None
