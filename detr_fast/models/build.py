"""Model, criterion and post-processing from command-line arguments.

Source: facebookresearch/detr, `build` in models/detr.py and its parts in backbone.py, transformer.py and
position_encoding.py.
"""

from argparse import Namespace

from torch import nn

from detr_fast.layers import PositionEmbeddingLearned, PositionEmbeddingSine
from detr_fast.models.backbone import Backbone, Joiner
from detr_fast.models.detr import DETR
from detr_fast.models.hub import LAST_THING
from detr_fast.models.segmentation import DETRsegm
from detr_fast.models.transformer import Transformer

_NUM_CLASSES = {"coco": 91, "coco_panoptic": 250}
_NUM_CLASSES_OTHER = 20


def build_position_encoding(args: Namespace) -> nn.Module:
    """The embedding `args.position_embedding` ("sine" or "learned") of `args.hidden_dim` features."""
    if args.hidden_dim % 2:
        raise ValueError(f"hidden_dim is {args.hidden_dim}; expected an even number, half for y and half for x")
    num_pos_feats = args.hidden_dim // 2
    if args.position_embedding in ("sine", "v2"):
        return PositionEmbeddingSine(num_pos_feats, normalize=True)
    if args.position_embedding in ("learned", "v3"):
        return PositionEmbeddingLearned(num_pos_feats)
    raise ValueError(f"position_embedding is {args.position_embedding!r}; expected 'sine' or 'learned'")


def build_backbone(args: Namespace, return_interm_layers: bool | None = None) -> Joiner:
    """Backbone and position embedding.

    Args:
        args: `backbone`, `dilation`, `lr_backbone` (0 freezes pretrained weights), and those of
            `build_position_encoding`; optional `backbone_weights` ("imagenet", "none" or a path), `backbone_norm` and
            `backbone_level`, see `Backbone`.
        return_interm_layers: return all levels; None: where `args.masks` says so, for the mask head.
    """
    position_embedding = build_position_encoding(args)
    weights = getattr(args, "backbone_weights", "imagenet")
    backbone = Backbone(
        args.backbone,
        args.lr_backbone > 0,
        bool(getattr(args, "masks", False)) if return_interm_layers is None else return_interm_layers,
        args.dilation,
        weights=None if weights == "none" else weights,
        norm=getattr(args, "backbone_norm", None),
        level=getattr(args, "backbone_level", None),
    )
    return Joiner(backbone, position_embedding)


def build_transformer(args: Namespace, kind: type[Transformer] = Transformer, prefix: str = "") -> Transformer:
    """The transformer.

    Args:
        args: `hidden_dim`, `dropout`, `nheads`, `dim_feedforward`, `enc_layers`, `dec_layers`, `pre_norm`.
        kind: the class to build.
        prefix: stands before those names, such as "second_".
    """
    values = {
        name: getattr(args, prefix + name)
        for name in ("hidden_dim", "dropout", "nheads", "dim_feedforward", "enc_layers", "dec_layers", "pre_norm")
    }
    return kind(
        d_model=values["hidden_dim"],
        dropout=values["dropout"],
        nhead=values["nheads"],
        dim_feedforward=values["dim_feedforward"],
        num_encoder_layers=values["enc_layers"],
        num_decoder_layers=values["dec_layers"],
        normalize_before=values["pre_norm"],
        return_intermediate_dec=True,
    )


def build_model(args: Namespace) -> tuple[DETR | DETRsegm, nn.Module, dict[str, nn.Module]]:
    """Everything that training and evaluation need.

    Args:
        args: the original's argument names: those of `build_backbone` and `build_transformer`, `num_queries`,
            `aux_loss`, `set_cost_class`, `set_cost_bbox`, `set_cost_giou`, `bbox_loss_coef`, `giou_loss_coef`,
            `eos_coef`, `device`, `dataset_file`; with `masks` also `mask_loss_coef`, `dice_loss_coef` and, optionally,
            `frozen_weights` (anything but None trains the mask head alone; the caller loads the file into
            ``model.detr``). Optional: `num_classes` (highest category id + 1), without it 91 for the dataset "coco",
            250 for "coco_panoptic", 20 for any other; `thing_classes` (the labels of things, for "coco_panoptic"),
            without it 0 to 90. With the dataset "lines" it is LETR, see `detr_fast.models.letr.build`.

    Returns:
        The model (on the CPU), the criterion (on `args.device`) and the post-processors: "bbox", with `masks` "segm",
        and for the dataset "coco_panoptic" with `masks` "panoptic".

    Raises:
        ValueError: `frozen_weights` without `masks`, or an argument of the parts is wrong.
    """
    if getattr(args, "dataset_file", None) == "lines":
        from detr_fast.models import letr  # which builds on this module

        return letr.build(args)
    from detr_fast.criterion import HungarianMatcher, PostProcess, PostProcessPanoptic, PostProcessSegm, SetCriterion

    masks, frozen = getattr(args, "masks", False), getattr(args, "frozen_weights", None) is not None
    if frozen and not masks:
        raise ValueError("frozen_weights trains the mask head alone; expected masks to be set, too")
    num_classes = getattr(args, "num_classes", None)
    if num_classes is None:
        num_classes = _NUM_CLASSES.get(args.dataset_file, _NUM_CLASSES_OTHER)

    model = DETR(
        build_backbone(args),
        build_transformer(args),
        num_classes=num_classes,
        num_queries=args.num_queries,
        aux_loss=args.aux_loss,
    )
    if masks:
        model = DETRsegm(model, freeze_detr=frozen)
    matcher = HungarianMatcher(
        cost_class=args.set_cost_class, cost_bbox=args.set_cost_bbox, cost_giou=args.set_cost_giou
    )
    weight_dict = {"loss_ce": 1, "loss_bbox": args.bbox_loss_coef, "loss_giou": args.giou_loss_coef}
    losses = ["labels", "boxes", "cardinality"]
    postprocessors = {"bbox": PostProcess()}
    if masks:
        weight_dict.update(loss_mask=args.mask_loss_coef, loss_dice=args.dice_loss_coef)
        losses.append("masks")
        postprocessors["segm"] = PostProcessSegm()
        if args.dataset_file == "coco_panoptic":
            things = getattr(args, "thing_classes", None)
            things = range(LAST_THING + 1) if things is None else things
            postprocessors["panoptic"] = PostProcessPanoptic({i: i in things for i in range(num_classes)})
    if args.aux_loss:
        last = dict(weight_dict)
        for i in range(args.dec_layers - 1):
            weight_dict.update({f"{name}_{i}": weight for name, weight in last.items()})
    criterion = SetCriterion(
        num_classes, matcher=matcher, weight_dict=weight_dict, eos_coef=args.eos_coef, losses=losses
    )
    criterion.to(args.device)
    return model, criterion, postprocessors
