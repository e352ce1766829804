"""Detection on image files: a picture for each, and a json in COCO's results format."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from detr_fast.config import Config, choose_device, make_output_dir, usage_errors
from detr_fast.data.annotations import read_annotations
from detr_fast.data.images import ImageReadError, load_image
from detr_fast.data.packed import PackedCollate
from detr_fast.data.prefetch import Prefetcher
from detr_fast.errors import UsageError
from detr_fast.inference.loading import Loaded, load_for_inference
from detr_fast.training.engine import PRECISIONS, outputs_of
from detr_fast.training.setup import packed_collate

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")

# The published checkpoints name no classes; theirs are COCO's.
_COCO_CLASSES = 91


def predict(
    config: Config,
    inputs: Sequence[str],
    *,
    given: Collection[str] = (),
    threshold: float = 0.5,
    ann: str | None = None,
) -> int:
    """Detects what the model knows in image files and writes to `config.output_dir`.

    Written are a picture for each image with what scores at least `threshold`; ``predictions.json``, the same
    detections in COCO's results format (category ids as in the training data, boxes x, y, width, height in pixels of
    the file, with the file's name beside the image id; with a mask head also "segmentation", run-length encoded; of a
    model of lines "line", x1, y1, dx, dy in pixels, in the place of boxes); and ``images.json``, every image's id, file
    name and size.

    Args:
        config: `weights`, `output_dir`, `batch_size`, `image_size`, `max_size`, `device` and `precision`; the model's
            settings are the checkpoint's.
        inputs: image files, and folders, which are searched for them.
        given: names of the settings that the user chose, see `load_for_inference`.
        threshold: lowest score, in 0..1.
        ann: a COCO json to take the image ids from. None: images are numbered from 1.

    Returns:
        How many images could not be read; each is named in a printed line and left out.

    Raises:
        UsageError: no image is found, one is not in `ann`, or one would be overwritten by its picture.
        ValueError, FileNotFoundError: the checkpoint cannot be read or does not fit.
    """
    with usage_errors():
        if not 0 <= threshold <= 1:
            raise UsageError(f"--threshold must be in 0..1, got {threshold}")
        device = choose_device(config.device, config.precision)
        files = list(find_images(inputs))
        ids = _image_ids([name for _, name in files], ann)
        pictures = _pictures(files, Path(config.output_dir))
        output_dir = make_output_dir(config.output_dir)
        loaded = load_for_inference(replace(config, device=device), given, config.weights)
        return _predict(loaded, files, ids, pictures, output_dir, threshold)


def _predict(loaded: Loaded, files, ids, pictures, output_dir: Path, threshold: float) -> int:
    task, config, categories = loaded.task, loaded.config, loaded.categories
    names = _coco_names() if categories is None and config.num_classes == _COCO_CLASSES else {}
    if categories is not None:
        names = dict(zip(categories.ids, categories.names, strict=True))
    device, dtype = torch.device(config.device), PRECISIONS[config.precision]
    loader = DataLoader(
        ImageFiles([path for path, _ in files], task.resize(config, uint8=True)),
        config.batch_size,
        collate_fn=_Collate(packed_collate(task, config)),
        pin_memory=device.type == "cuda",
    )

    predictions, described, failed = [], [], 0
    for samples, images, errors in Prefetcher(loader, device):
        for error in errors:
            print(f"left out: {error}", flush=True)
        failed += len(errors)
        if not images:
            continue
        orig_sizes, sizes = (torch.tensor([image[key] for image in images]) for key in ("orig_size", "size"))
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = outputs_of(loaded.model, samples)
        padded_size = samples.tensors.shape[-2:]
        results = task.postprocess(loaded.postprocessors, outputs, orig_sizes, sizes, padded_size)
        for image, result in zip(images, results, strict=True):
            if categories is not None:
                result["labels"] = categories.to_id(result["labels"])
            path, name = files[image["index"]]
            height, width = image["orig_size"]
            described.append({"id": ids[name], "file_name": name, "width": width, "height": height})
            found = task.describe(result, threshold)
            predictions += [{"image_id": ids[name], "file_name": name, **entry} for entry in found]
            task.draw(image["image"], result, names, threshold).save(pictures[path], quality=92)
    (output_dir / "predictions.json").write_text(json.dumps(predictions), encoding="utf-8")
    (output_dir / "images.json").write_text(json.dumps(described), encoding="utf-8")
    print(
        f"{len(predictions)} {task.found} with a score of at least {threshold} in {len(described)} images; "
        f"pictures, predictions.json and images.json are in {output_dir}",
        flush=True,
    )
    return failed


class ImageFiles(Dataset):
    """Image files for a model; an item is (uint8 image [3, h, w], what is known of it) or the error of reading it.

    Args:
        paths: of the files.
        transforms: called as ``transforms(image, None)``.
    """

    def __init__(self, paths: Sequence[Path], transforms):
        self.paths = paths
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]] | ImageReadError:
        try:
            image = load_image(self.paths[index])
        except ImageReadError as error:
            return error
        tensor = self.transforms(image, None)[0]
        known = {"index": index, "image": image, "orig_size": (image.height, image.width)}
        return tensor, {**known, "size": tuple(tensor.shape[-2:])}


class _Collate:
    """(batch or None, list of what is known of its images, list of errors)."""

    def __init__(self, collate: PackedCollate):
        self.collate = collate

    def __call__(self, items: Sequence) -> tuple:
        errors = [item for item in items if isinstance(item, ImageReadError)]
        read = [item for item in items if not isinstance(item, ImageReadError)]
        samples, images = self.collate(read) if read else (None, ())
        return samples, list(images), errors


def find_images(inputs: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """(path, name) of each image: files as given, and of folders all image files inside, sorted.

    The name is the file's, or its path within the folder.

    Raises:
        UsageError: nothing at an input, or no image anywhere.
    """
    found = False
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            for file in inside:
                found = True
                yield file, file.relative_to(path).as_posix()
        elif path.exists():
            found = True
            yield path, path.name
        else:
            raise UsageError(f"there is no file or folder {given!r}")
    if not found:
        raise UsageError(f"no image in {', '.join(map(repr, inputs))}; looked for {', '.join(IMAGE_SUFFIXES)}")


def _image_ids(names: Sequence[str], ann_file: str | None) -> dict[str, int]:
    if ann_file is None:
        repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if repeated:
            raise UsageError(f"more than one input image is called {repeated[0]!r}; give them in separate runs")
        return {name: number for number, name in enumerate(names, 1)}
    known = {image["file_name"]: image["id"] for image in read_annotations(ann_file)["images"]}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"{len(unknown)} images are not in {ann_file}, the first is {unknown[0]!r}")
    return {name: known[name] for name in names}


def _pictures(files: Sequence[tuple[Path, str]], output_dir: Path) -> dict[Path, Path]:
    """Where each image's picture goes."""
    used: set[str] = set()
    pictures = {path: output_dir / _picture_name(name, used) for path, name in files}
    inputs = {path.resolve() for path, _ in files}
    for picture in pictures.values():
        if picture.resolve() in inputs:
            raise UsageError(f"--output_dir {output_dir}: the picture would overwrite the input {picture}")
    return pictures


def _picture_name(name: str, used: set[str]) -> str:
    """A file name for the picture: folders become part of it, and two images never share one."""
    path = Path(name)
    stem = "_".join(path.with_suffix("").parts)
    candidate, number = f"{stem}.jpg", 1
    while candidate in used:
        number += 1
        candidate = f"{stem}_{number}.jpg"
    used.add(candidate)
    return candidate


def _coco_names() -> dict[int, str]:
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    return dict(enumerate(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]))
