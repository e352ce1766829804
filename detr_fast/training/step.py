"""The training step: how a model is laid out, computed and updated. The trainer and the benchmark build it here."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from detr_fast.config import Config
from detr_fast.distributed import is_dist_avail_and_initialized
from detr_fast.nested_tensor import NestedTensor
from detr_fast.training.casts import CastWeights
from detr_fast.training.graphs import Graphs
from detr_fast.training.optim import build_optimizer
from detr_fast.training.regions import compile_regions

# The name of DistributedDataParallel's switch, which torch 2.14 has renamed.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(nn.parallel.DistributedDataParallel).parameters
)

# The names are `detr_fast.config.PRECISIONS`.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(eq=False)
class TrainingStep:
    """All that a step needs. `losses` and a backward pass, then `optimizer_step`.

    Attributes:
        model: on `device`; may be wrapped in DistributedDataParallel.
        criterion: returns the losses by name; its `weight_dict` says which are summed, and with what weight.
        optimizer: of the model's trained parameters.
        device: where to compute.
        precision: a key of `PRECISIONS`; autocast in all but "fp32".
        max_norm: clip the gradients' norm; 0 does not clip.
        scaler: of the loss, for "fp16" and only there.
        call: calls the model with a NestedTensor; None: directly.

    Raises:
        ValueError: an unknown precision, or fp16 without a scaler.
    """

    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str = "fp32"
    max_norm: float = 0.0
    scaler: GradScaler | None = None
    call: Callable[[NestedTensor], Any] | None = None
    dtype: torch.dtype = field(init=False)

    def __post_init__(self):
        self.dtype = autocast_dtype(self.precision)
        if (self.precision == "fp16") != (self.scaler is not None):
            raise ValueError(
                f"precision fp16, and only it, needs a scaler; got {self.precision} and {type(self.scaler).__name__}"
            )
        self._sum = LossSum(self.criterion.weight_dict)
        self.parameters = list(self.model.parameters())

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def outputs(self, samples: NestedTensor) -> dict:
        """The model's outputs."""
        with self.autocast():
            return outputs_of(self.model if self.call is None else self.call, samples)

    def losses(self, outputs: Mapping[str, Any], targets) -> "Losses":
        """The criterion's losses and their sum."""
        return self._sum(self.criterion(outputs, targets))

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()


def build_step(
    model: nn.Module,
    criterion: nn.Module,
    config: Config,
    device: torch.device,
    say: Callable[[str], None],
    *,
    channels_last: bool | None = None,
) -> TrainingStep:
    """Moves the model to `device`, lays its weights out as its convolutions want them, and makes what trains it.

    Args:
        model: with its weights loaded.
        criterion: on any device.
        config: settings of the optimiser, `precision` (chosen, not "auto"), `clip_max_norm`, `compile`, `graphs`.
        device: where to train.
        say: takes a line for the user, where something could not be compiled or recorded.
        channels_last: convolution weights in channels-last memory, as the loader's images are; None: where
            `wants_channels_last` says so.
    """
    model.to(device)
    criterion.to(device)
    if wants_channels_last(device) if channels_last is None else channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config)
    scaler = GradScaler(device.type) if config.precision == "fp16" else None
    if config.compile:
        compile_regions(model, say)
    step = TrainingStep(model, criterion, optimizer, device, config.precision, config.clip_max_norm, scaler)
    if step.dtype != torch.float32 and not config.compile:  # compiled code has the casts in its kernels
        step.call = CastWeights(model, step.dtype)
    if config.graphs:
        reason = why_without_graphs(config, device)
        if reason is None:
            step.call = Graphs(model, say, step.call)
        else:
            say(f"--graphs has no effect: {reason}")
    return step


def wants_channels_last(device: torch.device) -> bool:
    """Whether convolutions on `device` are faster in channels-last memory: cuDNN's and, on a CPU, oneDNN's are."""
    return device.type == "cuda" or (device.type == "cpu" and torch.backends.mkldnn.is_available())


