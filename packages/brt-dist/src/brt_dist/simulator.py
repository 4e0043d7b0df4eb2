"""What a step takes by the alpha-beta model: messages at a cost each, bytes at a rate, operations.

Legend: L layers, E experts, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb

import numpy as np
from scipy.optimize import nnls

from brt_dist.placement.errors import PlacementError
from brt_dist.placement.plan import Plan
from brt_dist.placement.problem import Work, moved_WW
from brt_dist.placement.traffic import Floats, Ints, Traffic
from brt_dist.topology import Link, Topology

EXCHANGES = ("direct", "hierarchical", "padded")


@dataclass(frozen=True)
class StepTime:
    """Seconds of the mixtures of a step, all layers together."""

    exchange_s: float
    compute_s: float

    @property
    def total_s(self) -> float:
        """Both, one after the other."""
        return self.exchange_s + self.compute_s


@dataclass(frozen=True, kw_only=True)
class Simulator:
    """Predicts the time of exchanges and experts; it knows of no other work, and no overlap.

    A rank sends its messages one after another and receives likewise; the slowest rank counts.

    Attributes:
        topology: hosts, links and the speed of a rank.
        work: bytes and operations of a row.
        exchange: "direct" (each rank to each), "hierarchical" (first within a host to the rank
            with the receiver's place, then between hosts), or "padded" (direct, with every message
            as long as the longest).
        shared_within: the ranks of a host share what moves bytes between them, as processes on the
            cores of one CPU do: then the bytes of all of them count, not the busiest rank's.
        shared_cores: so many cores compute for all ranks of a host, each as fast as the topology
            says of a rank, and one rank uses one at a time; None = each rank has its own.
    """

    topology: Topology
    work: Work
    exchange: str = "direct"
    shared_within: bool = False
    shared_cores: int | None = None

    def __post_init__(self) -> None:
        if self.exchange not in EXCHANGES:
            known = ", ".join(EXCHANGES)
            raise PlacementError(f"simulator: exchange is one of {known}, not {self.exchange!r}")
        if self.shared_cores is not None and self.shared_cores < 1:
            raise PlacementError(
                f"simulator: shared_cores must be at least 1, got {self.shared_cores}"
            )

    def step(self, traffic: Traffic, plan: Plan | Ints, num_cells: int) -> StepTime:
        """Time of the mixtures where so many tokens, evenly from all ranks, go as in `traffic`.

        `plan` may be the rank of each expert, ``[L, E]``. Tokens that take one expert move from
        rank to rank and return after the last layer; others return after each, as one row for
        each rank that they visited (for each expert, where only loads are known).
        """
        if isinstance(plan, Plan):
            rank_LE = None if plan.num_replicas else plan.rank_LE
            load_LW = plan.load_LW(traffic.load_LE)
        else:
            rank_LE, num_ranks = plan, self.topology.num_ranks
            pairs = zip(rank_LE, traffic.load_LE, strict=True)
            load_LW = np.stack([np.bincount(r, load, num_ranks) for r, load in pairs])
        if load_LW.shape[1] != self.topology.num_ranks:
            raise PlacementError(
                f"simulator: a plan for {load_LW.shape[1]} ranks on {self.topology.num_ranks}"
            )
        share = num_cells / max(traffic.num_cells, 1)
        flows = self._flows(traffic, rank_LE, load_LW)
        return StepTime(
            sum(self.exchange_s(share * rows_WW) for rows_WW in flows),
            sum(self.compute_s(share * load_W) for load_W in load_LW),
        )

    def _flows(self, traffic: Traffic, rank_LE: Ints | None, load_LW: Floats) -> list[Floats]:
        """Rows from rank to rank in each exchange of a step.

        The way back is the way there, its hops in reverse, and takes as long.
        """
        num_ranks = self.topology.num_ranks
        if rank_LE is not None and traffic.moves_LEE is not None:
            flows = [np.tile(load_LW[0] / num_ranks, (num_ranks, 1))]
            for layer in range(len(traffic.moves_LEE)):
                flow_WW = moved_WW(traffic, rank_LE, layer)
                rest = num_ranks - len(flow_WW)
                flows.append(np.pad(flow_WW, ((0, rest), (0, rest))))
            return [*flows, np.tile(load_LW[-1] / num_ranks, (num_ranks, 1))]
        rows_LW = load_LW
        if rank_LE is not None and traffic.choice_TLK is not None:
            rows_LW = np.stack([_visits_W(traffic, r, i, num_ranks) for i, r in enumerate(rank_LE)])
        there = [np.tile(rows_W / num_ranks, (num_ranks, 1)) for rows_W in rows_LW]
        return [out_WW for out_WW in there for _ in range(2)]

    def compute_s(self, rows_W: Floats) -> float:
        """Time of the slowest rank's experts, or of a host's cores with those of all its ranks."""
        rows = float(rows_W.max())
        if self.shared_cores is not None:
            host_rows_H = rows_W.reshape(self.topology.hosts, -1).sum(1)
            rows = max(rows, float(host_rows_H.max()) / self.shared_cores)
        return rows * self.work.row_flops / (self.topology.tflops * 1e12)

    def exchange_s(self, rows_WW: Floats) -> float:
        """Time of one exchange of these rows; those on the diagonal stay."""
        bytes_WW = rows_WW * self.work.row_bytes
        if self.exchange == "padded":
            bytes_WW = np.full_like(bytes_WW, bytes_WW.max())
        if self.exchange != "hierarchical" or self.topology.hosts == 1:
            return self._direct_s(bytes_WW)
        hosts, places = self.topology.hosts, self.topology.ranks_per_host
        bytes_HPHP = bytes_WW.reshape(hosts, places, hosts, places)
        first, second = np.zeros_like(bytes_HPHP), np.zeros_like(bytes_HPHP)
        host, place = np.arange(hosts), np.arange(places)
        # Within the host, to the rank with the receiver's place; then from place to same place
        first[host, :, host] = bytes_HPHP.sum(2)
        second[:, place, :, place] = bytes_HPHP.sum(1).transpose(2, 0, 1)
        shape = bytes_WW.shape
        return self._direct_s(first.reshape(shape)) + self._direct_s(second.reshape(shape))

    def _direct_s(self, bytes_WW: Floats) -> float:
        topology = self.topology
        near_WW = topology.host_W[:, None] == topology.host_W
        moves_WW = ~np.eye(topology.num_ranks, dtype=bool)
        slowest = 0.0
        for axis in (0, 1):  # receiving, sending
            inside_WW = bytes_WW * (near_WW & moves_WW)
            near_W = self._seconds_W(topology.within, inside_WW, axis, self.shared_within)
            far_W = self._seconds_W(topology.between, bytes_WW * ~near_WW, axis, False)
            slowest = max(slowest, float((near_W + far_W).max()))
        return slowest

    def _seconds_W(self, link: Link, bytes_WW: Floats, axis: int, shared: bool) -> Floats:
        """Of each rank's messages by one kind of link."""
        messages_W, bytes_W = (bytes_WW > 0).sum(axis), bytes_WW.sum(axis)
        if shared:
            mean_H = bytes_W.reshape(self.topology.hosts, -1).mean(1)
            bytes_W = mean_H[self.topology.host_W]
        seconds_W: Floats = messages_W * link.alpha_us * 1e-6 + bytes_W / (link.beta_gbs * 1e9)
        return seconds_W


