"""The configuration of a run: every setting once, as a field of a frozen dataclass and as a flag of the command line.

`Config` has all settings in one flat object, under the names of the original's flags. Its parts, `ModelConfig`,
`LossConfig`, `OptimisationConfig`, `DataConfig` and `RunConfig`, are its base classes: a function that takes one of
them says what it reads, and takes a whole `Config` as well. The values are checked on construction, in Python as on the
command line, and an error names the flag. Nothing is changed later; `dataclasses.replace` makes a new, checked object.

    config = Config(coco_path="data/coco", output_dir="outputs/r50", lr=2e-4)
    config = Config.from_arguments(["--coco_path", "data/coco", "--lr", "2e-4"])

A preset is a set of values under a name (`PRESETS`), for the settings that were not given:

    config = Config(coco_path="data/coco", preset="original", batch_size=4)

A checkpoint keeps `Config.to_dict` under "args". Torch is not imported here, so that ``--help`` answers at
once.

Source of names and defaults: facebookresearch/detr, main.py; mlpc-ucsd/LETR, src/args.py.
"""

import argparse
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from detr_fast.errors import UsageError
from detr_fast.flags import Flag, Parser, Part, add_flags, flag, normalise_options, parse_with_given

PRECISIONS = ("fp32", "bf16", "fp16")
# What `--preset NAME` sets, except where a flag was given: by name, values of settings.
PRESETS: dict[str, dict[str, Any]] = {
    # facebookresearch/detr, main.py, as far as our defaults differ.
    "original": {
        "precision": "fp32", "batch_size": 2, "num_workers": 2, "size_divisor": 1, "group_by_size": False,
        "compile": False, "graphs": False,
    },
    # From trained weights, with new classes. AdamW moves a weight by about the learning rate in each step, however
    # small the gradient: half the original's rates, and its tenth for the backbone, keep more of what was learned. The
    # first steps are small while new classes know nothing; the rate falls to zero in 50 epochs, with no drop at 200.
    "finetune": {
        "lr": 5e-5, "lr_backbone": 5e-6, "epochs": 50, "lr_schedule": "cosine", "warmup_steps": 50,
    },
}  # fmt: skip
NO_OUTPUT = "none"  # as --output_dir: nothing is saved
LABEL_LOSSES = ("cross_entropy", "focal_loss")
EVAL_BACKENDS = ("auto", "pycocotools", "faster_coco_eval", "hotcoco")
_NO_TRAINING = "nothing is trained"
_OLD_EMBEDDINGS = {"v2": "sine", "v3": "learned"}  # further names that the original takes

# What a value must be, and how that is said.
_POSITIVE = (lambda value: value >= 1, "at least 1")
_NOT_NEGATIVE = (lambda value: 0 <= value < math.inf, "finite and not negative")
_FRACTION = (lambda value: 0 <= value < 1, "at least 0 and below 1")
_SEED = (lambda value: 0 <= value < 2**32, "in 0..2**32 - 1")


def _second(default: Any, check=_POSITIVE, **options: Any) -> Any:
    """A field of LETR's second stage; the help is completed with the first stage's flag."""
    return flag(default, "--{first} of the second stage", check=check, group=_LINES_GROUP, **options)


