"""Processes started by torchrun: who am I, and exchanging small things.

Every function also works in a single process without torchrun, where it does the obvious thing.
"""

import os
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def is_dist_avail_and_initialized() -> bool:
    """Whether this process belongs to an initialised process group."""
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    """Number of processes, 1 outside a process group."""
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def get_rank() -> int:
    """Number of this process among all, 0 outside a process group."""
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def is_main_process() -> bool:
    """Whether this is the process that prints and writes files."""
    return get_rank() == 0


def say(text: str) -> None:
    """Prints in the first process only."""
    if is_main_process():
        print(text, flush=True)


def barrier() -> None:
    """Wait until every process has come here."""
    if is_dist_avail_and_initialized():
        dist.barrier()


@contextmanager
def first_process_first():
    """Runs the body in each machine's first process before all others, so that one downloads and the rest read."""
    if not is_dist_avail_and_initialized():
        yield
        return
    is_first = int(os.environ.get("LOCAL_RANK", get_rank())) == 0
    if not is_first:
        dist.barrier()
    try:
        yield
    finally:
        if is_first:
            dist.barrier()


def all_gather(data) -> list:
    """Every process' object, in the order of the ranks.

    Args:
        data: any object that can be pickled.
    """
    if get_world_size() == 1:
        return [data]
    gathered = [None] * get_world_size()
    dist.all_gather_object(gathered, data)
    return gathered


@torch.no_grad()
def reduce_dict(input_dict: dict[str, Tensor], average: bool = True) -> dict[str, Tensor]:
    """Mean or sum over the processes of every value, in one reduction.

    Args:
        input_dict: 0-dimensional tensors (or all of one shape); every process has the same keys.
        average: mean if true, sum otherwise.

    Returns:
        A dict with the same keys in the same order; in a single process ``input_dict`` itself.
    """
    if get_world_size() == 1:
        return input_dict
    names = sorted(input_dict)  # the order of insertion may differ between processes
    values = torch.stack([input_dict[name] for name in names])
    dist.all_reduce(values)
    if average:
        values = values / get_world_size()
    reduced = dict(zip(names, values, strict=True))
    return {name: reduced[name] for name in input_dict}


class Processes(NamedTuple):
    """What torchrun has started.

    Attributes:
        rank, world_size: number of this process, and of all.
        local_rank: number of this process on its machine, which is that of its GPU; None outside torchrun.
        backend: "nccl" or "gloo"; None outside torchrun.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None
    backend: str | None = None


def join_processes(device: str = "cuda", dist_url: str = "env://") -> Processes:
    """Joins torchrun's process group, if there is one.

    Reads RANK, WORLD_SIZE and LOCAL_RANK, which torchrun sets. With a CUDA device and a GPU present, the backend is
    NCCL and the process takes the GPU of its local rank; otherwise the backend is gloo.

    Args:
        device: where to compute.
        dist_url: where the processes meet.

    Raises:
        ValueError: if torchrun's variables are incomplete, or there are fewer GPUs than processes on this machine.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return Processes()
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name not in os.environ]
    if missing:
        raise ValueError(f"torchrun sets RANK, WORLD_SIZE and LOCAL_RANK together, {', '.join(missing)} is missing")

    rank, world_size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    use_cuda = torch.device(device).type == "cuda" and torch.cuda.is_available()
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: "
                "start at most one process per GPU (torchrun --nproc-per-node)"
            )
        torch.cuda.set_device(local_rank)
    backend = "nccl" if use_cuda else "gloo"
    dist.init_process_group(backend, init_method=dist_url, rank=rank, world_size=world_size)
    dist.barrier()
    say(f"distributed: {world_size} processes, backend {backend}")
    # One store serves all of torchrun's restarts then, with the addresses that dead processes have left in it.
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0":
        say(
            "torchrun may restart these processes: without TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment new "
            "processes may wait for dead ones"
        )
    return Processes(rank, world_size, local_rank, backend)


def init_distributed_mode(args: Any) -> None:
    """`join_processes` as the original calls it.

    Args:
        args: gets ``distributed``, ``rank``, ``world_size``, ``gpu`` (the local rank, None outside torchrun) and
            ``dist_backend`` (None outside torchrun). Read if there: ``device`` ("cuda") and ``dist_url`` ("env://").

    Raises:
        ValueError: as `join_processes`.
    """
    args.distributed, args.rank, args.world_size, args.gpu, args.dist_backend = False, 0, 1, None, None
    given = {name: value for name, value in vars(args).items() if name in ("device", "dist_url")}
    processes = join_processes(**given)
    args.distributed = processes.local_rank is not None
    args.rank, args.world_size, args.gpu, args.dist_backend = processes
