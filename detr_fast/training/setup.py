"""What a run of any kind needs first: processes, a device and seeds, the model, and the loaders.

Source: facebookresearch/detr, main.py.
"""

import os
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from detr_fast.config import Config, choose_device, known_precision, say_preset, without_auto
from detr_fast.data.loader import EpochLoader, build_loader
from detr_fast.data.packed import PackedCollate
from detr_fast.distributed import get_rank, get_world_size, is_dist_avail_and_initialized, join_processes, say
from detr_fast.errors import UsageError
from detr_fast.models.backbone import BackboneBase
from detr_fast.tasks import Task
from detr_fast.training.step import PRECISIONS, wants_channels_last

# Bytes per pixel that a step keeps for its backward pass with each backbone; see `kept_per_pixel`.
_KEPT = {"resnet18": 260, "resnet34": 310, "resnet50": 550, "resnet101": 755}
# Images per optimiser step to which the original's learning rate belongs: 8 GPUs with 2 each.
_ORIGINAL_BATCH = 16


def start(config: Config, training: bool = False) -> tuple[Config, torch.device]:
    """Joins torchrun's processes, if any, chooses the device and seeds the generators, each process differently.

    Args:
        config: of the run.
        training: leave open, for `chosen_for_gpu`, what depends on a GPU that trains; otherwise it is chosen here.

    Returns:
        The configuration with the device and what else was chosen, and that device.

    Raises:
        UsageError: a device or number of processes that there is not.
        ValueError: see `join_processes`.
    """
    name = choose_device(config.device, known_precision(config.precision))
    processes = join_processes(name, config.dist_url)
    if config.world_size not in (1, processes.world_size):
        raise UsageError(
            f"--world_size {config.world_size}: processes are started by torchrun --nproc-per-node "
            f"{config.world_size} -m detr_fast …"
        )
    if processes.local_rank is None and config.dist_url != "env://":
        raise UsageError(
            f"--dist_url {config.dist_url} is where processes meet that torchrun has started, and there are none: "
            "leave it out, or use torchrun --nproc-per-node N -m detr_fast …"
        )
    if name == "cuda" and processes.local_rank is not None:
        name = f"cuda:{processes.local_rank}"
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    seed = config.seed + get_rank()
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    if config.preset:
        say(say_preset(config))
    if not training or device.type == "cpu":
        config = without_auto(config)
    name_of_device = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    say(f"device: {name_of_device}" + ("" if config.precision == "auto" else f", {config.precision}"))
    return replace(config, device=name), device


def chosen_for_gpu(config: Config, device: torch.device, earlier: Mapping[str, Any]) -> Config:
    """What is left to be chosen ("auto"), for training on the GPU `device`; each choice is said with its flag.

    Args:
        config: of the run.
        device: a GPU.
        earlier: settings of the checkpoint that the run continues, whose precision and batch size stay.
    """
    if config.precision == "auto" and "precision" in earlier:
        config = replace(config, precision=earlier["precision"])
        say(f"precision: {config.precision}, as before (--precision)")
    if config.batch_size is None and "batch_size" in earlier:
        config = replace(config, batch_size=earlier["batch_size"])
        say(f"batch: {config.batch_size} images per process, as before (--batch_size)")
    if config.precision == "auto":
        config = replace(config, precision="bf16" if torch.cuda.is_bf16_supported() else "fp32")
        say(f"precision: {config.precision}, which this GPU computes in (--precision)")
    if config.num_workers is None:
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        config = replace(config, num_workers=workers_for(processes))
        say(f"loader processes: {config.num_workers}, from the cores there are (--num_workers)")
    if config.batch_size is None:
        config = replace(config, batch_size=batch_size_for(config, torch.cuda.mem_get_info(device)[1]))
        total = config.batch_size * config.accumulate_steps * get_world_size()
        say(
            f"batch: {config.batch_size} images per process, as the GPU's memory allows, {total} per optimiser step "
            f"(--batch_size, --accumulate_steps); the learning rate stays {config.lr:g} (--lr), the original has 1e-4 "
            f"with {_ORIGINAL_BATCH} images per step"
        )
    return config


