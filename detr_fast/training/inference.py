"""A checkpoint used as it is: loaded to detect with, and evaluated.

Source: facebookresearch/detr, main.py (``--eval``).
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from detr_fast.data.categories import Categories
from detr_fast.data.coco import build_dataset, read_annotations
from detr_fast.distributed import is_main_process, say
from detr_fast.evaluation import LineEvaluator
from detr_fast.training.checkpoint import DETECTOR, has_masks, load_model, read_checkpoint, save_checkpoint
from detr_fast.training.config import (
    IDLE_IN_INFERENCE,
    UsageError,
    check_image_size,
    make_output_dir,
    usage_errors,
)
from detr_fast.training.engine import evaluate
from detr_fast.training.regions import compile_regions
from detr_fast.training.setup import MODEL_ARGS, box_annotations, build, loader_for, start

# Of the flags that a checkpoint brings along, those that may be given all the same: the weights fit anyway. Whether
# there are masks is seen from the weights.
_FREE = ("image_size", "max_size", "masks")


def load_for_inference(
    args: argparse.Namespace, given: set[str], path: str
) -> tuple[nn.Module, nn.Module, dict[str, nn.Module], Categories | None]:
    """A checkpoint's model in evaluation mode on `args.device`, described by the checkpoint itself.

    Args:
        args: parsed flags; those that define the model are overwritten by the checkpoint's, as are the images' size and
            the losses' weights, unless they were given. What has no effect is said.
        given: names of the flags that the user gave.
        path: a checkpoint of ours, of the original, or bare weights of the original. Averaged weights (EMA) are taken
            where there are some.

    Returns:
        Model, criterion, post-processors, and the categories; None where the checkpoint does not say.

    Raises:
        UsageError: a given flag describes another model, or images too small for this one.
        ValueError, FileNotFoundError: it cannot be read, or does not fit.
    """
    checkpoint = read_checkpoint(path)
    theirs = checkpoint.get("args", {})
    _check_given(args, given, path, checkpoint)
    for name in (*MODEL_ARGS, "aux_loss", "set_cost_class", "set_cost_bbox", "set_cost_giou", "bbox_loss_coef",
                 "giou_loss_coef", "mask_loss_coef", "dice_loss_coef", "eos_coef", "thing_classes",
                 "set_cost_line", "line_loss_coef", "label_loss_func", "label_loss_params"):  # fmt: skip
        if name in theirs and name not in given:
            setattr(args, name, theirs[name])
    if _detects_lines(checkpoint["model"]):
        args.dataset_file = "lines"
    if "image_size" in given:
        check_image_size(args)
    state = checkpoint["model"]
    if "ema" in checkpoint:
        say(f"{path}: using its averaged weights (EMA)")
        state = checkpoint["ema"]["values"]
    if args.masks and "masks" in given and not has_masks(state):
        raise ValueError(f"--masks: {path} has no mask head")
    args.masks, args.frozen_weights = has_masks(state), None
    classes = f"{DETECTOR if args.masks else ''}class_embed.bias"
    if classes not in state:
        raise ValueError(f"{path} has no {classes}; expected the weights of a DETR")
    args.num_classes = len(state[classes]) - 1
    if args.backbone_norm is None:
        args.backbone_norm = "frozen"
    args.backbone_weights, args.lr_backbone, args.dropout = "none", 0.0, 0.0
    model, criterion, postprocessors = build(args, own_weights=True)
    load_model(model, state, path)
    model.to(args.device).eval()
    if args.compile:
        compile_regions(model, say)
    categories = Categories.from_dict(checkpoint["categories"]) if "categories" in checkpoint else None
    return model, criterion, postprocessors, categories


def _detects_lines(state: Mapping[str, Tensor]) -> bool:
    return any("lines_embed." in name for name in state)


def _check_given(args: argparse.Namespace, given: set[str], path: str, checkpoint: Mapping) -> None:
    """Says which of the given flags do nothing, and refuses those that describe another model than the checkpoint's."""
    theirs = checkpoint.get("args", {})
    for name in sorted(given & set(IDLE_IN_INFERENCE)):
        say(f"--{name} has no effect here: {IDLE_IN_INFERENCE[name]}")
    other = [
        f"--{name} {getattr(args, name)}, it was trained with {theirs[name]}"
        for name in MODEL_ARGS
        if name in given and name in theirs and name not in _FREE and theirs[name] != getattr(args, name)
    ]
    lines = _detects_lines(checkpoint["model"])
    if "dataset_file" in given and lines != (args.dataset_file == "lines"):
        other.append(f"--dataset_file {args.dataset_file}, it detects {'lines' if lines else 'boxes'}")
    if other:
        raise UsageError(
            f"{path} is another model: {'; '.join(other)}. The checkpoint describes itself: leave that out"
        )


