"""The command line's flags: the original's names and defaults, and ours beside them.

Source: facebookresearch/detr, main.py.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from detr_fast.criterion.lines import LABEL_LOSSES
from detr_fast.training.engine import PRECISIONS

DATASETS = ("coco", "coco_panoptic", "lines")
# Flags that only "lines" reads, and those that it does not read, with their defaults.
_LINES_ONLY = {
    "LETRpost": False, "layer1_num": 3, "layer2_num": 2, "layer1_frozen": False, "second_enc_layers": 6,
    "second_dec_layers": 6, "second_dim_feedforward": 2048, "second_hidden_dim": 256, "second_dropout": 0.1,
    "second_nheads": 8, "second_pre_norm": False, "set_cost_line": 5, "line_loss_coef": 5,
    "label_loss_func": "cross_entropy", "label_loss_params": "{}",
}  # fmt: skip
_NO_TRAINING = "nothing is trained"
# Flags that a checkpoint which is only evaluated, or predicted with, leaves without effect.
IDLE_IN_INFERENCE = {
    **dict.fromkeys(
        ("lr", "lr_backbone", "weight_decay", "epochs", "max_steps", "lr_drop", "lr_schedule", "warmup_steps",
         "clip_max_norm", "accumulate_steps", "ema_decay", "augmentation", "train_ann", "train_images", "start_epoch",
         "eval_every", "sample_images", "tensorboard", "layer1_frozen", "remove_difficult"),
        _NO_TRAINING,
    ),
    **dict.fromkeys(("dropout", "second_dropout"), "dropout is for training"),
    **dict.fromkeys(("backbone_weights", "frozen_weights"), "the checkpoint has all weights"),
    "seed": "nothing is drawn at random",
}  # fmt: skip
_NOT_LINES = {"set_cost_bbox": 5, "set_cost_giou": 2, "bbox_loss_coef": 5, "giou_loss_coef": 2, "masks": False}


class UsageError(ValueError):
    """What the user asked for cannot be done as asked; the message says why and is all that needs to be shown."""


@contextmanager
def usage_errors() -> Iterator[None]:
    """While a run is set up, what a part refuses is the user's business: its message becomes a UsageError's."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise UsageError(str(error)) from error


