"""GatherRouter: paths to cells.

Legend: N cells, R routed rows, S trailing cell dims, U cells that some path delivers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from brt import checks, ops
from brt.cells import Cells
from brt.errors import RouteError
from brt.route import Route, merge_cells
from brt.routers.base import Router


class GatherRouter(Router):
    """Brings the rows of paths back to cells: their weighted sum for each cell.

    ``forward(rows, where, residual=None)``. ``where`` is the route of one scatter, and ``rows`` its
    paths in order (a list, tuples inside for flows) or its packed rows; or ``where`` is a list of
    `Cells` (``route[p]`` of any routes at any depth that share a root), and ``rows`` the list of
    their rows.

    Args:
        result: "all" gives one row for each cell of the scatter's input, or of the root where
            ``where`` is a list. "union" gives only the cells that some path delivers, in cell
            order, as ``(rows, cells)``, ready for the next scatter (``cells=cells``).
        weighted: multiply rows by the route's weights.
        overflow: what a cell is that no path delivers (result "all"): "drop" = zero; "residual" =
            its row of ``residual``; "error".
        add_residual: add ``residual`` to every cell.

    The result has the dtype of the rows; sums run in float32.
    """

    def __init__(
        self,
        *,
        result: Literal["all", "union"] = "all",
        weighted: bool = True,
        overflow: Literal["drop", "residual", "error"] = "drop",
        add_residual: bool = False,
    ) -> None:
        super().__init__()
        if result not in ("all", "union"):
            raise RouteError(f"GatherRouter: result must be 'all' or 'union', got {result!r}")
        if overflow not in ("drop", "residual", "error"):
            raise RouteError(
                f"GatherRouter: overflow must be 'drop', 'residual' or 'error', got {overflow!r}"
            )
        if result == "union" and overflow != "drop":
            raise RouteError(
                "GatherRouter: with result='union' undelivered cells are not there; "
                f"overflow={overflow!r} needs result='all'"
            )
        if overflow == "residual" and add_residual:
            raise RouteError(
                "GatherRouter: add_residual=True adds it to every cell already; "
                "leave overflow='drop'"
            )
        self.result = result
        self.weighted = weighted
        self.overflow = overflow
        self.add_residual = add_residual

    def forward(
        self,
        rows: Tensor | Sequence[Any],
        where: Route | Sequence[Cells],
        residual: Tensor | tuple[Tensor, ...] | None = None,
    ) -> Any:
        """Rows and where they belong -> cells, or (cells' rows, `Cells`) with result "union"."""
        flows, is_tuple = _as_flows(rows, where)
        if (residual is not None) != (self.add_residual or self.overflow == "residual"):
            raise RouteError(
                f"GatherRouter(overflow={self.overflow!r}, add_residual={self.add_residual}): "
                f"residual is {'needed' if residual is None else 'not used'}"
            )
        cells, row_NK, cell_R, weight_R = self._resolve(where, flows[0].device)
        residuals = residual if isinstance(residual, tuple) else (residual,) * len(flows)
        if len(residuals) != len(flows):
            raise RouteError(f"GatherRouter: {len(residuals)} residuals for {len(flows)} flows")
        undelivered_N = None
        if self.overflow != "drop" or self.result == "union":
            undelivered_N = (row_NK < 0).all(1)
        if self.overflow == "error" and undelivered_N is not None:
            checks.check_values(
                ~undelivered_N.any(),
                "GatherRouter(overflow='error'): cells that no path delivers",
                detail=lambda: f"{int(undelivered_N.sum())} of {undelivered_N.numel()}",
                error=RouteError,
            )
        if self.result == "union":
            assert undelivered_N is not None
            kept_U = (~undelivered_N).nonzero().squeeze(1)
            row_NK = row_NK.index_select(0, kept_U)
            # The rows' cells, counted in the union
            place_N = torch.cumsum(~undelivered_N, 0) - 1
            cell_R = torch.where(cell_R < 0, -1, place_N.index_select(0, cell_R.clamp(min=0)))
            root_U = kept_U if cells.cell_R is None else cells.cell_R.index_select(0, kept_U)
            cells = Cells(cells.root, root_U)
            residuals = tuple(r if r is None else r.index_select(0, kept_U) for r in residuals)
        out = tuple(
            self._finish(ops.combine(flow, row_NK, cell_R, weight_R), res, undelivered_N)
            for flow, res in zip(flows, residuals, strict=True)
        )
        result = out if is_tuple else out[0]
        return (result, cells) if self.result == "union" else result

    def _resolve(
        self, where: Route | Sequence[Cells], device: torch.device
    ) -> tuple[Cells, Tensor, Tensor, Tensor | None]:
        """(cells of the result, row_NK, cell_R, weight_R or None)."""
        records = (where,) if isinstance(where, Route) else where
        if self.weighted and any(r.weighted and r.weight_R is not None for r in records):
            raise RouteError(
                "GatherRouter: the scatter weighted these rows already (weighted=True); weight "
                "them once: GatherRouter(weighted=False)"
            )
        if isinstance(where, Route):
            weight_R = where.weight_R if self.weighted else None
            return where.cells, where.row_NK, where.cell_R, weight_R
        merged = merge_cells(where, device)
        weight_R = merged.weight_R if self.weighted else None
        return Cells(merged.root), merged.row_NL, merged.cell_R, weight_R

    def _finish(self, out: Tensor, residual: Tensor | None, undelivered_N: Tensor | None) -> Tensor:
        if residual is None:
            return out
        if residual.shape != out.shape:
            raise RouteError(
                f"GatherRouter: residual is {list(residual.shape)}, the result {list(out.shape)}"
            )
        if self.add_residual:
            return out + residual.to(out.dtype)
        assert undelivered_N is not None
        undelivered = undelivered_N.view(-1, *([1] * (out.ndim - 1)))
        return torch.where(undelivered, residual.to(out.dtype), out)

    def extra_repr(self) -> str:
        """The settings that differ from the default."""
        defaults = {"result": "all", "weighted": True, "overflow": "drop", "add_residual": False}
        return ", ".join(
            f"{name}={getattr(self, name)!r}"
            for name, default in defaults.items()
            if getattr(self, name) != default
        )


def _as_flows(
    rows: Tensor | Sequence[Any], where: Route | Sequence[Cells]
) -> tuple[tuple[Tensor, ...], bool]:
    """(each flow's rows in one tensor, whether they came as tuples)."""
    if isinstance(where, Route):
        wanted, what = where.num_paths, "paths of the route"
    elif isinstance(where, Sequence) and len(where) and all(isinstance(c, Cells) for c in where):
        wanted, what = len(where), "Cells in where"
    else:
        raise RouteError(
            "GatherRouter: where must be a Route, or a list of Cells (route[p]) with at least one, "
            f"got {type(where).__name__}"
        )
    if isinstance(rows, Tensor):
        if not isinstance(where, Route):
            raise RouteError("GatherRouter: rows in one tensor need the route they are packed for")
        return (rows,), False
    if len(rows) != wanted:
        raise RouteError(f"GatherRouter: {len(rows)} sets of rows for {wanted} {what}")
    if rows and all(isinstance(r, Tensor) for r in rows):
        _check_sizes(rows, where, 0)
        return (_together(rows, where),), False
    num_flows = {len(r) if isinstance(r, tuple) else -1 for r in rows}
    if len(num_flows) != 1 or -1 in num_flows:
        raise RouteError(
            "GatherRouter: every path must give one tensor, or a tuple of as many as the others"
        )
    flows = []
    for i in range(num_flows.pop()):
        parts = [r[i] for r in rows]
        _check_sizes(parts, where, i)
        flows.append(_together(parts, where))
    return tuple(flows), True


def _together(parts: Sequence[Tensor], where: Route | Sequence[Cells]) -> Tensor:
    """``torch.cat`` of the rows of all paths.

    NOTES: Inductor (seen in torch 2.13) may take memory for the result of a ``cat`` before all of
    its sizes are known, where they come from several routers: there rows are copied to their
    places.
    """
    mixed = len({part.dtype for part in parts}) > 1
    if not torch.compiler.is_compiling() or isinstance(where, Route) or mixed:
        return torch.cat(list(parts))
    num_rows = sum(part.shape[0] for part in parts)
    together, begin = parts[0].new_zeros((num_rows, *parts[0].shape[1:])), 0
    for part in parts:
        place_R = torch.arange(part.shape[0], device=part.device) + begin
        together = together.index_copy(0, place_R, part)
        begin = begin + part.shape[0]
    return together


def _check_sizes(parts: Sequence[Tensor], where: Route | Sequence[Cells], flow: int) -> None:
    trailing = {tuple(p.shape[1:]) for p in parts} if not torch.compiler.is_compiling() else set()
    if len(trailing) > 1:
        raise RouteError(
            f"GatherRouter: paths differ in the shape of their rows: {sorted(map(list, trailing))}"
        )
    if isinstance(where, Route):
        sizes = where.with_sizes().sizes
        assert sizes is not None
    else:
        sizes = tuple(cells.num_rows for cells in where)
    for p, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        ops.same_size(
            f"GatherRouter: rows of path {p} (flow {flow}) and its load", part.shape[0], size
        )
