"""A detector as one file that runs without this package: ONNX, torch.export's program, or AOTInductor's package."""

import copy
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from detr_fast import __version__
from detr_fast.criterion.postprocess import PostProcess
from detr_fast.data.categories import Categories
from detr_fast.data.transforms import COCO_MAX_SIZE, COCO_SCALES
from detr_fast.distributed import say
from detr_fast.errors import UsageError
from detr_fast.geometry.boxes import box_cxcywh_to_xyxy
from detr_fast.inference.loading import Loaded
from detr_fast.layers import PositionEmbeddingLearned
from detr_fast.models.detr import DETR
from detr_fast.nested_tensor import NestedTensor
from detr_fast.ops.attention import attention_reference
from detr_fast.ops.sine_position import _reference as sine_position_in_torch

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
    """Writes a detector of boxes as a file, in float32 on the CPU, and compares it with the model.

    Batch, height and width are free. Inputs: "images" [B, 3, H, W] float32, normalised; with `mask` also "mask"
    [B, H, W] bool, True = padding; with `postprocess` also "sizes" [B, 2] int64, height and width in pixels that boxes
    are scaled to. Outputs: "pred_logits" [B, Q, K] and "pred_boxes" [B, Q, 4], cx, cy, w, h in 0..1; with
    `postprocess` "boxes" [B, Q, 4], x0, y0, x1, y1 in pixels, "scores" [B, Q] and "labels" [B, Q] int64, category ids.

    Args:
        loaded: the model.
        path: the file; it is in place only once it was found equal.
        format: "onnx", "torch" (`torch.export.load`) or "aoti" (`torch._inductor.aoti_load_package`).

    Returns:
        The path.

    Raises:
        UsageError: another format or ending, a model that is not exported, or a package that is not installed.
        ExportDiffersError: on three shapes that it was not traced with the file gives other numbers, by more than 1e-4
            (of pixels: of the image's size). What was at `path` is left as it was.
    """
    path = Path(path)
    _check(loaded, path, format)
    model = copy.deepcopy(loaded.model).cpu().eval()
    categories = loaded.categories if postprocess else None
    graph = _Graph(model, mask, postprocess, categories)
    stride = loaded.task.stride(loaded.config)
    # Learned positions are a table: larger images have none.
    position = model.backbone[1]
    largest = stride * len(position.row_embed.weight) if isinstance(position, PositionEmbeddingLearned) else None
    program = _decomposed(_program(graph, stride, largest))
    metadata = json.dumps(metadata_of(loaded, graph), ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        written = Path(folder) / f"model{_SUFFIXES[format]}"
        _WRITERS[format](program, written, metadata, graph)
        _compare(_READERS[format](written), graph, model, categories, path)
        os.replace(written, path)
    return path


def metadata_of(loaded: Loaded, graph: "_Graph") -> dict[str, Any]:
    """What a user of the file must know: what goes in and comes out, preprocessing, class names."""
    config, task = loaded.config, loaded.task
    names, size = loaded.names, config.image_size or COCO_SCALES[-1]
    if loaded.categories is not None and not graph.postprocess:
        names = {label: names[category] for category, label in loaded.categories.label_of.items()}
    return {
        "made_by": f"detr_fast {__version__}",
        "inputs": graph.inputs,
        "outputs": graph.outputs,
        "preprocessing": {
            "channels": "RGB",
            "range": [0, 1],
            "mean": list(task.mean),
            "std": list(task.std),
            "shorter_side": size,
            "longer_side_at_most": config.max_size or round(COCO_MAX_SIZE * size / COCO_SCALES[-1]),
        },
        "stride": task.stride(config),
        "num_classes": config.num_classes,
        "names": {str(label): name for label, name in names.items()},
    }


def _check(loaded: Loaded, path: Path, format: str) -> None:
    if format not in FORMATS:
        raise UsageError(f"format is {format!r}; expected one of {', '.join(FORMATS)}")
    if path.suffix != _SUFFIXES[format]:
        raise UsageError(f"{path}: a file of format {format} must end in {_SUFFIXES[format]}")
    if type(loaded.model) is not DETR:
        raise UsageError(f"only detectors of boxes are exported; this one is of {loaded.task.name}")
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
        self.outputs = ["boxes", "scores", "labels"] if postprocess else ["pred_logits", "pred_boxes"]
        ids = None if categories is None else categories.to_id(torch.arange(categories.num_classes))
        self.register_buffer("ids", ids, persistent=False)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.inputs, inputs, strict=True))
        samples = NestedTensor(given["images"], given["mask"]) if self.mask else given["images"]
        outputs = self.model(samples)
        if not self.postprocess:
            return outputs["pred_logits"], outputs["pred_boxes"]
        # As `PostProcess`, whose checks would fix the batch's size.
        scores, labels = outputs["pred_logits"].softmax(-1)[..., :-1].max(-1)
        height, width = given["sizes"].to(scores.dtype).unbind(1)
        boxes = box_cxcywh_to_xyxy(outputs["pred_boxes"]) * torch.stack((width, height, width, height), 1)[:, None]
        return boxes, scores, labels if self.ids is None else self.ids[labels]

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
    program = program.run_decompositions(table)
    left = {str(node.target) for node in program.graph.nodes if str(node.target).startswith("detr_fast")}
    if left:
        raise NotImplementedError(f"no plain form is known of {', '.join(sorted(left))}")
    return program


