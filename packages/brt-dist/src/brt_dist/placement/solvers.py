"""The solver of placements that `brt_dist.plan` uses unless another is named.

Legend: L layers, E experts, W ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from brt_dist.placement.descent import descend, explore, improve, polish
from brt_dist.placement.packing import pack
from brt_dist.placement.problem import Problem
from brt_dist.placement.traffic import Ints

# Tokens beyond these make a search slower and hardly better; figures count all of them
_TOKENS_TO_IMPROVE = 16_384
_TOKENS_TO_POLISH = 4_000
# Work of a search: layers x experts x experts. Larger problems get fewer starts and kicks.
_LARGE = 200_000
# Steps of a walk for a kick: about as long
_STEPS = 25


@dataclass(frozen=True, kw_only=True)
class Descent:
    """Assignment layer by layer, swaps for traffic and load together, random kicks or walks.

    Attributes:
        seed: of the starts and kicks; the same seed gives the same placement.
        kicks: how often each layer is disturbed and improved again, from each start, in a problem
            of usual size; for co-activation, how long it is walked on (25 steps each).
        starts: random starts of the descent over layers.
    """

    seed: int = 0
    kicks: int = 20
    starts: int = 2

    def __call__(self, problem: Problem) -> Ints:
        """The ranks of the experts, ``[L, E]``."""
        rng = np.random.default_rng(self.seed)
        size = problem.num_layers * problem.num_experts**2
        kicks = round(self.kicks * min(1.0, _LARGE / size))
        usual, thin = thinned(problem, _TOKENS_TO_IMPROVE), thinned(problem, _TOKENS_TO_POLISH)
        plain = [problem.contiguous_LE, packed_LE(problem)]
        if problem.previous_LE is not None and problem.fits(problem.previous_LE):
            plain.append(problem.previous_LE)
        chained = problem.counts_traffic and problem.traffic.moves_LEE is not None
        found = [improve(usual, start) for start in plain[1:]]
        better: list[Ints] = []
        if chained:
            # These end far apart, and which is best shows only in the end
            better = [improve(usual, start) for start in self._descended(problem, rng, size)]
        if not chained or size > _LARGE:
            better = [min(found + better, key=problem.cost)]
        found += better
        if kicks:
            walks = problem.counts_traffic and not chained
            polished = [
                explore(thin, rank_LE, rng, _STEPS * kicks)
                if walks
                else polish(thin, rank_LE, rng, kicks)
                for rank_LE in better
            ]
            found += polished if thin is problem else [improve(usual, p) for p in polished]
        found += [relabelled(problem, rank_LE) for rank_LE in found]
        proof = problem.proof
        if proof is not None and proof.rank_LE is not None and problem.fits(proof.rank_LE):
            found.append(proof.rank_LE)
        # Of equals the first is taken: what was there before all others
        return _best(problem, plain[2:] + found + plain[:2])

    def _descended(self, problem: Problem, rng: np.random.Generator, size: int) -> Iterator[Ints]:
        yield descend(problem, problem.contiguous_LE)
        for _ in range(self.starts if size <= _LARGE else 0):
            shuffled = [rng.permutation(rank_E) for rank_E in problem.contiguous_LE]
            yield descend(problem, np.stack(shuffled))


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Balanced packing alone, as EPLB does it: milliseconds, and no thought of traffic."""

    seed: int = 0

    def __call__(self, problem: Problem) -> Ints:
        """The ranks of the experts, ``[L, E]``."""
        return packed_LE(problem)


def packed_LE(problem: Problem) -> Ints:
    """Each layer packed for balance."""
    load_LE = problem.traffic.load_LE
    low, high = problem.low, problem.high
    return np.stack([pack(load_E, problem.num_ranks, low, high) for load_E in load_LE])


def thinned(problem: Problem, most: int) -> Problem:
    """The problem with at most so many of its tokens, evenly spread; loads stay."""
    choice_TLK = problem.traffic.choice_TLK
    if problem.traffic.moves_LEE is not None or choice_TLK is None or len(choice_TLK) <= most:
        return problem
    index = np.linspace(0, len(choice_TLK) - 1, most).astype(np.int64)
    traffic = dataclasses.replace(problem.traffic, num_cells=most, choice_TLK=choice_TLK[index])
    return dataclasses.replace(problem, traffic=traffic)


def relabelled(problem: Problem, rank_LE: Ints) -> Ints:
    """The same parts under other ranks' names, so that the fewest experts move.

    Where hosts matter, or nothing was placed before, it is the same.
    """
    previous_LE = problem.previous_LE
    if previous_LE is None or (problem.counts_traffic and problem.topology.hosts > 1):
        return rank_LE
    together = problem.counts_traffic and problem.traffic.moves_LEE is not None
    renamed = rank_LE.copy()
    groups = [slice(None)] if together else [slice(i, i + 1) for i in range(len(rank_LE))]
    for layers in groups:
        common_WW = np.zeros((problem.num_ranks, problem.num_ranks))
        np.add.at(common_WW, (rank_LE[layers].ravel(), previous_LE[layers].ravel()), 1)
        renamed[layers] = linear_sum_assignment(-common_WW)[1][rank_LE[layers]]
    return renamed


def _best(problem: Problem, found: list[Ints]) -> Ints:
    """The cheapest; of equals the first."""
    if not problem.counts_traffic and problem.previous_LE is None:
        # Layers do not touch each other: the best of each
        excess = np.array([[problem.excess(i, r) for i, r in enumerate(ranks)] for ranks in found])
        best_L = excess.argmin(0)
        return np.stack([found[best][layer] for layer, best in enumerate(best_L)])
    return min(found, key=problem.cost)
