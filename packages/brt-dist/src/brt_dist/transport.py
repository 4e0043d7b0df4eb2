"""How the cells of a layer travel to experts on other ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from brt_dist.errors import ParallelError
from brt_dist.groups import Group
from brt_dist.hierarchical import Hosts
from brt_dist.topology import Topology


@dataclass(frozen=True)
class Transport:
    """The choices there are; each gives the same result, but for rows beyond a capacity.

    Attributes:
        degree: parts that the cells are cut into, so that the exchange of one overlaps with the
            experts' work on another. 1 = no overlap.
        hosts: exchange within hosts first, then between them; None = straight.
        replicated: gather all cells on all ranks instead of exchanging rows; it moves less where
            cells have more choices than there are ranks.
        capacity: rows that a rank may have for one expert, in buffers of that size: nothing is read
            from the device, and a CUDA graph can capture the exchange. Rows beyond it are dropped;
            with as many as the rank has cells none are.
        symmetric: rows that a rank has room for, in memory that the GPUs of the group reach: cells
            are written there by one kernel, and nothing is read from the device. CUDA; while
            gradients are recorded rows are exchanged as by default.
        among: the fastest of these, for each power of two of cells: measured on the layer at its
            first call with so many, and kept. The ranks tell each other how many cells they have.
        topology: with `among`, predict by it which is fastest instead of measuring.
    """

    degree: int = 1
    hosts: Hosts | None = None
    replicated: bool = False
    capacity: int | None = None
    symmetric: int | None = None
    among: tuple[Transport, ...] = ()
    topology: Topology | None = None

    def __post_init__(self) -> None:
        """Check that the choices go together."""
        if self.degree < 1:
            raise ParallelError(f"Transport: degree must be at least 1, got {self.degree}")
        for name, rows in (("capacity", self.capacity), ("symmetric", self.symmetric)):
            if rows is not None and rows < 1:
                raise ParallelError(f"Transport: {name} must be at least 1, got {rows}")
        others = (
            self.hosts is not None, self.replicated, self.capacity is not None,
            self.symmetric is not None, bool(self.among),
        )  # fmt: skip
        if (self.degree > 1) + sum(others) > 1:
            raise ParallelError(
                f"Transport: choose one of degree={self.degree}, hosts, replicated="
                f"{self.replicated}, capacity={self.capacity}, symmetric={self.symmetric} and among"
            )
        if self.topology is not None and not self.among:
            raise ParallelError("Transport: topology is to choose by, and needs among=(...)")
        if any(transport.among for transport in self.among):
            raise ParallelError("Transport: what stands in among chooses nothing itself")

    def check(self, group: Group) -> None:
        """Refuse what was made for another group."""
        if self.hosts is not None and self.hosts.group is not group:
            raise ParallelError("Transport: hosts is of another group")
        num_ranks = dist.get_world_size(group)
        if self.topology is not None and self.topology.num_ranks != num_ranks:
            raise ParallelError(
                f"Transport: the topology is of {self.topology.num_ranks} ranks, the group of "
                f"{num_ranks}"
            )
        for transport in self.among:
            transport.check(group)
