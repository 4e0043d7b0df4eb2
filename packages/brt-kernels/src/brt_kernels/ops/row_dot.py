"""`row_dot`.

Legend: N cells, K choices of a cell, R rows, S trailing sizes of a cell.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_dot(rows_RS: Tensor, cells_NS: Tensor, cell_R: Tensor, row_NK: Tensor) -> Tensor:
    """``out[r] = <rows[r], cells[cell[r]]>`` in float32, zero where ``cell[r]`` is -1."""
    return torch.ops.brt_kernels.row_dot(rows_RS, cells_NS, cell_R, row_NK)


def register_fakes() -> None:
    """Shapes for fake tensors. Called once the library is loaded."""

    @torch.library.register_fake("brt_kernels::row_dot")
    def _(rows_RS: Tensor, cells_NS: Tensor, cell_R: Tensor, row_NK: Tensor) -> Tensor:
        return rows_RS.new_empty((rows_RS.shape[0],), dtype=torch.float32)