def why_without_graphs(config: Config, device: torch.device) -> str | None:
    """Why `--graphs` cannot be honoured; None: it can."""
    if device.type != "cuda":
        return "CUDA graphs need a GPU"
    if config.accumulate_steps > 1:
        return "the graphs' gradients cannot be added up over several batches (--accumulate_steps)"
    if is_dist_avail_and_initialized():
        return "several processes train, which exchange gradients during the backward pass"
    return None


def distributed(step: TrainingStep) -> None:
    """Wraps the step's model so that the processes exchange its gradients."""
    model, device = step.model, step.device
    # The original's default has every forward pass take over the first process's statistics. Frozen ones are the same
    # everywhere and need no exchange.
    has_statistics = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    # A channels-last 1x1 weight and its gradient may differ in strides that no element depends on; torch warns of them.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    step.model = nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{_SYNC_BUFFERS: has_statistics},
    )
    if isinstance(step.call, CastWeights):
        step.call.model = step.model


def optimizer_step(step: TrainingStep) -> Tensor:
    """Clips and steps. Returns a 0-dimensional bool: False if the gradients are not finite; no weight moves then.

    With a scaler such gradients are its business (it lowers its scale), and True is returned.
    """
    optimizer, scaler = step.optimizer, step.scaler
    if scaler is not None:
        scaler.unscale_(optimizer)
    parameters = [p for p in step.parameters if p.grad is not None]
    if step.max_norm > 0:
        norm = nn.utils.clip_grad_norm_(parameters, step.max_norm)
    else:
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if scaler is not None:
        scaler.step(optimizer)
        scaler.update()
        return torch.ones((), dtype=torch.bool, device=norm.device)
    finite = torch.isfinite(norm)
    # The fused optimisers' own way to skip a step without asking the host; GradScaler uses it, too.
    optimizer.found_inf = (~finite).float()
    optimizer.step()
    del optimizer.found_inf
    return finite


@dataclass(frozen=True)
class Losses:
    """A step's losses.

    Attributes:
        by_name: as the criterion returned them.
        total: the weighted sum, 0-dimensional.
        weighted: each loss of the sum times its weight, [n], without gradient.
        names: theirs.
    """

    by_name: Mapping[str, Tensor]
    total: Tensor
    weighted: Tensor
    names: tuple[str, ...]

    def for_log(self) -> dict[str, Tensor]:
        """Values under the original's names."""
        named = {"loss": self.total, **dict(zip(self.names, self.weighted.unbind(), strict=True))}
        named |= {f"{name}_unscaled": value for name, value in self.by_name.items()}
        if "class_error" in self.by_name:
            named["class_error"] = self.by_name["class_error"]
        return named


class LossSum:
    """Sums the losses that have a weight: one product with the vector of weights, which is made once.

    Each loss's gradient is its weight, as in a sum of products; only the sum's last bit depends on the order.

    Args:
        weight_dict: the weight of each loss by name; further names on either side are passed over.
    """

    def __init__(self, weight_dict: Mapping[str, float]):
        self._weight_dict = weight_dict
        self._vectors: dict[tuple, Tensor] = {}

    def __call__(self, by_name: Mapping[str, Tensor]) -> Losses:
        names = tuple(name for name in by_name if name in self._weight_dict)
        values = torch.stack([by_name[name] for name in names])
        numbers = tuple(self._weight_dict[name] for name in names)
        key = (numbers, values.dtype, values.device)
        if key not in self._vectors:
            self._vectors[key] = torch.tensor(numbers, dtype=values.dtype, device=values.device)
        weighted = values * self._vectors[key]
        return Losses(by_name, weighted.sum(), weighted.detach(), names)


def outputs_of(model: Callable[[NestedTensor], Any], samples: NestedTensor) -> dict:
    """The model's outputs; LETR's second stage returns something beside them."""
    outputs = model(samples)
    return outputs[0] if isinstance(outputs, tuple) else outputs


def autocast_dtype(precision: str) -> torch.dtype:
    """The dtype of a precision.

    Raises:
        ValueError: an unknown one.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return PRECISIONS[precision]
