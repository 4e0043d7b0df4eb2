"""`row_dot`: the gradient of the weights of rows.

Legend: N cells, K choices per cell, R rows, S trailing cell dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from brt.errors import RouteError
from brt.ops.dispatch import check_devices, check_rows, same_size
from brt.ops.registry import Operator, call

_ROW_DOT = Operator(
    "row_dot", "(Tensor rows_RS, Tensor cells_NS, Tensor cell_R, Tensor row_NK) -> Tensor"
)


def row_dot(rows_RS: Tensor, cells_NS: Tensor, cell_R: Tensor, row_NK: Tensor) -> Tensor:
    """``out[r] = <rows[r], cells[cell[r]]>``, zero where ``cell[r]`` is -1; ``[R]``, float32.

    float64 inputs give float64.
    """
    _check(rows_RS, cells_NS, cell_R, row_NK)
    check_devices("row_dot", rows_RS, cells_NS, cell_R, row_NK)
    return _ROW_DOT(rows_RS, cells_NS, cell_R, row_NK)


def _check(rows_RS: Tensor, cells_NS: Tensor, cell_R: Tensor, row_NK: Tensor) -> None:
    check_rows("row_dot", cell_R, row_NK, None)
    if not (rows_RS.dtype.is_floating_point and cells_NS.dtype.is_floating_point):
        raise RouteError(f"row_dot: takes floats, got {rows_RS.dtype} and {cells_NS.dtype}")
    if rows_RS.shape[1:] != cells_NS.shape[1:]:
        raise RouteError(
            f"row_dot: rows and cells differ in shape: {list(rows_RS.shape[1:])} and "
            f"{list(cells_NS.shape[1:])}"
        )
    same_size("row_dot: rows given and rows of the route", rows_RS.shape[0], cell_R.shape[0])
    same_size("row_dot: cells given and cells of the route", cells_NS.shape[0], row_NK.shape[0])


@torch.library.register_fake("brt::row_dot")
def _(rows_RS: Tensor, cells_NS: Tensor, cell_R: Tensor, row_NK: Tensor) -> Tensor:
    _check(rows_RS, cells_NS, cell_R, row_NK)
    return rows_RS.new_empty(
        rows_RS.shape[0], dtype=torch.promote_types(rows_RS.dtype, torch.float32)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_R: Tensor) -> tuple[Tensor | None, ...]:
    rows_RS, cells_NS, cell_R, row_NK = ctx.saved_tensors
    grad_rows = grad_cells = None
    if ctx.needs_input_grad[0]:
        grad_rows = call("dispatch", cells_NS, cell_R, row_NK, grad_R).to(rows_RS.dtype)
    if ctx.needs_input_grad[1]:
        grad_cells = call("combine", rows_RS, row_NK, cell_R, grad_R).to(cells_NS.dtype)
    return grad_rows, grad_cells, None, None


torch.library.register_autograd("brt::row_dot", _backward, setup_context=_setup)