def get_args_parser() -> argparse.ArgumentParser:
    """All flags of training, as the original's function of this name (without ``--help``, to be used as a parent)."""
    parser = argparse.ArgumentParser("DETR training", add_help=False)
    add_optimiser_flags(parser)
    add_model_flags(parser)
    add_loss_flags(parser)
    add_data_flags(parser, train=True)
    add_device_flags(parser)
    add_run_flags(parser)
    return parser


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows every default that says something, unless the help speaks of it itself; numbers are N and X."""

    def _get_help_string(self, action: argparse.Action) -> str:
        silent = action.nargs == 0 or action.default in (None, "", argparse.SUPPRESS)
        silent = silent or "default" in action.help or action.help.startswith("no effect")
        return action.help if silent else f"{action.help} (default %(default)s)"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X"}.get(action.type) or super()._get_default_metavar_for_optional(action)


def add_optimiser_flags(parser: argparse.ArgumentParser) -> None:
    """Learning rates, schedule, length, clipping, accumulation, averaging."""
    group = parser.add_argument_group("optimiser")
    group.add_argument("--lr", default=1e-4, type=float, help="learning rate")
    group.add_argument("--lr_backbone", default=1e-5, type=float, help="learning rate of the backbone; 0 freezes it")
    group.add_argument("--batch_size", default=2, type=int, help="images per process")
    group.add_argument("--weight_decay", default=1e-4, type=float, help="of AdamW")
    group.add_argument("--epochs", default=300, type=int, help="passes over the training images")
    group.add_argument(
        "--max_steps", default=0, type=int, help="stop after so many optimiser steps (default 0: no limit)"
    )
    group.add_argument(
        "--lr_drop",
        default=200,
        type=int,
        help="with the step schedule: epochs after which the rate drops to a tenth; every so many epochs a numbered "
        "checkpoint is kept, too",
    )
    group.add_argument(
        "--lr_schedule",
        default="step",
        choices=("step", "cosine"),
        help="step: the original's drops; cosine: to zero at the end",
    )
    group.add_argument("--warmup_steps", default=0, type=int, help="optimiser steps of linear warm-up")
    group.add_argument("--clip_max_norm", default=0.1, type=float, help="largest norm of the gradients; 0: no clipping")
    group.add_argument("--accumulate_steps", default=1, type=int, help="batches per optimiser step")
    group.add_argument(
        "--ema_decay", default=0.0, type=float, help="keep and evaluate averaged weights, e.g. 0.9997; 0: none"
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """What the model is made of."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--frozen_weights",
        type=str,
        default=None,
        metavar="PATH",
        help="with --masks: a trained detector, which stays as it is while the mask head is trained; with --LETRpost: "
        "a trained first stage, from which the second one starts",
    )
    group.add_argument("--masks", action="store_true", help="a mask for every detection")
    group.add_argument("--backbone", default="resnet50", type=str, help="resnet18, resnet34, resnet50 or resnet101")
    group.add_argument(
        "--backbone_weights",
        default="imagenet",
        metavar="imagenet|none|PATH",
        help="torchvision's ImageNet weights, random ones, or a file",
    )
    group.add_argument(
        "--backbone_norm",
        default=None,
        choices=("frozen", "batch", "group"),
        help="normalisation (default: frozen batch norm with weights, trained batch norm without)",
    )
    group.add_argument(
        "--backbone_level",
        default=None,
        type=int,
        choices=range(4),
        help="the stage that the transformer reads, at stride 4, 8, 16 or 32 (default 3, the last)",
    )
    group.add_argument("--dilation", action="store_true", help="stride 16 instead of 32 in the last stage (DC5)")
    group.add_argument(
        "--position_embedding", default="sine", type=str, choices=("sine", "learned"), help="of the feature map"
    )
    group.add_argument("--enc_layers", default=6, type=int, help="layers of the encoder")
    group.add_argument("--dec_layers", default=6, type=int, help="layers of the decoder")
    group.add_argument("--dim_feedforward", default=2048, type=int, help="hidden features of a layer's two-layer part")
    group.add_argument("--hidden_dim", default=256, type=int, help="features of the transformer")
    group.add_argument("--dropout", default=0.1, type=float, help="in the transformer, while training")
    group.add_argument("--nheads", default=8, type=int, help="attention heads")
    group.add_argument("--num_queries", default=100, type=int, help="the most objects that can be found in an image")
    group.add_argument("--pre_norm", action="store_true", help="layer norm before each part of a layer, not after it")
    group = parser.add_argument_group("model of lines (LETR, --dataset_file lines)")
    group.add_argument("--layer1_num", default=3, type=int, choices=range(4), help="backbone level of the first stage")
    group.add_argument("--LETRpost", action="store_true", help="add the second, fine stage")
    group.add_argument("--layer2_num", default=2, type=int, choices=range(4), help="backbone level of the second stage")
    group.add_argument("--layer1_frozen", action="store_true", help="train the second stage alone")
    for name in ("enc_layers", "dec_layers", "dim_feedforward", "hidden_dim", "nheads", "dropout"):
        default = _LINES_ONLY[f"second_{name}"]
        group.add_argument(
            f"--second_{name}", default=default, type=type(default), help=f"--{name} of the second stage"
        )
    group.add_argument("--second_pre_norm", action="store_true", help="--pre_norm of the second stage")


