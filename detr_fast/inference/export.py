"""A model as one file that runs without this package: ONNX, torch.export's program, or AOTInductor's package."""

import copy
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from detr_fast import __version__
from detr_fast.data.categories import Categories
from detr_fast.data.transforms import RandomResize
from detr_fast.distributed import say
from detr_fast.errors import UsageError
from detr_fast.geometry.boxes import box_cxcywh_to_xyxy
from detr_fast.inference.exported import ENTRY, READERS, SETTINGS, Run, with_category_ids
from detr_fast.inference.loading import Loaded
from detr_fast.layers import PositionEmbeddingLearned
from detr_fast.nested_tensor import NestedTensor
from detr_fast.ops.attention import attention_reference
from detr_fast.ops.joint_softmax import joint_softmax_reference
from detr_fast.ops.sine_position import _reference as sine_position_in_torch
from detr_fast.training.engine import outputs_of

FORMATS = ("onnx", "torch", "aoti")
TOLERANCE = 1e-4
_SUFFIXES = {"onnx": ".onnx", "torch": ".pt2", "aoti": ".pt2"}
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
# Batch, height and width: those of the example that is traced, and others that the file is compared on.
_TRACED = (2, 128, 160)
_COMPARED = ((1, 160, 96), (3, 97, 131), (2, 192, 224))


class ExportDiffersError(RuntimeError):
    """The exported file gives other numbers than the model, or does not run."""


