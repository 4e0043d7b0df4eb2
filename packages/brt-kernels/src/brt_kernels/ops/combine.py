"""`combine`.

Legend: N cells, K choices of a cell, R rows, S trailing sizes of a cell.
"""

from __future__ import annotations

import torch
from torch import Tensor


def combine(
    rows_RS: Tensor, row_NK: Tensor, cell_R: Tensor, weight_R: Tensor | None = None
) -> Tensor:
    """``out[n] = sum_k weight[row[n, k]] * rows[row[n, k]]``, in float32, in the order of k."""
    return torch.ops.brt_kernels.combine(rows_RS, row_NK, cell_R, weight_R)


def register_fakes() -> None:
    """Shapes for fake tensors. Called once the library is loaded."""

    @torch.library.register_fake("brt_kernels::combine")
    def _(
        rows_RS: Tensor, row_NK: Tensor, cell_R: Tensor, weight_R: Tensor | None = None
    ) -> Tensor:
        return rows_RS.new_empty((row_NK.shape[0], *rows_RS.shape[1:]))
