"""What no placement can be better than.

Legend: E experts (or replicas), W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from brt_dist.placement.problem import Problem
from brt_dist.placement.traffic import Floats

_MOST_LP_EXPERTS = 64


@dataclass(frozen=True)
class Bounds:
    """Lower bounds, each by itself: no placement has less traffic, or less on its slowest rank.

    Attributes:
        balance_L: highest load of a rank in each layer, over the mean.
        links: `links_cost`; 0 where no traffic is known.
        how: how they were found.
    """

    balance_L: tuple[float, ...]
    links: float
    how: str


def bounds(problem: Problem) -> Bounds:
    """The bounds of a problem."""
    traffic = problem.traffic
    balance_L = tuple(
        most_load(load_E / mean, problem.num_ranks, problem.low, problem.high)
        for load_E, mean in zip(traffic.load_LE, problem.mean_load_L, strict=True)
    )
    how = "balance: mean load and pigeonholes"
    links = 0.0
    if traffic.moves_LEE is not None:
        links = _links(problem)
        small = problem.num_experts <= _MOST_LP_EXPERTS
        how += f"; traffic: {'linear program' if small else 'spectrum and heaviest partners'}"
        how += " for each pair of layers"
    elif traffic.choice_TLK is not None:
        links = _visits(problem)
        how += "; traffic: the most pairs of a token's experts that ranks could hold"
    return Bounds(balance_L, links, how)


def most_load(load_E: Floats, num_ranks: int, low: int, high: int) -> float:
    """The slowest rank has at least so much, whichever way experts are placed.

    The mean; and, of the (j - 1) W + 1 heaviest experts, some rank has j, and at least
    ``low - j`` others with them.
    """
    heavy_E = np.sort(load_E)[::-1]
    light_E = np.concatenate([[0.0], np.cumsum(heavy_E[::-1])])
    most = float(load_E.sum()) / num_ranks
    for together in range(1, high + 1):
        first = (together - 1) * num_ranks
        if first >= len(heavy_E):
            break
        # The lightest `together` of the heaviest `first + 1`
        held = float(heavy_E[first - together + 1 : first + 1].sum())
        most = max(most, held + float(light_E[max(low - together, 0)]))
    return most


def _links(problem: Problem) -> float:
    """Least `links_cost` where tokens stay: each pair of layers at its best, by itself."""
    traffic, topology = problem.traffic, problem.topology
    assert traffic.moves_LEE is not None
    far = topology.within.beta_gbs / topology.between.beta_gbs if topology.hosts > 1 else 1.0
    per_token = 1 / max(traffic.num_cells, 1) / max(problem.num_layers, 1)
    total = 0.0
    for moves_EE in traffic.moves_LEE:
        leaves_rank = moves_EE.sum() - _most_kept(moves_EE, problem.num_ranks, problem.high)
        leaves_host = 0.0
        if topology.hosts > 1:
            room = problem.high * topology.ranks_per_host
            leaves_host = moves_EE.sum() - _most_kept(moves_EE, topology.hosts, room)
        # A move between hosts is one between ranks too, and costs `far` instead of 1
        total += min(far, 1.0) * max(leaves_rank, 0.0)
        total += max(far - 1, 0.0) * max(leaves_host, 0.0)
    return per_token * total


def _most_kept(moves_EE: Floats, num_ranks: int, high: int) -> float:
    """At most so many moves stay within a rank, with `high` experts of either layer on it."""
    high = min(high, len(moves_EE))
    partners = min(
        float(np.sort(moves, axis=1)[:, -high:].sum()) for moves in (moves_EE, moves_EE.T)
    )
    # tr(X' M Y) of 0/1 matrices whose columns are orthogonal and no longer than sqrt(high)
    spectrum = high * float(np.linalg.svd(moves_EE, compute_uv=False)[:num_ranks].sum())
    most = min(partners, spectrum)
    if len(moves_EE) <= _MOST_LP_EXPERTS:
        most = min(most, _partners_lp(moves_EE, high))
    return most


def _partners_lp(moves_EE: Floats, high: int) -> float:
    """Each expert shares a rank with at most `high` of the other layer's: the best such pairs."""
    first, second = np.nonzero(moves_EE)
    if not len(first):
        return 0.0
    pair = np.arange(len(first))
    num_experts = len(moves_EE)
    rows = np.concatenate([first, num_experts + second])
    limits = sparse.csr_array((np.ones(2 * len(pair)), (rows, np.concatenate([pair, pair]))))
    full = np.full(limits.shape[0], float(high))
    found = linprog(-moves_EE[first, second], A_ub=limits, b_ub=full, bounds=(0, 1), method="highs")
    # A little more, against the solver's tolerance
    return float(moves_EE.sum()) if found.status != 0 else -float(found.fun) * (1 + 1e-7)


def _visits(problem: Problem) -> float:
    """Least `links_cost` where rows return, each layer at its best."""
    topology = problem.topology
    total = _least_visits(problem, topology.num_ranks, problem.high)
    if topology.hosts > 1:
        far = topology.within.beta_gbs / topology.between.beta_gbs
        room = problem.high * topology.ranks_per_host
        total += far * _least_visits(problem, topology.hosts, room)
    return total


def _least_visits(problem: Problem, num_groups: int, room: int) -> float:
    """At least so many groups are visited by a token, with room for so many experts in each.

    Experts of a token that share a group make pairs, and so many pairs of a layer fit into groups;
    `_saved` says what a token saves by them. A token visits one group for each `room` experts too.
    """
    choice_TLK = problem.traffic.choice_TLK
    assert choice_TLK is not None
    if not choice_TLK.size:
        return 0.0
    total = 0.0
    for choice_TK in choice_TLK.transpose(1, 0, 2):
        takes_TE = np.zeros((len(choice_TK), problem.num_experts + 1))
        np.put_along_axis(takes_TE, np.where(choice_TK < 0, problem.num_experts, choice_TK), 1, 1)
        takes_TE = takes_TE[:, :-1]
        taken_T = takes_TE.sum(1)
        pairs_EE = takes_TE.T @ takes_TE
        np.fill_diagonal(pairs_EE, 0)
        pairs = _most_pairs(pairs_EE, num_groups, room) / len(choice_TK)
        saved = np.interp(pairs, *_saved(int(taken_T.max())))
        total += max(float(taken_T.mean() - saved), float(np.ceil(taken_T / room).mean()))
    return total / choice_TLK.shape[1]


def _most_pairs(pairs_EE: Floats, num_groups: int, room: int) -> float:
    """At most so many pairs are within groups of at most `room` experts; each is there twice."""
    heavy_EE = np.sort(pairs_EE, axis=1)[:, ::-1]
    partners = float(heavy_EE[:, : room - 1].sum())
    # tr(X' P X) of a 0/1 matrix whose columns are orthogonal and no longer than sqrt(room)
    values = np.linalg.eigvalsh(pairs_EE)[-num_groups:]
    return min(partners, room * float(values[values > 0].sum())) / 2


def _saved(taken: int) -> tuple[Floats, Floats]:
    """The visits that a token saves by pairs, at most: corners of a concave curve (pairs, saved).

    Split evenly over g groups it makes the fewest pairs for the `taken - g` visits that it saves.
    """
    groups = np.arange(max(taken, 1), 0, -1)
    size, more = taken // groups, taken % groups
    pairs = (groups * size * (size - 1) / 2 + more * size).astype(np.float64)
    return pairs, (taken - groups).astype(np.float64)
