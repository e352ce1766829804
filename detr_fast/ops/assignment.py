"""`assign`: exact assignment of queries to targets for many images and decoder layers at once."""

import numpy as np
import torch

from detr_fast.ops._checks import check_tensor, is_integer
from detr_fast.ops._dispatch import calls_plainly, use_kernel

# The kernel keeps a problem's columns in registers; larger problems go to the host, even from a GPU.
_LARGEST_KERNEL_SIDE = 4096

SOLVED, INVALID, INFEASIBLE, TOO_LARGE = range(4)
_EXPLANATIONS = {
    INVALID: "has NaN or -inf among its costs",
    INFEASIBLE: "has no complete assignment of finite cost",
}


def assign(cost: torch.Tensor, offsets: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give every target its own query at the smallest total cost, for each image and layer.

    An image with more targets than queries gives every query a target. The total cost equals that of
    ``scipy.optimize.linear_sum_assignment`` (float64 inside); ties may be broken differently. A cost of +inf forbids
    the pair. On CUDA nothing waits for the device, except above 4096 queries or targets per image, where SciPy does the
    work. Not differentiable.

    Args:
        cost: [L, T, Q] float32 or float64, any strides: layers, targets of all images one after another, queries.
        offsets: [B + 1] int64 on the same device, from 0 to T: image b has the targets offsets[b] to
            offsets[b + 1] - 1, or none. Checked on the CPU only.
        largest: at least the most targets that an image has.

    Returns:
        query [L, T] int64, the query of each target, -1 where it has none; and status [L, B] int32 of each problem:
        0 = solved; 1 = a cost is NaN or -inf; 2 = +inf leaves no complete assignment; 3 = more than `largest` targets.
        The targets of an unsolved problem have no query.

    Raises:
        TypeError: `cost` is not a float32 or float64 tensor, `offsets` not an int64 tensor, `largest` not an integer.
        ValueError: a shape or device does not fit, `largest` is negative; on the CPU also if offsets do not fit, or a
            problem has no solution (outside `torch.compile`).

    Source: Crouse 2016, "On implementing 2D rectangular assignment algorithms".
    """
    _check(cost, offsets, largest)
    query, status = (_forward if calls_plainly(cost) else _assign)(cost, offsets, largest)
    if status.device.type == "cpu" and not torch.compiler.is_compiling() and type(status) is torch.Tensor:
        failed = status.nonzero()
        if len(failed):
            layer, image = failed[0].tolist()
            reason = _EXPLANATIONS[int(status[layer, image])]
            raise ValueError(f"no assignment: image {image} of layer {layer} {reason}")
    return query, status


def assign_reference(cost: torch.Tensor, offsets: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`assign` by SciPy on the host; a problem without a solution does not raise, its status tells."""
    _check(cost, offsets, largest)
    return _reference(cost, offsets, largest)


def _check(cost, offsets, largest) -> None:
    for name, tensor, shape in (("cost", cost, "layers, targets, queries"), ("offsets", offsets, "images + 1")):
        check_tensor(name, tensor, f" [{shape}]")
    if not is_integer(largest):
        raise TypeError(f"largest is a {type(largest).__name__}; expected an integer")
    if cost.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"cost must be float32 or float64; got {cost.dtype}")
    if cost.dim() != 3:
        raise ValueError(f"cost must be [layers, targets, queries]; got shape {tuple(cost.shape)}")
    if offsets.dtype != torch.int64:
        raise TypeError(f"offsets must be int64; got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] == 0:
        raise ValueError(f"offsets must be [images + 1]; got shape {tuple(offsets.shape)}")
    if offsets.device != cost.device:
        raise ValueError(f"cost and offsets must be on one device; got {cost.device} and {offsets.device}")
    if largest < 0:
        raise ValueError(f"largest must not be negative; got {largest}")
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling() and type(offsets) is torch.Tensor:
        steps = offsets.diff()
        if offsets[0] != 0 or offsets[-1] != cost.shape[1] or (steps < 0).any() or (steps > largest).any():
            raise ValueError(
                f"offsets must go from 0 to the number of targets, {cost.shape[1]}, in steps of 0 to `largest`, "
                f"{largest}; got {offsets.tolist()}"
            )


def _reference(cost, offsets, largest):
    from scipy.optimize import linear_sum_assignment  # half a second

    layers, _, num_queries = cost.shape
    costs, bounds = cost.detach().cpu().numpy(), offsets.tolist()
    query = np.full(costs.shape[:2], -1, dtype=np.int64)
    status = np.zeros((layers, len(bounds) - 1), dtype=np.int32)
    is_valid = (costs > -np.inf).all(axis=2)  # [L, T]; False for NaN, too
    for layer in range(layers):
        for image, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            if stop - start > largest:
                status[layer, image] = TOO_LARGE
            elif not is_valid[layer, start:stop].all():
                status[layer, image] = INVALID
            else:
                try:
                    # With queries as rows, as the original calls it: the same choice among equals.
                    rows, columns = linear_sum_assignment(costs[layer, start:stop].T)
                except ValueError:  # the only one left: infeasible
                    status[layer, image] = INFEASIBLE
                else:
                    query[layer, start + columns] = rows
    return torch.from_numpy(query).to(cost.device), torch.from_numpy(status).to(cost.device)


def _forward(cost: torch.Tensor, offsets: torch.Tensor, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    if not use_kernel(cost.device, "assign") or max(cost.shape[2], largest) > _LARGEST_KERNEL_SIDE:
        return _reference(cost, offsets, largest)
    from detr_fast.kernels.assignment import assignment_forward

    query, status = _empty_outputs(cost, offsets)
    assignment_forward(cost.contiguous(), offsets.contiguous(), largest, query=query, status=status)
    return query, status


_assign = torch.library.custom_op("detr_fast::assign", _forward, mutates_args=())


@_assign.register_fake
def _assign_fake(cost, offsets, largest):
    return _empty_outputs(cost, offsets)


def _empty_outputs(cost, offsets) -> tuple[torch.Tensor, torch.Tensor]:
    """query [L, T] and status [L, B], contiguous."""
    query = cost.new_empty(cost.shape[:2], dtype=torch.int64)
    return query, cost.new_empty((cost.shape[0], offsets.shape[0] - 1), dtype=torch.int32)


@_assign.register_vmap
def _assign_vmap(info, in_dims, *args):
    raise NotImplementedError("assign does not support vmap: it takes many problems as it is")
