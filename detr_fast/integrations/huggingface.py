"""Weights between this package, which has the original's names, and Hugging Face's folders, both ways.

A folder holds `config.json`, `model.safetensors`, `preprocessor_config.json` and a model card, `README.md`, so that
transformers' pipelines serve it. Neither direction imports transformers; reading and writing need safetensors, which
the extra `hf` brings.

Source of the names: transformers, models/detr and conversion_mapping.py; facebookresearch/detr, models/.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detr_fast.config import MODEL_SETTINGS, Config
from detr_fast.data.categories import Categories
from detr_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD, RandomResize, make_coco_transforms
from detr_fast.distributed import say
from detr_fast.inference.loading import settings_from_shapes
from detr_fast.models.weights import DETECTOR, has_masks, load_file, load_model
from detr_fast.tasks import task_of_weights
from detr_fast.training.checkpoint import read_checkpoint, save_checkpoint

# Beginnings of names: the original's, and those in a folder's file. transformers 5 calls some of them otherwise in
# memory, see `_NEWER`, but still writes and reads these.
_BEGINNINGS = {
    "backbone.0.body.": "model.backbone.conv_encoder.model.",
    "backbone.1.row_embed.": "model.position_embedding.row_embeddings.",
    "backbone.1.col_embed.": "model.position_embedding.column_embeddings.",
    "input_proj.": "model.input_projection.",
    "query_embed.": "model.query_position_embeddings.",
    "transformer.decoder.norm.": "model.decoder.layernorm.",
    "class_embed.": "class_labels_classifier.",
    "bbox_embed.": "bbox_predictor.",
}
# The parts of a layer. `in_proj` is cut into its three.
_PARTS = {
    "encoder": {
        "self_attn": "self_attn",
        "linear1": "fc1",
        "linear2": "fc2",
        "norm1": "self_attn_layer_norm",
        "norm2": "final_layer_norm",
    },
    "decoder": {
        "self_attn": "self_attn",
        "multihead_attn": "encoder_attn",
        "linear1": "fc1",
        "linear2": "fc2",
        "norm1": "self_attn_layer_norm",
        "norm2": "encoder_attn_layer_norm",
        "norm3": "final_layer_norm",
    },
}
_THIRDS = ("q_proj", "k_proj", "v_proj")
# What transformers 5 calls in memory, and what that is in a file.
_NEWER = (
    (r"(^|\.)model\.backbone\.model\.", r"\1model.backbone.conv_encoder.model."),
    (r"(^|\.)model\.backbone\.position_embedding\.", r"\1model.position_embedding."),  # transformers 4
    (r"\.o_proj\.", ".out_proj."),
    (r"\.mlp\.(fc[12])\.", r".\1."),
    (r"^bbox_attention\.([qk])_proj\.", r"bbox_attention.\1_linear."),
    (r"^mask_head\.conv([12])\.conv\.", r"mask_head.lay\1."),
    (r"^mask_head\.conv([12])\.norm\.", r"mask_head.gn\1."),
    (r"^mask_head\.output_conv\.", "mask_head.out_lay."),
    *(
        (rf"^mask_head\.fpn_stages\.{i}\.{theirs}\.", f"mask_head.{ours}.")
        for i in range(3)
        for theirs, ours in (
            ("fpn_adapter", f"adapter{i + 1}"),
            (r"refine\.conv", f"lay{i + 3}"),
            (r"refine\.norm", f"gn{i + 3}"),
        )
    ),
)
_MASK_HEAD = ("bbox_attention.", "mask_head.")

_COCO_CLASSES, _COCO_PANOPTIC_CLASSES = 91, 250
_NO_NAME = "N/A"  # what the published folders call labels that belong to no category
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names that Hugging Face's files have, which every version of transformers reads.

    Args:
        state: of a `DETR` or a `DETRsegm`, under the original's names.

    Returns:
        The same values; the attentions' `in_proj` cut into query, key and value.

    Raises:
        ValueError: a name has no counterpart; the message says which.
    """
    masks, out, unknown = has_masks(state), {}, []
    for name, value in state.items():
        if masks and name.startswith(_MASK_HEAD):
            out[name] = value
            continue
        theirs = _their_names(name.removeprefix(DETECTOR))
        if not theirs or masks != name.startswith(DETECTOR):
            unknown.append(name)
            continue
        for their, part in zip(theirs, value.chunk(len(theirs)), strict=True):
            # Separate memory: safetensors refuses tensors that share it.
            out[f"{DETECTOR if masks else ''}{their}"] = part.clone(memory_format=torch.contiguous_format)
    _refuse_unknown(unknown, "Hugging Face's DETR")
    return out


