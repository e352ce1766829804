"""`assign` against SciPy: as SciPy's reference on the CPU, as kernel through the interpreter, and on a GPU."""

import math
import os

import pytest
import torch
from assignment_problems import (
    FAMILIES,
    FINITE,
    INFEASIBLE,
    INVALID,
    SOLVED,
    all_forbidden,
    make_problems,
    rank_one,
    solve_and_judge,
    solve_finite,
)
from scipy.optimize import linear_sum_assignment

from detr_fast.ops import assign, assign_reference

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
FULL = bool(os.environ.get("DETR_FAST_ASSIGNMENT_FULL"))

both = [pytest.param(None, id="reference", marks=pytest.mark.skipif(INTERPRET, reason="runs without the interpreter"))]
both += [pytest.param(None, id="interpreted", marks=pytest.mark.interpret)]
either = pytest.mark.parametrize("_implementation", both)
# The interpreter's arithmetic is NumPy's, which warns of inf - inf in lanes that nobody reads.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

# (problems, queries, most targets): 10 000 in all.
SMALL = [(600, 1, 4), (1200, 2, 4), (1200, 3, 5), (2000, 4, 6), (1600, 6, 9), (2000, 8, 12), (1000, 12, 16)]
SMALL += [(320, 20, 25), (72, 100, 20), (8, 300, 30)]
# Too slow for the interpreter every time. On a GPU, or with DETR_FAST_ASSIGNMENT_FULL=1.
LARGE = [(100, 40, 40), (34, 100, 100), (34, 100, 180), (17, 300, 100), (12, 300, 300)]


def ids(case):
    return "{}-of-{}x{}".format(*case)


@pytest.mark.interpret
@pytest.mark.parametrize("case", SMALL, ids=ids)
def test_assign_kernel_matches_scipy(case):
    assert sum(count for count, _, _ in SMALL) == 10_000
    counts = solve_and_judge(*make_problems(*case, seed=case[1]))
    assert counts[SOLVED] > case[0] / 2
    if case[0] >= 100:
        assert min(counts.values()) > 0


@pytest.mark.interpret
@pytest.mark.skipif(not FULL, reason="takes minutes; set DETR_FAST_ASSIGNMENT_FULL=1")
@pytest.mark.parametrize("case", LARGE, ids=ids)
def test_assign_kernel_matches_scipy_on_large_problems(case):
    solve_and_judge(*make_problems(*case, seed=case[1]))