def calibrate(
    num_bytes: Sequence[float], seconds: Sequence[float], messages: Sequence[float] | None = None
) -> tuple[Link, float]:
    """The link that fits measured times best, and its mean relative error.

    Least squares of relative errors, with neither cost below 0. ``messages`` says of how many
    messages, one after another, each measurement was; 1 by default.
    """
    bytes_M, seconds_M = np.asarray(num_bytes, np.float64), np.asarray(seconds, np.float64)
    messages_M = np.ones_like(bytes_M) if messages is None else np.asarray(messages, np.float64)
    if bytes_M.ndim != 1 or not bytes_M.shape == seconds_M.shape == messages_M.shape:
        raise PlacementError(
            f"calibrate: as many bytes as seconds and messages, got {bytes_M.shape}, "
            f"{seconds_M.shape} and {messages_M.shape}"
        )
    if len(bytes_M) < 2 or (seconds_M <= 0).any() or np.ptp(bytes_M) == 0:
        raise PlacementError(
            "calibrate: needs messages of two sizes or more, each with a time above 0"
        )
    # Columns of like size, or the solver takes microseconds for nothing
    scale = float(bytes_M.max())
    features = np.stack([messages_M, bytes_M / scale], axis=1) / seconds_M[:, None]
    (alpha, per_scale), _ = nnls(features, np.ones_like(seconds_M))
    if per_scale <= 0:
        raise PlacementError("calibrate: the times do not grow with the bytes; measure larger ones")
    link = Link(alpha_us=alpha * 1e6, beta_gbs=scale / per_scale / 1e9)
    error = np.abs(features @ np.array([alpha, per_scale]) - 1).mean()
    return link, float(error)


def even_step(
    simulator: Simulator, *, num_experts: int, top_k: int, num_layers: int, cells_per_rank: int
) -> StepTime:
    """A step with even routing of independent choices: how cost grows with the number of ranks.

    More ranks than experts stand in groups of as many ranks as experts, side by side; each group
    exchanges within itself, so that cost stays what it is from there on.
    """
    topology = simulator.topology
    num_ranks = min(topology.num_ranks, num_experts)
    if num_ranks < topology.num_ranks:
        hosts = max(num_ranks // topology.ranks_per_host, 1)
        topology = replace(topology, hosts=hosts, ranks_per_host=num_ranks // hosts)
        simulator = replace(simulator, topology=topology)
    if num_experts % topology.num_ranks or not 1 <= top_k <= num_experts:
        raise PlacementError(
            f"even_step: {num_experts} experts on {topology.num_ranks} ranks, {top_k} a token: "
            "experts must divide by ranks, and choices be 1 to the number of experts"
        )
    others = num_experts - num_experts // num_ranks
    visited = 1 - comb(others, top_k) / comb(num_experts, top_k)
    rows_WW = np.full((num_ranks, num_ranks), cells_per_rank * visited)
    rows_W = np.full(num_ranks, float(cells_per_rank * top_k))
    exchange_s = 2 * num_layers * simulator.exchange_s(rows_WW)
    return StepTime(exchange_s, num_layers * simulator.compute_s(rows_W))


def _visits_W(traffic: Traffic, rank_E: Ints, layer: int, num_ranks: int) -> Floats:
    """Tokens that visit each rank in a layer."""
    assert traffic.choice_TLK is not None
    choice_TK = traffic.choice_TLK[:, layer]
    seen_TW = np.zeros((len(choice_TK), num_ranks + 1), bool)
    np.put_along_axis(seen_TW, np.where(choice_TK >= 0, rank_E[choice_TK], num_ranks), True, 1)
    return seen_TW[:, :-1].sum(0).astype(np.float64)
