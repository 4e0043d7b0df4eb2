"""The locality-aware return: fewer rows travel, and the order is restored."""

from __future__ import annotations

import re
from collections.abc import Callable

import locality_cases as cases
import pytest
from exchange_cases import keeping_own
from ranks import Ranks

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rows_stay_and_order_comes_back(seed: int, ranks: Ranks) -> None:
    for skew in range(min(ranks.num_ranks, 3)):
        for moved, if_home in ranks.run(cases.stays, skew, seed):
            assert moved <= if_home
            if skew and seed < 2:
                assert moved < if_home / 1.5


@pytest.mark.parametrize("skew", [0, 1, 2])
def test_rows_that_stay_are_not_sent(skew: int, ranks_of: Callable[[int], Ranks]) -> None:
    ranks_of(3).run(keeping_own, cases.stays, skew, 1)


WRONG = {
    "rows": r"return_to_assigned: the exchange gave \d+ rows, \[\d+, 3\] came",
    "flows": r"on rank 1: .*flows must have the same rows",
    "dtype": r"rank 1 sends rows of torch.float32 \[3\], but rank 0 rows of torch.float64 \[3\]",
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_said(kind: str, ranks_of: Callable[[int], Ranks]) -> None:
    for error in ranks_of(2).run(cases.wrong, kind):
        assert re.search(WRONG[kind], error), error
