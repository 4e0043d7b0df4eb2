"""`brt_dist.plan`: from what is known about a model to a placement with its figures.

Legend: L layers, E experts, P pieces (experts and their replicas), W ranks, S places of a rank.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

import brt
from brt import plugins
from brt_dist.placement.bounds import bounds
from brt_dist.placement.errors import PlacementError
from brt_dist.placement.packing import replicate, shared_load
from brt_dist.placement.plan import Figures, Plan
from brt_dist.placement.problem import OBJECTIVES, Problem, Work, moved_WW, visits_L
from brt_dist.placement.solvers import Descent, packed_LE
from brt_dist.placement.traffic import Ints, Traffic
from brt_dist.topology import Topology

Solver = Callable[[Problem], Ints]


def plan(
    source: brt.Profile | Traffic | ArrayLike | str | Path,
    topology: Topology | str | Path | int,
    objective: str = "both",
    *,
    memory: int | None = None,
    replicas: int = 0,
    previous: Plan | None = None,
    migration_cost: float = 0.0,
    balance_weight: float = 5.0,
    work: Work | None = None,
    solver: str | Solver | None = None,
    seed: int = 0,
) -> Plan:
    """Place the experts of every layer on ranks, at least one of a layer on each.

    Minimised is the mean over layers of what a token's rows cost on the links (in moves within a
    host), plus `balance_weight` times what the slowest rank's load is above the mean (as a share
    of it), plus `migration_cost` times the share of experts that leave the ranks of `previous`.
    The result costs no more than the contiguous placement, or than balanced packing (EPLB).

    Args:
        source: a profile, a trace ``[tokens, layers, choices]``, a `Traffic`, or a file.
        topology: hosts and links; a TOML or JSON file; or a number of ranks of one host.
        objective: "traffic" (load does not count), "balance" (traffic does not), or "both".
        memory: experts of a layer that a rank has room for; None = as the topology says.
        replicas: how many experts of each layer stand on a rank more; with "balance" only.
        previous: a plan of the same layers to stay close to.
        migration_cost: what it costs to move all experts.
        balance_weight: see above; with `work`, it follows from that and the topology instead.
        work: bytes and operations of a row.
        solver: a name that a plugin offers, or a callable; None = `Descent`.
        seed: the same seed gives the same plan.
    """
    start = time.perf_counter()
    traffic, topology = Traffic.of(source), _topology(topology)
    _check(traffic, topology, objective, replicas, previous)
    weight = balance_weight if work is None else _weight(work, traffic, topology)
    if not (weight >= 0 and migration_cost >= 0):
        raise PlacementError("plan: balance_weight and migration_cost must be at least 0")
    low, high = _room(traffic, topology, memory, replicas)
    pieces = _Pieces.of(traffic, replicas, topology.num_ranks)
    problem = Problem(
        pieces.traffic,
        topology,
        objective,
        low,
        high,
        {"traffic": 0.0, "balance": 1.0}.get(objective, weight),
        migration_cost,
        None if previous is None else previous.rank_LE,
        pieces.expert_LP if replicas else None,
    )
    rank_LP = _solver(solver, seed)(problem)
    if not problem.fits(rank_LP):
        raise PlacementError(
            f"plan: the solver {solver!r} returned ranks {np.shape(rank_LP)} that are no placement "
            f"of {problem.num_experts} experts with {low} to {high} a rank"
        )
    bound, how = _bound(problem)
    return Plan(
        model=traffic.model,
        layers=traffic.layers,
        num_experts=traffic.load_LE.shape[1],
        num_ranks=topology.num_ranks,
        objective=objective,
        admits=traffic.admits,
        expert_LWS=pieces.placed(rank_LP, topology.num_ranks),
        default=_figures(_without_replicas(problem, traffic)),
        packed=_figures(problem, packed_LE(problem)),
        planned=_figures(problem, rank_LP),
        bound=bound,
        how=how,
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True, eq=False)
class _Pieces:
    """What is placed: experts, and replicas of the hottest; with their loads."""

    expert_LP: Ints
    traffic: Traffic

    @classmethod
    def of(cls, traffic: Traffic, replicas: int, num_ranks: int) -> _Pieces:
        num_layers, num_experts = traffic.load_LE.shape
        if not replicas:
            return cls(np.tile(np.arange(num_experts), (num_layers, 1)), traffic)
        expert_LP = np.stack([replicate(load, replicas, num_ranks) for load in traffic.load_LE])
        load_LP = np.stack(
            [shared_load(load, e_P) for load, e_P in zip(traffic.load_LE, expert_LP, strict=True)]
        )
        return cls(expert_LP, Traffic(traffic.model, traffic.layers, traffic.num_cells, load_LP))

    def placed(self, rank_LP: Ints, num_ranks: int) -> Ints:
        """The experts of each rank's places, ``[L, W, S]``."""
        num_places = max(int(np.bincount(rank_P).max()) for rank_P in rank_LP)
        expert_LWS = np.full((len(rank_LP), num_ranks, num_places), -1)
        for expert_WS, expert_P, rank_P in zip(expert_LWS, self.expert_LP, rank_LP, strict=True):
            for rank in range(num_ranks):
                mine = np.sort(expert_P[rank_P == rank])
                expert_WS[rank, : len(mine)] = mine
        return expert_LWS


def _topology(given: Topology | str | Path | int) -> Topology:
    if isinstance(given, Topology):
        return given
    if isinstance(given, (str, Path)):
        return Topology.load(given)
    return Topology(ranks_per_host=given)


