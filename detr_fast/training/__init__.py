"""Training: the run, one epoch, checkpoints, logs."""

from detr_fast.distributed import (
    all_gather,
    barrier,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_dist_avail_and_initialized,
    is_main_process,
    reduce_dict,
)

__all__ = [
    "all_gather",
    "barrier",
    "get_rank",
    "get_world_size",
    "init_distributed_mode",
    "is_dist_avail_and_initialized",
    "is_main_process",
    "reduce_dict",
]