def add_loss_flags(parser: argparse.ArgumentParser) -> None:
    """Weights of the matching costs and of the losses."""
    group = parser.add_argument_group("loss")
    group.add_argument("--no_aux_loss", dest="aux_loss", action="store_false", help="no loss at the earlier layers")
    group.add_argument("--set_cost_class", default=1, type=float, help="matching cost of the class")
    group.add_argument("--set_cost_bbox", default=5, type=float, help="matching cost of the boxes' L1 distance")
    group.add_argument("--set_cost_giou", default=2, type=float, help="matching cost of the boxes' generalised IoU")
    group.add_argument("--mask_loss_coef", default=1, type=float, help="weight of the masks' focal loss")
    group.add_argument("--dice_loss_coef", default=1, type=float, help="weight of the masks' dice loss")
    group.add_argument("--bbox_loss_coef", default=5, type=float, help="weight of the boxes' L1 loss")
    group.add_argument("--giou_loss_coef", default=2, type=float, help="weight of the boxes' generalised IoU loss")
    group.add_argument("--set_cost_line", default=5, type=float, help="matching cost of the lines' L1 distance")
    group.add_argument("--line_loss_coef", default=5, type=float, help="weight of the lines' L1 loss")
    group.add_argument(
        "--label_loss_func", default="cross_entropy", choices=LABEL_LOSSES, help="classification loss of lines"
    )
    group.add_argument("--label_loss_params", default="{}", help="of lines' focal loss, such as '{\"gamma\": 2.0}'")
    group.add_argument("--eos_coef", default=0.1, type=float, help="relative weight of the no-object class")


