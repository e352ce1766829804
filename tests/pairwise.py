"""Pairwise cover: few cases in which every value of an axis meets every value of every other."""

from collections.abc import Sequence
from itertools import combinations, product


def pairwise(*axes: Sequence) -> list[tuple]:
    """Tuples of one value per axis that contain every pair of values of two axes; far fewer than the product.

    Most faults show with one value or with two together. The choice is greedy, and always the same.
    """
    missing = {
        pair for a, b in combinations(range(len(axes)), 2) for pair in product(_values(axes, a), _values(axes, b))
    }
    cases = []
    while missing:
        case = dict(min(missing))  # axis → index of its value
        for axis in range(len(axes)):
            if axis in case:
                continue
            # The value that meets most of the chosen ones for the first time; of equal ones another each time.
            turn = len(cases) % len(axes[axis])
            case[axis] = max(
                (*range(turn, len(axes[axis])), *range(turn)),
                key=lambda value, axis=axis, case=case: len(missing & _pairs({**case, axis: value})),
            )
        missing -= _pairs(case)
        cases.append(tuple(values[case[axis]] for axis, values in enumerate(axes)))
    return cases


def _values(axes: Sequence, axis: int) -> list[tuple[int, int]]:
    return [(axis, value) for value in range(len(axes[axis]))]


def _pairs(case: dict[int, int]) -> set:
    return set(combinations(sorted(case.items()), 2))