def export(
    loaded: Loaded, path: str | os.PathLike, format: str, *, mask: bool = False, postprocess: bool = False
) -> Path:
    """Writes a model as a file, in float32 on the CPU, and compares it with the model.

    Batch, height and width are free. Inputs: "images" [B, 3, H, W] float32, normalised; with `mask` also "mask"
    [B, H, W] bool, True = padding; with `postprocess` also "sizes" [B, 2] int64, height and width in pixels that boxes
    and lines are scaled to. Outputs: "pred_logits" [B, Q, K] and "pred_boxes" [B, Q, 4], cx, cy, w, h in 0..1, or of
    lines "pred_lines" [B, Q, 4], x1, y1, x2, y2 in 0..1; with `postprocess` "boxes" [B, Q, 4], x0, y0, x1, y1 in
    pixels, or "lines", "scores" [B, Q] and "labels" [B, Q] int64, category ids. Of a model with masks last
    "pred_masks" [B, Q, h, w], logits at a quarter of the batch's size, in either case.

    Args:
        loaded: the model.
        path: the file; it is in place only once it was found equal.
        format: "onnx", "torch" (`torch.export.load`) or "aoti" (`torch._inductor.aoti_load_package`).

    Returns:
        The path.

    Raises:
        UsageError: another format or ending, a compiled model, or a package that is not installed.
        ExportDiffersError: on three shapes that it was not traced with the file gives other numbers, by more than 1e-4
            (of pixels: of the image's size). What was at `path` is left as it was.
    """
    path = Path(path)
    _check(loaded, path, format)
    model = copy.deepcopy(loaded.model).cpu().eval()
    graph = _Graph(model, mask, postprocess, loaded.categories)
    stride = loaded.task.stride(loaded.config)
    # Learned positions are a table: larger images have none.
    learned = [module for module in model.modules() if isinstance(module, PositionEmbeddingLearned)]
    largest = stride * len(learned[0].row_embed.weight) if learned else None
    program = _decomposed(_program(graph, stride, largest))
    metadata = json.dumps(metadata_of(loaded, graph), ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        written = Path(folder) / f"model{_SUFFIXES[format]}"
        _WRITERS[format](program, written, metadata, graph)
        _compare(READERS[format](written)[0], graph, loaded, path)
        os.replace(written, path)
    return path


def metadata_of(loaded: Loaded, graph: "_Graph") -> dict[str, Any]:
    """What a user of the file must know: what goes in and comes out, preprocessing, class names."""
    config, task = loaded.config, loaded.task
    names, settings = loaded.names, config.to_dict()
    if loaded.categories is not None and not graph.postprocess:
        names = {label: names[category] for category, label in loaded.categories.label_of.items()}
    resize = next(step for step in task.resize(config).transforms if isinstance(step, RandomResize))
    return {
        "made_by": f"detr_fast {__version__}",
        "task": task.name,
        "inputs": graph.inputs,
        "outputs": graph.outputs,
        "preprocessing": {
            "channels": "RGB",
            "range": [0, 1],
            "mean": list(task.mean),
            "std": list(task.std),
            "shorter_side": resize.sizes[0],
            "longer_side_at_most": resize.max_size,
        },
        "stride": task.stride(config),
        "num_classes": config.num_classes,
        "names": {str(label): name for label, name in names.items()},
        # For `detr_fast.load`.
        "categories": None if loaded.categories is None else loaded.categories.to_dict(),
        "settings": {name: settings[name] for name in SETTINGS},
    }


def _check(loaded: Loaded, path: Path, format: str) -> None:
    if format not in FORMATS:
        raise UsageError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    if path.suffix != _SUFFIXES[format]:
        raise UsageError(f"{path}: a file of format {format} must end in {_SUFFIXES[format]}")
    if loaded.config.compile:
        raise UsageError("a compiled model is not exported: load it without compile")
    if format == "onnx":
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
        if missing:
            raise UsageError(
                f"ONNX needs packages that are not installed, {', '.join(missing)}: pip install 'detr_fast[export]'"
            )


class _Graph(nn.Module):
    """What is exported: the model with tensors as inputs and outputs."""

    def __init__(self, model: nn.Module, mask: bool, postprocess: bool, categories: Categories | None):
        super().__init__()
        self.model = model
        self.mask = mask
        self.postprocess = postprocess
        self.inputs = ["images", *(["mask"] if mask else []), *(["sizes"] if postprocess else [])]
        with torch.no_grad():
            given = outputs_of(model, torch.zeros(1, 3, *_TRACED[1:]))
        self.geometry = "lines" if "pred_lines" in given else "boxes"
        heads = [self.geometry, "scores", "labels"] if postprocess else ["pred_logits", f"pred_{self.geometry}"]
        self.outputs = heads + (["pred_masks"] if "pred_masks" in given else [])
        ids = categories.to_id(torch.arange(categories.num_classes)) if categories and postprocess else None
        self.register_buffer("ids", ids, persistent=False)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, inputs, strict=True))
        outputs = self.of_model(given)
        if self.postprocess:
            outputs = {**outputs, **self._pixels(outputs, given["sizes"])}
        return tuple(outputs[name] for name in self.outputs)

    def of_model(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        samples: Any = NestedTensor(given["images"], given["mask"]) if self.mask else given["images"]
        return outputs_of(self.model, samples)

    def _pixels(self, outputs: Mapping[str, Tensor], sizes: Tensor) -> dict[str, Tensor]:
        """As `PostProcess` and `PostProcess_Line`, whose checks would fix the batch's size."""
        scores, labels = outputs["pred_logits"].softmax(-1)[..., :-1].max(-1)
        places = outputs[f"pred_{self.geometry}"]
        if self.geometry == "boxes":
            places = box_cxcywh_to_xyxy(places)
        height, width = sizes.to(scores.dtype).unbind(1)
        places = places * torch.stack((width, height, width, height), 1)[:, None]
        return {self.geometry: places, "scores": scores, "labels": labels if self.ids is None else self.ids[labels]}

    def example(self, batch: int, height: int, width: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(height * width)
        inputs = {
            "images": torch.randn(batch, 3, height, width, generator=generator),
            "mask": torch.zeros(batch, height, width, dtype=torch.bool),
            "sizes": torch.tensor([[height * 2, width * 2]] * batch),
        }
        inputs["mask"][-1, height * 3 // 4 :] = True
        inputs["mask"][-1, :, width * 2 // 3 :] = True
        return tuple(inputs[name] for name in self.inputs)


def _program(graph: _Graph, stride: int, largest: int | None) -> ExportedProgram:
    # At least two cells of the feature map: at one, sizes of 1 would be fixed in the graph.
    batch = Dim("batch", min=1)
    height, width = (Dim(name, min=stride + 1, max=largest) for name in ("height", "width"))
    shapes = {"images": {0: batch, 2: height, 3: width}, "mask": {0: batch, 1: height, 2: width}, "sizes": {0: batch}}
    with torch.no_grad():
        return torch.export.export(
            graph, graph.example(*_TRACED), dynamic_shapes=(tuple(shapes[name] for name in graph.inputs),)
        )


def _attention_in_torch(query, key, value, key_padding_mask, dropout_p, seed, scale, query_padding_mask=None, *lists):
    """The op `attention` without dropout. The lists of valid rows only save the kernels time."""
    out, logsumexp = attention_reference(
        query, key, value, key_padding_mask, scale=scale, query_padding_mask=query_padding_mask
    )
    # The graph was traced with the op's strides: a view of [B, L, H, D].
    return out.transpose(1, 2).contiguous().transpose(1, 2), logsumexp


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    """The program without ops of this package."""
    table = torch.export.default_decompositions()
    table[torch.ops.detr_fast.attention.default] = _attention_in_torch
    table[torch.ops.detr_fast.sine_position.default] = sine_position_in_torch
    table[torch.ops.detr_fast.joint_softmax.default] = joint_softmax_reference
    program = program.run_decompositions(table)
    left = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("detr_fast")}
    if left:
        raise NotImplementedError(f"no plain form is known of {', '.join(sorted(left))}")
    return program


def _write_onnx(program: ExportedProgram, path: Path, metadata: str, graph: _Graph) -> None:
    # It would tell of each operation with several outputs that it is left as it is.
    folding = logging.getLogger("onnxscript.optimizer._constant_folding")
    level = folding.level
    folding.setLevel(logging.ERROR)
    try:
        written = torch.onnx.export(
            program, (), dynamo=True, input_names=graph.inputs, output_names=graph.outputs, verbose=False
        )
    finally:
        folding.setLevel(level)
    written.model.metadata_props[ENTRY] = metadata
    written.save(path)


def _write_torch(program: ExportedProgram, path: Path, metadata: str, graph: _Graph) -> None:
    torch.export.save(program, path, extra_files={ENTRY: metadata})


def _write_aoti(program: ExportedProgram, path: Path, metadata: str, graph: _Graph) -> None:
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs={"aot_inductor.metadata": {ENTRY: metadata}}
    )


_WRITERS: dict[str, Callable] = {"onnx": _write_onnx, "torch": _write_torch, "aoti": _write_aoti}


@torch.no_grad()
def _compare(run: Run, graph: _Graph, loaded: Loaded, path: Path) -> None:
    """Raises ExportDiffersError unless the file gives what the model and the task's post-processors give."""
    largest = 0.0
    for shape in _COMPARED:
        inputs = graph.example(*shape)
        given = dict(zip(graph.inputs, inputs, strict=True))
        expected, scale = dict(graph.of_model(given)), 1.0
        if graph.postprocess:
            expected |= _results(loaded, expected, given["sizes"], shape[1:])
            scale = float(given["sizes"].max())
        try:
            got = run(inputs)
        except Exception as error:
            raise ExportDiffersError(f"{path} is not written: it does not run on images of shape {shape}") from error
        for name, value in zip(graph.outputs, got, strict=True):
            right = expected[name]
            # Mask logits have no scale of their own: relative to the largest.
            unit = {graph.geometry: scale, "pred_masks": max(1.0, float(right.abs().max()))}.get(name, 1.0)
            difference = float(((value - right) / unit).abs().max()) if value.shape == right.shape else float("inf")
            if not difference <= TOLERANCE:
                raise ExportDiffersError(
                    f"{path} is not written: its {name} differs from the model's by {difference:.1e} on images of "
                    f"shape {shape}; at most {TOLERANCE:.0e} is allowed"
                )
            largest = max(largest, difference)
    say(f"{path}: equal to the model on {len(_COMPARED)} other shapes, largest difference {largest:.1e}")


def _results(loaded: Loaded, outputs: dict[str, Tensor], sizes: Tensor, padded: tuple[int, int]) -> dict[str, Tensor]:
    """What the task makes of the model's outputs, with the images of a batch stacked."""
    in_batch = torch.tensor([padded] * len(sizes))
    results = loaded.task.postprocess(loaded.postprocessors, outputs, sizes, in_batch, padded)
    results = with_category_ids(results, loaded.categories)
    names = {"boxes", "lines", "scores", "labels"} & set(results[0])
    return {name: torch.stack([result[name] for result in results]) for name in names}
