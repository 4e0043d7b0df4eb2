"""`dispatch`.

Legend: N cells, K choices of a cell, R rows, S trailing sizes of a cell.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dispatch(
    x_NS: Tensor, cell_R: Tensor, row_NK: Tensor, weight_R: Tensor | None = None
) -> Tensor:
    """``rows[r] = weight[r] * x[cell[r]]``, zero where ``cell[r]`` is -1."""
    return torch.ops.brt_kernels.dispatch(x_NS, cell_R, row_NK, weight_R)


def register_fakes() -> None:
    """Shapes for fake tensors. Called once the library is loaded."""

    @torch.library.register_fake("brt_kernels::dispatch")
    def _(x_NS: Tensor, cell_R: Tensor, row_NK: Tensor, weight_R: Tensor | None = None) -> Tensor:
        return x_NS.new_empty((cell_R.shape[0], *x_NS.shape[1:]))
