"""Where the data sets lie that a configuration names."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from detr_fast.config import Config, DataConfig
from detr_fast.data.layouts import find_layout
from detr_fast.distributed import first_process_first, say
from detr_fast.errors import UsageError

_NAMED = ("coco_path", "coco_panoptic_path", "train_ann", "train_images", "val_ann", "val_images")


def with_data(config: Config, ids: Mapping[str, int] | None = None) -> Config:
    """The configuration with `data`, a folder in any known layout, as the jsons and image folders found there.

    What was found is said. Without `data` the configuration stays as it is.

    Args:
        config: of the run.
        ids: name → category id, of the model that is evaluated; see `find_layout`.

    Raises:
        UsageError: other data are named as well.
        ValueError, FileNotFoundError: see `find_layout`.
    """
    if not config.data:
        return config
    check_data(config)
    with first_process_first():
        layout = find_layout(config.data, ids)
    for line in layout.lines:
        say(line)
    found = {}
    for name, split in layout.splits.items():
        found |= {f"{name}_images": str(split.images), f"{name}_ann": str(split.annotations)}
    return replace(config, data=None, **found)


def check_data(config: DataConfig) -> None:
    """Refuses `data` beside other flags that name data."""
    others = [f"--{name}" for name in _NAMED if getattr(config, name)]
    if config.data and others:
        raise UsageError(f"--data says where everything is; it does not go together with {', '.join(others)}")


def dataset_paths(image_set: str, config: DataConfig, kind: str = "instances") -> tuple[Path, Path]:
    """(image folder, annotation file) of a set, both of which exist.

    Args:
        image_set: "train" or "val".
        config: either `coco_path`, a directory in COCO's layout (``train2017/``, ``val2017/``,
            ``annotations/{kind}_{train,val}2017.json``), or the folder and json of own data.
        kind: of annotations.

    Raises:
        ValueError: no data named, both ways at once, or one half of a pair missing.
        FileNotFoundError: what is named does not exist; the message lists everything that is missing.
    """
    root = config.coco_path
    own = {
        "train_ann": config.train_ann, "train_images": config.train_images,
        "val_ann": config.val_ann, "val_images": config.val_images,
    }  # fmt: skip
    if root and any(own.values()):
        raise ValueError(f"give either coco_path or {', '.join(own)}, not both")
    if root:
        if not Path(root).is_dir():
            raise FileNotFoundError(f"coco_path {root} is not a directory")
        images = Path(root) / f"{image_set}2017"
        annotations = Path(root) / "annotations" / f"{kind}_{image_set}2017.json"
    else:
        absent = [name for name in (f"{image_set}_ann", f"{image_set}_images") if not own[name]]
        if absent:
            raise ValueError(f"no {image_set} data: {' and '.join(absent)} not given; give them, coco_path, or --data")
        images, annotations = Path(str(own[f"{image_set}_images"])), Path(str(own[f"{image_set}_ann"]))
    layout = f"; {root} should hold {{train,val}}2017/ and annotations/{kind}_{{train,val}}2017.json" if root else ""
    require(image_set, {"image folder": images}, {"annotation file": annotations}, layout)
    return images, annotations


def require(image_set: str, folders: dict[str, Path], files: dict[str, Path], layout: str = "") -> None:
    """Raises FileNotFoundError, which lists everything that does not exist; `layout` is added to its message."""
    missing = [f"{name} {path}" for name, path in folders.items() if not path.is_dir()]
    missing += [f"{name} {path}" for name, path in files.items() if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{image_set} data is incomplete, missing: {', '.join(missing)}{layout}")