def _write_onnx(program: ExportedProgram, path: Path, metadata: str, graph: _Graph) -> None:
    written = torch.onnx.export(
        program, (), dynamo=True, input_names=graph.inputs, output_names=graph.outputs, verbose=False
    )
    written.model.metadata_props["detr_fast"] = metadata
    written.save(path)


def _write_torch(program: ExportedProgram, path: Path, metadata: str, graph: _Graph) -> None:
    torch.export.save(program, path, extra_files={"detr_fast": metadata})


def _write_aoti(program: ExportedProgram, path: Path, metadata: str, graph: _Graph) -> None:
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs={"aot_inductor.metadata": {"detr_fast": metadata}}
    )


Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def _read_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(inputs):
        fed = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, fed)]

    return run


def _read_torch(path: Path) -> Run:
    module = torch.export.load(path).module()
    return lambda inputs: module(*inputs)


def _read_aoti(path: Path) -> Run:
    package = torch._inductor.aoti_load_package(str(path))
    return lambda inputs: package(*inputs)


_WRITERS = {"onnx": _write_onnx, "torch": _write_torch, "aoti": _write_aoti}
_READERS = {"onnx": _read_onnx, "torch": _read_torch, "aoti": _read_aoti}


@torch.no_grad()
def _compare(run: Run, graph: _Graph, model: nn.Module, categories: Categories | None, path: Path) -> None:
    """Raises ExportDiffersError unless the file gives what the model and `PostProcess` give."""
    largest = 0.0
    for shape in _COMPARED:
        inputs = graph.example(*shape)
        given = dict(zip(graph.inputs, inputs, strict=True))
        outputs = model(NestedTensor(given["images"], given["mask"]) if graph.mask else given["images"])
        expected, scales = [outputs["pred_logits"], outputs["pred_boxes"]], [1.0, 1.0]
        if graph.postprocess:
            results = PostProcess()(outputs, given["sizes"])
            expected = [torch.stack([result[name] for result in results]) for name in graph.outputs]
            if categories is not None:
                expected[2] = categories.to_id(expected[2])
            scales = [float(given["sizes"].max()), 1.0, 1.0]
        try:
            got = run(inputs)
        except Exception as error:
            raise ExportDiffersError(f"{path} is not written: it does not run on images of shape {shape}") from error
        for name, value, right, scale in zip(graph.outputs, got, expected, scales, strict=True):
            same = value.shape == right.shape
            difference = float(((value - right) / scale).abs().max()) if same else float("inf")
            if not difference <= TOLERANCE:
                raise ExportDiffersError(
                    f"{path} is not written: its {name} differs from the model's by {difference:.1e} on images of "
                    f"shape {shape}; at most {TOLERANCE:.0e} is allowed"
                )
            largest = max(largest, difference)
    say(f"{path}: equal to the model on {len(_COMPARED)} other shapes, largest difference {largest:.1e}")
