"""The fastest of several transports, by the number of cells: measured, or predicted by a topology.

Legend: N cells, K choices per cell, W ranks, P experts, D model and H hidden features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from brt_dist.agree import agree
from brt_dist.placement.problem import Work
from brt_dist.simulator import Simulator
from brt_dist.spread import Spread
from brt_dist.timing import side_by_side
from brt_dist.topology import Topology
from brt_dist.transport import Transport


@dataclass(frozen=True)
class Cells:
    """The cells of a call, on this rank.

    Attributes:
        kind: their dtype and shape, in words.
        work: what a row of them costs.
    """

    num_cells: int
    num_choices: int
    kind: str
    work: Work

    @classmethod
    def of(cls, x_ND: Tensor, choice_NK: Tensor, up_PHD: Tensor, down_PDH: Tensor) -> Cells:
        """From what a layer is called with."""
        weights = math.prod(up_PHD.shape[1:]) + math.prod(down_PDH.shape[1:])
        work = Work(row_bytes=max(1, x_ND.shape[1] * x_ND.element_size()), row_flops=2 * weights)
        kind = f"{x_ND.dtype} {list(x_ND.shape[1:])}"
        return cls(x_ND.shape[0], choice_NK.shape[1], kind, work)


Router = TypeVar("Router")
_REPEATS = 5


class Fastest(Generic[Router]):
    """The router, of one for each transport, that is fastest for so many cells.

    It is found at the first call with more cells than a power of two, for all ranks at once, and
    kept. Every rank chooses the same.
    """

    def __init__(
        self, transport: Transport, spread: Spread, make: Callable[[Transport], Router]
    ) -> None:
        self.among, self.topology, self.spread = transport.among, transport.topology, spread
        self.routers = tuple(make(one) for one in transport.among)
        self.chosen: dict[int, int] = {}

    def __call__(self, call: Callable[[Router], Tensor], cells: Cells) -> Tensor:
        """What the fastest router gives; every rank must call it."""
        most = self._most_cells(cells)
        size = 1 << most.bit_length() >> 1
        if size not in self.chosen:
            if self.topology is None:
                calls = [partial(call, router) for router in self.routers]
                seconds = side_by_side(calls, self.spread.group, _REPEATS)
            else:
                seconds = self.predicted(size, cells, self.topology)
            self.chosen[size] = min(range(len(seconds)), key=seconds.__getitem__)
        return call(self.routers[self.chosen[size]])

    def _most_cells(self, cells: Cells) -> int:
        """Cells of the rank that has most."""
        counts_W1 = torch.full((len(self.spread.held_W), 1), cells.num_cells)
        words = f"cells of {cells.kind} for {self.spread}, by the fastest of {len(self.among)} ways"
        agreed = agree("ParallelExpertRouter", words, counts_W1, self.spread.group)
        return int(agreed.received_WC.max())

    def predicted(self, num_cells: int, cells: Cells, topology: Topology) -> list[float]:
        """Seconds by each transport, by the simulator; routing is taken to be even."""
        rows = num_cells * cells.num_choices
        compute_s = rows * cells.work.row_flops / (topology.tflops * 1e12)
        found = []
        for transport in self.among:
            to_each = rows / topology.num_ranks
            if transport.replicated:
                to_each = num_cells
            elif transport.capacity is not None:
                to_each = transport.capacity * self.spread.num_slots
            travel_s = 2 * _one_way_s(transport, to_each, topology, cells.work)
            longer, shorter = max(travel_s, compute_s), min(travel_s, compute_s)
            found.append(longer + shorter / transport.degree)
        return found


def _one_way_s(transport: Transport, to_each: float, topology: Topology, work: Work) -> float:
    """Seconds of the messages, of so many rows each, that go one way."""
    form, degree = "direct", transport.degree
    if transport.hosts is not None:
        form, places = "hierarchical", dist.get_world_size(transport.hosts.within)
        hosts = topology.num_ranks // places
        topology = replace(topology, hosts=hosts, ranks_per_host=places)
    simulator = Simulator(topology=topology, work=work, exchange=form)
    rows_WW = np.full((topology.num_ranks, topology.num_ranks), to_each / degree)
    return degree * simulator.exchange_s(rows_WW)
