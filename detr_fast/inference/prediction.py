"""Detection on image files: a picture for each, and a json in COCO's results format."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from detr_fast.config import Config, choose_device, known_precision, make_output_dir, usage_errors
from detr_fast.data.annotations import read_annotations
from detr_fast.data.images import ImageReadError, is_turned
from detr_fast.data.validation import stated_size
from detr_fast.errors import UsageError
from detr_fast.inference.detector import Detector, open_detector
from detr_fast.inference.images import Picture, find_images


def predict(
    config: Config,
    inputs: Sequence[str],
    *,
    given: Collection[str] = (),
    threshold: float = 0.5,
    ann: str | None = None,
    ignore_exif: bool = False,
    low_latency: bool = False,
) -> int:
    """Detects what the model knows in image files and writes to `config.output_dir`.

    Written are a picture for each image with what scores at least `threshold`; ``predictions.json``, the same
    detections in COCO's results format (category ids as in the training data, boxes x, y, width, height in pixels of
    the file, with the file's name beside the image id; with a mask head also "segmentation", run-length encoded; of a
    model of lines "line", x1, y1, dx, dy in pixels, in the place of boxes; "category_name" where it is known); and
    ``images.json``, every image's id, file name and size. Only images of one size are computed together (see
    `Detector.predict`).

    Args:
        config: `weights`, `output_dir`, `batch_size`, `image_size`, `max_size`, `device` and `precision`; the model's
            settings are the checkpoint's.
        inputs: image files, and folders, which are searched for them.
        given: names of the settings that the user chose, see `load_for_inference`.
        threshold: lowest score, in 0..1.
        ann: a COCO json to take the image ids from. None: images are numbered from 1.
        ignore_exif: take the pixels as they are stored. By default images are turned as their EXIF orientation says;
            with `ann` only where that gives them the size that it states, as in training.
        low_latency: see `Detector.low_latency`.

    Returns:
        How many images could not be read; each is named in a printed line and left out.

    Raises:
        UsageError: no image is found, one is not in `ann`, or one would be overwritten by its picture.
        ValueError, FileNotFoundError: the checkpoint cannot be read or does not fit.
    """
    with usage_errors():
        if not 0 <= threshold <= 1:
            raise UsageError(f"--threshold must be in 0..1, got {threshold}")
        choose_device(config.device, known_precision(config.precision))  # before anything is written
        files = list(find_images(inputs))
        known = None if ann is None else {image["file_name"]: image for image in read_annotations(ann)["images"]}
        ids = _image_ids([name for _, name in files], known, ann)
        pictures = _pictures(files, Path(config.output_dir))
        output_dir = make_output_dir(config.output_dir)
        detector = open_detector(config, given, config.weights)
        if low_latency:
            detector.low_latency()
        images = [Picture(path, upright=not ignore_exif and _is_upright(path, name, known)) for path, name in files]
        return _predict(detector, files, images, ids, pictures, output_dir, threshold, config.batch_size or 1)


def _is_upright(path: Path, name: str, known: Mapping[str, Mapping] | None) -> bool:
    """Whether detections are to be in pixels of the upright image: with annotations, where theirs are."""
    if known is None:
        return True
    stated = stated_size(known[name])
    return stated is not None and is_turned(path, stated)


def _predict(
    detector: Detector, files, images, ids, pictures, output_dir: Path, threshold: float, batch_size: int
) -> int:
    entries: dict[int, list[dict]] = {}
    described: dict[int, dict] = {}
    for index, found, image in detector.stream(images, threshold, batch_size=batch_size):
        if isinstance(found, ImageReadError):
            print(f"left out: {found}", flush=True)
            continue
        path, name = files[index]
        height, width = found.size
        described[index] = {"id": ids[name], "file_name": name, "width": width, "height": height}
        entries[index] = [{"image_id": ids[name], "file_name": name, **entry} for entry in found.to_coco()]
        found.plot(image).save(pictures[path], quality=92)
    # Images of one size are computed together; the files keep the order in which they were given.
    predictions = [entry for index in sorted(entries) for entry in entries[index]]
    (output_dir / "predictions.json").write_text(json.dumps(predictions), encoding="utf-8")
    in_order = [described[index] for index in sorted(described)]
    (output_dir / "images.json").write_text(json.dumps(in_order), encoding="utf-8")
    hint = " (--threshold lowers it)" if described and not predictions else ""
    print(
        f"{len(predictions)} {detector.found} with a score of at least {threshold}{hint} in {len(described)} images; "
        f"{'pictures, ' if described else ''}predictions.json and images.json are in {output_dir}",
        flush=True,
    )
    return len(files) - len(described)


def _image_ids(names: Sequence[str], known: Mapping[str, Mapping] | None, ann_file: str | None) -> dict[str, int]:
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise UsageError(f"more than one input image is called {repeated[0]!r}; give them in separate runs")
    if known is None:
        return {name: number for number, name in enumerate(names, 1)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageError(f"{len(unknown)} images are not in {ann_file}, the first is {unknown[0]!r}")
    return {name: known[name]["id"] for name in names}


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
