"""Detection on image files: pictures with boxes, masks or lines, and a json in COCO's results format."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as mask_utils
from torch import Tensor

from detr_fast.data.coco import ImageReadError, load_image, read_annotations
from detr_fast.data.lines import LINES_MEAN, LINES_STD, make_line_transforms
from detr_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD, make_coco_transforms
from detr_fast.nested_tensor import nested_tensor_from_tensor_list
from detr_fast.training.config import UsageError, choose_device, make_output_dir, usage_errors
from detr_fast.training.engine import PRECISIONS, outputs_of
from detr_fast.training.inference import load_for_inference
from detr_fast.training.pictures import best_detections, best_lines, best_masks, draw_detections, draw_lines

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")

# The published checkpoints name no classes; theirs are COCO's.
_COCO_CLASSES = 91


def predict(args: argparse.Namespace, given: set[str]) -> int:
    """Detects objects in `args.inputs` and writes to `args.output_dir`.

    Written are a picture for each image with what scores at least `args.threshold`; ``predictions.json``, the same
    detections in COCO's results format (category ids as in the training data, boxes x, y, width, height in pixels of
    the file, with the file's name beside the image id; with a mask head also "segmentation", run-length encoded; of a
    model of lines "line", x1, y1, dx, dy in pixels, in the place of boxes); and ``images.json``, every image's id, file
    name and size. Image ids come from `args.ann`, a COCO json, if given; otherwise images are numbered from 1.

    Args:
        args: parsed flags of ``detr-fast predict``.
        given: names of the flags that the user gave.

    Returns:
        How many images could not be read; each is named in a printed line and left out.

    Raises:
        UsageError: no image is found, one is not in `args.ann`, or one would be overwritten by its picture.
        ValueError, FileNotFoundError: the checkpoint cannot be read or does not fit.
    """
    with usage_errors():
        return _predict(args, given)


def _predict(args: argparse.Namespace, given: set[str]) -> int:
    if not 0 <= args.threshold <= 1:
        raise UsageError(f"--threshold must be in 0..1, got {args.threshold}")
    if args.batch_size < 1:
        raise UsageError(f"--batch_size must be at least 1, got {args.batch_size}")
    args.device = choose_device(args.device, args.precision)
    files = list(find_images(args.inputs))
    ids = _image_ids([name for _, name in files], args.ann)
    output_dir, used = Path(args.output_dir), set()
    pictures = {path: output_dir / _picture_name(name, used) for path, name in files}
    inputs = {path.resolve() for path, _ in files}
    for picture in pictures.values():
        if picture.resolve() in inputs:
            raise UsageError(f"--output_dir {args.output_dir}: the picture would overwrite the input {picture}")
    make_output_dir(args.output_dir)
    model, _, postprocessors, categories = load_for_inference(args, given, args.weights)
    is_lines = "line" in postprocessors
    names = _coco_names() if categories is None and args.num_classes == _COCO_CLASSES else {}
    if categories is not None:
        names = dict(zip(categories.ids, categories.names, strict=True))
    options = {"max_size": args.max_size, "uint8": True}
    if is_lines:
        transform, mean, std = make_line_transforms("val", scale=args.image_size, **options), LINES_MEAN, LINES_STD
    else:
        transform = make_coco_transforms("val", scales=args.image_size, **options)
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    dtype, device = PRECISIONS[args.precision], torch.device(args.device)

    predictions, described, failed = [], [], 0
    for start in range(0, len(files), args.batch_size):
        batch = []
        for path, name in files[start : start + args.batch_size]:
            try:
                batch.append((path, name, load_image(path)))
            except ImageReadError as error:
                print(f"left out: {error}", flush=True)
                failed += 1
        if not batch:
            continue
        tensors = [transform(image, None)[0].to(device) for *_, image in batch]
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = outputs_of(model, nested_tensor_from_tensor_list(tensors, mean=mean, std=std))
        sizes = torch.tensor([[image.height, image.width] for *_, image in batch])
        results = postprocessors["line" if is_lines else "bbox"](outputs, sizes)
        if "segm" in postprocessors:
            processed = torch.tensor([tensor.shape[-2:] for tensor in tensors])
            results = postprocessors["segm"](results, outputs, sizes, processed)
        for (path, name, image), result in zip(batch, results, strict=True):
            if categories is not None:
                result["labels"] = categories.to_id(result["labels"])
            described.append({"id": ids[name], "file_name": name, "width": image.width, "height": image.height})
            found, picture = (_lines if is_lines else _objects)(image, result, args.threshold, names)
            predictions += [{"image_id": ids[name], "file_name": name, **entry} for entry in found]
            picture.save(pictures[path], quality=92)
    (output_dir / "predictions.json").write_text(json.dumps(predictions), encoding="utf-8")
    (output_dir / "images.json").write_text(json.dumps(described), encoding="utf-8")
    print(
        f"{len(predictions)} {'lines' if is_lines else 'detections'} with a score of at least {args.threshold} in "
        f"{len(described)} images; pictures, predictions.json and images.json are in {output_dir}",
        flush=True,
    )
    return failed


def _objects(
    image: Image.Image, result: Mapping[str, Tensor], threshold: float, names: Mapping[int, str]
) -> tuple[list[dict], Image.Image]:
    """What is found in an image, as COCO's results have it, and the picture of it."""
    boxes, labels, scores = best_detections(result, threshold)
    masks = best_masks(result, len(scores))
    found = [
        {"category_id": label, "bbox": _rounded(x0, y0, x1 - x0, y1 - y0), "score": score}
        for (x0, y0, x1, y1), label, score in zip(boxes, labels, scores, strict=True)
    ]
    for entry, mask in zip(found, masks or (), strict=False):
        entry["segmentation"] = _run_lengths(mask)
    return found, draw_detections(image, boxes, labels, names, scores, masks)


def _lines(
    image: Image.Image, result: Mapping[str, Tensor], threshold: float, names: Mapping[int, str]
) -> tuple[list[dict], Image.Image]:
    """As `_objects`, of lines, which have no captions: "line" is x1, y1, dx, dy, as in the data sets."""
    lines, labels, scores = best_lines(result, threshold)
    found = [
        {"category_id": label, "line": _rounded(x1, y1, x2 - x1, y2 - y1), "score": score}
        for (x1, y1, x2, y2), label, score in zip(lines, labels, scores, strict=True)
    ]
    return found, draw_lines(image, lines)


def _rounded(*values: float) -> list[float]:
    return [round(value, 3) for value in values]


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


def _run_lengths(mask: np.ndarray) -> dict:
    """COCO's compressed run-length encoding of a mask [H, W], as json takes it."""
    encoded = mask_utils.encode(np.asfortranarray(mask))
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}


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
