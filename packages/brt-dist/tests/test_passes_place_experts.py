"""place-experts: the same results with experts elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import pass_cases as cases
import pytest
from ranks import Ranks

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("replicas", [0, 1])
def test_experts_move_and_results_stay(replicas: int, ranks_of: Callable[[int], Ranks]) -> None:
    held_WL = ranks_of(3).run(cases.placed, replicas)
    first = [held[0] for held in held_WL]
    assert not any({0, 1} <= set(held) for held in first), "the two hot experts are together"
    assert {p for held in first for p in held} == set(range(6))
    assert sum(map(len, first)) == 6 + replicas


def test_a_plan_of_the_users(ranks_of: Callable[[int], Ranks]) -> None:
    assert ranks_of(2).run(cases.placed_by_plan, 2) == ["", ""]
    for error in ranks_of(2).run(cases.placed_by_plan, 3):
        assert "the plan is for 6 experts on 3 ranks, the layer has 6 on 2; plan again" in error


REASONS = {
    "not spread": "no experts on several ranks: brt_dist.parallelize",
    "training": "call model.eval(), or train with brt_dist.parallelize",
    "no profile": "it needs a profile of the region, or a plan",
    "branches": "its branches are modules of their own, not stacked weights",
}


@pytest.mark.parametrize("case", REASONS)
def test_says_why_not(case: str, ranks_of: Callable[[int], Ranks]) -> None:
    for reason in ranks_of(2).run(cases.refusal, "place-experts", case):
        assert REASONS[case] in reason
