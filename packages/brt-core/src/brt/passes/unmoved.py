"""Rows that need not move: of a route whose every path has all cells, in order, or none.

Legend: N cells, P paths, R routed rows, S trailing cell dims.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from brt.cells import Cells
from brt.passes.match import Scatter, argument, router_of
from brt.passes.memory import fresh, may_share, owner, written_after
from brt.route import Route
from brt.routers import GatherRouter, ScatterRouter


def copies(scatter: Scatter, paths: Iterable[int], scope: nn.Module) -> dict[int, str]:
    """The paths that may not get the scatter's input itself, but a copy, and why."""
    x = argument(scatter.node, 0, "x")
    flows = [
        one for one in (x if isinstance(x, (tuple, list)) else [x]) if isinstance(one, fx.Node)
    ]
    written = written_after(scatter.node, flows, scope)
    copied = {}
    for p in paths:
        start = scatter.path_P[p]
        why = written if written or start is None else may_share(start, scope)
        if why is not None:
            copied[p] = why
    return copied


def may_lend(rows: Any, scope: nn.Module) -> bool:
    """Whether a gather's result may be a path's rows (flows) themselves: nobody else has them."""
    flows = rows if isinstance(rows, (list, tuple)) else [rows]
    return all(_only_here(one, scope) for one in flows)


def _only_here(rows: Any, scope: nn.Module) -> bool:
    """Whether rows lie in memory of their own, and one node alone reads them."""
    while isinstance(rows, fx.Node) and len(rows.users) == 1:
        if fresh(rows, scope):
            return not isinstance(router_of(rows, scope), ScatterRouter)
        if owner(rows, scope) is rows:
            return False
        rows = rows.all_input_nodes[0]
    return False


def unmoved_paths(
    router: ScatterRouter,
    x: Tensor | tuple[Tensor, ...],
    route: Route,
    always_P: tuple[bool, ...],
    copied: tuple[int, ...],
) -> tuple[Any, ...]:
    """The paths that a scatter gives by a route on which each has every cell, or none."""
    flows = (x,) if isinstance(x, Tensor) else tuple(x)
    parts = [_parts(router, i, flow, route, always_P, copied) for i, flow in enumerate(flows)]
    return parts[0] if isinstance(x, Tensor) else tuple(zip(*parts, strict=True))


def _parts(
    router: ScatterRouter,
    index: int,
    flow: Tensor,
    route: Route,
    always_P: tuple[bool, ...],
    copied: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """One flow's rows for each path."""
    parts, start = [], 0
    for p, always in enumerate(always_P):
        part = flow[:, p] if router._is_per_path(index) else flow
        if not always:
            parts.append(part.narrow(0, 0, 0).contiguous())
            continue
        if route.weighted and route.weight_R is not None:
            part = _times(part, route.weight_R.narrow(0, start, route.num_cells))
            part = part.to(flow.dtype)
        elif p in copied or not part.is_contiguous():
            part = part.clone(memory_format=torch.contiguous_format)
        parts.append(part)
        start += route.num_cells
    return tuple(parts)


def unmoved_cells(
    router: GatherRouter,
    rows: Any,
    where: Route,
    residual: Any,
    always_P: tuple[bool, ...],
    lend: bool,
) -> Any:
    """A gather's result without indexing; None where the router is to do it, or to complain.

    Each path has all N cells, or none; ``lend``: whether the result may be the rows themselves.
    """
    weight_R = where.weight_R if router.weighted else None
    wants_residual = router.add_residual or router.overflow == "residual"
    twice = weight_R is not None and where.weighted
    if twice or (residual is not None) != wants_residual:
        return None
    several = isinstance(rows[0], tuple)
    flows = list(zip(*rows, strict=True)) if several else [tuple(rows)]
    residuals = residual if isinstance(residual, tuple) else (residual,) * len(flows)
    if len(residuals) != len(flows):
        return None
    outs = []
    for parts_P, extra in zip(flows, residuals, strict=True):
        if not _alike(parts_P, always_P, where.num_cells):
            return None
        out = _sum(parts_P, always_P, weight_R, where.num_cells, lend)
        if extra is not None:
            if extra.shape != out.shape:
                return None
            out = out + extra.to(out.dtype) if router.add_residual else out
        outs.append(out)
    result = tuple(outs) if several else outs[0]
    if router.result == "all":
        return result
    return result, Cells(where.cells.root, where.cells.index_R(outs[0].device))


def _alike(parts_P: tuple[Tensor, ...], always_P: tuple[bool, ...], num_cells: int) -> bool:
    """Whether paths have the rows that they should, alike in all else."""
    first = parts_P[0]
    return all(
        isinstance(part, Tensor)
        and part.shape[0] == (num_cells if always else 0)
        and part.shape[1:] == first.shape[1:]
        and part.dtype == first.dtype
        and part.device == first.device
        for part, always in zip(parts_P, always_P, strict=True)
    )


def _sum(
    parts_P: tuple[Tensor, ...],
    always_P: tuple[bool, ...],
    weight_R: Tensor | None,
    num_cells: int,
    lend: bool,
) -> Tensor:
    kept = [part for part, always in zip(parts_P, always_P, strict=True) if always]
    dtype = kept[0].dtype
    empty = [part for part in parts_P if part.shape[0] == 0 and part.requires_grad]
    if empty and torch.is_grad_enabled():
        # So that gradients of branches without rows are zeros, not None
        kept[0] = kept[0] + torch.cat(empty).sum().to(dtype)
    if weight_R is None and len(kept) == 1:
        return (
            kept[0].contiguous() if lend else kept[0].clone(memory_format=torch.contiguous_format)
        )
    total: Tensor | None = None
    for i, part in enumerate(kept):
        if weight_R is not None:
            part = _times(part, weight_R.narrow(0, i * num_cells, num_cells))
        part = part.to(_wide(dtype))
        total = part if total is None else total + part
    assert total is not None
    return total.to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype


def _times(rows_NS: Tensor, weight_N: Tensor) -> Tensor:
    """Rows times their weights, in the dtype in which operators multiply."""
    wide = _wide(rows_NS.dtype)
    return rows_NS.to(wide) * weight_N.to(wide).view(-1, *([1] * (rows_NS.ndim - 1)))
