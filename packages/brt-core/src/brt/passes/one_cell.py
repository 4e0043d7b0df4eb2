"""One cell: its route is read on the host, and what paths give of it is added up.

Legend: N cells, P paths, K choices per cell, R routed rows, S trailing cell dims.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from brt import checks
from brt.cells import Cells
from brt.decision import Decision
from brt.route import Route, make_route
from brt.routers import GatherRouter, ScatterRouter
from brt.routers.scatter import _widened


def one_cell_route(
    router: ScatterRouter, flows: tuple[Tensor, ...], scores: Tensor, cells: Cells | None
) -> Route | None:
    """The route of a single cell on a CPU, with its sizes, as the router decides it.

    Without operators: for one cell they take longer to choose and to call than to compute. None
    where there are several cells, or none, or the router has ways of its own.
    """
    is_plain = type(router)._decide is ScatterRouter._decide and not router.inherit_weights
    if not is_plain or not scores.is_cpu or flows[0].shape[:1] != (1,):
        return None
    router._check(flows, scores)
    decision = router.protocol(_widened(scores), router.num_paths)
    route = _read(decision, Cells.of(1) if cells is None else cells)
    return make_route(decision, 1, cells).with_sizes() if route is None else route


def _read(decision: Decision, cells: Any) -> Route | None:
    """The route of a decision that can be read as it is; None where `make_route` is to do it."""
    if decision.num_cells != 1 or decision.cell_PC is not None or decision.capacity is not None:
        return None
    if not isinstance(cells, Cells) or cells.num_rows != 1:
        return None
    num_paths, chosen = decision.num_paths, decision.choice_NK
    decided = decision.mask_NP if chosen is None else chosen
    assert decided is not None
    if not checks.wanted(decided) or (cells.cell_R is not None and not cells.cell_R.is_cpu):
        return None
    said = decided.tolist()[0]
    if chosen is None:
        taken = [(p, p) for p, takes in enumerate(said) if takes]
    else:
        taken = sorted((p, k) for k, p in enumerate(said) if p != -1)
        if len({p for p, _ in taken}) < len(taken) or not all(0 <= p < num_paths for p, _ in taken):
            return None
    size_P, offset_P1, row_K = [0] * num_paths, [0] * (num_paths + 1), [-1] * len(said)
    for row, (p, k) in enumerate(taken):
        size_P[p], row_K[k] = 1, row
    for p, size in enumerate(size_P):
        offset_P1[p + 1] = offset_P1[p] + size
    weight_R = None
    if decision.weight is not None:
        place_R = torch.tensor([k for _, k in taken], dtype=torch.int64)
        weight_R = decision.weight.reshape(-1).index_select(0, place_R)
    return Route(
        num_paths,
        1,
        cells,
        torch.zeros(len(taken), dtype=torch.int64),
        torch.tensor([row_K], dtype=torch.int64).view(1, len(said)),
        torch.tensor(offset_P1),
        weight_R,
        tuple(size_P),
    )


def is_one_cell(rows: Sequence[Any], where: Sequence[Cells], router: GatherRouter) -> bool:
    """Whether all rows are of one cell, and plain enough to be added up; else the router judges."""
    if len(rows) != len(where) or not all(type(r) is Tensor for r in rows):
        return False
    first, root = rows[0], where[0].root
    return root.num_cells == 1 and all(
        (c.root is root or c.root == root)
        and r.shape[0] == c.num_rows
        and r.shape[1:] == first.shape[1:]
        and r.dtype == first.dtype
        and not (router.weighted and c.weighted and c.weight_R is not None)
        for r, c in zip(rows, where, strict=True)
    )


def no_rows(like: Tensor, where: Cells, router: GatherRouter) -> Any:
    """What a gather gives for a single cell that no path has."""
    shape_S = like.shape[1:]
    if router.result == "all":
        return like.new_zeros((1, *shape_S))
    none_U = torch.empty(0, dtype=torch.int64, device=like.device)
    return like.new_empty((0, *shape_S)), Cells(where.root, none_U)


def row_sum(there: Sequence[tuple[Tensor, Cells]], is_weighted: bool, *, may_lend: bool) -> Tensor:
    """The sum of rows of a single cell, weighted where asked; sums run in float32.

    ``may_lend``: whether the result of one row, without a weight, may be the row itself.
    """
    first, cells = there[0]
    if len(there) == 1 and not (is_weighted and cells.weight_R is not None):
        return first if may_lend else first.clone()
    dtype = first.dtype
    wide = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else dtype
    total, is_own = None, False
    for part, cells in there:
        weight = cells.weight_R if is_weighted else None
        if weight is not None:
            weight = weight.to(wide).view(-1, *([1] * (part.ndim - 1)))
        part = part.to(wide)
        if total is None:
            total, is_own = (part, False) if weight is None else (part * weight, True)
        elif is_own:
            total = total.add_(part) if weight is None else total.addcmul_(part, weight)
        else:
            total, is_own = total + part if weight is None else total + part * weight, True
    assert total is not None
    return total.to(dtype)