def batch_size_for(config: Config, memory: int) -> int:
    """Images per process on a GPU with `memory` bytes: up to the original's images per optimiser step, to which its
    learning rate belongs, as far as they fit.

    What a step keeps for its backward pass grows with the pixels of the largest padded batch (`kept_per_pixel`). Half
    as much again is for what comes and goes, a fifth of the memory for others, and 2 GB are for weights and the like.
    """
    short = config.image_size or 800
    pixels = short * (config.max_size or short * 5 / 3)
    fits = int((0.8 * memory - 2e9) / (1.5 * kept_per_pixel(config) * pixels))
    wanted = -(-_ORIGINAL_BATCH // (get_world_size() * config.accumulate_steps))
    return max(1, min(fits, wanted))


def kept_per_pixel(config: Config) -> float:
    """About the bytes that a step keeps for its backward pass, per pixel of the batch.

    Counted on tensors without values, in bf16 at 832 x 1344, as what autograd saves; tests/training/test_step.py
    counts again.
    """
    kept = _KEPT.get(config.backbone, max(_KEPT.values()))
    kept *= 1.7 if config.dilation else 1
    kept *= 1 if with_norm(config).backbone_norm == "frozen" else 1.85
    kept += 450 if config.LETRpost else 0
    kept += 2700 if config.masks else 0
    return kept * (1.9 if config.precision == "fp32" else 1)


def workers_for(processes: int) -> int:
    """Loader processes for each of so many training processes on this machine: the cores that it may use, one left to
    each training process, and at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // processes - 1))


def with_norm(config: Config) -> Config:
    """The configuration with the backbone's norm chosen: trained where the backbone starts at random, else frozen."""
    if config.backbone_norm is not None:
        return config
    return replace(config, backbone_norm="batch" if config.backbone_weights == "none" else "frozen")


def build(task: Task, config: Config, own_weights: bool) -> tuple[nn.Module, nn.Module, dict[str, nn.Module]]:
    """Model, criterion and post-processors, the model on the CPU.

    Args:
        task: which builds them.
        config: `backbone_norm` is chosen, see `with_norm`.
        own_weights: the caller loads a checkpoint of the whole model: pretrained backbone weights are not fetched.

    Raises:
        UsageError: the backbone's weights cannot be fetched.
        ValueError: a setting of the parts is wrong.
    """
    if not own_weights or config.backbone_weights == "none":
        try:
            return task.build(config)
        except RuntimeError as error:  # the download of the backbone's weights
            raise UsageError(f"{error} Here: --backbone_weights PATH or --backbone_weights none.") from error
    if config.backbone_weights != "imagenet":
        say(f"--backbone_weights {config.backbone_weights} is not read: the checkpoint has the backbone's weights")
    built = task.build(replace(config, backbone_weights="none"))
    # Which parameters are trained is decided by where the weights once came from.
    for module in built[0].modules():
        if isinstance(module, BackboneBase):
            module.freeze(train_backbone=config.lr_backbone > 0)
    return built


def loader_for(task: Task, dataset: Dataset, config: Config, train: bool) -> EpochLoader:
    """The loader of a training or validation set of uint8 images."""
    config = without_auto(config)
    assert config.batch_size is not None and config.num_workers is not None
    return build_loader(
        dataset,
        config.batch_size,
        train=train,
        num_workers=config.num_workers,
        distributed=is_dist_avail_and_initialized(),
        seed=config.seed,
        group_by_size=None if config.group_by_size else False,
        timeout=config.loader_timeout,
        collate_fn=packed_collate(task, config, train=train),
    )


def size_divisor(config: Config, train: bool) -> int:
    """Of which number of pixels the height and width of a batch are multiples: `config.size_divisor`, if it is given.

    Otherwise 64 where a GPU trains: cuDNN plans every convolution anew for each shape that it has not seen, and there
    are fourteen times fewer shapes then, for 6 % more pixels (`python -m benchmarks.studies.padding`). Elsewhere 1, the
    original's sizes: the mask tells the padding, but a convolution at an image's edge sees it.
    """
    if config.size_divisor is not None:
        return config.size_divisor
    return 64 if train and torch.device(config.device).type == "cuda" else 1


def packed_collate(task: Task, config: Config, train: bool = False) -> PackedCollate:
    """What makes batches of uint8 images: they are normalised, padded and cast where they are used."""
    # Convolutions want channels-last images, and autocast would cast them: padding writes both at no cost.
    precision = known_precision(config.precision)
    dtype = None if precision == "fp32" else PRECISIONS[precision]
    return PackedCollate(
        mean=task.mean,
        std=task.std,
        channels_last=wants_channels_last(torch.device(config.device)),
        dtype=dtype,
        size_divisor=size_divisor(config, train),
    )
