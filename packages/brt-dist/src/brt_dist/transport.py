"""How the cells of a layer travel to experts on other ranks."""

from __future__ import annotations

from dataclasses import dataclass

from brt_dist.errors import ParallelError
from brt_dist.hierarchical import Hosts


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
    """

    degree: int = 1
    hosts: Hosts | None = None
    replicated: bool = False
    capacity: int | None = None
    symmetric: int | None = None

    def __post_init__(self) -> None:
        """Check that the choices go together."""
        if self.degree < 1:
            raise ParallelError(f"Transport: degree must be at least 1, got {self.degree}")
        for name, rows in (("capacity", self.capacity), ("symmetric", self.symmetric)):
            if rows is not None and rows < 1:
                raise ParallelError(f"Transport: {name} must be at least 1, got {rows}")
        others = (
            self.hosts is not None, self.replicated, self.capacity is not None,
            self.symmetric is not None,
        )  # fmt: skip
        if (self.degree > 1) + sum(others) > 1:
            raise ParallelError(
                f"Transport: choose one of degree={self.degree}, hosts, replicated="
                f"{self.replicated}, capacity={self.capacity} and symmetric={self.symmetric}"
            )
