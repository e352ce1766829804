"""Files that `export` wrote, read again: ONNX, torch.export's program, and AOTInductor's package."""

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.config import Config
from detr_fast.data.categories import Categories
from detr_fast.errors import UsageError
from detr_fast.inference.names import coco_names
from detr_fast.nested_tensor import NestedTensor
from detr_fast.tasks import Task, tasks
from detr_fast.tasks.base import Result

# The entry of a file's metadata that says, in JSON, what is in it.
ENTRY = "detr_fast"
# Settings that prediction needs, besides those that the program has fixed.
SETTINGS = ("dataset_file", "masks", "num_classes", "thing_classes")

Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Exported:
    """An exported file that is ready to run. It has what `Loaded` has, except the model and its criterion.

    Attributes:
        path: the file.
        task: what it detects.
        config: the settings that prediction reads.
        categories: the classes; None where the checkpoint did not say.
        postprocessors: see `Task.postprocessors`.
        inputs, outputs: their names, in order.
        run: tensors of the inputs → tensors of the outputs, all on the CPU.
    """

    path: Path
    task: Task
    config: Config
    categories: Categories | None
    postprocessors: dict[str, nn.Module]
    inputs: Sequence[str]
    outputs: Sequence[str]
    run: Run

    @property
    def names(self) -> dict[int, str]:
        """Category id → name, as `Loaded.names`."""
        if self.categories is None:
            return coco_names(self.config.num_classes)
        return dict(zip(self.categories.ids, self.categories.names, strict=True))

    def detect(self, samples: NestedTensor, orig_sizes: Tensor, sizes: Tensor) -> list[Result]:
        """A batch's results, as `Task.postprocess` returns them, but "labels" are category ids.

        Args:
            samples: normalised images.
            orig_sizes, sizes: [B, 2] height and width of the files, and of the images in the batch without padding.
        """
        given = {"images": samples.tensors, "mask": samples.mask, "sizes": orig_sizes}
        values = self.run([given[name] for name in self.inputs])
        outputs = dict(zip(self.outputs, values, strict=True))
        if "scores" not in outputs:
            padded_size = samples.tensors.shape[-2:]
            results = self.task.postprocess(self.postprocessors, outputs, orig_sizes, sizes, padded_size)
            return with_category_ids(results, self.categories)
        masks = outputs.pop("pred_masks", None)
        results = [dict(zip(outputs, of_image, strict=True)) for of_image in zip(*outputs.values(), strict=True)]
        if masks is None:
            return results
        return self.postprocessors["segm"](results, {"pred_masks": masks}, orig_sizes, sizes)


def with_category_ids(results: list[Result], categories: Categories | None) -> list[Result]:
    """Results with "labels" that are category ids; without `categories` the model's labels are."""
    if categories is None:
        return results
    return [{**result, "labels": categories.to_id(result["labels"])} for result in results]


def read_exported(path: Path, device: str, settings: Mapping[str, Any]) -> Exported:
    """A file that `export` wrote.

    Args:
        path: the file, .onnx or .pt2.
        device: where to run it: "auto" or "cpu".
        settings: `image_size` and `max_size`, to see images at another size than the metadata says.

    Raises:
        UsageError: another device or setting; onnxruntime is not installed.
        ValueError: the file cannot be read, or `export` did not write it.
    """
    if device not in ("auto", "cpu"):
        raise UsageError(f"{path} is an exported file, which runs on the CPU here; got device {device!r}")
    other = sorted(set(settings) - {"image_size", "max_size"})
    if other:
        raise UsageError(f"{path} is an exported file: only image_size and max_size can be set, not {other[0]}")
    try:
        run, metadata = READERS[format_of(path)](path)
    except (UsageError, MemoryError):
        raise
    except Exception as error:  # what they raise on other files differs from reader to reader
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"{str(path)!r} cannot be read: {reason}") from error
    if not metadata:
        raise ValueError(f"{str(path)!r} is not of detr-fast export: its metadata has no entry {ENTRY!r}")
    about = json.loads(metadata)
    task = next((task for task in tasks() if task.name == about.get("task")), None)
    if task is None:
        raise ValueError(f"{str(path)!r} is of another version of this package; export it again")
    steps = about["preprocessing"]
    size = {"image_size": steps["shorter_side"], "max_size": steps["longer_side_at_most"]}
    if settings:
        size = {"image_size": None, "max_size": None, **settings}
    config = Config.from_mapping({**about["settings"], **size, "device": "cpu", "precision": "fp32"})
    categories = None if about["categories"] is None else Categories.from_dict(about["categories"])
    postprocessors = task.postprocessors(config, about["num_classes"])
    return Exported(path, task, config, categories, postprocessors, about["inputs"], about["outputs"], run)


def format_of(path: Path) -> str:
    """ "onnx", "torch" or "aoti"; the last two have the same ending."""
    if path.suffix == ".onnx":
        return "onnx"
    with zipfile.ZipFile(path) as archive:
        return "aoti" if any("/aotinductor/" in name for name in archive.namelist()) else "torch"


def _read_onnx(path: Path) -> tuple[Run, str]:
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(f"{path} needs onnxruntime: pip install 'detr_fast[export]'") from error
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(inputs):
        fed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, fed)]

    return run, session.get_modelmeta().custom_metadata_map.get(ENTRY, "")


def _read_torch(path: Path) -> tuple[Run, str]:
    extra = {ENTRY: ""}
    module = torch.export.load(path, extra_files=extra).module()
    return lambda inputs: module(*inputs), extra[ENTRY]


def _read_aoti(path: Path) -> tuple[Run, str]:
    package = torch._inductor.aoti_load_package(str(path))
    return lambda inputs: package(*inputs), package.get_metadata().get(ENTRY, "")


READERS: dict[str, Callable[[Path], tuple[Run, str]]] = {"onnx": _read_onnx, "torch": _read_torch, "aoti": _read_aoti}
