"""What a run of any kind needs first: processes, a device and seeds, the model, and the loaders.

Source: facebookresearch/detr, main.py.
"""

import random
from dataclasses import replace

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from detr_fast.config import Config, choose_device
from detr_fast.data.loader import EpochLoader, build_loader
from detr_fast.data.packed import PackedCollate
from detr_fast.distributed import get_rank, is_dist_avail_and_initialized, join_processes, say
from detr_fast.errors import UsageError
from detr_fast.models.backbone import BackboneBase
from detr_fast.tasks import Task
from detr_fast.training.engine import PRECISIONS


def start(config: Config) -> tuple[Config, torch.device]:
    """Joins torchrun's processes, if any, chooses the device and seeds the generators, each process differently.

    Returns:
        The configuration with the device that was chosen, and that device.

    Raises:
        UsageError: a device or number of processes that there is not.
        ValueError: see `join_processes`.
    """
    name = choose_device(config.device, config.precision)
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
    say(f"device: {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'cpu'}, {config.precision}")
    return replace(config, device=name), device


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
    # A GPU's convolutions want channels-last images, and autocast would cast them: padding writes both at no cost.
    dtype = None if config.precision == "fp32" else PRECISIONS[config.precision]
    return PackedCollate(
        mean=task.mean,
        std=task.std,
        channels_last=torch.device(config.device).type == "cuda",
        dtype=dtype,
        size_divisor=size_divisor(config, train),
    )
