"""The helper that chooses the cases of other tests."""

from itertools import combinations, product

import pytest
from pairwise import pairwise


@pytest.mark.parametrize("sizes", [(2, 2), (1, 3, 1), (4, 3, 2, 2), (8, 7, 6, 4, 3, 4)])
def test_pairwise_has_every_pair_in_few_cases(sizes):
    axes = [[f"{axis}{value}" for value in range(size)] for axis, size in enumerate(sizes)]
    cases = pairwise(*axes)
    for a, b in combinations(range(len(axes)), 2):
        assert {(case[a], case[b]) for case in cases} == set(product(axes[a], axes[b]))
    largest, second = sorted(sizes)[:-3:-1]
    assert len(cases) <= 1.25 * largest * second
