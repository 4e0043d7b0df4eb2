"""Scatter and gather whose paths are on several ranks.

Legend: N cells, P paths, R routed rows, S trailing cell dims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brt import Cells, GatherRouter, Route, RouteError, ScatterRouter
from brt_dist.agree import telling
from brt_dist.exchange import Exchange, exchange_counts, reverse_all_to_all, start
from brt_dist.hierarchical import (
    TwoHops,
    hierarchical_all_to_all,
    reverse_hierarchical_all_to_all,
)
from brt_dist.segments import Reorder
from brt_dist.spread import Spread
from brt_dist.transport import Transport


@dataclass(frozen=True, eq=False, kw_only=True)
class SpreadRoute(Route):
    """The route of this rank's cells, whose paths also have the rows of other ranks' cells.

    Beside packed rows, ``offsets_P1`` are those of this rank's paths in them: as many as it holds.

    Attributes:
        spread: which rank holds which path.
        exchange: how the rows travelled, for the way back.
        by_rank: from rows by path to rows by rank, then path.
    """

    spread: Spread
    exchange: Exchange | TwoHops
    by_rank: Reorder

    def __getitem__(self, path: int) -> NoReturn:
        """Nobody can say which cells the rows of a path are: most are of other ranks."""
        raise RouteError(
            f"route[{path}]: this route is spread over ranks; its paths can be gathered by "
            "gather(rows, route) only, not nested or gathered with those of other routes"
        )


class Elsewhere(nn.Module):
    """The branch of a path that another rank holds; it gives back its no rows."""

    def forward(self, rows: Tensor, *others: Tensor) -> Tensor:
        """The rows."""
        return rows


class ParallelScatterRouter(ScatterRouter):
    """A `brt.ScatterRouter` that sends rows to the ranks of their paths. Every rank must call it.

    ``paths[p]`` has the rows of all ranks' cells where this rank holds path p, by rank, and none
    where it does not; packed rows are those of this rank's paths, in their order. The route is a
    `SpreadRoute`, for a `ParallelGatherRouter`.
    """

    waits_for_others = True

    def __init__(self, scatter: ScatterRouter, spread: Spread, transport: Transport) -> None:
        super().__init__(
            scatter.protocol,
            scatter.num_paths,
            weighted=scatter.weighted,
            per_path=scatter.per_path,
            inherit_weights=scatter.inherit_weights,
            result=scatter.result,
        )
        self.spread = spread
        self.transport = transport

    @torch.compiler.disable
    def forward(
        self, x: Tensor | tuple[Tensor, ...], scores: Tensor, cells: Cells | None = None
    ) -> tuple[Any, Route]:
        """Rows and scores -> (paths, route)."""
        flows = (x,) if isinstance(x, Tensor) else tuple(x)
        with telling("ParallelScatterRouter", self.spread.group):
            route = self._decide(flows, scores, cells).with_sizes()
            self._observe(route, scores)
            load_P = torch.tensor(route.sizes)
            by_rank = self.spread.by_rank(load_P, flows[0].device)
            packed = tuple(by_rank.apply(self._move(i, f, route)) for i, f in enumerate(flows))
        arrived, exchange = self._send(packed, self.spread.counts_WG(load_P))
        known = {field.name: getattr(route, field.name) for field in fields(Route)}
        if self.result == "packed":
            load_G = exchange.load_G[: len(self.spread.held)]
            known["offsets_P1"] = F.pad(load_G.cumsum(0), (1, 0)).to(flows[0].device)
        spread_route = SpreadRoute(**known, spread=self.spread, exchange=exchange, by_rank=by_rank)
        if self.result == "packed":
            return (arrived[0] if isinstance(x, Tensor) else arrived), spread_route
        parts = [self._paths(flow, exchange.load_G) for flow in arrived]
        if isinstance(x, Tensor):
            return tuple(parts[0]), spread_route
        return tuple(zip(*parts, strict=True)), spread_route

    def _send(
        self, flows: tuple[Tensor, ...], counts_WG: Tensor
    ) -> tuple[tuple[Tensor, ...], Exchange | TwoHops]:
        if self.transport.hosts is not None:
            return hierarchical_all_to_all(flows, counts_WG, self.transport.hosts)
        note = f" for {self.spread}"
        (exchange,), grads = exchange_counts(flows, [counts_WG], self.spread.group, note)
        return start(flows, exchange, grads)(), exchange

    def _paths(self, rows: Tensor, load_G: Tensor) -> list[Tensor]:
        """Rows by this rank's experts -> the rows of each path."""
        held = self.spread.held
        parts = [rows[:0]] * self.num_paths
        sizes = load_G[: len(held)].tolist()
        for path, part in zip(held, rows.split(sizes) if held else (), strict=True):
            parts[path] = part
        return parts


class ParallelGatherRouter(GatherRouter):
    """A `brt.GatherRouter` that takes the paths of a `ParallelScatterRouter` back to their ranks.

    Of ``rows`` it reads the paths that this rank holds; packed, they are all. Other routes it
    gathers as `brt.GatherRouter` does.
    """

    waits_for_others = True

    def __init__(self, gather: GatherRouter) -> None:
        super().__init__(
            result=gather.result,
            weighted=gather.weighted,
            overflow=gather.overflow,
            add_residual=gather.add_residual,
        )

    @torch.compiler.disable
    def forward(
        self,
        rows: Tensor | Sequence[Any],
        where: Route | Sequence[Cells],
        residual: Tensor | tuple[Tensor, ...] | None = None,
    ) -> Any:
        """Rows and where they belong -> cells, as `brt.GatherRouter` gives them."""
        if not isinstance(where, SpreadRoute):
            return super().forward(rows, where, residual)
        if isinstance(rows, Tensor):
            num_rows = int(where.exchange.load_G.sum())
            if rows.shape[0] != num_rows:
                raise RouteError(f"GatherRouter: {rows.shape[0]} packed rows for {num_rows}")
            return super().forward(_back(rows, where), where, residual)
        held = self._held(rows, where)
        if isinstance(held[0], Tensor):
            return super().forward(_back(torch.cat(held), where), where, residual)
        flows = [_back(torch.cat(flow), where) for flow in zip(*held, strict=True)]
        parts = [where.split(flow) for flow in flows]
        return super().forward(list(zip(*parts, strict=True)), where, residual)

    def _held(self, rows: Sequence[Any], where: SpreadRoute) -> list[Any]:
        """The results of this rank's paths, checked."""
        if len(rows) != where.num_paths:
            raise RouteError(
                f"GatherRouter: {len(rows)} for the {where.num_paths} paths of the route"
            )
        held = [rows[path] for path in where.spread.held]
        for path, part, load in zip(
            where.spread.held, held, where.exchange.load_G.tolist(), strict=False
        ):
            for flow in (part,) if isinstance(part, Tensor) else part:
                if flow.shape[0] != load:
                    raise RouteError(
                        f"GatherRouter: path {path} gave {flow.shape[0]} rows for {load}"
                    )
        return held


def _back(rows: Tensor, route: SpreadRoute) -> Tensor:
    """Rows of this rank's paths -> rows of this rank's cells, by path."""
    reverse: Callable[..., Tensor] = reverse_all_to_all
    if isinstance(route.exchange, TwoHops):
        reverse = reverse_hierarchical_all_to_all
    return route.by_rank.undo(reverse(rows, route.exchange))
