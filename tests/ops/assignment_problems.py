"""Random and adversarial assignment problems, and SciPy's judgement of what `assign` makes of them."""

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from detr_fast.ops import assign

SOLVED, INVALID, INFEASIBLE = 0, 1, 2


def uniform(g, n, q):
    return torch.rand(n, q, generator=g)


def negative(g, n, q):
    return -torch.rand(n, q, generator=g) - 3


def mixed_signs(g, n, q):
    return torch.randn(n, q, generator=g)


def ties(g, n, q):
    return torch.randint(0, 3, (n, q), generator=g).float()


def equal(g, n, q):
    return torch.full((n, q), float(torch.randn((), generator=g)))


def wide_range(g, n, q):
    """Magnitudes from 1e-6 to 1e6, either sign."""
    sign = torch.randint(0, 2, (n, q), generator=g) * 2 - 1
    return sign * 10 ** (torch.rand(n, q, generator=g) * 12 - 6)


def large_offset(g, n, q):
    """Differences in the last bits of float32."""
    return 1e6 + torch.randint(0, 8, (n, q), generator=g) / 16


def rank_one(g, n, q):
    """Products of sorted factors: every row wants the same columns, and paths become long."""
    return torch.arange(1.0, n + 1)[:, None] * torch.arange(1.0, q + 1)


def sum_of_parts(g, n, q):
    """Every complete assignment of a square costs the same."""
    return torch.randint(0, 9, (n, 1), generator=g).float() + torch.randint(0, 9, (1, q), generator=g)


def repeated_rows(g, n, q):
    return torch.rand(1, q, generator=g).expand(n, q)


def repeated_columns(g, n, q):
    return torch.rand(n, 1, generator=g).expand(n, q)


def detr_like(g, n, q):
    """Predictions that crowd around a few places."""
    places = torch.rand(q, 4, generator=g) * 0.1 + torch.randint(0, 3, (q, 1), generator=g) * 0.3
    return (torch.rand(n, 1, 4, generator=g) - places).abs().sum(-1) * 5 - torch.rand(1, q, generator=g)


def few_forbidden(g, n, q):
    return torch.rand(n, q, generator=g).masked_fill(torch.rand(n, q, generator=g) < 0.2, math.inf)


def mostly_forbidden(g, n, q):
    """Often infeasible."""
    return torch.randn(n, q, generator=g).masked_fill(torch.rand(n, q, generator=g) < 0.7, math.inf)


def all_forbidden(g, n, q):
    return torch.full((n, q), math.inf)


def one_not_a_number(g, n, q):
    return spoilt(torch.rand(n, q, generator=g), g, math.nan)


def one_negative_infinity(g, n, q):
    return spoilt(torch.rand(n, q, generator=g), g, -math.inf)


def spoilt(cost, g, value):
    if cost.numel():
        cost.view(-1)[torch.randint(cost.numel(), (), generator=g)] = value
    return cost


FINITE = (
    uniform,
    negative,
    mixed_signs,
    ties,
    equal,
    wide_range,
    large_offset,
    rank_one,
    sum_of_parts,
    repeated_rows,
    repeated_columns,
    detr_like,
)
FAMILIES = (*FINITE, few_forbidden, mostly_forbidden, all_forbidden, one_not_a_number, one_negative_infinity)


def make_problems(count, queries, most_targets, seed, families=FAMILIES, layers=1, dtype=torch.float32):
    """`count` problems per layer, of all families in turn and 0 to `most_targets` targets: (cost, offsets)."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(0, most_targets + 1, (count,), generator=g).tolist()
    sizes[0] = most_targets
    layer_costs = [
        torch.cat([families[(i + layer) % len(families)](g, n, queries) for i, n in enumerate(sizes)])
        for layer in range(layers)
    ]
    return torch.stack(layer_costs).to(dtype), torch.tensor([0, *np.cumsum(sizes).tolist()])


def judge(cost, offsets, query, status):
    """Hold results against SciPy: statuses, complete and valid pairs, the total of every problem. Counts statuses."""
    cost, query, status = cost.cpu().double().numpy(), query.cpu().numpy(), status.cpu().numpy()
    bounds = offsets.tolist()
    counts = dict.fromkeys((SOLVED, INVALID, INFEASIBLE), 0)
    for layer in range(len(cost)):
        for image, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            problem, chosen = cost[layer, start:stop], query[layer, start:stop]
            where = f"layer {layer}, image {image}, {problem.shape}"
            best, expected_status = scipy_total(problem)
            assert status[layer, image] == expected_status, f"{where}: {status[layer, image]} for {expected_status}"
            counts[expected_status] += 1
            targets = np.flatnonzero(chosen >= 0)
            if expected_status != SOLVED:
                assert len(targets) == 0, where
                continue
            assert len(targets) == min(problem.shape) == len(set(chosen[targets].tolist())), where
            assert chosen.max(initial=-1) < problem.shape[1], where
            total = problem[targets, chosen[targets]].sum()
            assert np.isfinite(total), where
            # What float64 can tell apart over so many additions.
            finite = np.abs(problem[np.isfinite(problem)]).max(initial=0)
            assert abs(total - best) <= 1e-14 * (len(targets) + 1) * finite, f"{where}: {total} for {best}"
    return counts


def scipy_total(problem):
    if np.isnan(problem).any() or np.isneginf(problem).any():
        return None, INVALID
    try:
        rows, columns = linear_sum_assignment(problem)
    except ValueError:
        return None, INFEASIBLE
    return problem[rows, columns].sum(), SOLVED


def solve_and_judge(cost, offsets, device="cpu"):
    largest = int(offsets.diff().max())
    # The op itself: `assign` raises on the CPU for problems without a solution, which are among these.
    query, status = torch.ops.detr_fast.assign(cost.to(device), offsets.to(device), largest)
    return judge(cost, offsets, query, status)


def solve_finite(cost, offsets):
    query, status = assign(cost, offsets, int(offsets.diff().max()))
    return judge(cost, offsets, query, status)
