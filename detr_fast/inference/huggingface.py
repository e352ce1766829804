"""Weights between this package, which has the original's names, and Hugging Face's folders, both ways.

A folder holds `config.json`, `model.safetensors`, `preprocessor_config.json` and a model card, `README.md`, so that
transformers' pipelines serve it. Neither direction imports transformers; reading and writing need safetensors, which
the extra `hf` brings.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from detr_fast.config import MODEL_SETTINGS, Config
from detr_fast.data.categories import Categories
from detr_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD, RandomResize, make_coco_transforms
from detr_fast.distributed import say
from detr_fast.errors import UsageError
from detr_fast.inference.huggingface_names import from_huggingface, is_huggingface, to_huggingface
from detr_fast.inference.loading import settings_from_shapes
from detr_fast.inference.names import coco_names
from detr_fast.models.weights import load_file, load_model
from detr_fast.tasks import Task, task_of_weights
from detr_fast.training.checkpoint import read_checkpoint, save_checkpoint

_NO_NAME = "N/A"  # what the published folders call labels that belong to no category
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


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
        UsageError: safetensors is absent.
    """
    if Path(source).is_dir():
        _to_checkpoint(Path(source), Path(destination), dilation, nheads)
    else:
        _to_folder(source, Path(destination), dilation, nheads)


def _to_folder(source: str, folder: Path, dilation: bool | None, nheads: int | None) -> None:
    _refuse_used(folder)
    checkpoint = read_checkpoint(source)
    write_folder(checkpoint, folder, source, dilation=dilation, nheads=nheads)


def write_folder(
    checkpoint: Mapping[str, Any],
    folder: Path,
    source: str,
    *,
    dilation: bool | None = None,
    nheads: int | None = None,
) -> None:
    """Writes a checkpoint's content as a Hugging Face folder.

    Args:
        checkpoint: as `read_checkpoint` returns it.
        folder: is made; it must be new or empty.
        source: what messages call the checkpoint.
        dilation, nheads: see `convert`.

    Raises: as `convert`.
    """
    _refuse_used(folder)
    state, theirs = checkpoint["model"], dict(checkpoint.get("args", {}))
    if "ema" in checkpoint:
        say(f"{source}: using its averaged weights (EMA)")
        state = checkpoint["ema"]["values"]
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    try:
        weights = to_huggingface(state)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    task, config = _config_of(state, theirs, {"dilation": dilation, "nheads": nheads}, source)
    _check_fits(task, config, state, source)
    categories = Categories.from_dict(checkpoint["categories"]) if "categories" in checkpoint else None
    save = _safetensors().save_file
    folder.mkdir(parents=True, exist_ok=True)
    save(weights, folder / _WEIGHT_FILES[0], metadata={"format": "pt"})
    described = _describe(config, categories)
    _write_json(folder / "config.json", described)
    _write_json(folder / "preprocessor_config.json", _preprocessing(config))
    (folder / "README.md").write_text(_card(config, described, folder.name), encoding="utf-8")
    say(f"{source}: {_words(config)}; {len(weights)} tensors written to {folder}")


def push_folder(
    checkpoint: Mapping[str, Any],
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """`write_folder`, and its upload; see `Detector.push_to_hub`."""
    try:
        from huggingface_hub import HfApi, get_token
    except ImportError as error:
        raise UsageError(f"push_to_hub needs huggingface_hub, pip install 'detr_fast[hf]': {error}") from error
    if token is None and get_token() is None:
        raise UsageError("push_to_hub needs a token that may write: run `hf auth login`, set HF_TOKEN, or give token=…")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as temporary:
        # The folder's name is the card's title.
        folder = Path(temporary) / repo_id.rsplit("/", 1)[-1]
        write_folder(checkpoint, folder, "the model")
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message
            )
        except Exception as error:  # offline, refused, a bad name: of which classes, changes with the version
            if isinstance(error, (MemoryError, TypeError)):
                raise
            reason = str(error).strip() or type(error).__name__
            raise UsageError(f"could not upload to {repo_id}: {reason}") from error
    return str(done)


def _refuse_used(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists; expected a new or empty folder for Hugging Face's files")


def _to_checkpoint(folder: Path, file: Path, dilation: bool | None, nheads: int | None) -> None:
    if file.exists():
        raise FileExistsError(f"{file} exists; expected a new file for the checkpoint")
    if dilation is not None or nheads is not None:
        raise ValueError(f"{folder} says itself whether it is dilated and how many heads it has; leave that out")
    checkpoint = read_folder(folder)
    state, config = checkpoint["model"], Config.from_mapping(checkpoint["args"])
    _check_fits(task_of_weights(state, None, None), config, state, str(folder))
    file.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(checkpoint, file)
    say(f"{folder}: {_words(config)}; {len(state)} tensors written to {file}")


def read_folder(folder: Path) -> dict[str, Any]:
    """A Hugging Face folder as a checkpoint: "model", "args", and "categories" where it names classes.

    Raises:
        FileNotFoundError: it lacks `config.json` or the weights.
        ValueError: it is of another model, or cannot be read.
        UsageError: safetensors is absent.
    """
    described = _read_json(folder / "config.json")
    processor = _read_json(folder / "preprocessor_config.json", {})
    settings = _settings(described, processor, folder)
    state = from_huggingface(_read_weights(folder))
    _, config = _config_of(state, settings, {}, str(folder))
    checkpoint: dict[str, Any] = {"model": state, "args": config.to_dict()}
    categories = _categories(described)
    return checkpoint if categories is None else {**checkpoint, "categories": categories.to_dict()}


def read_safetensors(path: Path) -> dict[str, Any]:
    """A safetensors file as a checkpoint, under the original's names or Hugging Face's.

    One that lies in a Hugging Face folder is read as that folder; any other is bare weights.

    Raises: as `read_folder`.
    """
    if path.name == _WEIGHT_FILES[0] and (path.parent / "config.json").is_file():
        return read_folder(path.parent)
    state = _load_safetensors(path)
    return {"model": from_huggingface(state) if is_huggingface(state) else state}


def _config_of(
    state: Mapping[str, Tensor], theirs: Mapping, given: Mapping[str, Any], source: str
) -> tuple[Task, Config]:
    """The task, and the model's settings: from the weights where they show them, else the checkpoint's, else those
    given."""
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
    return task, Config.from_mapping(known)


def _check_fits(task: Task, config: Config, state: Mapping[str, Tensor], source: str) -> None:
    """Builds the model and loads the weights, so that nothing is written that does not fit."""
    load_model(task.build(config)[0], state, source)


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
    names = categories.label_names if categories is not None else coco_names(count)
    if not names:
        names = {label: f"LABEL_{label}" for label in range(count)}
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
                return _load_safetensors(folder / name)
            return load_file(folder / name)
    raise FileNotFoundError(f"{folder} has no weights; expected {' or '.join(_WEIGHT_FILES)}")


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    safetensors = _safetensors()
    try:
        return safetensors.load_file(path)
    except Exception as error:  # SafetensorError is of no class that can be named without the package
        if isinstance(error, (OSError, MemoryError)):
            raise
        raise ValueError(f"{str(path)!r} cannot be read as a safetensors file: {error}") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UsageError(f"safetensors files need safetensors, pip install 'detr_fast[hf]': {error}") from error
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
