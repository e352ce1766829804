"""A model as one object: loaded from anywhere, it detects in anything that is an image.

model = detr_fast.load("outputs/mine")
found = model.predict("photo.jpg")
"""

import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from detr_fast.config import (
    LOSS_SETTINGS,
    MODEL_SETTINGS,
    NO_OUTPUT,
    Config,
    choose_device,
    known_precision,
    with_output_dir,
)
from detr_fast.data.categories import Categories
from detr_fast.data.images import ImageReadError
from detr_fast.data.prefetch import Prefetcher
from detr_fast.distributed import say
from detr_fast.errors import UsageError
from detr_fast.inference.detections import Detections, best
from detr_fast.inference.evaluation import evaluate_loaded
from detr_fast.inference.export import export
from detr_fast.inference.exported import Exported, read_exported, with_category_ids
from detr_fast.inference.huggingface import push_folder
from detr_fast.inference.images import (
    CollateRead,
    ImageLike,
    Picture,
    ResizedImages,
    batches_of_one_size,
    pictures,
)
from detr_fast.inference.latency import ForwardGraphs
from detr_fast.inference.loading import Loaded, load_for_inference
from detr_fast.inference.names import with_names
from detr_fast.inference.sources import EXPORTED_SUFFIXES
from detr_fast.nested_tensor import NestedTensor
from detr_fast.tasks.base import Result
from detr_fast.training.callbacks import Callback
from detr_fast.training.checkpoint import save_checkpoint
from detr_fast.training.setup import packed_collate
from detr_fast.training.step import PRECISIONS, outputs_of
from detr_fast.training.step_errors import step_errors
from detr_fast.training.trainer import train

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from detr_fast.inference.settings import LoadSettings

# What `load` takes besides the source.
_LOADING = (*MODEL_SETTINGS, "dataset_file", "compile")
# What a checkpoint that `Detector.save` writes says of itself.
_SAVED = (*MODEL_SETTINGS, *LOSS_SETTINGS, "dataset_file", "num_classes", "thing_classes")
_EVALUATION = (
    "data", "coco_path", "coco_panoptic_path", "val_ann", "val_images", "allow_outside", "image_size", "max_size",
    "batch_size", "num_workers", "group_by_size", "output_dir", "print_freq", "eval_backend",
)  # fmt: skip


def load(
    source: str | os.PathLike, *, device: str = "auto", precision: str = "fp32", **settings: "Unpack[LoadSettings]"
) -> "Detector":
    """A trained model, ready to detect.

    Args:
        source: a training run's folder (its best checkpoint is taken); a checkpoint of ours or of the original, a file
            or an https address; a Hugging Face folder or a safetensors file (the extra `hf`); a file that
            `Detector.export` wrote, .onnx (the extra `export`) or .pt2, which only detects; or a published name,
            "detr_resnet50", "detr_resnet50_dc5", "detr_resnet101", "detr_resnet101_dc5", "detr_resnet50_panoptic",
            "detr_resnet50_dc5_panoptic", "detr_resnet101_panoptic", which is downloaded once, its hash checked, to
            torch.hub's cache.
        device: "auto" (a GPU if there is one), "cuda", "cuda:1", "cpu".
        precision: "fp32", or autocast in "bf16" or "fp16".
        settings: `image_size` and `max_size` to see images at another size than in training; `compile`; and of weights
            that came without their settings what their shapes do not show, such as ``nheads=4`` or ``dilation=True``.

    Raises:
        FileNotFoundError: there is nothing of that name.
        ValueError: a format that is not supported, a file that cannot be read, weights of another model, settings that
            contradict it, a device that there is not, or a download that failed; the message says what to do.
        TypeError: a setting that there is not.
    """
    _check_names(settings, _LOADING, "load")
    config = Config(device=device, precision=precision, **settings)
    return open_detector(config, set(settings), os.fspath(source))


