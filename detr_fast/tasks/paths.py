"""Where the data sets lie that a configuration names."""

from pathlib import Path

from detr_fast.config import DataConfig


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
            raise ValueError(f"no {image_set} data: {' and '.join(absent)} not given; give them, or coco_path")
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
