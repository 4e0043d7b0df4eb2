"""`expert_mlp` in Triton: two grouped products, with what lies around them inside where it pays.

Legend: N cells, K choices per cell, R rows, P paths, D model and H hidden features.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from brt_kernels.triton.one_cell import one_cell_down, one_cell_up
from brt_kernels.triton.product import boxable, early, on_device, product
from brt_kernels.triton.tells import OF_MLP, Tells, error_word, told
from brt_kernels.triton.tiles import choose, power_of_two, strip_down, strip_up

_MOST_ROWS_OF_ONE_CELL = 32


def expert_mlp(
    x_ND: Tensor,
    cell_R: Tensor,
    row_NK: Tensor,
    offsets_P1: Tensor,
    weight_R: Tensor | None,
    up_PHD: Tensor,
    up_bias_PH: Tensor | None,
    down_PDH: Tensor,
    down_bias_PD: Tensor | None,
    activation: str,
) -> Tensor:
    """Gather, up, activation, down, weighted sum of the choices."""
    (num_cells, num_choices), num_rows = row_NK.shape, cell_R.shape[0]
    num_paths, num_out, num_hidden = down_PDH.shape
    if num_cells == 0 or num_rows == 0 or num_out == 0:
        return x_ND.new_zeros((num_cells, num_out))
    x_ND, cell_R, row_NK = boxable(x_ND), cell_R.contiguous(), row_NK.contiguous()
    offsets_P1 = offsets_P1.contiguous()
    weight_R = None if weight_R is None else weight_R.contiguous()
    up_bias_PH = None if up_bias_PH is None else up_bias_PH.contiguous()
    down_bias_PD = None if down_bias_PD is None else down_bias_PD.contiguous()
    hidden_RH = x_ND.new_empty((num_rows, num_hidden))
    pair, tells = early(x_ND), told(OF_MLP, x_ND.device)
    with on_device(x_ND):
        if num_cells == 1 and num_rows <= _MOST_ROWS_OF_ONE_CELL:
            return _one_cell(
                x_ND, cell_R, row_NK, offsets_P1, weight_R, up_PHD, up_bias_PH, down_PDH,
                down_bias_PD, activation, hidden_RH,
            )  # fmt: skip

        # 1. Hidden features
        gated = activation == "swiglu"
        tile = choose(num_rows, num_paths, up_PHD.shape[1], gated=gated, gathers=True)
        rows, cells = (x_ND, cell_R) if tile.gather else (_gather(x_ND, cell_R, row_NK), None)
        product(
            rows, cells, offsets_P1, up_PHD, up_bias_PH, hidden_RH, tile, activation,
            num_rows=num_rows, first=pair, tells=Tells(tells.offsets, tells.cells),
        )  # fmt: skip

        # 2. Results: of one choice to their cells at once, of several to be summed
        tile = choose(num_rows, num_paths, num_out, gated=False)
        to_cells = (cell_R, row_NK, weight_R) if num_choices == 1 else None
        out = x_ND.new_empty((num_cells if to_cells else num_rows, num_out))
        product(
            hidden_RH, None, offsets_P1, down_PDH, down_bias_PD, out, tile, "none",
            num_rows=num_rows, to_cells=to_cells, second=pair, tells=Tells(rows=tells.rows),
        )  # fmt: skip
        return out if to_cells else _combine(out, row_NK, cell_R, weight_R)


def _one_cell(
    x_1D: Tensor,
    cell_R: Tensor,
    row_1K: Tensor,
    offsets_P1: Tensor,
    weight_R: Tensor | None,
    up_PHD: Tensor,
    up_bias_PH: Tensor | None,
    down_PDH: Tensor,
    down_bias_PD: Tensor | None,
    activation: str,
    hidden_RH: Tensor,
) -> Tensor:
    gated = activation == "swiglu"
    (num_paths, num_out, num_hidden), num_in = down_PDH.shape, up_PHD.shape[2]
    num_rows, num_choices = cell_R.shape[0], row_1K.shape[1]
    paths = max(16, power_of_two(num_paths))
    out_1D = x_1D.new_empty((1, num_out))
    pair, tells = early(x_1D), told(OF_MLP, x_1D.device)
    errors = error_word(x_1D.device)
    up, down = strip_up(num_in, gated=gated), strip_down(num_hidden, num_choices)
    one_cell_up[(triton.cdiv(num_hidden, up.block_n), num_rows)](
        x_1D, cell_R, offsets_P1, up_PHD, up_bias_PH, hidden_RH, errors, num_paths, num_in,
        num_hidden, num_rows, TELL_OFFSETS=tells.offsets, TELL_CELLS=tells.cells,
        ACT="none" if gated else activation, GATED=gated, BIAS=up_bias_PH is not None,
        BLOCK_H=up.block_n, BLOCK_K=up.block_k, STAGES=up.num_stages, PATHS=paths, FIRST=pair,
        num_warps=up.num_warps, **({"launch_pdl": True} if pair else {}),
    )  # fmt: skip
    one_cell_down[(triton.cdiv(num_out, down.block_n),)](
        hidden_RH, row_1K, offsets_P1, weight_R, down_PDH, down_bias_PD, out_1D, errors, num_rows,
        num_paths, num_hidden, num_out, num_choices, BIAS=down_bias_PD is not None,
        TELL_ROWS=tells.rows, WEIGHTED=weight_R is not None, BLOCK_D=down.block_n,
        BLOCK_K=down.block_k, CHOICES=power_of_two(num_choices), STAGES=down.num_stages,
        PATHS=paths, LINES=min(16, power_of_two(triton.cdiv(num_hidden, 64))), SECOND=pair,
        num_warps=down.num_warps, **({"launch_pdl": True} if pair else {}),
    )  # fmt: skip
    return out_1D


def _gather(x_ND: Tensor, cell_R: Tensor, row_NK: Tensor) -> Tensor:
    return torch.ops.brt_kernels.dispatch(x_ND, cell_R, row_NK)


def _combine(rows_RD: Tensor, row_NK: Tensor, cell_R: Tensor, weight_R: Tensor | None) -> Tensor:
    return torch.ops.brt_kernels.combine(rows_RD, row_NK, cell_R, weight_R)
