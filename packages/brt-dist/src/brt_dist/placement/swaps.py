"""Local search in one layer: the best exchange of two experts, or move of one, until none helps.

Legend: E experts, W ranks, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from brt_dist.placement.traffic import Floats, Ints

NDArray32 = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

_LEAST = 1e-9
# Beside the slowest rank, evenness of the others counts a little: it opens the way to more swaps
_EVENNESS = 0.05
# How long an expert that `explore` moved stays: at least, and less than
_KEPT_STEPS = (4, 12)


class Cost(Protocol):
    """What places cost beside load. `rank_E` is the placement that changes are counted from."""

    def moved_EW(self, rank_E: Ints) -> Floats:
        """Change where an expert moves to a rank."""

    def shared_EE(self, rank_E: Ints) -> Floats | None:
        """What exchanging two experts costs beyond their two moves."""

    def of(self, rank_E: Ints) -> float:
        """What the placement costs."""


@dataclass(frozen=True, eq=False)
class PlaceCost:
    """Each expert's places cost what they cost, wherever the others are."""

    cost_EW: Floats

    def moved_EW(self, rank_E: Ints) -> Floats:
        """See `Cost`."""
        return self.cost_EW - np.take_along_axis(self.cost_EW, rank_E[:, None], 1)

    def shared_EE(self, rank_E: Ints) -> None:
        """See `Cost`."""

    def of(self, rank_E: Ints) -> float:
        """See `Cost`."""
        return float(np.take_along_axis(self.cost_EW, rank_E[:, None], 1).sum())


@dataclass(frozen=True, eq=False)
class VisitCost:
    """Tokens cost as many rows as there are ranks with any of their experts.

    Attributes:
        takes_TE: float32, 1 where a token takes an expert.
        group_W: what counts as one place: ranks themselves, or their hosts.
        weight: cost of a visit of one token.
    """

    takes_TE: NDArray32
    group_W: Ints
    weight: float

    def _counts_TG(self, group_E: Ints) -> NDArray32:
        groups = np.arange(int(self.group_W.max()) + 1)
        counts_TG: NDArray32 = self.takes_TE @ (group_E[:, None] == groups).astype(np.float32)
        return counts_TG

    def moved_EW(self, rank_E: Ints) -> Floats:
        """See `Cost`."""
        group_E = self.group_W[rank_E]
        counts_TG = self._counts_TG(group_E)
        enter_EG = self.takes_TE.T @ (counts_TG == 0).astype(np.float32)
        last_EG = self.takes_TE.T @ (counts_TG == 1).astype(np.float32)
        leave_E = np.take_along_axis(last_EG, group_E[:, None], 1)
        moved_EW = (enter_EG - leave_E)[:, self.group_W].astype(np.float64)
        moved_EW[group_E[:, None] == self.group_W] = 0
        return self.weight * moved_EW

    def shared_EE(self, rank_E: Ints) -> Floats:
        """See `Cost`: a token that takes both goes on visiting both ranks."""
        group_E = self.group_W[rank_E]
        counts_TG = self._counts_TG(group_E)
        last_TE = self.takes_TE * (counts_TG == 1)[:, group_E]
        last_EE = (last_TE.T @ self.takes_TE).astype(np.float64)
        shared_EE = self.weight * (last_EE + last_EE.T)
        shared_EE[group_E[:, None] == group_E] = 0
        return shared_EE

    def of(self, rank_E: Ints) -> float:
        """See `Cost`."""
        return self.weight * float((self._counts_TG(self.group_W[rank_E]) > 0).sum())


@dataclass(frozen=True, eq=False)
class ApartCost:
    """Replicas of one expert should be on different ranks: two on one are worth one.

    Attributes:
        owner_E: whose replica each of the "experts" here is.
        num_ranks: W.
    """

    owner_E: Ints
    num_ranks: int
    weight: float = 10.0

    def _others_EW(self, rank_E: Ints) -> Floats:
        """How many other replicas of the same expert a rank has."""
        held_EW = np.zeros((len(rank_E), self.num_ranks))
        np.add.at(held_EW, (self.owner_E, rank_E), 1)
        held_EW = held_EW[self.owner_E]
        held_EW[np.arange(len(rank_E)), rank_E] -= 1
        return held_EW

    def moved_EW(self, rank_E: Ints) -> Floats:
        """See `Cost`."""
        others_EW = self.weight * self._others_EW(rank_E)
        return others_EW - np.take_along_axis(others_EW, rank_E[:, None], 1)

    def shared_EE(self, rank_E: Ints) -> Floats:
        """See `Cost`: two replicas of one expert exchange nothing."""
        same_EE = self.owner_E[:, None] == self.owner_E
        return np.where(same_EE & (rank_E[:, None] != rank_E), -2 * self.weight, 0.0)

    def of(self, rank_E: Ints) -> float:
        """See `Cost`."""
        others_EW = self._others_EW(rank_E)
        return self.weight * float(np.take_along_axis(others_EW, rank_E[:, None], 1).sum()) / 2


@dataclass(frozen=True, eq=False)
class Summed:
    """Several costs, added."""

    parts: tuple[Cost, ...]

    def moved_EW(self, rank_E: Ints) -> Floats:
        """See `Cost`."""
        return np.sum([part.moved_EW(rank_E) for part in self.parts], axis=0)

    def shared_EE(self, rank_E: Ints) -> Floats | None:
        """See `Cost`."""
        found = [s for part in self.parts if (s := part.shared_EE(rank_E)) is not None]
        return np.sum(found, axis=0) if found else None

    def of(self, rank_E: Ints) -> float:
        """See `Cost`."""
        return sum(part.of(rank_E) for part in self.parts)


