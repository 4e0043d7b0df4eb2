"""Hosts, ranks and the links between them.

Legend: W ranks.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from brt_dist.placement.errors import PlacementError


@dataclass(frozen=True, kw_only=True)
class Link:
    """A message of b bytes takes ``alpha_us * 1e-6 + b / (beta_gbs * 1e9)`` seconds."""

    alpha_us: float
    beta_gbs: float

    def __post_init__(self) -> None:
        if not (self.alpha_us >= 0 and self.beta_gbs > 0):
            raise PlacementError(f"{self}: alpha_us must be at least 0 and beta_gbs above 0")

    def seconds(self, num_bytes: float) -> float:
        """How long one message takes."""
        return self.alpha_us * 1e-6 + num_bytes / (self.beta_gbs * 1e9)


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Ranks on hosts: rank r is on host ``r // ranks_per_host``.

    The links' defaults are of the order of one NVLink host and one InfiniBand port a rank; only
    their ratio matters to a placement, and only where there are several hosts.

    Attributes:
        hosts: number of hosts.
        ranks_per_host: ranks on each.
        within: the link between two ranks of one host.
        between: a rank's share of the link between hosts.
        tflops: what one rank computes, in 1e12 floating-point operations a second.
        memory_experts: experts of a layer that a rank has room for; None = as many as an even
            split needs.
    """

    hosts: int = 1
    ranks_per_host: int
    within: Link = Link(alpha_us=3.0, beta_gbs=300.0)
    between: Link = Link(alpha_us=12.0, beta_gbs=45.0)
    tflops: float = 400.0
    memory_experts: int | None = None

    def __post_init__(self) -> None:
        if self.hosts < 1 or self.ranks_per_host < 1:
            raise PlacementError(f"topology: at least one host and one rank a host, got {self}")
        if not self.tflops > 0:
            raise PlacementError(f"topology: tflops must be above 0, got {self.tflops}")
        if self.memory_experts is not None and self.memory_experts < 1:
            raise PlacementError(
                f"topology: memory_experts must be at least 1, got {self.memory_experts}"
            )

    @property
    def num_ranks(self) -> int:
        """W."""
        return self.hosts * self.ranks_per_host

    @property
    def host_W(self) -> NDArray[np.int64]:
        """The host of each rank."""
        return np.arange(self.num_ranks) // self.ranks_per_host

    @property
    def cost_WW(self) -> NDArray[np.float64]:
        """What moving a byte costs, in moves within a host: 0 on a rank, 1 within a host."""
        host_W = self.host_W
        far = self.within.beta_gbs / self.between.beta_gbs
        cost_WW = np.where(host_W[:, None] == host_W, 1.0, far)
        np.fill_diagonal(cost_WW, 0.0)
        return cost_WW

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a TOML or JSON file whose keys are the fields, links as tables of theirs."""
        path = Path(path)
        text = path.read_text(encoding="utf-8")
        try:
            found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except ValueError as error:
            raise PlacementError(f"topology: {path} is neither TOML nor JSON: {error}") from error
        return cls.of(found, str(path))

    @classmethod
    def of(cls, found: Any, where: str = "topology") -> Self:
        """From what a file holds."""
        known = _checked(found, [f.name for f in fields(cls)], where)
        if "ranks_per_host" not in known:
            raise PlacementError(f"{where}: ranks_per_host is missing")
        for name in ("within", "between"):
            if name in known:
                link = _checked(known[name], [f.name for f in fields(Link)], f"{where}: {name}")
                if len(link) != 2:
                    raise PlacementError(f"{where}: {name} needs alpha_us and beta_gbs")
                known[name] = Link(**link)
        return cls(**known)


def _checked(found: Any, names: list[str], where: str) -> dict[str, Any]:
    """A mapping of these names, whose plain values are numbers."""
    if not isinstance(found, Mapping):
        raise PlacementError(f"{where}: expected {', '.join(names)}, got {type(found).__name__}")
    if unknown := set(found) - set(names):
        raise PlacementError(f"{where}: unknown {sorted(unknown)}; known are {', '.join(names)}")
    for name, value in found.items():
        whole = name in ("hosts", "ranks_per_host", "memory_experts")
        fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if name not in ("within", "between") and not fits:
            kind = "a whole number" if whole else "a number"
            raise PlacementError(f"{where}: {name} must be {kind}, got {value!r}")
    return dict(found)
