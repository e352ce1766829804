"""The table of kernel configurations: complete, without dead rules, and the same for every GPU of a family."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from detr_fast.kernels import _configurations, _target  # noqa: E402
from detr_fast.kernels._configurations import MEASURED, RULES, attention_conditions, configuration  # noqa: E402

FAMILIES = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
BOOL = (False, True)
ATTENTION = {
    "family": FAMILIES,
    "precision": ("16-bit", "tf32", "ieee"),
    "block_d": (16, 32, 64, 128),
    "ragged": BOOL,
    "mask": BOOL,
    "dropout": BOOL,
    "lengths": ("few x few", "few x many", "many"),
}
PAD = {"family": FAMILIES, "source_bytes": (1, 2, 4, 8), "batch_bytes": (1, 2, 4, 8), "channels_last": BOOL}
CONDITIONS = {
    "attention_forward": ATTENTION,
    "attention_grad_query": ATTENTION,
    "attention_grad_key_value": ATTENTION,
    "pad_collate_forward": PAD,
    "pad_collate_backward": PAD,
    "sine_position_forward": {"family": FAMILIES, "bytes": (2, 4), "tokens": BOOL},
}


def _launches(kernel):
    domain = CONDITIONS[kernel]
    return [dict(zip(domain, values, strict=True)) for values in itertools.product(*domain.values())]


@pytest.mark.parametrize("kernel", CONDITIONS)
def test_every_launch_has_a_configuration(kernel):
    blocks = {
        "attention": {"BLOCK_M", "BLOCK_N", "num_stages"},
        "pad": {"BLOCK_H", "BLOCK_W"},
        "sine": {"BLOCK_T", "BLOCK_F"},
    }
    for conditions in _launches(kernel):
        tile = configuration(kernel, **conditions)
        assert tile.keys() == {"num_warps", *blocks[kernel.split("_")[0]]}, (conditions, tile)
        powers = [value for name, value in tile.items() if name != "num_stages"]
        assert all(value & (value - 1) == 0 < value for value in powers), tile
        # A matrix product has at least 16 rows; on sm_90 a warp group of 4 warps takes 64.
        assert tile.get("BLOCK_M", 16) >= 16 and tile.get("BLOCK_N", 64) % 64 == 0, tile
        assert 1 <= tile.get("num_stages", 1) <= 5, tile


@pytest.mark.parametrize("kernel", CONDITIONS)
def test_every_rule_is_some_launchs(kernel):
    used = {id(configuration(kernel, **conditions)) for conditions in _launches(kernel)}
    unused = [entry for entry in (*MEASURED, *RULES) if entry[0] == kernel and id(entry[2]) not in used]
    assert not unused
    assert [entry for entry in RULES if entry[0] == kernel][-1][1] == {}, "the last rule is the fallback"


def test_measured_entries_name_every_condition_and_come_first(monkeypatch):
    for kernel, conditions, *_ in MEASURED:
        assert conditions.keys() == CONDITIONS[kernel].keys()
        assert all(value in CONDITIONS[kernel][name] for name, value in conditions.items())
    launch = _launches("attention_forward")[0]
    measured = {"BLOCK_M": 16, "num_warps": 1, "num_stages": 1}
    before = configuration("attention_forward", **launch)
    monkeypatch.setattr(_configurations, "MEASURED", (("attention_forward", launch, measured, "3 → 2 µs"),))
    configuration.cache_clear()
    assert _configurations.by_rule("attention_forward", launch) == before
    try:
        assert configuration("attention_forward", **launch) == measured != before
        other = launch | {"dropout": not launch["dropout"]}
        assert configuration("attention_forward", **other) != measured
    finally:
        configuration.cache_clear()


def test_unknown_kernel_is_refused():
    with pytest.raises(KeyError, match="no configuration of kernel 'attention'"):
        configuration("attention", family="sm_90")


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((0, 0), "sm_80"),
        ((7, 5), "sm_80"),
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 9), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((11, 0), "sm_100"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_120"),
        ((15, 0), "sm_120"),
    ],
)
def test_family(monkeypatch, capability, expected):
    monkeypatch.setattr(_target, "compute_capability", lambda device: capability)
    assert _configurations.family(torch.device("cuda")) == expected


@pytest.mark.parametrize(
    ("lengths", "dims", "dtype", "expected"),
    [
        ((128, 128), (32, 32), torch.bfloat16, {"lengths": "few x few", "precision": "16-bit", "ragged": False}),
        ((100, 129), (32, 32), torch.float32, {"lengths": "few x many", "precision": "tf32", "ragged": False}),
        ((129, 100), (24, 32), torch.float16, {"lengths": "many", "precision": "16-bit", "ragged": True}),
    ],
)
def test_conditions_of_attention(lengths, dims, dtype, expected):
    query, key = (torch.empty(1, 2, length, dims[0], dtype=dtype) for length in lengths)
    value = torch.empty(1, 2, lengths[1], dims[1], dtype=dtype)
    conditions = attention_conditions(query, key, value, "tf32", 32, True, False)
    assert conditions == {"family": "sm_80", "block_d": 32, "mask": True, "dropout": False} | expected
