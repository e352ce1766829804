"""The process helpers, alone and in two processes started as torchrun starts them."""

import argparse
import os

import pytest
import torch

from detr_fast.distributed import join_processes
from detr_fast.training import (
    all_gather,
    barrier,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_dist_avail_and_initialized,
    is_main_process,
    reduce_dict,
)

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def test_a_single_process(monkeypatch, capsys):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    args = argparse.Namespace(device="cpu", dist_url="env://")
    init_distributed_mode(args)
    assert (args.distributed, args.rank, args.world_size, args.gpu, args.dist_backend) == (False, 0, 1, None, None)
    assert not is_dist_avail_and_initialized()
    assert (get_rank(), get_world_size(), is_main_process()) == (0, 1, True)
    barrier()
    assert all_gather({"a": 1}) == [{"a": 1}]
    values = {"loss": torch.tensor(2.0)}
    assert reduce_dict(values) is values
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("missing", VARIABLES[1:])
def test_rejects_incomplete_variables(monkeypatch, missing):
    for name in VARIABLES:
        monkeypatch.setenv(name, "0")
    monkeypatch.delenv(missing)
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        init_distributed_mode(argparse.Namespace(device="cpu"))


def worker(rank, folder):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    args = argparse.Namespace(device="cpu", dist_url=f"file://{folder}/store")
    init_distributed_mode(args)
    assert is_dist_avail_and_initialized()
    barrier()
    # The keys come in another order, and the objects have another size, in each process.
    pairs = [("a", torch.tensor(1.0 + rank)), ("b", torch.tensor(10.0 * rank))]
    values = dict(pairs if rank == 0 else pairs[::-1])
    state = {
        "args": [args.distributed, args.rank, args.world_size, args.gpu, args.dist_backend],
        "helpers": [get_rank(), get_world_size(), is_main_process()],
        "gathered": all_gather({"rank": rank, "items": list(range(100 * rank))}),
        "mean": reduce_dict(values),
        "sum": reduce_dict(values, average=False),
    }
    torch.save(state, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path):
    # Forked: two processes that import torch anew take seconds.
    torch.multiprocessing.start_processes(worker, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert state["args"] == [True, rank, 2, rank, "gloo"]
        assert state["helpers"] == [rank, 2, rank == 0]
        assert state["gathered"] == [{"rank": 0, "items": []}, {"rank": 1, "items": list(range(100))}]
        assert {k: v.item() for k, v in state["mean"].items()} == {"a": 1.5, "b": 5.0}
        assert {k: v.item() for k, v in state["sum"].items()} == {"a": 3.0, "b": 10.0}
        assert list(state["mean"]) == ["a", "b"][:: -1 if rank else 1]


@pytest.mark.parametrize(
    "variables, is_said",
    [
        ({"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}, True),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "0"}, False),
        ({"TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_MAX_RESTARTS": "3"}, False),
        ({}, False),
    ],
)
def test_restarts_that_would_meet_dead_processes_are_said(monkeypatch, tmp_path, capsys, variables, is_said):
    for name, value in {**dict(zip(VARIABLES, "010", strict=True)), **variables}.items():
        monkeypatch.setenv(name, value)
    try:
        join_processes("cpu", f"file://{tmp_path}/store")
    finally:
        torch.distributed.destroy_process_group()
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in capsys.readouterr().out) == is_said
