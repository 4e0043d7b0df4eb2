"""Models that `parallelize` spread over 1 to 4 ranks equal themselves in one process."""

from __future__ import annotations

import re
from collections.abc import Callable

import model_cases as cases
import pytest
from ranks import Ranks

pytestmark = pytest.mark.dist

SIZES = {"uneven": (5, 0, 7, 2), "few": (1, 1, 0, 0)}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", cases.MODELS)
def test_equals_one_process(name: str, sizes: str, ranks: Ranks) -> None:
    ranks.run(cases.run_all, name, SIZES[sizes], "", "", sizes == "few")


@pytest.mark.parametrize("name", cases.MODELS)
def test_any_placement(name: str, ranks: Ranks) -> None:
    ranks.run(cases.run_all, name, SIZES["uneven"], "placed", "", False)


@pytest.mark.parametrize("name", cases.MODELS)
def test_by_hosts(name: str, ranks_of: Callable[[int], Ranks]) -> None:
    ranks_of(4).run(cases.run_all, name, SIZES["uneven"], "placed", "hosts", False)


def test_eight_ranks(ranks_of: Callable[[int], Ranks]) -> None:
    ranks_of(8).run(cases.run_all, "stacked", (2, 0, 3, 1, 4, 1, 0, 2), "", "", False)


def test_overlap(ranks: Ranks) -> None:
    ranks.run(cases.run_all, "stacked", SIZES["uneven"], "", "overlap", False)


@pytest.mark.parametrize("name", cases.MODELS)
def test_replicas(name: str, ranks: Ranks) -> None:
    ranks.run(cases.run_all, name, SIZES["uneven"], "replicas", "", False)


@pytest.mark.parametrize("transport", ["overlap", "replicated", "hosts"])
def test_replicas_by_any_transport(transport: str, ranks_of: Callable[[int], Ranks]) -> None:
    ranks_of(4).run(cases.run_all, "stacked", SIZES["uneven"], "replicas", transport, False)


REFUSED = {
    "nothing": "Linear has no brt.ExpertRouter and no brt.ScatterRouter",
    "few": "the model cannot be spread: its 2 branches leave none for rank 2",
    "packed": r"it must hold one module with stacked weights \[5, ...\], and holds 0",
    "exit": "'scatters' cannot be spread: it must hold one GatherRouter, and holds 0",
    "no weights": "the model cannot be spread: its ExpertRouter has 3 experts, but the module",
    "tied": "its parameter is shared: experts.3.0.weight and other.weight",
    "one module": "the model cannot be spread: two of its branches are one module",
    "twice": "'0.scatter' stands in several places of the model",
    "placement": "'first': the placement puts expert 2 on rank 9, but there are 3",
    "unknown": r"the placement names \['last'\], the mixtures are \['first', 'layers.1'\]",
    "degree": r"'first' cannot be spread: Transport\(degree=2.* is for ExpertRouter only",
    "mesh": "experts are spread over one dimension of a mesh",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refuses_before_anything_changes(kind: str, ranks_of: Callable[[int], Ranks]) -> None:
    for type_, message in ranks_of(3).run(cases.wrong, kind):
        assert type_ == "ParallelError"
        assert re.search(REFUSED[kind], message), message


def test_ranks_must_agree(ranks_of: Callable[[int], Ranks]) -> None:
    for _, message in ranks_of(3).run(cases.wrong, "ranks differ"):
        assert "parallelize: rank 1 sends a model with first: 4 experts on 3 ranks" in message
    for _, message in ranks_of(3).run(cases.wrong, "one rank"):
        assert "parallelize: on rank 1: Linear has no brt.ExpertRouter" in message


@pytest.mark.parametrize("name", ["normed", "both"])
def test_state_is_whole(name: str, ranks_of: Callable[[int], Ranks]) -> None:
    states = [state for n in (1, 2, 3) for state in ranks_of(n).run(cases.state_is_whole, name)]
    assert all(state == states[0] for state in states)


def test_as_planned(ranks: Ranks) -> None:
    assert set(ranks.run(cases.planned, 0, 0)) == {""}
    if ranks.num_ranks > 1:
        assert set(ranks.run(cases.planned, 0, 1)) == {""}
    for error in ranks.run(cases.planned, 1, 0):
        assert error.startswith("PlacementError: parallelize: on rank 0: this plan is for"), error


@pytest.mark.parametrize("name", ["branches", "stacked"])
def test_compiled(name: str, ranks_of: Callable[[int], Ranks]) -> None:
    ranks_of(2).run(cases.compiled, name)


def test_modules_are_left_alone(ranks_of: Callable[[int], Ranks]) -> None:
    ranks_of(2).run(cases.left_alone)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cells of one rank", r"on rank 0: top-k: scores must be \[N, P\]"),
        ("scores", r"on rank 0: .*"),
        ("nested", r"route\[0\]: this route is spread over ranks"),
        ("missing paths", "GatherRouter: 3 for the 4 paths of the route"),
        ("packed rows", r"GatherRouter: 1000 packed rows for \d+"),
        ("rows", r"GatherRouter: path \d gave \d+ rows for \d+"),
    ],
)
def test_calls_that_are_wrong(kind: str, message: str, ranks_of: Callable[[int], Ranks]) -> None:
    for error in ranks_of(2).run(cases.wrong_call, kind):
        assert re.search(message, error), error


def test_profiles_see_the_cells_of_a_rank(ranks_of: Callable[[int], Ranks]) -> None:
    assert ranks_of(2).run(cases.profiled) == [[6, 6], [6, 6]]