@dataclass(frozen=True, eq=False)
class LayerSearch:
    """One layer, with the rest of the model as it is.

    Attributes:
        cost: what places cost beside load.
        load_E: loads, in units of a rank's mean load.
        balance_weight: what the slowest rank's load counts.
        low: least experts of a rank.
        high: most experts of a rank.
    """

    cost: Cost
    load_E: Floats
    balance_weight: float
    low: int
    high: int

    def value(self, rank_E: Ints, num_ranks: int) -> float:
        """What the layer costs."""
        most = float(np.bincount(rank_E, self.load_E, num_ranks).max())
        return self.cost.of(rank_E) + self.balance_weight * max(most - 1.0, 0.0)

    def improve(self, rank_E: Ints, num_ranks: int, max_steps: int = 10_000) -> Ints:
        """The placement after the best exchanges and moves, one after another."""
        rank_E = rank_E.copy()
        for _ in range(max_steps):
            swap_EE, move_EW = self._changes(rank_E, num_ranks)
            if min(swap_EE.min(), move_EW.min()) > -_LEAST:
                break
            _carry_out(rank_E, swap_EE, move_EW)
        return rank_E

    def explore(self, rank_E: Ints, num_ranks: int, steps: int, rng: np.random.Generator) -> Ints:
        """The best placement on a walk that goes on where no change helps (tabu search).

        Each step is the best change of experts that have not moved a while before, or any that
        beats all placements so far.
        """
        best_E, now_E = rank_E, rank_E.copy()
        least = now = self.value(rank_E, num_ranks)
        free_E = np.zeros(len(rank_E), np.int64)  # steps from which an expert may move again
        for step in range(steps):
            swap_EE, move_EW = self._changes(now_E, num_ranks)
            kept_E = free_E > step
            needed = least - now - _LEAST
            swap_EE[(kept_E[:, None] | kept_E) & (swap_EE > needed)] = np.inf
            move_EW[kept_E[:, None] & (move_EW > needed)] = np.inf
            moved = _carry_out(now_E, swap_EE, move_EW)
            if not moved:
                break
            free_E[moved] = step + rng.integers(*_KEPT_STEPS)
            now = self.value(now_E, num_ranks)
            if now < least - _LEAST:
                best_E, least = now_E.copy(), now
        return best_E

    def _changes(self, rank_E: Ints, num_ranks: int) -> tuple[Floats, Floats]:
        """Change of the whole cost by each exchange ``[E, E]`` and each move ``[E, W]``."""
        moved_EW = self.cost.moved_EW(rank_E)
        swap_EE = moved_EW[:, rank_E]
        swap_EE = swap_EE + swap_EE.T
        shared_EE = self.cost.shared_EE(rank_E)
        if shared_EE is not None:
            swap_EE += shared_EE
        loads = _LoadChange.of(np.bincount(rank_E, self.load_E, num_ranks).astype(np.float64))
        less_EE = self.load_E[:, None] - self.load_E
        swap_EE += self.balance_weight * loads.by(rank_E[:, None], rank_E, less_EE)
        swap_EE[rank_E[:, None] == rank_E] = np.inf
        size_W = np.bincount(rank_E, minlength=num_ranks)
        move_EW = np.full_like(moved_EW, np.inf)
        leaving, entering = size_W[rank_E] > self.low, size_W < self.high
        if leaving.any() and entering.any():
            change_EW = loads.by(rank_E[:, None], np.arange(num_ranks), self.load_E[:, None])
            move_EW = moved_EW + self.balance_weight * change_EW
            move_EW[~leaving] = np.inf
            move_EW[:, ~entering] = np.inf
            move_EW[np.arange(len(rank_E)), rank_E] = np.inf
        return swap_EE, move_EW


def _carry_out(rank_E: Ints, swap_EE: Floats, move_EW: Floats) -> list[int]:
    """Do the best of the exchanges and moves, in place: the experts that moved, [] if none may."""
    swap, move = int(swap_EE.argmin()), int(move_EW.argmin())
    if min(swap_EE.flat[swap], move_EW.flat[move]) == np.inf:
        return []
    if swap_EE.flat[swap] <= move_EW.flat[move]:
        one, other = divmod(swap, len(rank_E))
        rank_E[[one, other]] = rank_E[[other, one]]
        return [one, other]
    one, rank_E[one] = divmod(move, move_EW.shape[1])
    return [one]


@dataclass(frozen=True, eq=False)
class _LoadChange:
    load_W: Floats
    most: float
    others_WW: Floats
    """Highest load of the ranks that are neither of two."""

    @classmethod
    def of(cls, load_W: Floats) -> _LoadChange:
        order = np.argsort(-load_W, kind="stable")[:3]
        others_WW = np.full((len(load_W), len(load_W)), -np.inf)
        for rank in order[::-1]:
            # From the third highest up: what remains is the highest that is neither
            keeps = np.arange(len(load_W)) != rank
            others_WW[np.ix_(keeps, keeps)] = load_W[rank]
        return cls(load_W, float(load_W.max()), others_WW)

    def by(self, from_: Ints, to: Ints, less: Floats) -> Floats:
        """Change of the balance's cost where `less` goes from a rank to another."""
        before_from, before_to = self.load_W[from_], self.load_W[to]
        after_from, after_to = before_from - less, before_to + less
        most = np.maximum(np.maximum(after_from, after_to), self.others_WW[from_, to])
        # a^2 + b^2 grows by 2 less (b - a + less)
        uneven = 2 * less * (before_to - before_from + less) / len(self.load_W)
        return (most - self.most) + _EVENNESS * uneven