def from_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`to_huggingface` backwards; takes the names of a file and those of transformers 5 in memory.

    Raises:
        ValueError: a name has no counterpart, or a query, key or value projection lacks the others.
    """
    masks, out, unknown = has_masks(state), {}, []
    thirds: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        for pattern, replacement in _NEWER:
            name = re.sub(pattern, replacement, name)
        if masks and name.startswith(_MASK_HEAD):
            out[name] = value
            continue
        our = _our_name(name.removeprefix(DETECTOR))
        if our is None or masks != name.startswith(DETECTOR):
            unknown.append(name)
            continue
        our, third = our
        our = f"{DETECTOR if masks else ''}{our}"
        if third is None:
            out[our] = value
        else:
            # Entered now, so that the order of the names stays.
            thirds.setdefault(our, {})[third] = out[our] = value
    _refuse_unknown(unknown, "the original")
    for our, parts in thirds.items():
        if set(parts) != set(_THIRDS):
            raise ValueError(f"{our} needs {', '.join(_THIRDS)}; there is only {', '.join(parts)}")
        out[our] = torch.cat([parts[third] for third in _THIRDS])
    return out


def _their_names(name: str) -> tuple[str, ...]:
    """Of the whole tensor, or of its three parts; empty: there is none."""
    for ours, theirs in _BEGINNINGS.items():
        if name.startswith(ours):
            return (theirs + name.removeprefix(ours),)
    found = re.fullmatch(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.(\w+)\.(.+)", name)
    if not found or found[3] not in _PARTS[found[1]]:
        return ()
    side, layer, part, rest = found.groups()
    beginning = f"model.{side}.layers.{layer}.{_PARTS[side][part]}."
    if rest.startswith("in_proj_"):
        return tuple(f"{beginning}{third}.{rest.removeprefix('in_proj_')}" for third in _THIRDS)
    return (beginning + rest,)


def _our_name(name: str) -> tuple[str, str | None] | None:
    """Our name, and which third of that tensor it is, if it is one; None: there is none."""
    for ours, theirs in _BEGINNINGS.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs), None
    found = re.fullmatch(r"model\.(encoder|decoder)\.layers\.(\d+)\.(\w+)\.(.+)", name)
    if not found:
        return None
    side, layer, part, rest = found.groups()
    parts = {theirs: ours for ours, theirs in _PARTS[side].items()}
    if part not in parts:
        return None
    beginning = f"transformer.{side}.layers.{layer}.{parts[part]}."
    third, _, kind = rest.partition(".")
    return (f"{beginning}in_proj_{kind}", third) if third in _THIRDS else (beginning + rest, None)


def _refuse_unknown(names: list[str], where: str) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"{', '.join(names[:3])}{more} have no counterpart in {where}")


def convert(source: str, destination: str, *, dilation: bool | None = None, nheads: int | None = None) -> None:
    """Writes a checkpoint as a Hugging Face folder, or such a folder as a checkpoint; which, the source decides.

    Args:
        source: a checkpoint of ours or of the original (a file or an https address), or a folder.
        destination: the folder, which must be new or empty; or the checkpoint's file, which must be new.
        dilation: whether the last stage is dilated (DC5), which the weights do not show.
        nheads: attention heads, which the weights do not show. Both are for checkpoints that do not say: those of
            ours do, and folders do. None: no, and 8.

    Raises:
        ValueError: the source cannot be read, or there is no counterpart for what the model is; `dilation` or `nheads`
            contradict the source.
        FileNotFoundError, FileExistsError: the source is missing, the destination is not.
        ImportError: safetensors is absent.
    """
    if Path(source).is_dir():
        _to_checkpoint(Path(source), Path(destination), dilation, nheads)
    else:
        _to_folder(source, Path(destination), dilation, nheads)


def _to_folder(source: str, folder: Path, dilation: bool | None, nheads: int | None) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists; expected a new or empty folder for Hugging Face's files")
    checkpoint = read_checkpoint(source)
    state, theirs = checkpoint["model"], dict(checkpoint.get("args", {}))
    if "ema" in checkpoint:
        say(f"{source}: using its averaged weights (EMA)")
        state = checkpoint["ema"]["values"]
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    try:
        weights = to_huggingface(state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    config = _config_of(state, theirs, {"dilation": dilation, "nheads": nheads}, source)
    categories = Categories.from_dict(checkpoint["categories"]) if "categories" in checkpoint else None
    save = _safetensors().save_file
    folder.mkdir(parents=True, exist_ok=True)
    save(weights, folder / _WEIGHT_FILES[0], metadata={"format": "pt"})
    described = _describe(config, categories)
    _write_json(folder / "config.json", described)
    _write_json(folder / "preprocessor_config.json", _preprocessing(config))
    (folder / "README.md").write_text(_card(config, described, folder.name), encoding="utf-8")
    say(f"{source}: {_words(config)}; {len(weights)} tensors written to {folder}")


def _to_checkpoint(folder: Path, file: Path, dilation: bool | None, nheads: int | None) -> None:
    if file.exists():
        raise FileExistsError(f"{file} exists; expected a new file for the checkpoint")
    if dilation is not None or nheads is not None:
        raise ValueError(f"{folder} says itself whether it is dilated and how many heads it has; leave that out")
    described = _read_json(folder / "config.json")
    processor = _read_json(folder / "preprocessor_config.json", {})
    state = from_huggingface(_read_weights(folder))
    config = _config_of(state, _settings(described, processor, folder), {}, str(folder))
    checkpoint: dict[str, Any] = {"model": state, "args": config.to_dict()}
    categories = _categories(described)
    if categories is not None:
        checkpoint["categories"] = categories.to_dict()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(checkpoint, file)
    say(f"{folder}: {_words(config)}; {len(state)} tensors written to {file}")


def _config_of(state: Mapping[str, Tensor], theirs: Mapping, given: Mapping[str, Any], source: str) -> Config:
    """The model's settings: from the weights where they show them, else the checkpoint's, else those given.

    The model is built and takes the weights, so that nothing is written that does not fit.
    """
    try:
        task = task_of_weights(state, None, theirs.get("dataset_file"))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    for name, value in given.items():
        if value is not None and name in theirs and theirs[name] != value:
            raise ValueError(f"--{name} {value}: {source} was trained with {theirs[name]}; leave that out")
    known = {name: theirs[name] for name in (*MODEL_SETTINGS, "dropout", "thing_classes") if name in theirs}
    known |= {name: value for name, value in given.items() if value is not None}
    known |= task.settings_of(state)
    known |= _sizes(state, source) | {"backbone_weights": "none", "frozen_weights": None, "device": "cpu"}
    config = Config.from_mapping(known)
    model = task.build(config)[0]
    load_model(model, state, source)
    return config


def _sizes(state: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """The settings that names and shapes of the weights show."""
    shown = settings_from_shapes(state)
    if "backbone" not in shown:
        raise ValueError(f"{source}: the weights are not of a DETR on one of torchvision's ResNets")
    if "backbone_norm" in shown:
        raise ValueError(f"{source}: the backbone has group norm, Hugging Face's DETR has batch norm alone")
    return {"backbone_norm": "frozen", "backbone_level": None, **shown}


def _settings(described: Mapping, processor: Mapping, folder: Path) -> dict[str, Any]:
    """The settings that a folder's `config.json` and `preprocessor_config.json` name."""
    if described.get("model_type") != "detr":
        raise ValueError(f"{folder}: model_type is {described.get('model_type')!r}, expected 'detr'")
    backbone, options = (described.get(f"backbone_{name}") or {} for name in ("config", "kwargs"))
    timm = backbone.get("model_type") == "timm_backbone" if backbone else described.get("use_timm_backbone", True)
    if not timm:
        raise ValueError(f"{folder}: its backbone is not timm's; expected one like the published folders' (main)")
    heads, feed_forward = (
        {described.get(f"{side}_{name}", default) for side in ("encoder", "decoder")}
        for name, default in (("attention_heads", 8), ("ffn_dim", 2048))
    )
    if len(heads) > 1 or len(feed_forward) > 1 or described.get("activation_function", "relu") != "relu":
        raise ValueError(f"{folder}: encoder and decoder must be alike, with ReLU; the original's are")
    size = processor.get("size", {})
    if isinstance(size, int):  # as the first versions wrote it
        size = {"shortest_edge": size, "longest_edge": processor.get("max_size")}
    return {
        "nheads": heads.pop(),
        "dilation": bool(described.get("dilation"))
        or 16 in (backbone.get("output_stride"), options.get("output_stride")),
        "dropout": float(described.get("dropout", 0.1)),
        "image_size": size.get("shortest_edge"),
        "max_size": size.get("longest_edge"),
        "thing_classes": described.get("detr_fast", {}).get("thing_classes"),
    }


