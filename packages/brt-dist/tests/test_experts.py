"""A layer of stacked experts on 1 to 4 ranks equals the layer in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import layer_cases as cases
import pytest
import torch
from layer_cases import Layer
from ranks import Ranks

import brt_dist

pytestmark = pytest.mark.dist

LAYERS = {
    "plain": Layer(),
    "more experts than divide": Layer(num_experts=5, seed=1),
    "fewer experts than ranks": Layer(num_experts=2, seed=2),
    "one expert": Layer(num_experts=1, top_k=1, seed=3),
    "one cell": Layer(sizes=(1, 0, 0, 0), seed=4),
    "no cells": Layer(sizes=(0, 0, 0, 0), seed=5),
    "skewed": Layer(skewed=True, num_experts=7, sizes=(9, 1, 8, 3), seed=6),
    "no bias, gelu": Layer(bias=False, gated=False, seed=7),
    "no weights": Layer(weighted=False, seed=8),
}
TRANSPORTS = ("plain", "overlap3", "replicated", "capacity21")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", LAYERS)
def test_equals_one_process(name: str, transport: str, ranks: Ranks) -> None:
    ranks.run(cases.equals_one_process, LAYERS[name], transport, None, False)


@pytest.mark.parametrize("name", ["plain", "skewed"])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_equal_one_process(name: str, hosts: int, ranks_of: Callable[[int], Ranks]) -> None:
    ranks_of(4).run(cases.equals_one_process, LAYERS[name], f"hosts{hosts}", None, False)


@pytest.mark.parametrize("transport", [*TRANSPORTS, "hosts2", "hosts4"])
def test_eight_ranks(transport: str, ranks_of: Callable[[int], Ranks]) -> None:
    layer = Layer(num_experts=11, sizes=(3, 0, 4, 1, 5, 2, 0, 6), seed=9)
    ranks_of(8).run(cases.equals_one_process, layer, transport, None, False)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_any_placement(transport: str, ranks: Ranks) -> None:
    made = torch.Generator().manual_seed(0)
    for _ in range(3):
        placement = tuple(torch.randint(0, ranks.num_ranks, (7,), generator=made).tolist())
        ranks.run(cases.equals_one_process, LAYERS["skewed"], transport, placement, True)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_autocast(transport: str, ranks: Ranks) -> None:
    ranks.run(cases.in_bfloat16, transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_only_experts_have_gradients(transport: str, ranks: Ranks) -> None:
    ranks.run(cases.frozen_gate_and_cells, transport)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("choice", r"on rank 1: a choice must be a path in range(4) or -1: got 9"),
        ("cells", "on rank 1: ParallelExpertRouter: cells and choices"),
        ("experts", "rank 1 sends rows of float32 [5] for 3 experts on 3 ranks"),
        ("placement", "rank 1 sends rows of float32 [5] for 4 experts on 3 ranks (placement"),
        ("dtype", "rank 1 sends rows of float64 [5]"),
    ],
)
def test_what_is_wrong_on_one_rank_is_an_error_on_all(
    wrong: str, message: str, ranks_of: Callable[[int], Ranks]
) -> None:
    for error in ranks_of(3).run(cases.wrong_layer, wrong):
        assert message in error, error


@pytest.mark.parametrize("ranks_per_host", [1, 2, 4])
def test_hierarchical_equals_flat(ranks_per_host: int, ranks_of: Callable[[int], Ranks]) -> None:
    for seed in range(4):
        ranks_of(4).run(cases.hierarchical_equals_flat, ranks_per_host, seed)


def test_wrong_hosts(ranks_of: Callable[[int], Ranks]) -> None:
    for of_three, of_counts in ranks_of(4).run(cases.wrong_hosts):
        assert "4 ranks do not make hosts of 3 ranks" in of_three
        assert "on rank 3: counts sum to 16, but there are 8 rows" in of_counts


def test_transport_takes_one_choice() -> None:
    with pytest.raises(brt_dist.ParallelError, match="degree must be at least 1, got 0"):
        brt_dist.Transport(degree=0)
    with pytest.raises(brt_dist.ParallelError, match="choose one of degree=2"):
        brt_dist.Transport(degree=2, replicated=True)
    with pytest.raises(brt_dist.ParallelError, match="capacity must be at least 1, got 0"):
        brt_dist.Transport(capacity=0)
    with pytest.raises(brt_dist.ParallelError, match="symmetric=None and among"):
        brt_dist.Transport(degree=2, among=(brt_dist.Transport(),))
    with pytest.raises(brt_dist.ParallelError, match="needs among"):
        brt_dist.Transport(topology=brt_dist.Topology(ranks_per_host=1))
    with pytest.raises(brt_dist.ParallelError, match="chooses nothing itself"):
        brt_dist.Transport(among=(brt_dist.Transport(among=(brt_dist.Transport(),)),))
    assert list(asdict(brt_dist.Transport()).values()) == [1, None, False, None, None, (), None]


@pytest.mark.parametrize("name", ["plain", "no cells", "skewed"])
def test_fastest_equals_one_process(name: str, ranks_of: Callable[[int], Ranks]) -> None:
    ranks_of(3).run(cases.equals_one_process, LAYERS[name], "fastest", None, False)


def test_fastest_is_measured_once_for_a_size(ranks_of: Callable[[int], Ranks]) -> None:
    # 4 to 7 cells on the rank that has most, and 32 to 63
    assert ranks_of(3).run(cases.fastest_by_size) == [({4: 0, 32: 2}, [3, 3])] * 3


TOPOLOGIES = {
    # Four choices on two ranks: twice as many rows as cells
    "bytes count": (4, 1e-6, 0.0, [2, 2]),
    # Parts are worth their messages where there is enough to overlap
    "messages count": (1, 1e-3, 100.0, [0, 1]),
}


@pytest.mark.parametrize("case", TOPOLOGIES)
def test_fastest_by_topology(case: str, ranks_of: Callable[[int], Ranks]) -> None:
    num_choices, beta_gbs, alpha_us, ways = TOPOLOGIES[case]
    found = ranks_of(2).run(cases.fastest_by_topology, num_choices, beta_gbs, alpha_us)
    assert found == [ways] * 2


def test_wrong_ways(ranks_of: Callable[[int], Ranks]) -> None:
    for topology, hosts, cells in ranks_of(2).run(cases.wrong_ways):
        assert topology == "Transport: the topology is of 3 ranks, the group of 2"
        assert hosts == "Transport: hosts is of another group"
        assert "on rank 1: ParallelExpertRouter: cells and choices" in cells


def test_rows_beyond_a_capacity_are_dropped(ranks: Ranks) -> None:
    for capacity in (1, 3):
        ranks.run(cases.beyond_capacity, capacity)


def test_padded_sizes_never_change(ranks_of: Callable[[int], Ranks]) -> None:
    (first, *others) = ranks_of(2).run(cases.sizes_never_change)
    assert len(first) == 1
    assert others == [first]


def test_replicas_share_rows_evenly(ranks_of: Callable[[int], Ranks]) -> None:
    for rank, (by_choice, by_load) in enumerate(ranks_of(2).run(cases.replicas_share_rows)):
        assert by_choice == [5, 0, 5, 0]
        assert by_load == [3 + rank, 2, 4 - rank, 3]