def add_data_flags(parser: argparse.ArgumentParser, train: bool) -> None:
    """Where images and annotations are, and at what size they are read."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset_file",
        default="coco",
        choices=DATASETS,
        help="coco: boxes, with --masks also masks; coco_panoptic: things and stuff; lines: line segments (LETR)",
    )
    group.add_argument(
        "--coco_path",
        type=str,
        metavar="DIR",
        help="folder with annotations/instances_{train,val}2017.json (lines: lines_…), train2017/, val2017/",
    )
    group.add_argument(
        "--coco_panoptic_path",
        type=str,
        metavar="DIR",
        help="for coco_panoptic: folder with annotations/panoptic_{train,val}2017.json, panoptic_{train,val}2017/",
    )
    if train:
        group.add_argument(
            "--remove_difficult", action="store_true", help="the original's flag; refused, COCO has no such mark"
        )
        group.add_argument(
            "--augmentation",
            default="detr",
            choices=("detr", "flip"),
            help="detr: flip, random size, random crop, as the original; flip: only that",
        )
        group.add_argument("--train_ann", type=str, metavar="JSON", help="own data: annotations of the training images")
        group.add_argument("--train_images", type=str, metavar="DIR", help="own data: folder of the training images")
    group.add_argument(
        "--no_group_by_size",
        dest="group_by_size",
        action="store_false",
        help="batches in the original's order, instead of images of like size together (more padding)",
    )
    group.add_argument("--val_ann", type=str, metavar="JSON", help="own data: annotations of the validation images")
    group.add_argument("--val_images", type=str, metavar="DIR", help="own data: folder of the validation images")
    add_size_flags(group)
    group.add_argument("--num_workers", default=2, type=int, help="loader processes")


def add_size_flags(parser: argparse.ArgumentParser) -> None:
    """The images' size."""
    parser.add_argument(
        "--image_size",
        "--short_side",
        default=None,
        type=int,
        help="short side of the images in pixels, while training the largest one (default: a checkpoint's own, or 800; "
        "while evaluating lines 1100)",
    )
    parser.add_argument(
        "--max_size",
        default=None,
        type=int,
        help="longest side in pixels (default 1333, in proportion to --image_size)",
    )


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Where and how to compute."""
    group = parser.add_argument_group("device")
    group.add_argument("--device", default="auto", help="auto (a GPU if there is one), cuda, cuda:N or cpu")
    group.add_argument(
        "--precision", default="fp32", choices=tuple(PRECISIONS), help="fp32, or autocast in bf16 or fp16"
    )
    group.add_argument("--compile", action="store_true", help="torch.compile the transformer's layers and the box head")


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """The original's flags about processes, which torchrun starts."""
    parser.add_argument("--world_size", default=1, type=int, help="number of processes, checked against torchrun's")
    parser.add_argument(
        "--dist_url", default="env://", help="where torchrun's processes meet; refused without torchrun"
    )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Where results go, where the run starts from, and how often it tells."""
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="", metavar="DIR", help="where to save; without it nothing is saved")
    group.add_argument("--seed", default=42, type=int, help="of weights, order, augmentation and dropout")
    group.add_argument(
        "--resume",
        default="",
        metavar="PATH|auto",
        help="continue a run from its checkpoint; auto: from output_dir if a checkpoint is there",
    )
    group.add_argument(
        "--weights",
        default="",
        metavar="PATH",
        help="start a new run from a checkpoint's weights; heads that do not fit are replaced",
    )
    group.add_argument("--start_epoch", default=0, type=int, metavar="N", help="number of the first epoch")
    group.add_argument("--eval", action="store_true", help="only evaluate --resume's or --weights' checkpoint")
    group.add_argument("--eval_every", default=1, type=int, help="epochs between evaluations; the last is evaluated")
    group.add_argument("--print_freq", default=10, type=int, help="batches between progress lines")
    group.add_argument("--sample_images", default=4, type=int, help="pictures per evaluation in output_dir/samples")
    group.add_argument("--tensorboard", action="store_true", help="write event files to output_dir/tensorboard")
    add_process_flags(group)


def normalise_options(argv: Sequence[str]) -> list[str]:
    """Option names with ``_`` for ``-``: ``--batch-size=2`` and ``--batch_size=2`` are the same. Values stay."""
    return [_normalise(argument) for argument in argv]


def _normalise(argument: str) -> str:
    if not argument.startswith("--") or len(argument) == 2:
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def check_args(args: argparse.Namespace) -> None:
    """Refuses what cannot be honoured, before anything is read or built.

    Raises:
        UsageError: says which flag, what it was and what is expected.
    """
    _check_lines(args)
    _check_segmentation(args)
    positive = (
        "batch_size", "epochs", "lr_drop", "accumulate_steps", "eval_every", "print_freq", "num_queries", "enc_layers",
        "dec_layers", "hidden_dim", "nheads", "dim_feedforward", "image_size", "max_size", "second_enc_layers",
        "second_dec_layers", "second_nheads", "second_dim_feedforward",
    )  # fmt: skip
    for name in positive:
        _require(args, name, lambda value: value >= 1, "at least 1")
    not_negative = ("lr", "lr_backbone", "weight_decay", "max_steps", "warmup_steps", "clip_max_norm", "num_workers",
                    "start_epoch", "sample_images", "set_cost_class", "set_cost_bbox", "set_cost_giou",
                    "mask_loss_coef", "dice_loss_coef", "bbox_loss_coef", "giou_loss_coef", "eos_coef",
                    "set_cost_line", "line_loss_coef")  # fmt: skip
    for name in not_negative:
        _require(args, name, lambda value: 0 <= value < math.inf, "finite and not negative")
    _require(args, "seed", lambda value: 0 <= value < 2**32, "in 0..2**32 - 1")
    for name in ("dropout", "second_dropout", "ema_decay"):
        _require(args, name, lambda value: 0 <= value < 1, "at least 0 and below 1")
    if args.hidden_dim % args.nheads or args.hidden_dim % 2:
        raise UsageError(
            f"--hidden_dim must be even and divisible by --nheads, got {args.hidden_dim} and {args.nheads}"
        )


def check_train_args(args: argparse.Namespace) -> None:
    """As `check_args`, and what concerns training alone."""
    check_args(args)
    check_image_size(args)
    if args.remove_difficult:
        raise UsageError("--remove_difficult cannot be honoured: COCO annotations have no 'difficult' mark")
    for name, default in (("tensorboard", False), ("sample_images", 4)):
        if not args.output_dir and getattr(args, name) != default:
            raise UsageError(f"--{name} writes to --output_dir, which is empty")
    if args.resume == "auto" and not args.output_dir:
        raise UsageError("--resume auto looks in --output_dir, which is empty")
    if args.eval and not (args.resume or args.weights):
        raise UsageError("--eval needs a checkpoint: --resume PATH or --weights PATH")
    if args.start_epoch >= args.epochs:
        raise UsageError(f"--start_epoch {args.start_epoch} leaves nothing to train of --epochs {args.epochs}")


def check_image_size(args: argparse.Namespace) -> None:
    """Refuses images without a single whole cell of the feature map. The model's flags are known by now.

    Raises:
        UsageError: `args.image_size` is below the stride of the backbone's last level in use.
    """
    level = args.backbone_level
    if args.dataset_file == "lines":
        level = args.layer1_num
    stride = 16 if level in (None, 3) and args.dilation else 4 * 2 ** (3 if level is None else level)
    if args.image_size is not None and args.image_size < stride:
        raise UsageError(
            f"--image_size must be at least {stride}, one cell of the feature map at the backbone's stride, got "
            f"{args.image_size}; for smaller images read an earlier stage (--backbone_level)"
        )


def make_output_dir(path: str) -> Path:
    """The folder `path`, made if need be.

    Raises:
        UsageError: it cannot be made, for instance because there is a file of that name.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "there is a file of that name" if Path(path).is_file() else error.strerror
        raise UsageError(f"--output_dir {path}: {reason}; expected a folder, or the name of a new one") from error
    return Path(path)