_LINES_GROUP = "model of lines (LETR, --dataset_file lines)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimisationConfig(Part):
    """Learning rates, schedule, length, clipping, accumulation, averaging."""

    heading = "optimiser"

    lr: float = flag(1e-4, "learning rate", check=_NOT_NEGATIVE, idle=_NO_TRAINING, basic=True)
    lr_backbone: float = flag(
        1e-5, "learning rate of the backbone; 0 freezes it", check=_NOT_NEGATIVE, idle=_NO_TRAINING
    )
    batch_size: int | None = flag(
        None,
        "images per process; auto (the default): while training on a GPU from its memory, otherwise 2",
        check=_POSITIVE,
        metavar="N|auto",
        auto=2,
        basic=True,
    )
    weight_decay: float = flag(1e-4, "of AdamW", check=_NOT_NEGATIVE, idle=_NO_TRAINING)
    epochs: int = flag(300, "passes over the training images", check=_POSITIVE, idle=_NO_TRAINING, basic=True)
    max_steps: int = flag(
        0, "stop after so many optimiser steps (default 0: no limit)", check=_NOT_NEGATIVE, idle=_NO_TRAINING
    )
    lr_drop: int = flag(
        200,
        "with the step schedule: epochs after which the rate drops to a tenth; every so many epochs a numbered "
        "checkpoint is kept, too",
        check=_POSITIVE,
        idle=_NO_TRAINING,
    )
    lr_schedule: str = flag(
        "step",
        "step: the original's drops; cosine: to zero at the end",
        choices=("step", "cosine"),
        idle=_NO_TRAINING,
    )
    warmup_steps: int = flag(0, "optimiser steps of linear warm-up", check=_NOT_NEGATIVE, idle=_NO_TRAINING)
    clip_max_norm: float = flag(
        0.1, "largest norm of the gradients; 0: no clipping", check=_NOT_NEGATIVE, idle=_NO_TRAINING
    )
    accumulate_steps: int = flag(1, "batches per optimiser step", check=_POSITIVE, idle=_NO_TRAINING)
    ema_decay: float = flag(
        0.0, "keep and evaluate averaged weights, e.g. 0.9997; 0: none", check=_FRACTION, idle=_NO_TRAINING
    )
    early_stop: int = flag(
        0,
        "stop after so many evaluations without a better score; 0: train to the end",
        check=_NOT_NEGATIVE,
        idle=_NO_TRAINING,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(Part):
    """What the model is made of.

    `num_classes` and `thing_classes` have no flags: they come from the annotations or a checkpoint. `num_classes` is
    the highest category id + 1 (without no-object); `thing_classes` are the labels of things in panoptic data.
    """

    heading = "model"
    describes_model = True

    frozen_weights: str | None = flag(
        None,
        "with --masks: a trained detector, which stays as it is while the mask head is trained; with --LETRpost: "
        "a trained first stage, from which the second one starts",
        metavar="PATH",
        idle="the checkpoint has all weights",
    )
    masks: bool = flag(False, "a mask for every detection", basic=True)
    backbone: str = flag("resnet50", "resnet18, resnet34, resnet50 or resnet101", basic=True)
    backbone_weights: str = flag(
        "imagenet",
        "torchvision's ImageNet weights, random ones, or a file",
        metavar="imagenet|none|PATH",
        idle="the checkpoint has all weights",
    )
    backbone_norm: str | None = flag(
        None,
        "normalisation (default: frozen batch norm with weights, trained batch norm without)",
        choices=("frozen", "batch", "group"),
    )
    backbone_level: int | None = flag(
        None,
        "the stage that the transformer reads, at stride 4, 8, 16 or 32 (default 3, the last)",
        choices=range(4),
    )
    dilation: bool = flag(False, "stride 16 instead of 32 in the last stage (DC5)")
    position_embedding: str = flag("sine", "of the feature map", choices=("sine", "learned"))
    enc_layers: int = flag(6, "layers of the encoder", check=_POSITIVE)
    dec_layers: int = flag(6, "layers of the decoder", check=_POSITIVE)
    dim_feedforward: int = flag(2048, "hidden features of a layer's two-layer part", check=_POSITIVE)
    hidden_dim: int = flag(256, "features of the transformer", check=_POSITIVE)
    dropout: float = flag(0.1, "in the transformer, while training", check=_FRACTION, idle="dropout is for training")
    nheads: int = flag(8, "attention heads", check=_POSITIVE)
    num_queries: int = flag(100, "the most objects that can be found in an image", check=_POSITIVE)
    pre_norm: bool = flag(False, "layer norm before each part of a layer, not after it")

    layer1_num: int = flag(3, "backbone level of the first stage", choices=range(4), group=_LINES_GROUP)
    LETRpost: bool = flag(False, "add the second, fine stage", group=_LINES_GROUP)
    layer2_num: int = flag(2, "backbone level of the second stage", choices=range(4), group=_LINES_GROUP)
    layer1_frozen: bool = flag(False, "train the second stage alone", group=_LINES_GROUP, idle=_NO_TRAINING)
    second_enc_layers: int = _second(6)
    second_dec_layers: int = _second(6)
    second_dim_feedforward: int = _second(2048)
    second_hidden_dim: int = _second(256)
    second_nheads: int = _second(8)
    second_dropout: float = _second(0.1, check=_FRACTION, idle="dropout is for training")
    second_pre_norm: bool = _second(False, check=None)

    num_classes: int | None = None
    thing_classes: Sequence[int] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_dim % self.nheads or self.hidden_dim % 2:
            raise UsageError(
                f"--hidden_dim is {self.hidden_dim}; expected an even number that is divisible by --nheads, here "
                f"{self.nheads}"
            )
        if self.num_classes is not None and self.num_classes < 1:
            raise UsageError(f"num_classes must be at least 1, got {self.num_classes}")
        if self.thing_classes is not None:
            object.__setattr__(self, "thing_classes", tuple(int(label) for label in self.thing_classes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig(Part):
    """Weights of the matching costs and of the losses."""

    heading = "loss"
    describes_model = True

    aux_loss: bool = flag(True, "no loss at the earlier layers", names=("--no_aux_loss",))
    set_cost_class: float = flag(1, "matching cost of the class", check=_NOT_NEGATIVE)
    set_cost_bbox: float = flag(5, "matching cost of the boxes' L1 distance", check=_NOT_NEGATIVE)
    set_cost_giou: float = flag(2, "matching cost of the boxes' generalised IoU", check=_NOT_NEGATIVE)
    mask_loss_coef: float = flag(1, "weight of the masks' focal loss", check=_NOT_NEGATIVE)
    dice_loss_coef: float = flag(1, "weight of the masks' dice loss", check=_NOT_NEGATIVE)
    bbox_loss_coef: float = flag(5, "weight of the boxes' L1 loss", check=_NOT_NEGATIVE)
    giou_loss_coef: float = flag(2, "weight of the boxes' generalised IoU loss", check=_NOT_NEGATIVE)
    set_cost_line: float = flag(5, "matching cost of the lines' L1 distance", check=_NOT_NEGATIVE)
    line_loss_coef: float = flag(5, "weight of the lines' L1 loss", check=_NOT_NEGATIVE)
    label_loss_func: str = flag("cross_entropy", "classification loss of lines", choices=LABEL_LOSSES)
    label_loss_params: str = flag("{}", "of lines' focal loss, such as '{\"gamma\": 2.0}'")
    eos_coef: float = flag(0.1, "relative weight of the no-object class", check=_NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Part):
    """Where images and annotations are, and at what size they are read."""

    heading = "data"

    dataset_file: str = flag(
        "coco",
        "coco: boxes, with --masks also masks; coco_panoptic: things and stuff; lines: line segments (LETR)",
        metavar="TASK",
    )
    data: str | None = flag(
        None,
        "folder of labelled images: COCO, Roboflow's COCO, YOLO (or its data.yaml) or Pascal VOC, which is found out",
        metavar="DIR",
        basic=True,
    )
    coco_path: str | None = flag(
        None,
        "folder with annotations/instances_{train,val}2017.json (lines: lines_…), train2017/, val2017/",
        metavar="DIR",
        basic=True,
    )
    coco_panoptic_path: str | None = flag(
        None,
        "for coco_panoptic: folder with annotations/panoptic_{train,val}2017.json, panoptic_{train,val}2017/",
        metavar="DIR",
    )
    remove_difficult: bool = flag(False, "the original's flag; refused, COCO has no such mark", idle=_NO_TRAINING)
    augmentation: str = flag(
        "detr",
        "detr: flip, random size, random crop, as the original; flip: only that",
        choices=("detr", "flip"),
        idle=_NO_TRAINING,
    )
    train_ann: str | None = flag(
        None, "own data: annotations of the training images", metavar="JSON", idle=_NO_TRAINING
    )
    train_images: str | None = flag(None, "own data: folder of the training images", metavar="DIR", idle=_NO_TRAINING)
    group_by_size: bool = flag(
        True,
        "batches in the original's order, instead of images of like size together (more padding)",
        names=("--no_group_by_size",),
    )
    val_ann: str | None = flag(None, "own data: annotations of the validation images", metavar="JSON")
    val_images: str | None = flag(None, "own data: folder of the validation images", metavar="DIR")
    allow_outside: bool = flag(False, "take images whose file_name leads out of their folder (../, absolute paths)")
    image_size: int | None = flag(
        None,
        "short side of the images in pixels, while training the largest one (default: a checkpoint's own, or 800; "
        "while evaluating lines 1100)",
        names=("--image_size", "--short_side"),
        check=_POSITIVE,
        basic=True,
    )
    max_size: int | None = flag(
        None, "longest side in pixels (default 1333, in proportion to --image_size)", check=_POSITIVE
    )
    size_divisor: int | None = flag(
        None,
        "pad batches to a multiple of so many pixels, so that fewer distinct shapes occur (default: 64 while training "
        "on a GPU, otherwise 1, the original's exact sizes)",
        check=_POSITIVE,
    )
    num_workers: int | None = flag(
        None,
        "loader processes; auto (the default): while training on a GPU from the cores, otherwise 2",
        check=_NOT_NEGATIVE,
        metavar="N|auto",
        auto=2,
    )
    cache_dir: str | None = flag(
        None,
        "where the columns of a large json are kept for all processes to share (default: beside the json, or "
        "~/.cache/detr_fast where nothing can be written there)",
        metavar="DIR",
    )
    loader_timeout: float = flag(
        600,
        "seconds after which a loader process that gives no batch ends the run, with the names of its images; 0: never",
        check=_NOT_NEGATIVE,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.remove_difficult:
            raise UsageError("--remove_difficult cannot be honoured: COCO annotations have no 'difficult' mark")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Part):
    """Where and how to compute, where results go, where the run starts from, and how often it tells."""

    heading = "run"

    preset: str = flag(
        "",
        "values for the flags that are not given; original: those of facebookresearch/detr, for the same training; "
        "finetune: learning rates and length for data of one's own, from --weights",
        choices=("", *PRESETS),
        metavar="|".join(PRESETS),
        idle=_NO_TRAINING,
        basic=True,
    )

    device: str = flag("auto", "auto (a GPU if there is one), cuda, cuda:N or cpu", group="device", basic=True)
    precision: str = flag(
        "auto",
        "fp32, or autocast in bf16 or fp16; auto: bf16 while training on a GPU that computes in it, otherwise fp32",
        choices=("auto", *PRECISIONS),
        group="device",
    )
    compile: bool = flag(False, "torch.compile the transformer's layers and the box head", group="device")
    graphs: bool = flag(
        False,
        "replay CUDA graphs of the model's passes, one for each kind of batch; needs one process and no accumulation",
        group="device",
        idle=_NO_TRAINING,
    )

    output_dir: str = flag(
        "",
        "where to save; without it outputs/ gets a folder named by the time; none: nothing is saved",
        metavar="DIR",
        basic=True,
    )
    seed: int = flag(42, "of weights, order, augmentation and dropout", check=_SEED, idle="nothing is drawn at random")
    resume: str = flag(
        "",
        "continue a run from its checkpoint; auto: from output_dir if a checkpoint is there",
        metavar="PATH|auto",
        basic=True,
    )
    checkpoint_every: str = flag(
        "30m",
        "also save within an epoch: 500, every so many optimiser steps, or 10m, minutes; 0: at its end only",
        metavar="STEPS|MINUTESm",
        idle=_NO_TRAINING,
    )
    weights: str = flag(
        "",
        "start a new run from a checkpoint's weights; heads that do not fit are replaced",
        metavar="PATH",
        basic=True,
    )
    start_epoch: int = flag(0, "number of the first epoch", metavar="N", check=_NOT_NEGATIVE, idle=_NO_TRAINING)
    eval: bool = flag(False, "only evaluate --resume's or --weights' checkpoint")
    eval_every: int = flag(1, "epochs between evaluations; the last is evaluated", check=_POSITIVE, idle=_NO_TRAINING)
    eval_backend: str = flag(
        "auto",
        "who computes COCO's numbers (default auto: the fastest that is installed)",
        choices=EVAL_BACKENDS,
    )
    print_freq: int = flag(10, "batches between progress lines", check=_POSITIVE)
    sample_images: int = flag(
        4, "pictures per evaluation in output_dir/samples", check=_NOT_NEGATIVE, idle=_NO_TRAINING
    )
    probe_memory: str = flag(
        "auto",
        "compute the largest batch once before training starts, to see whether it fits; auto: on a GPU",
        choices=("auto", "on", "off"),
        idle=_NO_TRAINING,
    )
    tensorboard: bool = flag(False, "write event files to output_dir/tensorboard", idle=_NO_TRAINING)
    log_to: str = flag(
        "",
        "each epoch's numbers also to Weights & Biases or MLflow",
        choices=("", "wandb", "mlflow"),
        metavar="wandb|mlflow",
        idle=_NO_TRAINING,
    )
    world_size: int = flag(1, "number of processes, checked against torchrun's", check=_POSITIVE)
    dist_url: str = flag("env://", "where torchrun's processes meet; refused without torchrun")

    def __post_init__(self):
        super().__post_init__()
        checkpoint_interval(self.checkpoint_every)


_Self = TypeVar("_Self", bound="Config")


def _takes_presets(kind: type[_Self]) -> type[_Self]:
    """Has `kind(preset=…, …)` take the preset's values for the settings that are not among the arguments."""
    plain = kind.__init__

    @functools.wraps(plain)
    def init(self, **given: Any) -> None:
        preset = PRESETS.get(given.get("preset") or "", {})  # the check of the values refuses another name
        plain(self, **(preset | given))

    kind.__init__ = init  # type: ignore[method-assign]
    return kind


@_takes_presets
@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig, DataConfig, LossConfig, ModelConfig, OptimisationConfig):
    """All settings of a run, each under the name of its flag; see the parts, its base classes."""

    @classmethod
    def from_arguments(cls: type[_Self], arguments: Sequence[str] = ()) -> _Self:
        """From the flags of ``detr-fast train``, as on the command line.

        Raises:
            UsageError: a flag that there is not, or a value that it does not take.
        """
        args, given = parse_with_given(get_args_parser(Parser), normalise_options(arguments))
        return cls.from_mapping({name: getattr(args, name) for name in given})

    @classmethod
    def from_mapping(cls: type[_Self], values: Mapping[str, Any]) -> _Self:
        """From values by name, such as those a checkpoint keeps. What is missing gets its preset's value or its
        default; names that are no setting of ours, such as those of a checkpoint of the original, are passed over."""
        known = {name: values[name] for name in _FIELDS if name in values}
        if known.get("position_embedding") in _OLD_EMBEDDINGS:
            known["position_embedding"] = _OLD_EMBEDDINGS[known["position_embedding"]]
        return cls(**known)

    @classmethod
    def of(cls: type[_Self], args: Any) -> _Self:
        """A `Config` as it is; anything else by its attributes: the argparse namespace of code that was written for
        the original, or an object with some of its names."""
        return args if isinstance(args, cls) else cls.from_mapping(vars(args))

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and None by name, for a checkpoint that loads with ``weights_only=True``."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


_FIELDS: dict[str, dataclasses.Field] = {field.name: field for field in dataclasses.fields(Config)}
_FLAGS: dict[str, Flag] = {name: field.metadata["flag"] for name, field in _FIELDS.items() if field.metadata}

# Settings that define the model and how it sees images: a checkpoint brings them along.
MODEL_SETTINGS = (
    "backbone", "backbone_norm", "backbone_level", "dilation", "position_embedding", "enc_layers", "dec_layers",
    "dim_feedforward", "hidden_dim", "nheads", "num_queries", "pre_norm", "masks", "image_size", "max_size",
    "layer1_num", "LETRpost", "layer2_num", "second_enc_layers", "second_dec_layers", "second_dim_feedforward",
    "second_hidden_dim", "second_nheads", "second_dropout", "second_pre_norm",
)  # fmt: skip
# And those that a checkpoint brings along for its losses to be computed as in training.
LOSS_SETTINGS = tuple(field.name for field in dataclasses.fields(LossConfig))
# Flags that a checkpoint which is only evaluated, or predicted with, leaves without effect, and why.
IDLE_IN_INFERENCE = {name: settings.idle for name, settings in _FLAGS.items() if settings.idle}


def default_of(name: str) -> Any:
    """The default of a setting."""
    return _FIELDS[name].default


def say_preset(config: Config) -> str:
    """A line that says what the preset has set, and what was given in its place; empty without a preset."""
    values = PRESETS.get(config.preset, {})
    taken = [f"--{name} {value}" for name, value in values.items() if getattr(config, name) == value]
    given = [f"--{name} {getattr(config, name)}" for name, value in values.items() if getattr(config, name) != value]
    if not values:
        return ""
    text = f"--preset {config.preset}: {', '.join(taken) or 'every flag was given'}"
    return f"{text}; given: {', '.join(given)}" if given and taken else text


def without_auto(config: Config) -> Config:
    """The configuration with what is still to be chosen as it is without a GPU: `precision` fp32, two images, two
    workers, the original's."""
    chosen = {name: settings.auto for name, settings in _FLAGS.items() if settings.auto is not None}
    chosen = {name: value for name, value in chosen.items() if getattr(config, name) is None}
    return replace(config, precision=known_precision(config.precision), **chosen)


def known_precision(precision: str) -> str:
    """`precision`, or fp32 for "auto"."""
    return "fp32" if precision == "auto" else precision


def check_for_training(config: Config) -> None:
    """Refuses what a training run cannot honour, before anything is read or built.

    Raises:
        UsageError: says which flag, what it was and what is expected.
    """
    for name in ("tensorboard", "sample_images"):
        if config.output_dir == NO_OUTPUT and getattr(config, name) not in (default_of(name), 0):
            raise UsageError(f"--{name} writes to --output_dir, which is none")
    if config.resume == "auto" and config.output_dir in ("", NO_OUTPUT):
        raise UsageError("--resume auto looks in --output_dir: give the folder of the run that is to go on")
    if config.preset == "finetune" and not (config.weights or config.resume or config.frozen_weights):
        raise UsageError("--preset finetune is for trained weights: give --weights, for instance detr_resnet50")
    if config.start_epoch >= config.epochs:
        raise UsageError(f"--start_epoch {config.start_epoch} leaves nothing to train of --epochs {config.epochs}")


def checkpoint_interval(text: str) -> tuple[int, float]:
    """What ``--checkpoint_every`` says: (steps, 0) or (0, seconds), both 0 for never.

    Raises:
        UsageError: it says neither.
    """
    number, is_minutes = text.removesuffix("m"), text.endswith("m")
    try:
        value = float(number) if is_minutes else int(number or 0)
    except ValueError:
        value = -1
    if not 0 <= value < math.inf:
        raise UsageError(f"--checkpoint_every must be steps, such as 500, or minutes, such as 10m; got {text!r}")
    return (0, 60 * value) if is_minutes else (int(value), 0.0)


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


def with_output_dir(config: Config) -> Config:
    """The configuration with its `output_dir` made; "none" becomes the empty name: nothing is saved.

    Raises:
        UsageError: see `make_output_dir`.
    """
    if config.output_dir == NO_OUTPUT:
        return replace(config, output_dir="")
    if config.output_dir:
        make_output_dir(config.output_dir)
    return config


def choose_device(name: str, precision: str = "fp32") -> str:
    """The device for `name`: "auto" is "cuda" where there is a GPU and "cpu" elsewhere.

    Raises:
        UsageError: there is no such device, or it cannot compute in `precision`.
    """
    import torch

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


@contextmanager
def usage_errors() -> Iterator[None]:
    """While a run is set up, what a part refuses is the user's business: its message becomes a UsageError's."""
    try:
        yield
    except UsageError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise UsageError(str(error)) from error


def get_args_parser(kind: type[argparse.ArgumentParser] = argparse.ArgumentParser) -> argparse.ArgumentParser:
    """All flags of training, as the original's function of this name (without ``--help``, to be used as a parent)."""
    parser = kind("DETR training", add_help=False, allow_abbrev=False)
    for part in (OptimisationConfig, ModelConfig, LossConfig, DataConfig, RunConfig):
        add_flags(parser, part)
    return parser


def flag_names(message: str) -> str:
    """A message with the settings as flags, "--coco_path" for "coco_path"; one-word settings and paths stay."""
    names = "|".join(name for name in _FLAGS if "_" in name)
    return re.sub(rf"(?<![\w./\\'\"-])({names})(?![\w/\\'\"=-]|\.\w)", r"--\1", message)
