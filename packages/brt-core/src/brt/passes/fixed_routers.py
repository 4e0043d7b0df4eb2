"""Routers whose decisions are proved to be fixed: they route nothing, and read no loads.

Legend: N cells, P paths, K choices of a cell, R routed rows.
"""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from brt.cells import Cells
from brt.passes.constants import Constant, Keeper
from brt.passes.fixed import Bounds, FixedRoutes, fixed_paths
from brt.passes.unmoved import unmoved_cells, unmoved_paths
from brt.route import Route
from brt.routers import GatherRouter, ScatterRouter
from brt.routers.scatter import _widened


class FixedScatter(nn.Module):
    """A scatter whose protocol leaves no choice: ``forward(x, scores, cells)`` moves no rows.

    The protocol still checks the scores and gives the weights. Where its options have changed,
    and under a compiler, the scatter runs.
    """

    def __init__(
        self, scope: nn.Module, router_target: str, bounds: Bounds, copied: tuple[int, ...]
    ) -> None:
        super().__init__()
        self._scope = (scope,)
        self.router_target = router_target
        self.bounds = bounds
        self.copied = copied
        self._routes = FixedRoutes()

    @property
    def router(self) -> ScatterRouter:
        """The scatter."""
        return attrgetter(self.router_target)(self._scope[0])

    def forward(
        self, x: Tensor | tuple[Tensor, ...], scores: Tensor, cells: Cells | None = None
    ) -> tuple[Any, Route]:
        """What the scatter returns."""
        router = self.router
        always_P = fixed_paths(router.protocol, router.num_paths, self.bounds)
        if torch.compiler.is_compiling() or always_P is None:
            return router(x, scores, cells)
        num_cells = router._check((x,) if isinstance(x, Tensor) else tuple(x), scores)
        decision = router.protocol(_widened(scores), router.num_paths)
        if decision.num_cells != num_cells or not _fits(cells, num_cells, scores.device):
            return router(x, scores, cells)  # which says what is wrong
        cells = Cells.of(num_cells) if cells is None else cells
        route = self._routes.route(decision, always_P, cells)
        route = replace(route, weighted=True) if router.weighted else route
        paths = unmoved_paths(router, x, route, always_P, self.copied)
        router._observe(route, scores)
        return paths, route

    def extra_repr(self) -> str:
        """The router whose protocol is asked."""
        return f"weighs by {self.router_target}"


def _fits(cells: Cells | None, num_cells: int, device: torch.device) -> bool:
    if cells is None:
        return True
    is_there = cells.cell_R is None or cells.cell_R.device == device
    return is_there and cells.num_rows == num_cells


class ConstantScatter(Keeper):
    """A scatter whose scores depend on no input: ``forward(x, *sizes)`` decides once.

    Its route is kept until a parameter of the scores changes. Where each path takes all cells or
    none, no rows move.
    """

    def __init__(
        self, scope: nn.Module, router_target: str, scores: Constant, copied: tuple[int, ...]
    ) -> None:
        super().__init__(scope, scores)
        self.router_target = router_target
        self.copied = copied

    @property
    def router(self) -> ScatterRouter:
        """The scatter."""
        return attrgetter(self.router_target)(self._scope[0])

    def forward(self, x: Any, *sizes: Any) -> tuple[Any, Route]:
        """What the scatter returns."""
        router = self.router
        if torch.compiler.is_compiling():
            return router(x, self.value(*sizes))
        flows = (x,) if isinstance(x, Tensor) else tuple(x)
        places = tuple(
            (flow.shape[: router._is_per_path(i) + 1], flow.device) for i, flow in enumerate(flows)
        )
        key = (sizes, places, router.protocol, router.num_paths)
        made = self.keep(key, lambda: self._made(flows, sizes))
        scores, size_P, cell_R, row_NK, offsets_P1, *weight = made
        num_cells, sizes_P = flows[0].shape[0], tuple(size_P.tolist())
        route = Route(
            router.num_paths, num_cells, Cells.of(num_cells), cell_R, row_NK, offsets_P1,
            weight[0] if weight else None, sizes_P, router.weighted,
        )  # fmt: skip
        always_P = all_or_none(route)
        if always_P is None:
            return router._carry_out(x, scores, route)
        paths = unmoved_paths(router, x, route, always_P, self.copied)
        router._observe(route, scores)
        return paths, route

    def _made(self, flows: tuple[Tensor, ...], sizes: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The scores, loads on the host, and the route."""
        scores = self.value(*sizes)
        route = self.router._decide(flows, scores, None).with_sizes()
        weight = () if route.weight_R is None else (route.weight_R,)
        sizes_P = torch.tensor(route.sizes)
        return scores, sizes_P, route.cell_R, route.row_NK, route.offsets_P1, *weight

    def extra_repr(self) -> str:
        """The router that decides."""
        return f"decides by {self.router_target}"


class FixedGather(nn.Module):
    """A gather that takes rows as they are where each path has all cells or none.

    ``forward(rows, where, residual)`` returns what the gather returns.
    """

    def __init__(self, scope: nn.Module, router_target: str, lent: tuple[bool, ...]) -> None:
        super().__init__()
        self._scope = (scope,)
        self.router_target = router_target
        self.lent = lent
        """For each path, whether the result may be its rows themselves: nobody else reads them."""

    @property
    def router(self) -> GatherRouter:
        """The gather."""
        return attrgetter(self.router_target)(self._scope[0])

    def forward(self, rows: Any, where: Any, residual: Any = None) -> Any:
        """What the gather returns."""
        router, out = self.router, None
        always_P = None if torch.compiler.is_compiling() else all_or_none(where)
        if always_P is not None and any(always_P):
            lend = sum(always_P) == 1 and self.lent[always_P.index(True)]
            out = unmoved_cells(router, rows, where, residual, always_P, lend)
        return router(rows, where, residual) if out is None else out

    def extra_repr(self) -> str:
        """The router that stands behind."""
        return f"otherwise {self.router_target}"


def all_or_none(route: Route) -> tuple[bool, ...] | None:
    """Which paths have all cells, where the others have none; None elsewhere, and for no cells."""
    sizes_P, num_cells = route.sizes, route.num_cells
    if not num_cells or sizes_P is None or not {0, num_cells}.issuperset(sizes_P):
        return None
    return tuple(size == num_cells for size in sizes_P)
