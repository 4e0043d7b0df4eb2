"""What is asked of a placement, and what one costs.

Legend: L layers, E experts, W ranks, T tokens, K choices of a token, H hosts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from brt_dist.placement.errors import PlacementError
from brt_dist.placement.traffic import Floats, Ints, Traffic
from brt_dist.topology import Topology

if TYPE_CHECKING:
    from brt_dist.placement.exact import Proof

OBJECTIVES = ("traffic", "balance", "both")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one row costs: its bytes on a link, and the operations of an expert on it."""

    row_bytes: float
    row_flops: float

    def __post_init__(self) -> None:
        if not (self.row_bytes > 0 and self.row_flops >= 0):
            raise PlacementError(f"{self}: row_bytes must be above 0, row_flops at least 0")


@dataclass(frozen=True, eq=False)
class Problem:
    """Ranks for the experts of each layer: at least `low` and at most `high` of a layer on each.

    What a placement costs is the mean over layers of what a token's rows cost on the links, in
    moves within a host, plus `balance_weight` times what the slowest rank's load is above the
    mean (as a share of it), plus `migration_cost` times the share of experts that move away from
    `previous_LE`.
    """

    traffic: Traffic
    topology: Topology
    objective: str
    low: int
    high: int
    balance_weight: float
    migration_cost: float = 0.0
    previous_LE: Ints | None = None
    owner_LE: Ints | None = None
    """With replicas: whose replica each "expert" is."""

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.traffic.load_LE)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.traffic.load_LE.shape[1]

    @property
    def num_ranks(self) -> int:
        """W."""
        return self.topology.num_ranks

    @property
    def counts_traffic(self) -> bool:
        """Whether rows on the links are part of the objective."""
        return self.objective != "balance"

    @cached_property
    def mean_load_L(self) -> Floats:
        """Load of a rank in each layer if all were equal; 1 where nothing was routed."""
        mean_L = self.traffic.load_LE.sum(1) / self.num_ranks
        return np.where(mean_L > 0, mean_L, 1.0)

    @cached_property
    def contiguous_LE(self) -> Ints:
        """The default: experts in order, an even share on each rank."""
        sizes = [len(part) for part in np.array_split(np.arange(self.num_experts), self.num_ranks)]
        return np.tile(np.repeat(np.arange(self.num_ranks), sizes), (self.num_layers, 1))

    def migration_EW(self, layer: int) -> Floats:
        """What placing an expert costs for its weights to move there."""
        shape = (self.num_experts, self.num_ranks)
        if self.previous_LE is None or self.migration_cost == 0:
            return np.zeros(shape)
        stays_EW = self.previous_LE[layer][:, None] == np.arange(self.num_ranks)
        return np.where(stays_EW, 0.0, self.migration_cost / self.num_experts)

    @cached_property
    def proof(self) -> Proof | None:
        """What an integer program shows about it; None where it is too large for one."""
        from brt_dist.placement import exact

        return exact.solve(self) if exact.admits(self) else None

    def fits(self, rank_LE: Ints) -> bool:
        """Whether this is a placement, and ranks have room for it."""
        rank_LE = np.asarray(rank_LE)
        if rank_LE.shape != (self.num_layers, self.num_experts) or rank_LE.dtype.kind != "i":
            return False
        if rank_LE.min() < 0 or rank_LE.max() >= self.num_ranks:
            return False
        sizes = [np.bincount(rank_E, minlength=self.num_ranks) for rank_E in rank_LE]
        return all(s.min() >= self.low and s.max() <= self.high for s in sizes)

    def cost(self, rank_LE: Ints) -> float:
        """What a placement costs; lower is better."""
        layers = range(self.num_layers)
        balance = np.mean([self.excess(layer, rank_LE[layer]) for layer in layers])
        total = self.balance_weight * float(balance)
        if self.counts_traffic:
            total += links_cost(self.traffic, self.topology, rank_LE)
        if self.previous_LE is not None:
            total += self.migration_cost * float((rank_LE != self.previous_LE).mean())
        return total

    def excess(self, layer: int, rank_E: Ints) -> float:
        """Load of the slowest rank above the mean, as a share of it."""
        load_W = np.bincount(rank_E, self.traffic.load_LE[layer], self.num_ranks)
        return max(float(load_W.max()) / float(self.mean_load_L[layer]) - 1.0, 0.0)


def links_cost(traffic: Traffic, topology: Topology, rank_LE: Ints) -> float:
    """Mean over layers of what a token costs on the links, in moves within a host.

    Where a token visits several experts of a layer, its row goes once to each rank, and once to
    each host.
    """
    num_layers = max(len(rank_LE), 1)
    if traffic.moves_LEE is not None:
        flows = [moved_WW(traffic, rank_LE, i) for i in range(len(traffic.moves_LEE))]
        total = sum(float((flow * topology.cost_WW).sum()) for flow in flows)
        return total / max(traffic.num_cells, 1) / num_layers
    total = float(visits_L(traffic, rank_LE, topology.num_ranks).sum())
    if topology.hosts > 1:
        far = topology.within.beta_gbs / topology.between.beta_gbs
        host_LE = topology.host_W[rank_LE]
        total += far * float(visits_L(traffic, host_LE, topology.hosts).sum())
    return total / num_layers


def moved_WW(traffic: Traffic, rank_LE: Ints, layer: int) -> Floats:
    """Tokens that go from a rank to a rank between a layer and the next."""
    assert traffic.moves_LEE is not None
    num_ranks = int(rank_LE.max(initial=0)) + 1
    first_EW = one_hot(rank_LE[layer], num_ranks)
    second_EW = one_hot(rank_LE[layer + 1], num_ranks)
    flow_WW: Floats = first_EW.T @ traffic.moves_LEE[layer] @ second_EW
    return flow_WW


def visits_L(traffic: Traffic, rank_LE: Ints, num_ranks: int) -> Floats:
    """Ranks (or other groups of experts) that a token visits in each layer, on average."""
    assert traffic.choice_TLK is not None
    found = []
    for layer, rank_E in enumerate(rank_LE):
        choice_TK = traffic.choice_TLK[:, layer]
        seen_TW = np.zeros((len(choice_TK), num_ranks + 1), bool)
        # The spare last column takes choices that are none
        rank_TK = np.where(choice_TK >= 0, rank_E[choice_TK], num_ranks)
        np.put_along_axis(seen_TW, rank_TK, True, 1)
        found.append(float(seen_TW[:, :-1].sum()) / max(len(choice_TK), 1))
    return np.array(found)


def one_hot(rank_E: Ints, num_ranks: int) -> Floats:
    """``[E, W]``: 1 where an expert is."""
    return (rank_E[:, None] == np.arange(num_ranks)).astype(np.float64)
