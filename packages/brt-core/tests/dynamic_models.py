"""Small models whose inputs say where their cells go: the first P features of a cell are scores.

Legend: N cells, P paths, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import brt
from brt import protocols

DIM = 6


def to_paths(paths: Sequence[int | Sequence[int]], dtype: torch.dtype = torch.float32) -> Tensor:
    """Cells ``[N, D]`` that go to these paths; a cell may name several, the best first."""
    made = torch.Generator().manual_seed(len(paths))
    x_ND = torch.randn(len(paths), DIM, generator=made) * 0.1
    for n, wanted in enumerate(paths):
        for place, p in enumerate([wanted] if isinstance(wanted, int) else wanted):
            x_ND[n, p] = 5.0 - place
    return x_ND.to(dtype)


class Mixture(nn.Module):
    """Scatter by the first features, a branch for each path, gather."""

    def __init__(
        self,
        num_paths: int = 3,
        k: int = 1,
        branches: Sequence[nn.Module] | None = None,
        protocol: protocols.Protocol | None = None,
        scatter: dict[str, Any] | None = None,
        gather: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_paths = num_paths
        self.scatter = brt.ScatterRouter(
            protocol or protocols.TopK(k), num_paths, **(scatter or {})
        )
        if branches is None:
            branches = [nn.Sequential(nn.Linear(DIM, DIM), nn.GELU()) for _ in range(num_paths)]
        self.branches = nn.ModuleList(branches)
        self.gather = brt.GatherRouter(**(gather or {}))
        self.eval()

    def scores(self, x: Tensor) -> Tensor:
        return x[:, : self.num_paths]

    def forward(self, x: Tensor) -> Any:
        paths, route = self.scatter(x, self.scores(x))
        outs = [branch(path) for branch, path in zip(self.branches, paths, strict=True)]
        residual = x if self.gather.add_residual or self.gather.overflow == "residual" else None
        return self.gather(outs, route, residual)


class Residual(nn.Module):
    """A mixture with work before and behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mixture = Mixture()
        self.head = nn.Linear(DIM, 2)
        self.register_buffer("scale", torch.tensor(2.0))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.scale * self.mixture(x))


class Untraceable(nn.Module):
    """Python code that branches on values, around two mixtures."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mixture(), Mixture(k=2)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] and bool((x > 100).any()):
            return x
        return self.second(self.first(x) + x)