def choose_device(name: str, precision: str = "fp32") -> str:
    """The device for `name`: "auto" is "cuda" where there is a GPU and "cpu" elsewhere.

    Raises:
        UsageError: there is no such device, or it cannot compute in `precision`.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device must be auto, cuda, cuda:N or cpu, got {name!r}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise UsageError(f"--device {name}: torch sees no GPU on this machine; use --device cpu or auto")
        if device.index is not None and device.index >= count:
            raise UsageError(f"--device {name}: there are only {count} GPUs")
    elif device.type != "cpu":
        raise UsageError(f"--device must be auto, cuda, cuda:N or cpu, got {name!r}")
    if precision == "fp16" and device.type == "cpu":
        raise UsageError("--precision fp16 needs a GPU; on the CPU use bf16 or fp32")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UsageError(
            f"--precision bf16: {torch.cuda.get_device_name(device)} does not support it; use fp16 or fp32"
        )
    return name


def parse_with_given(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, set[str]]:
    """Parses `argv`, and tells which flags were really given (by their names in the namespace)."""
    args = parser.parse_args(argv)
    # argparse leaves alone what a namespace already has: what still holds the mark was not given.
    mark = object()
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), mark)))
    return args, {name for name, value in vars(given).items() if value is not mark}


def _check_lines(args: argparse.Namespace) -> None:
    is_lines = args.dataset_file == "lines"
    for name, default in (_NOT_LINES if is_lines else _LINES_ONLY).items():
        if getattr(args, name, default) != default:
            raise UsageError(f"--{name} does nothing with --dataset_file {args.dataset_file}")
    if not is_lines:
        return
    if not args.LETRpost:
        for name in ("layer2_num", "layer1_frozen", *(name for name in _LINES_ONLY if name.startswith("second_"))):
            if getattr(args, name) != _LINES_ONLY[name]:
                raise UsageError(f"--{name} is about the second stage; it needs --LETRpost")
    elif args.second_hidden_dim != args.hidden_dim or args.hidden_dim % args.second_nheads:
        raise UsageError(
            f"--second_hidden_dim must be --hidden_dim and divisible by --second_nheads, got {args.second_hidden_dim}, "
            f"{args.hidden_dim} and {args.second_nheads}"
        )


def _check_segmentation(args: argparse.Namespace) -> None:
    if not args.masks and not getattr(args, "LETRpost", False):
        for name, default in (("frozen_weights", None), ("mask_loss_coef", 1), ("dice_loss_coef", 1)):
            if getattr(args, name, default) != default:
                raise UsageError(f"--{name} is about masks; it needs --masks")
    if args.frozen_weights is not None and getattr(args, "weights", ""):
        raise UsageError("--frozen_weights and --weights both say where the detector comes from; give one of them")
    if args.dataset_file not in DATASETS:
        raise UsageError(f"--dataset_file must be one of {', '.join(DATASETS)}, got {args.dataset_file!r}")
    panoptic = args.dataset_file == "coco_panoptic"
    if panoptic and not (args.coco_path and args.coco_panoptic_path):
        raise UsageError("--dataset_file coco_panoptic needs --coco_path (images) and --coco_panoptic_path (segments)")
    if not panoptic and args.coco_panoptic_path:
        raise UsageError("--coco_panoptic_path is only read with --dataset_file coco_panoptic")


def _require(args: argparse.Namespace, name: str, holds: Callable[[float], bool], expected: str) -> None:
    value = getattr(args, name, None)
    if value is not None and not holds(value):
        raise UsageError(f"--{name} must be {expected}, got {value}")
