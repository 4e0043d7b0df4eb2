"""ScatterRouter: cells to paths.

Legend: N cells, P paths, R routed rows, S trailing cell dims, F flows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from brt import ops
from brt.cells import Cells
from brt.errors import RouteError
from brt.protocols.base import Protocol
from brt.route import Route, make_route
from brt.routers.base import Router


class ScatterRouter(Router):
    """Sends each cell along the paths that a protocol decides from its scores.

    ``forward(x, scores, cells=None)`` takes rows ``[N, *S]``, or a tuple of F such flows that
    travel together, and returns ``(paths, route)``: ``paths[p]`` holds the rows of path p in cell
    order (a tuple of F tensors for flows), possibly none.

    Under ``torch.autocast`` scores are taken, and weights given, in float32; rows keep their dtype.

    Args:
        protocol: what decides; see `brt.protocols`.
        num_paths: P.
        weighted: multiply rows by their weights here instead of in the gather, which must then
            have ``weighted=False``.
        per_path: flows (one bool, or one a flow) of shape ``[N, P, *S]``, of which path p takes
            ``[:, p]``.
        inherit_weights: multiply the weights by those that ``cells`` carry from the route before.
        result: "paths", or "packed": rows of all paths in one tensor ``[R, *S]`` that nothing on
            the host needs to know the loads of; for `brt.grouped`.
    """

    def __init__(
        self,
        protocol: Protocol,
        num_paths: int,
        *,
        weighted: bool = False,
        per_path: bool | tuple[bool, ...] = False,
        inherit_weights: bool = False,
        result: Literal["paths", "packed"] = "paths",
    ) -> None:
        super().__init__()
        if not isinstance(protocol, Protocol):
            raise RouteError(
                f"ScatterRouter: protocol must be a brt.protocols.Protocol, got {protocol!r}; by "
                "name: brt.protocols.get('top-k', k=2)"
            )
        if num_paths < 1:
            raise RouteError(f"ScatterRouter: num_paths must be at least 1, got {num_paths}")
        if result not in ("paths", "packed"):
            raise RouteError(f"ScatterRouter: result must be 'paths' or 'packed', got {result!r}")
        self.protocol = protocol
        self.num_paths = num_paths
        self.weighted = weighted
        self.per_path = per_path
        self.inherit_weights = inherit_weights
        self.result = result

    def forward(
        self, x: Tensor | tuple[Tensor, ...], scores: Tensor, cells: Cells | None = None
    ) -> tuple[Any, Route]:
        """Rows and scores -> (paths, route)."""
        flows = (x,) if isinstance(x, Tensor) else tuple(x)
        return self._carry_out(x, scores, self._decide(flows, scores, cells))

    def _decide(self, flows: tuple[Tensor, ...], scores: Tensor, cells: Cells | None) -> Route:
        """The route of these flows, not yet observed."""
        num_cells = self._check(flows, scores)
        decision = self.protocol(_widened(scores), self.num_paths)
        route = make_route(decision, num_cells, cells)
        if self.inherit_weights and cells is not None and cells.weight_R is not None:
            if cells.weighted:
                raise RouteError(
                    "ScatterRouter(inherit_weights=True): these rows were multiplied by their "
                    "weights already, by the scatter before (weighted=True)"
                )
            route = _inherit(route, cells.weight_R)
        if self.weighted:
            route = replace(route, weighted=True)
        return route

    def _carry_out(
        self, x: Tensor | tuple[Tensor, ...], scores: Tensor, route: Route
    ) -> tuple[Any, Route]:
        """Move the rows: (paths, route)."""
        flows = (x,) if isinstance(x, Tensor) else tuple(x)
        if self.result == "packed":
            rows = tuple(self._move(i, flow, route) for i, flow in enumerate(flows))
            self._observe(route, scores)
            return (rows[0] if isinstance(x, Tensor) else rows), route
        route = route.with_sizes()
        parts = [route.split(self._move(i, flow, route)) for i, flow in enumerate(flows)]
        self._observe(route, scores)
        if isinstance(x, Tensor):
            return parts[0], route
        return tuple(zip(*parts, strict=True)), route

    def _move(self, index: int, flow: Tensor, route: Route) -> Tensor:
        """One flow's rows, packed."""
        weight_R = route.weight_R if route.weighted else None
        if weight_R is not None and not flow.is_floating_point():
            raise RouteError(f"ScatterRouter(weighted=True): flow {index} is {flow.dtype}")
        if not self._is_per_path(index):
            return ops.dispatch(flow, route.cell_R, route.row_NK, weight_R)
        # Every (cell, path) pair is a cell of its own, with at most one row
        path_R = route.path_R()
        pair_R = torch.where(route.cell_R < 0, -1, route.cell_R * self.num_paths + path_R)
        num_pairs, num_rows = route.num_cells * self.num_paths, route.cell_R.shape[0]
        row = torch.full((num_pairs + 1,), -1, dtype=torch.int64, device=flow.device)
        row_R = torch.arange(num_rows, device=flow.device)
        row = row.scatter(0, torch.where(pair_R < 0, num_pairs, pair_R), row_R)
        return ops.dispatch(flow.flatten(0, 1), pair_R, row[:num_pairs, None], weight_R)

    def _is_per_path(self, index: int) -> bool:
        return self.per_path if isinstance(self.per_path, bool) else self.per_path[index]

    def _check(self, flows: tuple[Tensor, ...], scores: Tensor) -> int:
        if not flows or any(flow.ndim < 1 for flow in flows):
            raise RouteError("ScatterRouter: x must be rows [N, ...] or a tuple of such flows")
        if not isinstance(self.per_path, bool) and len(self.per_path) != len(flows):
            raise RouteError(
                f"ScatterRouter: per_path names {len(self.per_path)} flows, x has {len(flows)}"
            )
        num_cells = flows[0].shape[0]
        for i, flow in enumerate(flows):
            ops.same_size(
                f"ScatterRouter: cells of flow {i} and of flow 0", flow.shape[0], num_cells
            )
            if flow.device != scores.device:
                raise RouteError(
                    f"ScatterRouter: flow {i} is on {flow.device}, the scores on {scores.device}"
                )
            if self._is_per_path(i) and (flow.ndim < 2 or flow.shape[1] != self.num_paths):
                raise RouteError(
                    f"ScatterRouter: per-path flow {i} must be [N, {self.num_paths}, ...], got "
                    f"{list(flow.shape)}"
                )
        return num_cells

    def extra_repr(self) -> str:
        """The settings that differ from the default."""
        parts = [repr(self.protocol), f"num_paths={self.num_paths}"]
        for name, default in (
            ("weighted", False), ("per_path", False), ("inherit_weights", False),
            ("result", "paths"),
        ):  # fmt: skip
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)


def _widened(scores: Tensor) -> Tensor:
    """Scores as protocols take them: float32 where autocast made them less."""
    is_half = scores.dtype in (torch.float16, torch.bfloat16) and not scores.is_meta
    if is_half and torch.is_autocast_enabled(scores.device.type):
        return scores.float()
    return scores


def _inherit(route: Route, weight_N: Tensor) -> Route:
    inherited_R = ops.dispatch(weight_N, route.cell_R, route.row_NK)
    weight_R = inherited_R if route.weight_R is None else route.weight_R * inherited_R
    return replace(route, weight_R=weight_R)
