"""What a run of any kind needs first: processes, a device and seeds, the model, and the loaders.

Source: facebookresearch/detr, main.py.
"""

import argparse
import random

import numpy as np
import torch
from pycocotools.coco import COCO
from torch import nn

from detr_fast.data.coco import CocoDetection, build_dataset
from detr_fast.data.lines import LineDetection
from detr_fast.data.loader import EpochLoader, PackedCollate, build_loader
from detr_fast.data.panoptic import CocoPanoptic
from detr_fast.distributed import get_rank, init_distributed_mode, say
from detr_fast.models.build import build_model
from detr_fast.models.segmentation import DETRsegm
from detr_fast.training.config import UsageError, choose_device
from detr_fast.training.engine import PRECISIONS

# The arguments that define the model and how it sees images: a checkpoint brings them along.
MODEL_ARGS = (
    "backbone", "backbone_norm", "backbone_level", "dilation", "position_embedding", "enc_layers", "dec_layers",
    "dim_feedforward", "hidden_dim", "nheads", "num_queries", "pre_norm", "masks", "image_size", "max_size",
    "layer1_num", "LETRpost", "layer2_num", "second_enc_layers", "second_dec_layers", "second_dim_feedforward",
    "second_hidden_dim", "second_nheads", "second_dropout", "second_pre_norm",
)  # fmt: skip


def start(args: argparse.Namespace) -> torch.device:
    """Joins torchrun's processes, if any, chooses the device and seeds the generators, each process differently."""
    asked = args.world_size
    args.device = choose_device(args.device, args.precision)
    init_distributed_mode(args)
    if asked not in (1, args.world_size):
        raise UsageError(
            f"--world_size {asked}: processes are started by torchrun --nproc-per-node {asked} -m detr_fast …"
        )
    if not args.distributed and args.dist_url != "env://":
        raise UsageError(
            f"--dist_url {args.dist_url} is where processes meet that torchrun has started, and there are none: leave "
            "it out, or use torchrun --nproc-per-node N -m detr_fast …"
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
    if args.backbone_weights != "imagenet":
        say(f"--backbone_weights {args.backbone_weights} is not read: the checkpoint has the backbone's weights")
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


def loader_for(dataset: CocoDetection | CocoPanoptic, args: argparse.Namespace, train: bool) -> EpochLoader:
    """The loader of a training or validation set of uint8 images, as the flags say."""
    # A GPU's convolutions want channels-last images, and autocast would cast them: padding writes both at no cost.
    options = {"channels_last": torch.device(args.device).type == "cuda"}
    if args.precision != "fp32":
        options["dtype"] = PRECISIONS[args.precision]
    if isinstance(dataset, LineDetection):
        options |= {"mean": dataset.mean, "std": dataset.std}
    return build_loader(
        dataset,
        args.batch_size,
        train=train,
        num_workers=args.num_workers,
        distributed=args.distributed,
        seed=args.seed,
        group_by_size=None if args.group_by_size else False,
        collate_fn=PackedCollate(**options),
    )
