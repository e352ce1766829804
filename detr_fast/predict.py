"""Detection on image files: pictures with boxes, and a json in COCO's results format."""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from pycocotools import mask as mask_utils

from detr_fast.data.coco import ImageReadError, load_image, read_annotations
from detr_fast.data.transforms import IMAGENET_MEAN, IMAGENET_STD, make_coco_transforms
from detr_fast.nested_tensor import nested_tensor_from_tensor_list
from detr_fast.training.config import UsageError, choose_device, make_output_dir, usage_errors
from detr_fast.training.engine import PRECISIONS
from detr_fast.training.inference import load_for_inference
from detr_fast.training.pictures import best_detections, best_masks, draw_detections

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")

# The published checkpoints name no classes; theirs are COCO's.
_COCO_CLASSES = 91


def predict(args: argparse.Namespace, given: set[str]) -> int:
    """Detects objects in `args.inputs` and writes to `args.output_dir`.

    Written are a picture for each image with what scores at least `args.threshold`; ``predictions.json``, the same
    detections in COCO's results format (category ids as in the training data, boxes x, y, width, height in pixels of
    the file, with the file's name beside the image id; with a mask head also "segmentation", run-length encoded); and
    ``images.json``, every image's id, file name and size. Image ids come from `args.ann`, a COCO json, if given;
    otherwise images are numbered from 1.

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
    if "line" in postprocessors:
        raise UsageError(
            f"{args.weights} detects lines; predict draws boxes and masks: use detr-fast eval, or the model"
        )
    names = _coco_names() if categories is None and args.num_classes == _COCO_CLASSES else {}
    if categories is not None:
        names = dict(zip(categories.ids, categories.names, strict=True))
    transform = make_coco_transforms("val", scales=args.image_size, max_size=args.max_size, uint8=True)
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
            outputs = model(nested_tensor_from_tensor_list(tensors, mean=IMAGENET_MEAN, std=IMAGENET_STD))
        sizes = torch.tensor([[image.height, image.width] for *_, image in batch])
        results = postprocessors["bbox"](outputs, sizes)
        if "segm" in postprocessors:
            processed = torch.tensor([tensor.shape[-2:] for tensor in tensors])
            results = postprocessors["segm"](results, outputs, sizes, processed)
        for (path, name, image), result in zip(batch, results, strict=True):
            if categories is not None:
                result["labels"] = categories.to_id(result["labels"])
            boxes, labels, scores = best_detections(result, args.threshold)
            masks = best_masks(result, len(scores))
            described.append({"id": ids[name], "file_name": name, "width": image.width, "height": image.height})
            for i, ((x0, y0, x1, y1), label, score) in enumerate(zip(boxes, labels, scores, strict=True)):
                prediction = {
                    "image_id": ids[name],
                    "file_name": name,
                    "category_id": label,
                    "bbox": [round(value, 3) for value in (x0, y0, x1 - x0, y1 - y0)],
                    "score": score,
                }
                if masks is not None:
                    prediction["segmentation"] = _run_lengths(masks[i])
                predictions.append(prediction)
            picture = draw_detections(image, boxes, labels, names, scores, masks)
            picture.save(pictures[path], quality=92)
    (output_dir / "predictions.json").write_text(json.dumps(predictions), encoding="utf-8")
    (output_dir / "images.json").write_text(json.dumps(described), encoding="utf-8")
    print(
        f"{len(predictions)} detections with a score of at least {args.threshold} in {len(described)} images; "
        f"pictures, predictions.json and images.json are in {output_dir}",
        flush=True,
    )
    return failed


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