@pytest.mark.gpu
@pytest.mark.parametrize("case", SMALL + LARGE, ids=ids)
def test_assign_on_the_gpu_matches_scipy(case):
    for seed in range(3):
        solve_and_judge(*make_problems(*case, seed=seed), device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("queries, targets", [(100, 1500), (900, 300), (4096, 3), (5000, 3)])
def test_assign_on_the_gpu_takes_many_queries_and_targets(queries, targets):
    solve_and_judge(*make_problems(12, queries, targets, seed=0, families=FINITE), device="cuda")


@pytest.mark.interpret
def test_assign_kernel_matches_scipy_one_problem_at_a_time():
    """As on a GPU; above, the interpreter takes hundreds in step."""
    for seed, family in enumerate(FAMILIES[::2]):
        solve_and_judge(*make_problems(1, 4, 4 + seed % 2, seed=seed, families=(family,)))


@either
def test_assign_layers_are_problems_of_their_own(_implementation):
    for dtype in (torch.float32, torch.float64):
        cost, offsets = make_problems(len(FINITE), 7, 9, seed=1, families=FINITE, layers=3, dtype=dtype)
        solve_finite(cost, offsets)


@either
def test_assign_takes_float64(_implementation):
    """Costs that float32 cannot tell apart."""
    cost = 1 + 1e-12 * torch.tensor([[[3.0, 1, 2], [2, 3, 1], [1, 2, 3]]], dtype=torch.float64)
    query, status = assign(cost, torch.tensor([0, 3]), 3)
    assert query.tolist() == [[1, 2, 0]] and status.tolist() == [[SOLVED]]


@either
def test_assign_by_hand(_implementation):
    # Image 0: two targets want query 1, the second one more. Image 1: none. Image 2: four targets for three queries.
    cost = torch.tensor([[5.0, 1, 9], [9, 0, 6], [7, 1, 2], [7, 7, 7], [3, 9, 9], [1, 8, 8]])
    query, status = assign(cost[None], torch.tensor([0, 2, 2, 6]), 4)
    assert query.dtype == torch.int64 and status.dtype == torch.int32
    # Both targets of the first image are nearest to query 1: 5 + 0 is less than 1 + 6. The second image has none. The
    # third has four targets for three queries: 1 + 7 + 1, without the third.
    assert query.tolist() == [[0, 1, 1, 2, -1, 0]]
    assert status.tolist() == [[SOLVED] * 3]


@either
def test_assign_any_strides(_implementation):
    cost, offsets = make_problems(6, 8, 5, seed=2, families=FINITE, layers=4)
    want, _ = assign(cost, offsets, 5)
    for strided in (cost.transpose(1, 2).contiguous().transpose(1, 2), cost.repeat(1, 1, 2)[:, :, :8], cost[::2]):
        got, _ = assign(strided, offsets, 5)
        assert torch.equal(got, want[::2] if len(strided) == 2 else want)
    got, _ = assign(cost, torch.stack((offsets, offsets), dim=1)[:, 0], 9)
    assert torch.equal(got, want)


@either
def test_assign_empty(_implementation):
    for layers, sizes, queries in ((2, [0, 0], 5), (0, [2, 3], 5), (2, [2, 3], 0), (3, [], 4), (1, [0], 0)):
        offsets = torch.tensor([0, *torch.tensor(sizes, dtype=torch.int64).cumsum(0).tolist()])
        query, status = assign(torch.zeros(layers, sum(sizes), queries), offsets, max(sizes, default=0))
        assert query.shape == (layers, sum(sizes)) and (query == -1).all()
        assert status.shape == (layers, len(sizes)) and (status == SOLVED).all()


@either
@pytest.mark.parametrize(
    "value, expected, message",
    [
        (math.nan, INVALID, "image 1 of layer 1 has NaN or -inf among its costs"),
        (-math.inf, INVALID, "image 1 of layer 1 has NaN or -inf"),
        (math.inf, INFEASIBLE, "image 1 of layer 1 has no complete assignment"),
    ],
    ids=str,
)
def test_assign_problems_without_a_solution(value, expected, message, _implementation):
    cost, offsets = torch.rand(2, 6, 4), torch.tensor([0, 2, 5, 6])
    cost[1, 3] = value
    query, status = torch.ops.detr_fast.assign(cost, offsets, 3)
    assert status.tolist() == [[0, 0, 0], [0, expected, 0]]
    assert (query[1, 2:5] == -1).all()
    assert (query[0] >= 0).all() and (query[1, [0, 1, 5]] >= 0).all()  # the others do not suffer
    with pytest.raises(ValueError, match=message):
        assign(cost, offsets, 3)
    assert torch.equal(assign_reference(cost, offsets, 3)[1], status)


@either
def test_assign_does_not_trust_largest(_implementation):
    query, status = torch.ops.detr_fast.assign(torch.rand(1, 50, 3), torch.tensor([0, 40, 50]), 10)
    assert status.tolist() == [[3, SOLVED]]
    assert (query[0, :40] == -1).all() and (query[0, 40:] >= 0).sum() == 3


@pytest.mark.interpret
def test_assign_kernel_says_more_targets_than_it_was_made_for():
    from detr_fast.kernels.assignment import INVALID as KERNEL_INVALID
    from detr_fast.kernels.assignment import TOO_LARGE

    assert (KERNEL_INVALID.value, TOO_LARGE.value) == (INVALID, 3)


@either
def test_assign_leaves_its_arguments_alone(_implementation):
    cost, offsets = make_problems(12, 6, 6, seed=3, families=FINITE)
    before = cost.clone(), offsets.clone()
    assign(cost.requires_grad_(), offsets, 6)
    assert torch.equal(cost, before[0]) and torch.equal(offsets, before[1])


def test_assign_reference_chooses_as_the_original_among_equals():
    """The original gives SciPy queries as rows."""
    cost = torch.randint(0, 2, (1, 60, 10)).float()
    query, _ = assign_reference(cost, torch.arange(0, 61, 10), 10)
    for image in range(6):
        rows, columns = linear_sum_assignment(cost[0, 10 * image : 10 * image + 10].T.numpy())
        assert query[0, 10 * image + torch.from_numpy(columns)].tolist() == rows.tolist()


def test_the_judge_finds_worse_and_wrong_assignments():
    from assignment_problems import judge

    cost, offsets = make_problems(40, 8, 6, seed=4, families=(rank_one,))
    query, status = assign_reference(cost, offsets, 6)
    judge(cost, offsets, query, status)
    start, stop = next((a, b) for a, b in zip(offsets.tolist(), offsets[1:].tolist(), strict=False) if b - a > 1)
    worse, twice, missing = query.clone(), query.clone(), query.clone()
    worse[0, [start, start + 1]] = query[0, [start + 1, start]]
    twice[0, start] = twice[0, start + 1]
    missing[0, start] = -1
    for wrong in (worse, twice, missing):
        with pytest.raises(AssertionError):
            judge(cost, offsets, wrong, status)
    with pytest.raises(AssertionError):
        judge(cost, offsets, query, status + 1)
    forbidden, offsets = make_problems(5, 8, 6, seed=4, families=(all_forbidden,))
    with pytest.raises(AssertionError):
        judge(forbidden, offsets, query[:, :0], torch.zeros(1, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_assign_opcheck(dtype):
    cost, offsets = make_problems(5, 6, 8, seed=5, families=FINITE, layers=2, dtype=dtype)
    for strided in (cost, cost.transpose(1, 2).contiguous().transpose(1, 2), cost[:0]):
        torch.library.opcheck(torch.ops.detr_fast.assign.default, (strided, offsets, 8))


@pytest.mark.skipif(INTERPRET, reason="judges the graph, not the kernel")
def test_assign_compiles_dynamic():
    compilations = []

    def backend(module, _):
        compilations.append(module)
        return module.forward

    def function(cost, offsets):
        query, status = assign(cost * 2, offsets, cost.shape[1])
        return query + 1, status

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for seed, (queries, layers) in enumerate([(7, 2), (12, 3), (5, 6)]):
        cost, offsets = make_problems(4 + seed, queries, 9, seed=seed, families=FINITE, layers=layers)
        for got, want in zip(compiled(cost, offsets), function(cost, offsets), strict=True):
            assert torch.equal(got, want)
    assert len(compilations) == 1


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(cost=torch.zeros(1, 3, 4, dtype=torch.float16)), TypeError, "float32 or float64; got torch.float16"),
        (dict(cost=None), TypeError, r"cost is a NoneType; expected a tensor \[layers, targets, queries\]"),
        (dict(offsets=[0, 1, 3]), TypeError, r"offsets is a list; expected a tensor \[images \+ 1\]"),
        (dict(largest="2"), TypeError, "largest is a str; expected an integer"),
        (dict(largest=None), TypeError, "largest is a NoneType; expected an integer"),
        (dict(cost=torch.zeros(3, 4)), ValueError, r"\[layers, targets, queries\]; got shape \(3, 4\)"),
        (dict(offsets=torch.tensor([0, 1, 3]).int()), TypeError, "offsets must be int64; got torch.int32"),
        (dict(offsets=torch.zeros(0, dtype=torch.int64)), ValueError, r"\[images \+ 1\]; got shape \(0,\)"),
        (dict(offsets=torch.zeros(3, dtype=torch.int64, device="meta")), ValueError, "on one device; got cpu and meta"),
        (dict(offsets=torch.tensor([0, 2, 4])), ValueError, r"from 0 to the number of targets, 3, .*got \[0, 2, 4\]"),
        (dict(offsets=torch.tensor([1, 2, 3])), ValueError, r"got \[1, 2, 3\]"),
        (dict(offsets=torch.tensor([0, 4, 3])), ValueError, r"got \[0, 4, 3\]"),
        (dict(largest=1), ValueError, "in steps of 0 to `largest`, 1; got"),
        (dict(largest=-1), ValueError, "largest must not be negative; got -1"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_assign_rejects(change, error, message):
    arguments = dict(cost=torch.zeros(1, 3, 4), offsets=torch.tensor([0, 1, 3]), largest=2)
    for function in (assign, assign_reference):
        function(**arguments)
        with pytest.raises(error, match=message):
            function(**{**arguments, **change})


def test_assign_families_are_what_they_say():
    cost, offsets = make_problems(2 * len(FAMILIES), 6, 6, seed=6)
    _, status = assign_reference(cost, offsets, 6)
    assert set(status.flatten().tolist()) == {SOLVED, INVALID, INFEASIBLE}
    assert cost[cost.isfinite()].abs().max() > 1e5 and cost.isnan().any() and (cost == -math.inf).any()


@pytest.mark.gpu
def test_assign_does_not_wait_for_the_gpu_and_can_be_captured():
    cost, offsets = make_problems(12, 100, 30, seed=7, families=FINITE, layers=6)
    other, _ = make_problems(12, 100, 30, seed=7, families=FINITE[::-1], layers=6)
    device_cost, device_offsets = cost.cuda(), offsets.cuda()
    assign(device_cost, device_offsets, 30)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assign(device_cost, device_offsets, 30)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        query, status = assign(device_cost, device_offsets, 30)
    device_cost.copy_(other)
    graph.replay()
    want_query, want_status = assign(other.cuda(), device_offsets, 30)
    assert torch.equal(query, want_query) and torch.equal(status, want_status)
