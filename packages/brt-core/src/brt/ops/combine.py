"""`combine`: rows of all paths become cells again.

Legend: N cells, K choices per cell, R rows, S trailing cell dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from brt.errors import RouteError
from brt.ops.dispatch import check_devices, check_rows, same_size
from brt.ops.registry import Operator, call

_COMBINE = Operator(
    "combine", "(Tensor rows_RS, Tensor row_NK, Tensor cell_R, Tensor? weight_R) -> Tensor"
)


def combine(
    rows_RS: Tensor, row_NK: Tensor, cell_R: Tensor, weight_R: Tensor | None = None
) -> Tensor:
    """``out[n] = sum_k weight[row[n, k]] * rows[row[n, k]]`` over choices with a row; ``[N, *S]``.

    A cell without any row is zero. Sums run in float32; the result has the dtype of the rows. Any
    dtype where there is no weight. The gradient is `dispatch`.
    """
    _check(rows_RS, row_NK, cell_R, weight_R)
    check_devices("combine", rows_RS, row_NK, cell_R, weight_R)
    return _COMBINE(rows_RS, row_NK, cell_R, weight_R)


def _check(rows_RS: Tensor, row_NK: Tensor, cell_R: Tensor, weight_R: Tensor | None) -> None:
    check_rows("combine", cell_R, row_NK, weight_R)
    if rows_RS.ndim < 1:
        raise RouteError("combine: rows must have a row dim, got a scalar")
    same_size("combine: rows given and rows of the route", rows_RS.shape[0], cell_R.shape[0])
    if weight_R is not None and not rows_RS.dtype.is_floating_point:
        raise RouteError(f"combine: only floats can be weighted, got rows of {rows_RS.dtype}")


@torch.library.register_fake("brt::combine")
def _(rows_RS: Tensor, row_NK: Tensor, cell_R: Tensor, weight_R: Tensor | None = None) -> Tensor:
    _check(rows_RS, row_NK, cell_R, weight_R)
    return rows_RS.new_empty((row_NK.shape[0], *rows_RS.shape[1:]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows_RS, row_NK, cell_R, weight_R = inputs
    needs_weight = weight_R is not None and weight_R.requires_grad
    ctx.save_for_backward(rows_RS if needs_weight else None, row_NK, cell_R, weight_R)


def _backward(ctx: Any, grad_NS: Tensor) -> tuple[Tensor | None, ...]:
    rows_RS, row_NK, cell_R, weight_R = ctx.saved_tensors
    grad_rows = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_rows = call("dispatch", grad_NS, cell_R, row_NK, weight_R)
    if ctx.needs_input_grad[3]:
        grad_weight = call("row_dot", rows_RS, grad_NS, cell_R, row_NK).to(weight_R.dtype)
    return grad_rows, None, None, grad_weight


torch.library.register_autograd("brt::combine", _backward, setup_context=_setup)
