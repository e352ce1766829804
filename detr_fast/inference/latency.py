"""Low latency on a GPU: the forward pass of one image is a single launch of a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from detr_fast.nested_tensor import NestedTensor
from detr_fast.training.graphs import Graphs, Passes, tensors_of

_WARM_UP = 3  # calls before the recording: libraries choose their algorithms, and autotuning ends


class ForwardGraphs(Graphs):
    """Calls a model in evaluation mode, by replaying recorded graphs where it can; see `Graphs`.

    Outputs are copies, which stay valid. Values that are written into weights and buffers count in the next call. Where
    one of them was replaced or moved, all graphs are dropped and recorded anew. One thread at a time.

    Args:
        model: called with a NestedTensor, without gradients.
        say: takes a line for the user.
        limit: the most kinds of batches to be recorded. Each keeps its images and its outputs; what lies between they
            share.
    """

    flag, runs = "low_latency", "images are computed"
    in_training = False

    def __init__(self, model: nn.Module, say: Callable[[str], None], limit: int = 16):
        super().__init__(model, say, limit=limit, record=self._recorded)
        self._hooks: list[dict] = []  # of the recorded model's modules
        # Each module and weight that the graphs use: what keeps it, and where a weight is.
        self._parts: list[tuple[dict[str, Any], str, nn.Module | Tensor, int]] = []

    def __call__(self, samples: NestedTensor) -> Any:
        if any(own.get(name) is not value or _place(value) != at for own, name, value, at in self._parts):
            self._drop()
            self._parts = []
        if any(self._hooks):  # came after the recording; a graph would not call it
            self.eager += 1
            return self.call(samples)
        return super().__call__(samples)

    def _recorded(self, model: nn.Module, call: Passes, samples: NestedTensor, pool: Any) -> Passes:
        if not self._parts:
            self._parts = [
                (own, name, value, _place(value))
                for module in model.modules()
                for own in (module._modules, module._parameters, module._buffers)
                for name, value in own.items()
                if value is not None
            ]
            self._hooks = [h for module in model.modules() for h in (module._forward_hooks, module._forward_pre_hooks)]
        with torch.inference_mode(False):  # else only calls in that mode could write into the graph's images
            return record_forward(model, call, samples, pool)


def _place(part: nn.Module | Tensor) -> int:
    return part.data_ptr() if isinstance(part, Tensor) else 0


def record_forward(model: nn.Module, call: Passes, samples: NestedTensor, pool: Any) -> Passes:
    """Records the forward pass for batches like `samples`, in the current autocast mode.

    Args:
        model: in evaluation mode.
        call: calls it with a NestedTensor.
        samples: a batch.
        pool: of memory, see `torch.cuda.graph_pool_handle`.

    Returns:
        A callable that takes a NestedTensor and gives copies of the outputs.

    Raises:
        RuntimeError: the pass cannot be recorded, for instance because something in it waits for the host.
    """
    inputs = tuple(tensor.clone() for tensor in tensors_of(samples))
    mask = inputs[1] if len(inputs) > 1 else None
    device = inputs[0].device

    def forward():
        return call(NestedTensor(inputs[0], mask, no_padding=mask is None))

    cached = torch.is_autocast_cache_enabled()
    # A cast that was cached outside would not be in the graph.
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.no_grad():
            beside = torch.cuda.Stream(device)
            beside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(beside):
                for _ in range(_WARM_UP):
                    forward()
            torch.cuda.current_stream(device).wait_stream(beside)
            graph = torch.cuda.CUDAGraph()
            # A server's other threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=beside, capture_error_mode="thread_local"):
                outputs = forward()
    except BaseException:
        _end_capture_of_generator(device)
        raise
    finally:
        torch.set_autocast_cache_enabled(cached)

    def replay(samples: NestedTensor) -> Any:
        for own, given in zip(inputs, tensors_of(samples), strict=True):
            own.copy_(given)
        graph.replay()
        return pytree.tree_map_only(Tensor, torch.clone, outputs)

    return replay


def _end_capture_of_generator(device: torch.device) -> None:
    """After a capture that failed, the random generator believes that it goes on, and refuses to draw elsewhere."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
        fresh = torch.Generator(device).manual_seed(generator.initial_seed())
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