def _categories(described: Mapping) -> Categories | None:
    """The classes of a folder; None where it names none."""
    ours = described.get("detr_fast", {}).get("categories")
    if ours is not None:
        return Categories.from_dict(ours)
    names = {int(label): name for label, name in described.get("id2label", {}).items()}
    named = {label: names[label] for label in sorted(names) if names[label] not in (_NO_NAME, f"LABEL_{label}")}
    return Categories(tuple(named), tuple(named.values())) if named else None


def _describe(config: Config, categories: Categories | None) -> dict[str, Any]:
    """The content of `config.json`."""
    count = int(config.num_classes or 0)
    names = categories.label_names if categories is not None else _coco_names(count)
    labels = {label: names.get(label, _NO_NAME) for label in range(count)}
    described = {
        "architectures": ["DetrForSegmentation" if config.masks else "DetrForObjectDetection"],
        "model_type": "detr",
        "torch_dtype": "float32",
        "d_model": config.hidden_dim,
        "num_queries": config.num_queries,
        "position_embedding_type": config.position_embedding,
        "activation_function": "relu",
        # Where the original drops out; transformers' defaults leave two of the three out.
        "dropout": config.dropout,
        "attention_dropout": config.dropout,
        "activation_dropout": config.dropout,
        # With it, transformers feeds each decoder layer the normalised output of the one before, unlike the original.
        "auxiliary_loss": False,
        "dilation": config.dilation,
        "id2label": {str(label): name for label, name in labels.items()},
        "label2id": {name: label for label, name in labels.items()},
    }
    for side, layers in (("encoder", config.enc_layers), ("decoder", config.dec_layers)):
        described[f"{side}_layers"] = layers
        described[f"{side}_attention_heads"] = config.nheads
        described[f"{side}_ffn_dim"] = config.dim_feedforward
    if config.backbone_level is None:
        # As the published folders have it, which transformers 4 and 5 read.
        described |= {"use_timm_backbone": True, "use_pretrained_backbone": False, "backbone": config.backbone}
    else:
        described["backbone_config"] = {
            "model_type": "timm_backbone",
            "backbone": config.backbone,
            "features_only": True,
            "use_pretrained_backbone": False,
            "num_channels": 3,
            "out_indices": list(range(1, config.backbone_level + 2)),
        }
    extra: dict[str, Any] = {}
    if categories is not None:
        extra["categories"] = categories.to_dict()
    if config.thing_classes is not None:
        extra["thing_classes"] = list(config.thing_classes)
    # What there is no place for in transformers' own keys, for the way back.
    return described | ({"detr_fast": extra} if extra else {})


