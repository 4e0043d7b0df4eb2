"""`brt_dist.plan`: feasible, never worse than what others do, the same for a seed.

Legend: L layers, E experts, W ranks.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from placement_cases import Ints, clustered, traces

from brt_dist.placement import (
    Descent,
    Packing,
    PlacementError,
    Plan,
    Problem,
    Work,
    eplb,
    plan,
)
from brt_dist.placement.descent import explore, improve
from brt_dist.placement.packing import shared_load
from brt_dist.placement.planner import figures_of
from brt_dist.placement.traffic import of_loads, of_trace
from brt_dist.topology import Link, Topology

FEW = settings(max_examples=25, deadline=None)
QUICK = Descent(kicks=2, starts=0)
EPLB_EXAMPLE = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]


def assert_feasible(found: Plan, high: int) -> None:
    for layer in range(len(found.layers)):
        placed = found.permutation(layer)
        assert set(placed) == set(range(found.num_experts))
        assert len(placed) == found.num_experts + found.num_replicas
        counts_W = found.counts(layer)
        assert counts_W.min() >= 1
        assert counts_W.max() <= high


@FEW
@given(traces(), st.sampled_from(("traffic", "balance", "both")), st.integers(0, 2))
def test_plans_are_feasible_and_never_worse(
    case: tuple[Ints, int], objective: str, spare: int
) -> None:
    choice_TLK, num_ranks = case
    traffic = of_trace(choice_TLK, num_experts=max(int(choice_TLK.max(initial=0)) + 1, num_ranks))
    num_experts = traffic.load_LE.shape[1]
    high = -(-num_experts // num_ranks) + spare
    memory = None if spare == 0 else high
    found = plan(traffic, num_ranks, objective, memory=memory, solver=QUICK)
    assert_feasible(found, high)
    assert found.planned.cost <= min(found.default.cost, found.packed.cost) + 1e-9
    assert found.bound.cost <= found.planned.cost + 1e-6
    assert found.bound.balance <= found.planned.balance + 1e-6
    if found.bound.traffic is not None and found.planned.traffic is not None:
        assert found.bound.traffic <= found.planned.traffic + 1e-6


@FEW
@given(traces(), st.integers(0, 3), st.integers(1, 4))
def test_plans_repeat(case: tuple[Ints, int], seed: int, hosts: int) -> None:
    choice_TLK, num_ranks = case
    traffic = of_trace(choice_TLK, num_experts=9)
    topology = Topology(hosts=hosts, ranks_per_host=max(num_ranks // hosts, 1))
    first, again = (plan(traffic, topology, solver=Descent(seed=seed, kicks=3)) for _ in range(2))
    assert (first.expert_LWS == again.expert_LWS).all()


@FEW
@given(traces(), st.randoms(use_true_random=False))
def test_names_of_ranks_do_not_matter(case: tuple[Ints, int], random: object) -> None:
    choice_TLK, num_ranks = case
    traffic = of_trace(choice_TLK, num_experts=9)
    found = plan(traffic, num_ranks, solver=QUICK)
    names_W = np.array(random.sample(range(num_ranks), num_ranks))  # type: ignore[attr-defined]
    before = figures_of(found.rank_LE, traffic, num_ranks)
    after = figures_of(names_W[found.rank_LE], traffic, num_ranks)
    np.testing.assert_allclose(dataclasses.astuple(before), dataclasses.astuple(after))


@pytest.mark.parametrize("top_k", [1, 2])
def test_hidden_clusters_are_found(top_k: int) -> None:
    choice_TLK = clustered(top_k=top_k, noise=0.0)
    found = plan(choice_TLK, 4, "traffic")
    assert found.admits == ("affinity" if top_k == 1 else "co-activation")
    assert found.planned.traffic == (0.0 if top_k == 1 else 1.0)
    assert found.default.traffic is not None
    assert found.default.traffic > (0.4 if top_k == 1 else 1.3)


def test_walks_go_on_where_no_exchange_helps() -> None:
    traffic = of_trace(clustered(num_experts=24, top_k=4, clusters=8, noise=0.5))
    problem = Problem(traffic, Topology(ranks_per_host=4), "both", 6, 6, 1.0)
    stuck_LE = improve(problem, problem.contiguous_LE)
    walked_LE = explore(problem, stuck_LE, np.random.default_rng(0), 200)
    assert problem.fits(walked_LE)
    assert problem.cost(walked_LE) < problem.cost(stuck_LE) - 1e-3


def test_pairs_of_a_layer_bound_what_tokens_visit() -> None:
    # Tokens without any order: three experts of twelve, and a rank holds three
    found = plan(clustered(num_experts=12, top_k=3, noise=1.0), 4, "traffic", solver=QUICK)
    assert found.bound.traffic is not None
    assert found.planned.traffic is not None
    assert 1.9 < found.bound.traffic <= found.planned.traffic


def test_no_placement_of_a_small_problem_is_cheaper() -> None:
    traffic = of_trace(clustered(60, 2, 4, noise=0.5))
    found = plan(traffic, 2)
    problem = Problem(traffic, Topology(ranks_per_host=2), "both", 2, 2, 5.0)
    sides = [r for r in itertools.product((0, 1), repeat=4) if sum(r) == 2]
    every = [problem.cost(np.array([one, other])) for one in sides for other in sides]
    assert found.planned.cost == pytest.approx(min(every))
    assert found.bound.cost == pytest.approx(min(every), abs=1e-6)
    assert "integer program" in found.how
    assert found.gap < 1e-6


@pytest.mark.parametrize(
    ("num_experts", "num_ranks"), [(1, 1), (5, 1), (4, 4), (5, 4)], ids=lambda n: str(n)
)
def test_edge_sizes(num_experts: int, num_ranks: int) -> None:
    found = plan(of_trace(clustered(50, 3, num_experts, clusters=1)), num_ranks)
    assert_feasible(found, -(-num_experts // num_ranks))
    if num_ranks == 1:
        assert found.planned.traffic == 0
        assert (found.permutation(0) == np.arange(num_experts)).all()


def test_nothing_routed() -> None:
    found = plan(of_trace(np.full((4, 3, 1), -1), num_experts=4), 2)
    assert_feasible(found, 2)
    assert found.planned.cost == 0
    assert found.gap == 0
    loads = plan(of_loads(np.zeros((2, 4)).tolist()), 2, "balance")
    assert loads.planned.balance == 1


def test_one_layer_has_no_moves() -> None:
    found = plan(clustered(50, 1, 4), 2)
    assert found.planned.traffic == 0


def test_a_previous_plan_stays_where_moving_is_expensive() -> None:
    old = plan(clustered(seed=1), 4, solver=QUICK)
    new = clustered(seed=2)
    stays = plan(new, 4, previous=old, migration_cost=1e6)
    assert (stays.expert_LWS == old.expert_LWS).all()
    free, cheap = (plan(new, 4, previous=old, migration_cost=c) for c in (0.0, 0.05))
    assert free.planned.traffic is not None
    assert stays.planned.traffic is not None
    assert free.planned.traffic < stays.planned.traffic
    moved_free, moved_cheap = ((p.rank_LE != old.rank_LE).mean() for p in (free, cheap))
    assert moved_cheap <= moved_free


def test_parts_keep_their_ranks_names() -> None:
    trace = clustered(top_k=2, noise=0.3)
    old = plan(trace, 4)
    renamed = dataclasses.replace(old, expert_LWS=old.expert_LWS[:, ::-1])
    again = plan(trace, 4, previous=renamed, migration_cost=1e-3)
    assert (again.expert_LWS == renamed.expert_LWS).all()


def test_hosts_count() -> None:
    # Four clusters on two hosts of two: pairs of clusters that share tokens share a host
    rng = np.random.default_rng(0)
    pair_T = rng.integers(2, size=800)
    cluster_TL = 2 * pair_T[:, None] + rng.integers(2, size=(800, 5))
    choice_TLK = (cluster_TL + 4 * rng.integers(2, size=(800, 5)))[..., None]
    far = Topology(hosts=2, ranks_per_host=2, between=Link(alpha_us=10, beta_gbs=5))
    found = plan(choice_TLK, far, "traffic")
    host_LE = far.host_W[found.rank_LE]
    assert figures_of(host_LE, of_trace(choice_TLK), 2).traffic == 0


def test_memory_bounds_experts() -> None:
    choice = clustered(200, 3, 8)
    found = plan(choice, 3, memory=6)
    assert_feasible(found, 6)
    by_topology = plan(choice, Topology(ranks_per_host=3, memory_experts=6))
    assert (by_topology.expert_LWS == found.expert_LWS).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"topology": 9}, "leave ranks without one"),
        ({"topology": 2, "memory": 3}, "cannot hold 8"),
        ({"topology": 2, "objective": "speed"}, "objective is one of"),
        ({"topology": 2, "replicas": 2}, "replicas"),
        ({"topology": 2, "replicas": 9, "objective": "balance"}, "on every rank"),
        ({"topology": 2, "balance_weight": -1}, "at least 0"),
        ({"topology": 2, "solver": lambda problem: problem.contiguous_LE * 0}, "no placement"),
        ({"topology": 0}, "at least one host"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_planned(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(PlacementError, match=says):
        plan(clustered(50), **arguments)  # type: ignore[arg-type]


def test_loads_alone_admit_balance_only() -> None:
    loads = of_loads(EPLB_EXAMPLE)
    with pytest.raises(PlacementError, match="objective='balance'"):
        plan(loads, 4)
    found = plan(loads, 4, "balance")
    assert found.admits == "nothing"
    assert "balance alone" in str(found)


def test_previous_of_other_sizes_is_refused() -> None:
    old = plan(clustered(50), 2, solver=QUICK)
    with pytest.raises(PlacementError, match="previous plan is for"):
        plan(clustered(50), 4, previous=old)


@pytest.mark.parametrize(("groups", "hosts"), [(1, 1), (4, 2)])
def test_as_balanced_as_eplb_on_its_own_example(groups: int, hosts: int) -> None:
    found = plan(of_loads(EPLB_EXAMPLE), 8, "balance", replicas=4)
    assert found.num_replicas == 4
    assert_feasible(found, 2)
    load_LE = np.array(EPLB_EXAMPLE, np.float64)
    ours_L = found.load_LW(load_LE).max(1)
    for load_E, ours in zip(load_LE, ours_L, strict=True):
        expert_P, rank_P = eplb(load_E, 8, 4, groups=groups, hosts=hosts)
        assert ours <= np.bincount(rank_P, shared_load(load_E, expert_P)).max() + 1e-9
        assert (np.bincount(rank_P) == 2).all()


@FEW
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 6), st.integers(0, 99))
def test_replicas_are_feasible(ranks: int, each: int, replicas: int, seed: int) -> None:
    num_experts = ranks * each
    replicas = min(replicas, num_experts * (ranks - 1))
    load_LE = np.random.default_rng(seed).gamma(0.5, 100, (2, num_experts))
    found = plan(of_loads(load_LE.tolist()), ranks, "balance", replicas=replicas, solver=QUICK)
    assert_feasible(found, -(-(num_experts + replicas) // ranks))
    mean_L = load_LE.sum(1) / ranks
    balance = float((found.load_LW(load_LE).max(1) / mean_L).mean())
    assert balance == pytest.approx(found.planned.balance)
    assert found.planned.balance <= found.packed.balance + 1e-9
    if replicas:
        with pytest.raises(PlacementError, match="several ranks"):
            _ = found.rank_LE


def test_eplb_refuses_what_it_cannot_split() -> None:
    with pytest.raises(PlacementError, match="by ranks, got 12 by 5"):
        eplb(np.ones(12), 5)


def test_work_weighs_compute_against_links() -> None:
    choice = clustered(noise=0.5)
    heavy, light = (plan(choice, 4, work=Work(row_bytes=4096, row_flops=f)) for f in (1e9, 1.0))
    assert heavy.planned.balance <= light.planned.balance
    assert light.planned.traffic is not None
    assert heavy.planned.traffic is not None
    assert light.planned.traffic <= heavy.planned.traffic


def test_packing_is_a_solver_too() -> None:
    found = plan(clustered(), 4, solver=Packing())
    assert found.planned.cost == found.packed.cost


def test_a_plan_is_a_file(tmp_path: Path) -> None:
    found = plan(clustered(), 4, solver=QUICK)
    path = tmp_path / "plan.json"
    found.save(path)
    again = Plan.load(path)
    assert (again.expert_LWS == found.expert_LWS).all()
    assert again.planned == found.planned
    assert str(again) == str(found)
    path.write_text(path.read_text().replace('"num_ranks": 4', '"num_ranks": 5'))
    with pytest.raises(PlacementError, match="damaged"):
        Plan.load(path)
    path.write_text("[]")
    with pytest.raises(PlacementError, match="no plan"):
        Plan.load(path)
    path.write_text("{")
    with pytest.raises(PlacementError, match="no plan"):
        Plan.load(path)


def test_permutation_names_its_layers() -> None:
    found = plan(clustered(), 4, solver=QUICK)
    assert (found.permutation("layer 1") == found.permutation(1)).all()
    assert found.counts(0).tolist() == [2, 2, 2, 2]
    with pytest.raises(PlacementError, match="no layer 'layer 9'"):
        found.permutation("layer 9")


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for source, objective in ((of_trace(clustered()), "both"), (of_loads(EPLB_EXAMPLE), "balance")):
        path = tmp_path / f"{objective}.png"
        plan(source, 4, objective, solver=QUICK).plot(path, source)
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(PlacementError, match="not of loads"):
        plan(clustered(), 4, solver=QUICK).plot(path, of_loads(EPLB_EXAMPLE))