def open_detector(config: Config, given: Collection[str], source: str) -> "Detector":
    """`load` with its settings in a `Config`; `given`: names of those that the user chose."""
    path = Path(source)
    if path.suffix in EXPORTED_SUFFIXES and path.is_file():
        if known_precision(config.precision) != "fp32":
            raise UsageError(f"{source} is an exported file, which computes in fp32; got precision {config.precision}")
        return Detector(
            read_exported(path, config.device, {name: getattr(config, name) for name in set(given) & set(_LOADING)})
        )
    config = replace(config, device=choose_device(config.device, known_precision(config.precision)))
    return Detector(load_for_inference(config, given, source))


class Detector:
    """A trained model with its classes and everything between an image and named boxes. `load` makes it.

    Attributes:
        model: the network, in evaluation mode; an exported file has none to show.
        config: its settings.
        categories: its classes; None where the weights came without.
        names: category id → name, of COCO where the weights came without and have COCO's number of classes.
        found: what its detections are called when they are counted: "detections" or "lines".
    """

    def __init__(self, loaded: Loaded | Exported):
        self._loaded = loaded
        self.names: dict[int, str] = loaded.names
        self.found = loaded.task.found
        self._graphs: ForwardGraphs | None = None

    @property
    def model(self) -> nn.Module:
        return self._trained("model").model

    @property
    def config(self) -> Config:
        return self._loaded.config

    @property
    def categories(self) -> Categories | None:
        return self._loaded.categories

    def __repr__(self) -> str:
        config, loaded = self.config, self._loaded
        what = loaded.path.name if isinstance(loaded, Exported) else config.backbone
        return f"Detector of {loaded.task.name}: {what}, {config.num_classes} classes, on {config.device}"

    def _trained(self, what: str) -> Loaded:
        if isinstance(self._loaded, Exported):
            raise UsageError(f"{self._loaded.path} is an exported file, which only detects; for {what} load the model")
        return self._loaded

    @overload  # a str is an Iterable, too: the first that fits counts
    def predict(  # type: ignore[overload-overlap]
        self, images: ImageLike, threshold: float = 0.5, *, batch_size: int = 1, ignore_exif: bool = False
    ) -> Detections: ...
    @overload
    def predict(
        self, images: Iterable[ImageLike], threshold: float = 0.5, *, batch_size: int = 1, ignore_exif: bool = False
    ) -> list[Detections]: ...

    def predict(self, images, threshold=0.5, *, batch_size=1, ignore_exif=False):
        """Detects what the model knows.

        Args:
            images: one image or a list of them. An image is a file's path or its http(s) address, a PIL image, an array
                [H, W, 3] or [H, W] (RGB or grey), or a tensor [3, H, W] or [1, H, W], uint8 or floats in 0..1. A folder
                stands for all image files in it, a video file for its frames (needs PyAV, extra ``video``).
            threshold: lowest score, in 0..1.
            batch_size: the most images at a time. Only images that have one size once they are resized are computed
                together, without padding, so that a result does not depend on the images beside it.
            ignore_exif: take the pixels as they are stored. By default files and PIL images are turned as their EXIF
                orientation says, and boxes are in pixels of the upright image.

        Returns:
            A `Detections` for a single image, a list of them for a list, a folder or a video, in its order.

        Raises:
            ImageReadError: an image cannot be fetched, read or decoded.
            TypeError, ValueError: something that is no image; a threshold or batch size out of its range.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be in 0..1, got {threshold}")
        given, is_single = pictures(images, upright=not ignore_exif)
        found: dict[int, Detections] = {}
        for index, detections, _ in self.stream(given, threshold, batch_size=batch_size):
            if isinstance(detections, ImageReadError):
                raise detections
            found[index] = detections
        return found[0] if is_single else [found[index] for index in range(len(given))]

    def stream(
        self, images: Sequence[Picture], threshold: float, *, batch_size: int = 1
    ) -> Iterator[tuple[int, Detections, Image.Image] | tuple[int, ImageReadError, None]]:
        """Detections one image after another, in the order in which they are computed; see `predict`.

        Yields:
            The image's index, its detections, and the image as RGB; or, where it cannot be read, the error and None.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        task, config = self._loaded.task, self.config
        device, dtype = torch.device(config.device), PRECISIONS[config.precision]
        transforms = task.resize(config, uint8=True)
        loader = DataLoader(
            ResizedImages(images, transforms),
            batch_sampler=batches_of_one_size(images, transforms, batch_size),
            collate_fn=CollateRead(packed_collate(task, config)),
            pin_memory=device.type == "cuda",
        )
        for samples, known, errors in Prefetcher(loader, device):
            yield from ((index, error, None) for index, error in errors)
            if not known:
                continue
            orig_sizes, sizes = (torch.tensor([image[key] for image in known]) for key in ("orig_size", "size"))
            autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
            with step_errors(samples, "a batch"), torch.no_grad(), autocast:
                results = self._results(samples, orig_sizes, sizes)
            for image, result in zip(known, results, strict=True):
                yield image["index"], self._detections(result, images[image["index"]], image, threshold), image["image"]

    def _results(self, samples: NestedTensor, orig_sizes: Tensor, sizes: Tensor) -> list[Result]:
        """A batch's results, with category ids as labels."""
        loaded = self._loaded
        if isinstance(loaded, Exported):
            return loaded.detect(samples, orig_sizes, sizes)
        outputs = outputs_of(loaded.model if self._graphs is None else self._graphs, samples)
        padded_size = samples.tensors.shape[-2:]
        results = loaded.task.postprocess(loaded.postprocessors, outputs, orig_sizes, sizes, padded_size)
        return with_category_ids(results, loaded.categories)

    def _detections(self, result: Result, picture: Picture, known: dict[str, Any], threshold: float) -> Detections:
        height, width = known["orig_size"]
        return Detections(best(result, threshold), self._loaded.task, self.names, picture, (height, width))

    def low_latency(self, shapes: int = 16) -> "Detector":
        """Has `predict` replay CUDA graphs of the network on a GPU; elsewhere a printed line says that it cannot.

        A graph is recorded when a batch of its shape comes for the second time, which takes a few calls' time, and
        replayed from then on: of the network's many launches one is left. What is found stays the same. That helps
        single images of few different sizes, such as a camera's. Where the network cannot be recorded a line says why,
        and it runs as before. Changed weights are noticed. Not for several threads at a time.

        Args:
            shapes: the most shapes to be recorded, each of which keeps a few megabytes; others run without a graph.

        Returns:
            This object: ``model = load(x).low_latency()``.

        Raises:
            UsageError: an exported file. ValueError: no shapes.
        """
        model = self._trained("low_latency").model
        if shapes < 1:
            raise ValueError(f"shapes must be at least 1, got {shapes}")
        if torch.device(self.config.device).type == "cuda":
            self._graphs = ForwardGraphs(model, say, limit=shapes)
        else:
            say("low_latency has no effect: CUDA graphs need a GPU")
        return self

    def evaluate(self, **settings: Any) -> dict[str, Any]:
        """Evaluates on validation data and prints the task's numbers, as ``detr-fast eval`` does.

        Args:
            settings: where the data are, ``data=…``, ``coco_path=…``, or ``val_ann=…, val_images=…``; `batch_size`,
                `num_workers`, `image_size`, `max_size`, `group_by_size`, `print_freq`, `eval_backend`, and `output_dir`
                to save eval.pth, eval/report.html and results.json.

        Returns:
            The losses and the task's numbers, such as "coco_eval_bbox", pycocotools' twelve.

        Raises:
            TypeError: another setting. ValueError, FileNotFoundError: no data, or data that do not fit the model.
        """
        loaded = self._trained("evaluate")
        _check_names(settings, _EVALUATION, "evaluate")
        config = replace(self.config, **settings)
        if "image_size" in settings:
            loaded.task.check_image_size(config)
        config = with_output_dir(config)
        return evaluate_loaded(replace(loaded, config=config), "the model")

    def train(
        self, output_dir: str | os.PathLike, *, callbacks: Sequence[Callback] = (), **settings: Any
    ) -> "Detector":
        """Trains on from this model's weights, as ``detr-fast train --weights`` does. This object stays as it is.

        Args:
            output_dir: gets the run's files.
            callbacks: are told of each epoch, see `detr_fast.training.callbacks`.
            settings: of `Config`, such as ``data=…, preset="finetune"``, or ``train_ann=…, train_images=…, val_ann=…,
                val_images=…, epochs=…, lr=…``. The model's own need not be given.

        Returns:
            The run's best checkpoint as a `Detector`.

        Raises:
            UsageError: settings or data that do not fit. TypeError: a setting that there is not, or that is not free.
        """
        checkpoint = with_names(self._checkpoint("train"))
        for name in {"weights", "eval"} & set(settings):
            raise TypeError(f"train starts from this model's weights and trains: {name!r} cannot be set")
        if os.fspath(output_dir) in ("", NO_OUTPUT):
            raise UsageError("train needs an output_dir: the trained model is read from it")
        own = {name: getattr(self.config, name) for name in (*_SAVED, "device", "precision", "compile")}
        # The classes are the data's. Frozen norms came with pretrained weights: their first layers are not trained.
        own |= {"num_classes": None, "thing_classes": None, "output_dir": output_dir}
        own |= {"backbone_weights": "imagenet" if self.config.backbone_norm == "frozen" else "none"}
        with tempfile.TemporaryDirectory() as folder:
            weights = Path(folder) / "weights.pth"
            save_checkpoint(checkpoint, weights)
            config = Config(**{**own, **settings, "weights": weights})
            train(config, callbacks=callbacks)
        return load(output_dir, device=config.device, precision=config.precision, compile=config.compile)

    def export(
        self, path: str | os.PathLike, format: str = "onnx", *, mask: bool = False, postprocess: bool = False
    ) -> None:
        """Writes a file that runs without this package, as ``detr-fast export`` does. `load` reads it, too.

        Args:
            path: the file, ending in .onnx, or .pt2 for the other formats.
            format: "onnx", "torch" (`torch.export.load`) or "aoti" (`torch._inductor.aoti_load_package`).
            mask: take the padding mask of a batch as an input.
            postprocess: give boxes or lines in pixels, scores and labels (category ids) instead of the raw outputs.

        Raises:
            UsageError: a format or ending that there is not, a compiled model, or a package that is not installed.
            ExportDiffersError: the file gives other numbers than the model; it is not kept.
        """
        export(self._trained("export"), path, format, mask=mask, postprocess=postprocess)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a checkpoint that `load`, ``--weights`` and the original read: weights, settings and classes."""
        save_checkpoint(self._checkpoint("save"), path)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a DETR",
    ) -> str:
        """Uploads the model as a Hugging Face folder, as ``detr-fast convert`` writes it, model card included.

        Args:
            repo_id: "name/of-the-model"; it is made where there is none.
            private: of a new one: who may see it. None: as the account is set.
            token: None: that of ``hf auth login`` or of HF_TOKEN.
            revision: the branch. None: main.
            commit_message: what the upload is called in the history.

        Returns:
            The address of the upload.

        Raises:
            UsageError: the extra `hf` is not installed, there is no token or no network, or the server refuses.
            ValueError: the model has no counterpart in transformers.
        """
        checkpoint = self._checkpoint("push_to_hub")
        return push_folder(
            checkpoint, repo_id, private=private, token=token, revision=revision, commit_message=commit_message
        )

    def _checkpoint(self, what: str) -> dict[str, Any]:
        loaded = self._trained(what)
        settings = loaded.config.to_dict()
        state: dict[str, Any] = {
            "model": loaded.model.state_dict(),
            "args": {name: settings[name] for name in _SAVED},
            "version": 1,
        }
        if loaded.categories is not None:
            state["categories"] = loaded.categories.to_dict()
        return state


def _check_names(settings: Collection[str], known: Collection[str], function: str) -> None:
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise TypeError(f"{function} takes no setting {unknown[0]!r}; expected one of {', '.join(known)}")
