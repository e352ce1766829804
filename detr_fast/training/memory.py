"""The largest batch is tried before training starts: a run that does not fit into memory ends at once."""

import numpy as np
import torch

from detr_fast.data.grouping import SizeGroupedBatchSampler, SizePlanner, can_plan, group_by_size
from detr_fast.data.loader import EpochLoader
from detr_fast.data.prefetch import Prefetcher
from detr_fast.training.checkpoint import rng_state, set_rng_state
from detr_fast.training.step import TrainingStep, outputs_of
from detr_fast.training.step_errors import described, step_errors

_LOOKED_AT = 4096  # images; as many as are grouped at a time


def probe_memory(step: TrainingStep, loader: EpochLoader, epoch: int) -> str:
    """Computes the largest batch forward and backward, and leaves weights, statistics and generators as they were.

    Of 4096 images, evenly spread over the data set, those batches are looked at that the epoch could have; the largest,
    padded, is loaded and computed, with as much memory set aside as the optimiser will need.

    Args:
        step: whose model is not wrapped yet; its AdamW's two averages may not exist yet.
        loader: of uint8 images, see `build_loader`.
        epoch: whose augmentation is drawn.

    Returns:
        What to tell the user.

    Raises:
        UsageError: it does not fit. ImageReadError: one of its images cannot be read.
    """
    if not can_plan(loader.dataset.dataset):
        return "--probe_memory: the data set does not tell its images' sizes beforehand; no batch is tried"
    model, optimizer, device = step.model, step.optimizer, step.device
    generators = rng_state(device)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    keys = _largest_batch(loader, epoch)
    batch = loader.collate_fn([loader.dataset[key] for key in keys])
    (samples, targets) = next(iter(Prefetcher([batch], device)))
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    absent = [p for p in parameters if not optimizer.state.get(p)]
    model.train()
    step.criterion.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with step_errors(samples, "the largest batch,"):
            reserved = [torch.empty_like(p) for p in absent for _ in range(2)]
            with step.autocast():
                outputs = outputs_of(model, samples)
            try:
                loss = step.losses(outputs, targets).total
            except ValueError:  # the matcher refuses NaN; the first step of training will say where it comes from
                return "--probe_memory: the largest batch has no loss; only its forward pass was tried"
            loss.backward()
            del reserved
    finally:
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        set_rng_state(generators, device)
    used = f", {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB" if device.type == "cuda" else ""
    return f"the largest batch fits: {described(samples)}{used}"


def _largest_batch(loader: EpochLoader, epoch: int) -> list[tuple[int, int]]:
    """The keys (epoch, index) of its images."""
    dataset, sampler = loader.dataset, loader.epoch_sampler.sampler
    batch_size = sampler.batch_size
    count = min(len(dataset), _LOOKED_AT) // batch_size * batch_size
    indices = np.linspace(0, len(dataset) - 1, count).astype(int)
    sizes = np.array(SizePlanner(dataset.dataset, dataset.seed)(epoch, indices.tolist()))
    if isinstance(sampler, SizeGroupedBatchSampler):
        chosen = group_by_size(sizes, batch_size)[-1]
    elif batch_size == 1:
        chosen = [sizes.prod(axis=1).argmax()]
    else:  # the highest and the widest may meet
        extremes = sizes.argmax(axis=0).tolist()
        others = [i for i in np.argsort(-sizes.prod(axis=1)).tolist() if i not in extremes]
        pairs = sorted(set(extremes), key=lambda i: -sizes[i].prod())
        chosen = [*pairs, *others][:batch_size]
    return [(epoch, int(indices[i])) for i in chosen]
