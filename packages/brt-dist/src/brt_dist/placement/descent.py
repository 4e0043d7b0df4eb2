"""Placement of whole models: layer by layer with the neighbours fixed, then joint swaps.

Legend: L layers, E experts, W ranks, S places (each rank's, one after another).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.optimize import linear_sum_assignment

from brt_dist.placement.problem import Problem, one_hot
from brt_dist.placement.swaps import ApartCost, Cost, LayerSearch, PlaceCost, Summed, VisitCost
from brt_dist.placement.traffic import Floats, Ints

_MAX_SWEEPS = 50
_LEAST = 1e-9


def places_EW(problem: Problem, rank_LE: Ints, layer: int) -> Floats:
    """What each place of a layer's experts costs while the other layers stay."""
    traffic, cost_WW = problem.traffic, problem.topology.cost_WW
    cost_EW = problem.migration_EW(layer)
    if not problem.counts_traffic or traffic.moves_LEE is None:
        return cost_EW
    per_token = 1 / max(traffic.num_cells, 1)
    if layer > 0:
        came_EW = traffic.moves_LEE[layer - 1].T @ one_hot(rank_LE[layer - 1], problem.num_ranks)
        cost_EW = cost_EW + per_token * (came_EW @ cost_WW)
    if layer + 1 < problem.num_layers:
        goes_EW = traffic.moves_LEE[layer] @ one_hot(rank_LE[layer + 1], problem.num_ranks)
        cost_EW = cost_EW + per_token * (goes_EW @ cost_WW)
    return cost_EW


def assign(problem: Problem, cost_EW: Floats) -> Ints:
    """The cheapest ranks of a layer's experts where places cost what they cost, wherever the
    others are: a linear assignment problem.
    """
    rank_S = np.repeat(np.arange(problem.num_ranks), problem.high)
    cost_ES = cost_EW[:, rank_S]
    if problem.low < problem.high:
        # Nothing is worth leaving one of a rank's first places empty
        bonus = 2 * float(np.abs(cost_EW).sum()) + 1
        first_S = np.tile(np.arange(problem.high) < problem.low, problem.num_ranks)
        cost_ES = cost_ES - bonus * first_S
    place_E = linear_sum_assignment(cost_ES)[1]
    return rank_S[place_E]


def descend(problem: Problem, rank_LE: Ints) -> Ints:
    """Reassign layer after layer, there and back, while that helps. Ignores load."""
    rank_LE = rank_LE.copy()
    layers = range(problem.num_layers)
    for _ in range(_MAX_SWEEPS):
        changed = False
        for layer in (*layers, *reversed(layers[:-1])):
            cost_EW = places_EW(problem, rank_LE, layer)
            new_E = assign(problem, cost_EW)
            index = np.arange(problem.num_experts)
            gain = cost_EW[index, rank_LE[layer]].sum() - cost_EW[index, new_E].sum()
            if gain > _LEAST:
                rank_LE[layer], changed = new_E, True
        if not changed:
            break
    return rank_LE


def improve(problem: Problem, rank_LE: Ints, layers: Iterable[int] | None = None) -> Ints:
    """Swap experts of layer after layer, for traffic and load together, while that helps.

    Starts at these layers, or at all; their neighbours follow where a change reaches them.
    """
    rank_LE = rank_LE.copy()
    waiting = set(range(problem.num_layers) if layers is None else layers)
    while waiting:
        layer = min(waiting)
        waiting.discard(layer)
        search = layer_search(problem, rank_LE, layer)
        new_E = search.improve(rank_LE[layer], problem.num_ranks)
        before, after = (search.value(r, problem.num_ranks) for r in (rank_LE[layer], new_E))
        # Evenness, which the search also counts, must not keep neighbours busy for ever
        if after < before - _LEAST:
            rank_LE[layer] = new_E
            waiting |= _neighbours(problem, layer)
    return rank_LE


def _neighbours(problem: Problem, layer: int) -> set[int]:
    """The layers whose costs depend on where this one's experts are."""
    if not problem.counts_traffic or problem.traffic.moves_LEE is None:
        return set()
    return {layer - 1, layer + 1} & set(range(problem.num_layers))


def polish(
    problem: Problem, rank_LE: Ints, rng: np.random.Generator, kicks: int, size: int = 4
) -> Ints:
    """Disturb a layer by a few random swaps, improve it again, keep it where it got better."""
    rank_LE = rank_LE.copy()
    num_experts, num_ranks = problem.num_experts, problem.num_ranks
    chained = problem.counts_traffic and problem.traffic.moves_LEE is not None
    searches: dict[int, LayerSearch] = {}
    for kick in range(kicks * problem.num_layers):
        layer = kick % problem.num_layers
        search = searches.get(layer) or layer_search(problem, rank_LE, layer)
        if not chained:
            searches[layer] = search
        new_E = rank_LE[layer].copy()
        for one, other in rng.integers(num_experts, size=(size, 2)):
            new_E[[one, other]] = new_E[[other, one]]
        new_E = search.improve(new_E, num_ranks)
        gain = search.value(rank_LE[layer], num_ranks) - search.value(new_E, num_ranks)
        if gain > _LEAST:
            rank_LE[layer] = new_E
            rank_LE = improve(problem, rank_LE, _neighbours(problem, layer))
    return rank_LE


def explore(problem: Problem, rank_LE: Ints, rng: np.random.Generator, steps: int) -> Ints:
    """`LayerSearch.explore` in each layer. For costs that do not depend on other layers."""
    searches = [layer_search(problem, rank_LE, layer) for layer in range(problem.num_layers)]
    walks = zip(searches, rank_LE, strict=True)
    return np.stack([s.explore(rank_E, problem.num_ranks, steps, rng) for s, rank_E in walks])


def layer_search(problem: Problem, rank_LE: Ints, layer: int) -> LayerSearch:
    """The local search of one layer, with the others as they are."""
    traffic = problem.traffic
    cost: Cost = PlaceCost(places_EW(problem, rank_LE, layer))
    if problem.counts_traffic and traffic.moves_LEE is None:
        cost = Summed((cost, *_visits(problem, layer)))
    if problem.owner_LE is not None:
        cost = Summed((cost, ApartCost(problem.owner_LE[layer], problem.num_ranks)))
    load_E = traffic.load_LE[layer] / problem.mean_load_L[layer]
    return LayerSearch(cost, load_E, problem.balance_weight, problem.low, problem.high)


def _visits(problem: Problem, layer: int) -> list[VisitCost]:
    assert problem.traffic.choice_TLK is not None
    topology = problem.topology
    choice_TK = problem.traffic.choice_TLK[:, layer]
    takes_TE = np.zeros((len(choice_TK), problem.num_experts + 1), np.float32)
    np.put_along_axis(takes_TE, np.where(choice_TK < 0, problem.num_experts, choice_TK), 1, 1)
    takes_TE = np.ascontiguousarray(takes_TE[:, :-1])
    per_token = 1 / max(len(choice_TK), 1)
    costs = [VisitCost(takes_TE, np.arange(topology.num_ranks), per_token)]
    if topology.hosts > 1:
        far = topology.within.beta_gbs / topology.between.beta_gbs
        costs.append(VisitCost(takes_TE, topology.host_W, far * per_token))
    return costs