def _preprocessing(config: Config) -> dict[str, Any]:
    """The content of `preprocessor_config.json`: what validation and prediction do here."""
    resize = _resize(config)
    return {
        "image_processor_type": "DetrImageProcessor",
        "format": "coco_panoptic" if config.masks else "coco_detection",
        "do_resize": True,
        "size": {"shortest_edge": resize.sizes[0], "longest_edge": resize.max_size},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "do_pad": True,
    }


def _resize(config: Config) -> RandomResize:
    transforms = make_coco_transforms("val", scales=config.image_size, max_size=config.max_size).transforms
    return next(step for step in transforms if isinstance(step, RandomResize))


def _coco_names(count: int) -> dict[int, str]:
    """The published checkpoints name no classes; theirs are COCO's. Of stuff torchvision has no names."""
    if count not in (_COCO_CLASSES, _COCO_PANOPTIC_CLASSES):
        return {label: f"LABEL_{label}" for label in range(count)}
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    stuff = {label: f"LABEL_{label}" for label in range(_COCO_CLASSES, count)}
    return {label: name for label, name in enumerate(names) if name not in ("__background__", _NO_NAME)} | stuff


def _card(config: Config, described: Mapping, name: str) -> str:
    """The content of `README.md`."""
    pipeline = "image-segmentation" if config.masks else "object-detection"
    size = _preprocessing(config)["size"]
    names = [name for name in described["id2label"].values() if name != _NO_NAME]
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return f"""---
library_name: transformers
pipeline_tag: {pipeline}
tags:
- detr
- {pipeline}
---

# {name}

DETR ({_words(config)}), {config.enc_layers} encoder and {config.dec_layers} decoder layers, \
{config.num_queries} queries, converted from a checkpoint with the original's names.

Images: short side {size["shortest_edge"]}, long side at most {size["longest_edge"]} pixels.

Classes: {shown}.

```python
from transformers import pipeline

detect = pipeline("{pipeline}", model="PATH_OR_NAME_OF_THIS_FOLDER")
print(detect("image.jpg"))
```
"""


