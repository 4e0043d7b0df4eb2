"""`dispatch`: cells become rows of the paths they take.

Legend: N cells, K choices per cell, R rows, S trailing cell dims.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from brt.errors import RouteError
from brt.ops.registry import Operator, call

_DISPATCH = Operator(
    "dispatch", "(Tensor x_NS, Tensor cell_R, Tensor row_NK, Tensor? weight_R) -> Tensor"
)


def dispatch(
    x_NS: Tensor, cell_R: Tensor, row_NK: Tensor, weight_R: Tensor | None = None
) -> Tensor:
    """``rows[r] = weight[r] * x[cell[r]]``, zero where ``cell[r]`` is -1; ``[R, *S]``, x's dtype.

    ``cell_R`` and ``row_NK`` are what `route` returned (``row_NK`` serves the gradient, which is
    `combine`). Any dtype where there is no weight.
    """
    _check(x_NS, cell_R, row_NK, weight_R)
    check_devices("dispatch", x_NS, cell_R, row_NK, weight_R)
    return _DISPATCH(x_NS, cell_R, row_NK, weight_R)


def _check(x_NS: Tensor, cell_R: Tensor, row_NK: Tensor, weight_R: Tensor | None) -> None:
    check_rows("dispatch", cell_R, row_NK, weight_R)
    if x_NS.ndim < 1:
        raise RouteError("dispatch: x must have a cell dim, got a scalar")
    same_size("dispatch: cells of x and of the route", x_NS.shape[0], row_NK.shape[0])
    if weight_R is not None and not x_NS.dtype.is_floating_point:
        raise RouteError(f"dispatch: only floats can be weighted, got x of {x_NS.dtype}")


@torch.library.register_fake("brt::dispatch")
def _(x_NS: Tensor, cell_R: Tensor, row_NK: Tensor, weight_R: Tensor | None) -> Tensor:
    _check(x_NS, cell_R, row_NK, weight_R)
    return x_NS.new_empty((cell_R.shape[0], *x_NS.shape[1:]))


def check_rows(what: str, cell_R: Tensor, row_NK: Tensor, weight_R: Tensor | None) -> None:
    """Raise where the index tensors of a route do not have their ranks and dtypes."""
    if cell_R.ndim != 1 or row_NK.ndim != 2:
        raise RouteError(
            f"{what}: cell_R must be 1-D and row_NK 2-D, got {list(cell_R.shape)} and "
            f"{list(row_NK.shape)}"
        )
    if cell_R.dtype.is_floating_point or row_NK.dtype.is_floating_point:
        raise RouteError(f"{what}: indices are integers, got {cell_R.dtype}, {row_NK.dtype}")
    if weight_R is not None:
        if weight_R.ndim != 1 or not weight_R.dtype.is_floating_point:
            raise RouteError(
                f"{what}: weight_R must be 1-D floats, got {weight_R.dtype}{list(weight_R.shape)}"
            )
        same_size(f"{what}: weights and rows", weight_R.shape[0], cell_R.shape[0])


def check_devices(what: str, *tensors: Tensor | None) -> None:
    """Raise unless all tensors lie on one device."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) > 1:
        found = ", ".join(sorted(map(str, devices)))
        raise RouteError(f"{what}: tensors on different devices ({found}); move them to one")


def same_size(what: str, came: int, wanted: int) -> None:
    """Raise where two sizes differ; while tracing, sizes may be symbols: then a runtime check."""
    if torch.compiler.is_compiling() or not (isinstance(came, int) and isinstance(wanted, int)):
        torch._check(came == wanted)  # torch 2.11 traces no message that names ``what``
    elif came != wanted:
        raise RouteError(f"{what} must be equal in number, got {came} and {wanted}")


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_NS, cell_R, row_NK, weight_R = inputs
    needs_weight = weight_R is not None and weight_R.requires_grad
    ctx.save_for_backward(x_NS if needs_weight else None, cell_R, row_NK, weight_R)


def _backward(ctx: Any, grad_RS: Tensor) -> tuple[Tensor | None, ...]:
    x_NS, cell_R, row_NK, weight_R = ctx.saved_tensors
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = call("combine", grad_RS, row_NK, cell_R, weight_R)
    if ctx.needs_input_grad[3]:
        grad_weight = call("row_dot", grad_RS, x_NS, cell_R, row_NK).to(weight_R.dtype)
    return grad_x, None, None, grad_weight


torch.library.register_autograd("brt::dispatch", _backward, setup_context=_setup)
