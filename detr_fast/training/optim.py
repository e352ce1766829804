"""The optimiser and its schedule.

Source: facebookresearch/detr, main.py.
"""

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR

from detr_fast.config import OptimisationConfig


def build_optimizer(model: nn.Module, config: OptimisationConfig) -> torch.optim.AdamW:
    """AdamW with two groups: everything else at `config.lr`, the backbone at `config.lr_backbone`.

    It is the fused one: a step takes one launch per group and can be skipped by the device (see `train_one_epoch`).

    Args:
        model: only parameters that require gradients are taken; a name with "backbone" belongs to the backbone.
        config: `lr`, `lr_backbone`, `weight_decay`.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in trained if "backbone" not in name]},
        {"params": [parameter for name, parameter in trained if "backbone" in name], "lr": config.lr_backbone},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping) -> None:
    """Loads a state dict, also one of an optimiser that was not fused (the original's).

    Raises:
        ValueError: the groups or their sizes differ, as when other parameters are trained.
    """
    # torch takes these settings from the state dict and moves the step counters accordingly.
    groups = [dict(group, fused=True, foreach=None) for group in state["param_groups"]]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    # The fused step wants averages laid out as their parameters, which the machine that saved them may not have had.
    for parameter, averages in optimizer.state.items():
        for name, value in averages.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                averages[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def build_scheduler(optimizer: torch.optim.Optimizer, config: OptimisationConfig, steps_per_epoch: int) -> LRScheduler:
    """The schedule, to be stepped as `steps_every` says.

    Args:
        optimizer: whose learning rates it scales.
        config: `lr_schedule` "step" (a tenth after every `lr_drop` epochs, the original's) or "cosine" (to zero at the
            end), `warmup_steps` (linear from zero), `epochs`, `lr_drop`, `max_steps` (None or 0: no limit).
        steps_per_epoch: optimiser steps in an epoch.
    """
    if steps_every(config) == "epoch":
        return StepLR(optimizer, config.lr_drop)
    total = config.epochs * steps_per_epoch
    if config.max_steps:
        total = min(total, config.max_steps)

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.lr_schedule == "step":
            return warmup * 0.1 ** (step // (config.lr_drop * steps_per_epoch))
        done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
        return warmup * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))

    return LambdaLR(optimizer, factor)


def steps_every(config: OptimisationConfig) -> str:
    """ "epoch" for the original's schedule, "step" for one with warm-up or cosine."""
    return "epoch" if config.lr_schedule == "step" and not config.warmup_steps else "step"
