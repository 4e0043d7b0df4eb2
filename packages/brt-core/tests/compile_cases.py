"""Modules that the tests of torch.compile and torch.export share, and loads to call them with.

Legend: N cells, P paths, D features, C channels, H W height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from core_cases import close, top_k
from torch import Tensor, nn
from torch.nn import functional as F

import brt
from brt import Cells, EarlyExit, GatherRouter, ScatterRouter
from brt.protocols import BinaryThreshold, CapacityTopK, Label, Threshold


class Branches(nn.Module):
    """Linear or convolutional branches between a scatter and a gather; scores come from outside."""

    def __init__(
        self, kind: str, num_paths: int, k: int = 1, scatter: dict | None = None, **gather: Any
    ) -> None:
        super().__init__()
        self.kind = kind
        self.scatter = ScatterRouter(top_k(k), num_paths, **(scatter or {}))
        self.branches = nn.ModuleList(self._branch() for _ in range(num_paths))
        self.gather = GatherRouter(**gather)

    def _branch(self) -> nn.Module:
        if self.kind == "conv":
            return nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, stride=2, padding=1)
            )
        if self.kind == "conv1d":
            return nn.Conv1d(2, 2, 3, padding=1)
        return nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))

    def forward(self, x: Tensor, scores: Tensor) -> Tensor:
        paths, route = self.scatter(x, scores)
        rows = [branch(path) for branch, path in zip(self.branches, paths, strict=True)]
        residual = (x,) if self.gather.add_residual or self.gather.overflow == "residual" else ()
        return self.gather(rows, route, *residual)

    def inputs(self, num_cells: int, load: str = "random", device: object = "cpu") -> tuple:
        """(x, scores): at random, all cells on the first or last path, or on every other one."""
        shape = {"conv": (2, 6, 6), "conv1d": (2, 5)}.get(self.kind, (4,))
        num_paths = self.scatter.num_paths
        scores = torch.rand(num_cells, num_paths)
        if load == "first":
            scores[:, 0] += 1
        elif load == "last":
            scores[:, -1] += 1
        elif load == "even":
            scores[:, ::2] += 1
        return torch.randn(num_cells, *shape).to(device), scores.to(device)


LOADS = ("random", "first", "last", "even")


class Tokens(nn.Module):
    """The first lines of the readme."""

    def __init__(self, dim: int = 4, num_experts: int = 4, k: int = 2) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, num_experts)
        self.scatter = ScatterRouter(top_k(k), num_paths=num_experts)
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_experts))
        self.gather = GatherRouter()

    def forward(self, x_BSD: Tensor) -> Tensor:
        cells_ND, grid = brt.annotate(x_BSD, dims=(0, 1))
        paths, route = self.scatter(cells_ND, self.gate(cells_ND).softmax(-1))
        rows = [expert(path) for expert, path in zip(self.experts, paths, strict=True)]
        return grid.restore(self.gather(rows, route))


class Records(Tokens):
    """The same, with everything that routing recorded among its outputs."""

    def forward(self, x_BSD: Tensor) -> tuple:
        cells_ND, grid = brt.annotate(x_BSD, dims=(0, 1))
        scores = self.gate(cells_ND).softmax(-1)
        paths, route = self.scatter(cells_ND, scores, grid.cells)
        rows = [expert(path) for expert, path in zip(self.experts, paths, strict=True)]
        out = grid.restore(self.gather(rows, route))
        return out, route, route[1], grid, self.scatter.protocol(scores, len(self.experts))


class Grouped(Tokens):
    """The same, all experts in one operator."""

    def __init__(self, dim: int = 4, num_experts: int = 4, k: int = 2) -> None:
        super().__init__(dim, num_experts, k)
        self.scatter = ScatterRouter(top_k(k), num_experts, result="packed")

    def forward(self, x_BSD: Tensor) -> Tensor:
        cells_ND, grid = brt.annotate(x_BSD, dims=(0, 1))
        rows, route = self.scatter(cells_ND, self.gate(cells_ND).softmax(-1))
        return grid.restore(self.gather(brt.grouped(list(self.experts), rows, route), route))


class Capacity(Tokens):
    """Dropped cells pass through."""

    def __init__(self, dim: int = 4, num_experts: int = 4, k: int = 2) -> None:
        super().__init__(dim, num_experts, k)
        self.scatter = ScatterRouter(CapacityTopK(k=k, capacity_factor=0.5), num_experts)
        self.gather = GatherRouter(overflow="residual")

    def forward(self, x_BSD: Tensor) -> Tensor:
        cells_ND, grid = brt.annotate(x_BSD, dims=(0, 1))
        paths, route = self.scatter(cells_ND, self.gate(cells_ND).softmax(-1))
        rows = [expert(path) for expert, path in zip(self.experts, paths, strict=True)]
        return grid.restore(self.gather(rows, route, cells_ND))


class Flows(nn.Module):
    """Two flows with one decision, one of them per path, weighted on the way in."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.scatter = ScatterRouter(top_k(2), 3, weighted=True, per_path=(False, True))
        self.gather = GatherRouter(weighted=False)

    def forward(self, x: Tensor) -> Tensor:
        per_path = torch.stack([x * (p + 1) for p in range(3)], 1)
        paths, route = self.scatter((x, per_path), self.gate(x).sigmoid())
        first, second = self.gather([(a.sin(), b.cos()) for a, b in paths], route)
        return first + second


