"""CUDA graphs of a model's forward and backward passes: one launch where there were a thousand.

A graph is recorded for a kind of batch: shapes, dtypes, and whether there is padding. Loss and optimiser stay outside:
they depend on the number of targets. `--size_divisor` keeps the kinds few. `detr_fast.inference.latency` has graphs of
the forward pass alone.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from detr_fast.nested_tensor import NestedTensor, is_unpadded

Passes = Callable[..., Any]


class Graphs:
    """Calls a model, by replaying recorded graphs where it can.

    A kind of batch is recorded when it comes for the second time; up to `limit` kinds are, others run as always, and so
    does a model in evaluation mode. What was returned is valid until the next call: the graphs share their memory. So
    are the gradients, which must not be added up over several calls.

    Args:
        model: called with a NestedTensor; on a GPU, its parameters are not replaced from now on.
        say: takes a line for the user.
        call: how the model is called; None: directly.
        limit: the most kinds to be recorded. Each keeps its inputs, its outputs and all gradients: for R50 and 16
            images about 0.3 GB.
        record: instead of `record_passes`, for tests.

    Attributes:
        replayed, eager: calls so far, of each way.
    """

    flag, runs = "--graphs", "the steps run"  # what the lines for the user begin with
    in_training = True  # the mode in which graphs are recorded

    def __init__(
        self,
        model: nn.Module,
        say: Callable[[str], None],
        call: Passes | None = None,
        limit: int = 32,
        record: Callable[[nn.Module, Passes, NestedTensor, Any], Passes] | None = None,
    ):
        self.model, self.say, self.limit = model, say, limit
        self.call = model if call is None else call
        self._record = record_passes if record is None else record
        self._pool: Any = None
        self._passes: dict[tuple, Passes] = {}
        self._seen: Counter = Counter()
        self._works = True
        self._is_full = False
        self.replayed = self.eager = 0

    def __call__(self, samples: NestedTensor) -> Any:
        """The model's outputs."""
        passes = self._passes_for(samples) if self._works and self.model.training == self.in_training else None
        if passes is None:
            self.eager += 1
            return self.call(samples)
        self.replayed += 1
        return passes(samples)

    def _passes_for(self, samples: NestedTensor) -> Passes | None:
        kind = kind_of(samples)
        if kind in self._passes:
            return self._passes[kind]
        self._seen[kind] += 1
        if self._seen[kind] < 2:
            return None
        if len(self._passes) >= self.limit:
            if not self._is_full:
                self.say(f"{self.flag}: {self.limit} kinds of batches are recorded, further ones run without a graph")
                self._is_full = True
            return None
        hooked = name_of_hooked(self.model)
        if hooked is not None:
            self._stop(f"{hooked} has a hook, which a graph would not call")
            return None
        if self._pool is None and samples.tensors.is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            self._passes[kind] = self._record(self.model, self.call, samples, self._pool)
        except (RuntimeError, AssertionError) as error:
            self._stop(str(error).splitlines()[0] if str(error) else repr(error))
            return None
        return self._passes[kind]

    def _stop(self, reason: str) -> None:
        self._works = False
        self._drop()
        self.say(f"{self.flag}: {self.runs} without graphs: {reason}")

    def _drop(self) -> None:
        self._passes.clear()
        self._pool = None  # a pool that no graph uses any more takes no further ones


def record_passes(model: nn.Module, call: Passes, samples: NestedTensor, pool: Any) -> Passes:
    """Records forward and backward passes for batches like `samples`, in the current autocast mode.

    The random generators, trained batch norm's statistics and the gradients are as before.

    Args:
        model: whose parameters are differentiated.
        call: calls it with a NestedTensor.
        samples: a batch.
        pool: of memory, see `torch.cuda.graph_pool_handle`.

    Returns:
        A callable that takes a NestedTensor and gives the outputs, differentiable in the model's parameters.

    Raises:
        RuntimeError: the passes cannot be recorded, for instance because something in them waits for the host.
    """
    device = samples.tensors.device
    forward = _OfTensors(model, call)
    inputs = tuple(tensor.clone() for tensor in tensors_of(samples))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cached = torch.is_autocast_cache_enabled()
    with torch.random.fork_rng([device]):
        # A cast that was cached outside would not be in the graph.
        torch.set_autocast_cache_enabled(False)
        try:
            passes = torch.cuda.make_graphed_callables(forward, inputs, allow_unused_input=True, pool=pool)
        finally:
            torch.set_autocast_cache_enabled(cached)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return lambda samples: passes(*tensors_of(samples))


def kind_of(samples: NestedTensor) -> tuple:
    """What a graph is recorded for: shape, strides and dtype of images and mask (none: no padding), and autocast's
    dtype."""
    layout = tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors_of(samples))
    device = samples.tensors.device.type
    mode = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return layout, mode


def name_of_hooked(model: nn.Module) -> str | None:
    """The first module with a hook, which replaying a graph would pass over; None if there is none."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for name, module in model.named_modules():
        if any(getattr(module, kind, None) for kind in kinds):
            return name or type(model).__name__
    return None


def tensors_of(samples: NestedTensor) -> tuple[Tensor, ...]:
    """A batch's images, and its mask where there may be padding."""
    return (samples.tensors,) if is_unpadded(samples) else (samples.tensors, samples.mask)


class _OfTensors(nn.Module):
    """The model as a function of tensors, as recording wants it."""

    def __init__(self, model: nn.Module, call: Passes):
        super().__init__()
        self.model, self.call = model, call

    def forward(self, tensors: Tensor, mask: Tensor | None = None) -> Any:
        return self.call(NestedTensor(tensors, mask, no_padding=mask is None))
