"""overlap-exchange: the same results in several parts, where that is faster."""

from __future__ import annotations

from collections.abc import Callable

import pass_cases as cases
import pytest
from ranks import Ranks

from brt import PassError
from brt_dist.passes import OverlapExchange

pytestmark = pytest.mark.dist


def test_degree_is_that_measured_fastest(ranks_of: Callable[[int], Ranks]) -> None:
    assert ranks_of(2).run(cases.overlapped, (3,), -1e9) == [[3, 3]] * 2
    degrees = ranks_of(2).run(cases.overlapped, (2, 4), -1e9)
    assert degrees[0] == degrees[1]
    assert set(degrees[0]) <= {2, 4}


def test_stays_whole_where_parts_bring_nothing(ranks_of: Callable[[int], Ranks]) -> None:
    assert ranks_of(2).run(cases.overlapped, (2,), 1e9) == [[], []]


def test_overlaps_what_is_placed(ranks_of: Callable[[int], Ranks]) -> None:
    for degrees in ranks_of(3).run(cases.both):
        assert (2, False) in degrees


REASONS = {
    "not spread": "no experts on several ranks: brt_dist.parallelize",
    "no sample": "it measures: brt.optimize(model, passes=[...], sample=batch)",
    "branches": "its branches are modules of their own, not stacked weights",
    "chosen": "its cells travel by Transport(degree=1, hosts=None, replicated=True",
}


@pytest.mark.parametrize("case", REASONS)
def test_says_why_not(case: str, ranks_of: Callable[[int], Ranks]) -> None:
    for reason in ranks_of(2).run(cases.refusal, "overlap-exchange", case):
        assert REASONS[case] in reason


def test_options_are_checked() -> None:
    with pytest.raises(PassError, match="degrees must be at least 2"):
        OverlapExchange(degrees=(1,))


def test_default_passes_race_nothing(ranks_of: Callable[[int], Ranks]) -> None:
    ranks_of(2).run(cases.default_passes)