class Nested(nn.Module):
    """A union of two paths goes through a second scatter; paths of both depths are gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.scatter = ScatterRouter(Threshold(0.0), 3)
        self.union = GatherRouter(result="union")
        self.gather = GatherRouter()
        self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, outer = self.scatter(x, self.gate(x), Cells.of(x.shape[0]))
        first = [branch(path) for branch, path in zip(self.branches, first, strict=True)]
        rows, cells = self.union(first[:2], [outer[0], outer[1]])
        second, inner = self.scatter(rows, self.gate(rows), cells)
        return self.gather([second[2].sin(), first[2], second[0]], [inner[2], outer[2], inner[0]])


class Patches(nn.Module):
    """A picture cut into overlapping patches, routed to convolutions, folded at twice the size."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(1, 2)
        self.scatter = ScatterRouter(top_k(), 2)
        self.gather = GatherRouter()
        self.branches = nn.ModuleList(nn.Conv2d(2, 8, size, padding=size // 2) for size in (3, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        cells, grid = brt.annotate_patches(x_BCHW, 4, 3)
        scores = self.gate(cells.mean((1, 2, 3))[:, None]).softmax(1)
        paths, route = self.scatter(cells, scores)
        rows = [b(path) for b, path in zip(self.branches, paths, strict=True)]
        return grid.restore(F.pixel_shuffle(self.gather(rows, route), 2), scale=2)


class Ids(nn.Module):
    """Routing by an integer id, without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.scatter, self.gather = ScatterRouter(Label(), 3), GatherRouter()

    def forward(self, x: Tensor) -> Tensor:
        paths, route = self.scatter(x, (x[:, 0] > 0).long() + (x[:, 1] > 0))
        return self.gather([path * (p + 1) for p, path in enumerate(paths)], route)


def exits(num_stages: int = 3) -> EarlyExit:
    return EarlyExit(
        (nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(num_stages)),
        (nn.Linear(4, 3) for _ in range(num_stages)),
        BinaryThreshold(0.45),
    )


def rows(num_cells: int) -> Tensor:
    return torch.randn(num_cells, 4)


def tokens(num_cells: int) -> Tensor:
    return torch.randn(2, num_cells, 4)


def pictures(num_cells: int) -> Tensor:
    return torch.randn(num_cells, 2, 7, 9)


# name, module, what makes an input for a number of cells (or tokens, or pictures)
MODULES: list[tuple[str, Callable[[], nn.Module], Callable[[int], Tensor]]] = [
    ("tokens", Tokens, tokens),
    ("records", Records, tokens),
    ("grouped", Grouped, tokens),
    ("capacity", Capacity, tokens),
    ("flows", Flows, rows),
    ("nested", Nested, rows),
    ("patches", Patches, pictures),
    ("ids", Ids, rows),
    ("early-exit", exits, rows),
]


def first_of(made: Any) -> Tensor:
    return made if isinstance(made, Tensor) else made[0]


def outcome(
    module: nn.Module, call: Callable[..., Any], inputs: tuple[Tensor, ...]
) -> Iterator[tuple[str, Tensor | None]]:
    """The output and every gradient, by name, for a fixed, uneven sum of the output."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    module.zero_grad(set_to_none=True)
    out = first_of(call(*leaves))
    yield "output", out.detach()
    weight = torch.linspace(-1, 2, out.numel(), device=out.device, dtype=out.dtype)
    (out * weight.view(out.shape)).sum().backward()
    for i, leaf in enumerate(leaves):
        yield f"gradient of input {i}", leaf.grad
    for name, parameter in module.named_parameters():
        yield f"gradient of {name}", parameter.grad


def same_outcome(
    module: nn.Module, call: Callable[..., Any], inputs: tuple[Tensor, ...], what: object
) -> None:
    """Assert that ``call`` gives the output and gradients of ``module``."""
    wanted = list(outcome(module, module, inputs))
    for (name, want), (_, came) in zip(wanted, outcome(module, call, inputs), strict=True):
        if want is None:
            assert came is None or not came.any(), f"{what}: {name}"
        else:
            assert came is not None, f"{what}: {name}"
            close(came, want, f"{what}: {name}", factor=20)