def _words(config: Config) -> str:
    """What the weights do not show is said: a wrong guess would go unnoticed."""
    level = 3 if config.backbone_level is None else config.backbone_level
    stride = 2 ** (level + 2) // (2 if config.dilation else 1)
    masks = ", masks" if config.masks else ""
    return f"{config.backbone}, features at stride {stride}, {config.nheads} attention heads{masks}"


def _read_weights(folder: Path) -> dict[str, Tensor]:
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            if name.endswith(".safetensors"):
                return _safetensors().load_file(folder / name)
            return load_file(folder / name)
    raise FileNotFoundError(f"{folder} has no weights; expected {' or '.join(_WEIGHT_FILES)}")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"Hugging Face's folders need safetensors, pip install 'detr_fast[hf]': {error}") from error
    return safetensors.torch


def _read_json(path: Path, otherwise: dict | None = None) -> dict[str, Any]:
    if not path.is_file():
        if otherwise is not None:
            return otherwise
        run = next(path.parent.glob("checkpoint*.pth"), None)
        hint = "" if run is None else f"; of a run's folder give a checkpoint, such as {run}"
        raise FileNotFoundError(f"there is no {path}; expected a folder of Hugging Face's{hint}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not json: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected names with values")
    return content


def _write_json(path: Path, content: Mapping) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