def evaluate_checkpoint(args: argparse.Namespace, given: set[str], path: str) -> dict:
    """Evaluates a checkpoint on the validation data and prints COCO's numbers and those of each class.

    Masks are evaluated where the model has some, and with ``args.dataset_file`` "coco_panoptic" panoptic pictures.

    Args:
        args: parsed flags of ``detr-fast eval`` or ``detr-fast train --eval``.
        given: names of the flags that the user gave.
        path: the checkpoint.

    Returns:
        The losses and what `evaluate` adds to them.
    """
    with usage_errors():
        device = start(args)
        output_dir = make_output_dir(args.output_dir) if args.output_dir else None
        model, criterion, postprocessors, categories = load_for_inference(args, given, path)
        if categories is None and args.val_ann and args.dataset_file != "lines":
            # Without word of the contrary labels are category ids, as in the original.
            categories = Categories.from_coco(read_annotations(args.val_ann)["categories"])
        dataset = build_dataset("val", args, categories=categories, uint8=True)
        if dataset.categories.num_classes > args.num_classes:
            raise UsageError(
                f"{path} has {args.num_classes} classes, the annotations need {dataset.categories.num_classes}: "
                f"category ids up to {dataset.categories.ids[-1]}"
            )
        if "panoptic" in postprocessors:
            postprocessors["panoptic"].is_thing_map = {
                label: label in dataset.thing_classes for label in range(args.num_classes)
            }
        annotations = box_annotations(dataset, args)
        loader = loader_for(dataset, args, train=False)
    stats, evaluator = evaluate(
        model,
        criterion,
        postprocessors,
        loader,
        annotations,
        device,
        args.output_dir,
        categories=dataset.categories,
        precision=args.precision,
        print_freq=args.print_freq,
    )
    if is_main_process():
        for iou_type, title in (("bbox", "category"), ("segm", "category (masks)")):
            if iou_type not in getattr(evaluator, "iou_types", ()):
                continue
            rows = evaluator.per_class(iou_type)
            width = max(len(title), *(len(name) for name in rows))
            print(f"{title:{width}}     AP   AP50")
            for name, row in rows.items():
                if not math.isnan(row["AP"]):
                    print(f"{name:{width}}  {row['AP']:.3f}  {row['AP50']:.3f}")
        if output_dir is not None:
            save_evaluation(evaluator, output_dir / "eval.pth")
    return stats


def save_evaluation(evaluator, path: Path) -> None:
    """Writes pycocotools' precision and recall arrays as tensors, readable with ``weights_only=True``.

    Keys: "precision" [IoU thresholds, recalls, classes, areas, detections], "scores" likewise, "recall" without the
    second axis, "counts", and "stats", the twelve numbers; -1 where there is no object.
    Of lines there are only `LineEvaluator.stats`.
    """
    if isinstance(evaluator, LineEvaluator):
        save_checkpoint({"stats": dict(evaluator.stats)}, path)
        return
    curves = evaluator.coco_eval["bbox"].eval
    state = {name: torch.from_numpy(curves[name]) for name in ("precision", "recall", "scores")}
    state["counts"] = list(curves["counts"])
    state["stats"] = evaluator.coco_eval["bbox"].stats.tolist()
    save_checkpoint(state, path)