def _check(
    traffic: Traffic, topology: Topology, objective: str, replicas: int, previous: Plan | None
) -> None:
    if objective not in OBJECTIVES:
        raise PlacementError(
            f"plan: objective is one of {', '.join(OBJECTIVES)}, not {objective!r}"
        )
    num_layers, num_experts = traffic.load_LE.shape
    if not num_layers or not num_experts:
        raise PlacementError(f"plan: {traffic.model} has no experts: {[num_layers, num_experts]}")
    if traffic.admits == "nothing" and objective != "balance":
        raise PlacementError(
            f"plan: {traffic.model} says nothing about which experts share tokens (a profile does "
            "where each token takes one expert and the layers share a root); pass a trace "
            "[tokens, layers, choices] (brt_dist.placement.record makes one), or "
            "objective='balance'"
        )
    if replicas < 0 or (replicas and (objective != "balance" or previous is not None)):
        raise PlacementError(
            "plan: replicas (0 or more) are planned with objective='balance' and without a "
            f"previous plan, got replicas={replicas}, objective={objective!r}"
        )
    if previous is not None and (previous.layers, previous.num_experts, previous.num_ranks) != (
        traffic.layers,
        num_experts,
        topology.num_ranks,
    ):
        raise PlacementError(
            f"plan: the previous plan is for {len(previous.layers)} layers of "
            f"{previous.num_experts} experts on {previous.num_ranks} ranks, not {num_layers} of "
            f"{num_experts} on {topology.num_ranks}, or for layers of other names"
        )


def _room(
    traffic: Traffic, topology: Topology, memory: int | None, replicas: int
) -> tuple[int, int]:
    """Least and most experts of a layer on a rank."""
    num_experts, num_ranks = traffic.load_LE.shape[1], topology.num_ranks
    num_pieces = num_experts + replicas
    if num_experts < num_ranks:
        raise PlacementError(
            f"plan: {num_experts} experts on {num_ranks} ranks leave ranks without one; place "
            f"them on {num_experts} ranks at most, several times side by side"
        )
    if replicas > num_experts * (num_ranks - 1):
        raise PlacementError(f"plan: {replicas} replicas: every expert is on every rank before")
    memory = topology.memory_experts if memory is None else memory
    if memory is None:
        return num_pieces // num_ranks, -(-num_pieces // num_ranks)
    if memory * num_ranks < num_pieces:
        raise PlacementError(
            f"plan: {num_ranks} ranks with room for {memory} experts each cannot hold {num_pieces}"
        )
    return 1, min(memory, num_pieces)


def _weight(work: Work, traffic: Traffic, topology: Topology) -> float:
    """Seconds to compute a token's rows over seconds to move one, within a host."""
    rows = float(traffic.load_LE.sum()) / max(traffic.num_cells * len(traffic.load_LE), 1)
    moves = 1 if traffic.moves_LEE is not None else 2  # there, and where rows return, back
    move_seconds = moves * work.row_bytes / (topology.within.beta_gbs * 1e9)
    return rows * work.row_flops / (topology.tflops * 1e12) / move_seconds


def _solver(solver: str | Solver | None, seed: int) -> Solver:
    if solver is None:
        return Descent(seed=seed)
    if isinstance(solver, str):
        found: Solver = plugins.get("solvers", solver).factory(seed=seed)
        return found
    return solver


def _without_replicas(problem: Problem, traffic: Traffic) -> Problem:
    return dataclasses.replace(problem, traffic=traffic, owner_LE=None)


def figures_of(rank_LE: Ints, traffic: Traffic, topology: Topology | int) -> Figures:
    """What a placement ``[L, E]`` does with other traffic than it was planned for.

    `Figures.cost` is that of the links alone, where they are known.
    """
    topology = _topology(topology)
    objective = "balance" if traffic.admits == "nothing" else "traffic"
    problem = Problem(traffic, topology, objective, 0, rank_LE.shape[1], 0.0)
    return _figures(problem, rank_LE)


def _figures(problem: Problem, rank_LE: Ints | None = None) -> Figures:
    """Figures of a placement; without one, of the contiguous."""
    rank_LE = problem.contiguous_LE if rank_LE is None else rank_LE
    excess = [problem.excess(layer, rank_E) for layer, rank_E in enumerate(rank_LE)]
    return Figures(
        balance=1 + float(np.mean(excess)),
        worst=1 + max(excess),
        traffic=_traffic(problem, rank_LE),
        cost=problem.cost(rank_LE),
    )


def _traffic(problem: Problem, rank_LE: Ints) -> float | None:
    traffic = problem.traffic
    if traffic.moves_LEE is not None:
        total = float(traffic.moves_LEE.sum())
        flows = [moved_WW(traffic, rank_LE, i) for i in range(len(traffic.moves_LEE))]
        stays = sum(float(np.trace(flow)) for flow in flows)
        return 1 - stays / total if total else 0.0
    if traffic.choice_TLK is None:
        return None
    return float(visits_L(traffic, rank_LE, problem.num_ranks).mean())


def _bound(problem: Problem) -> tuple[Figures, str]:
    """Bounds as figures, and how they were found."""
    found = bounds(problem)
    balance, how = float(np.mean(found.balance_L)), found.how
    cost = problem.balance_weight * (balance - 1)
    cost += found.links if problem.counts_traffic else 0.0
    proof = problem.proof
    if proof is not None:
        how += "; integer program (HiGHS)"
        cost = max(cost, proof.bound)
        if problem.objective == "balance" and problem.previous_LE is None:
            balance = max(balance, 1 + proof.bound)
    traffic: float | None = None
    if problem.traffic.admits != "nothing" and problem.topology.hosts == 1:
        moves_LEE = problem.traffic.moves_LEE
        traffic = found.links
        if moves_LEE is not None:
            per_move = problem.traffic.num_cells * problem.num_layers / max(moves_LEE.sum(), 1.0)
            traffic *= float(per_move)
    return Figures(balance, max(found.balance_L), traffic, max(cost, 0.0)), how
