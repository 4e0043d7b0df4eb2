"""Routers of a segment on which all cells are taken to go the likely way: nothing is moved.

Legend: N cells, P paths, K choices of a cell, S trailing cell dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from brt.cells import Cells
from brt.decision import Decision
from brt.routers import GatherRouter, ScatterRouter
from brt.routers.scatter import _widened


class Missed(Exception):  # noqa: N818 - it is caught, never shown
    """A cell goes another way, or the routers are asked for what only they can do."""


def decided(
    router: ScatterRouter,
    x: Tensor | tuple[Tensor, ...],
    scores: Tensor,
    cells: Cells | None,
    path: int,
    is_copied: bool,
    is_early: bool,
) -> tuple[Any, Cells, Tensor]:
    """Rows and scores -> (the rows of the path, their `Cells`, bool: whether all cells take it).

    Raises `Missed` where that is clear already: with ``is_early`` the flag is read, on a CPU.
    """
    flows = (x,) if isinstance(x, Tensor) else tuple(x)
    num_cells = router._check(flows, scores)
    if router.protocol.stochastic or (cells is not None and cells.num_rows != num_cells):
        raise Missed
    decision = router.protocol(_widened(scores), router.num_paths)
    if decision.num_cells != num_cells or _may_drop(decision, path):
        raise Missed
    hit, weight_N = _taken(decision, path)
    if is_early and hit.device.type == "cpu" and not hit:
        raise Missed
    rows = tuple(
        flow.clone(memory_format=torch.contiguous_format)
        if is_copied or not flow.is_contiguous()
        else flow
        for flow in flows
    )
    cells = Cells.of(num_cells) if cells is None else cells
    found = Cells(cells.root, cells.cell_R, weight_N)
    return rows[0] if isinstance(x, Tensor) else rows, found, hit


def _may_drop(decision: Decision, path: int) -> bool:
    """Whether capacity would not hold all cells on one path."""
    if decision.capacity is None:
        return False
    limit = decision.capacity if isinstance(decision.capacity, int) else decision.capacity[path]
    return limit < (decision.group_size or decision.num_cells)


def _taken(decision: Decision, path: int) -> tuple[Tensor, Tensor | None]:
    """(bool: whether all cells take this path and no other, weight_N or None)."""
    weight = decision.weight
    if decision.mask_NP is not None:
        mask_NP = decision.mask_NP
        path_P = torch.arange(mask_NP.shape[1], device=mask_NP.device)
        return (mask_NP == (path_P == path)).all(), None if weight is None else weight[:, path]
    if decision.choice_NK is None:
        raise Missed
    is_taken_NK = decision.choice_NK == path
    if is_taken_NK.shape[1] == 1:
        return is_taken_NK.all(), None if weight is None else weight[:, 0]
    hit = (
        is_taken_NK.any(1) & ((decision.choice_NK == -1).sum(1) == is_taken_NK.shape[1] - 1)
    ).all()
    return hit, None if weight is None else torch.where(is_taken_NK, weight, 0).sum(1)


def gathered(
    router: GatherRouter,
    rows: Sequence[Any],
    where: Sequence[Cells],
    residual: Any,
    by_route: bool,
    is_lent: bool,
) -> Any:
    """What a gather gives where these rows are all that there are.

    ``by_route``: it gathers what one scatter sent out. ``is_lent``: nobody else reads the rows.
    """
    cells = where[0]
    if len(rows) > 1 or not (by_route or cells.cell_R is None):
        return router(rows, where, *(() if residual is None else (residual,)))
    is_wanted = router.add_residual or router.overflow == "residual"
    if (residual is not None) != is_wanted:
        raise Missed
    flows = rows[0] if isinstance(rows[0], tuple) else (rows[0],)
    residuals = residual if isinstance(residual, tuple) else (residual,) * len(flows)
    if len(residuals) != len(flows) or any(f.shape[0] != cells.num_rows for f in flows):
        raise Missed
    weight_N = cells.weight_R if router.weighted else None
    outs = tuple(
        _merged(router, flow, weight_N, extra, is_lent)
        for flow, extra in zip(flows, residuals, strict=True)
    )
    result = outs if isinstance(rows[0], tuple) else outs[0]
    if router.result == "all":
        return result
    return result, Cells(cells.root, cells.index_R(outs[0].device))


def _merged(
    router: GatherRouter, flow: Tensor, weight_N: Tensor | None, residual: Any, is_lent: bool
) -> Tensor:
    if residual is not None and residual.shape != flow.shape:
        raise Missed
    if weight_N is not None:
        if not flow.is_floating_point():
            raise Missed
        # In the dtype in which operators multiply
        wide = torch.promote_types(flow.dtype, torch.float32)
        weight_NS = weight_N.to(wide).view(-1, *([1] * (flow.ndim - 1)))
        flow = (flow.to(wide) * weight_NS).to(flow.dtype)
    if router.add_residual:
        return flow.contiguous() + residual.to(flow.dtype)
    if weight_N is not None or is_lent:
        return flow.contiguous()
    return flow.clone(memory_format=torch.contiguous_format)
