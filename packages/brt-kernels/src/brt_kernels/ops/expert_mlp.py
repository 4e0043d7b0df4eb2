"""`expert_mlp`.

Legend: N cells, K choices of a cell, R rows, P paths, D H features.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    """Gather, up, activation, down, weighted sum; "swiglu" takes ``up`` of 2H rows, gate first."""
    return torch.ops.brt_kernels.expert_mlp(
        x_ND, cell_R, row_NK, offsets_P1, weight_R, up_PHD, up_bias_PH, down_PDH, down_bias_PD,
        activation,
    )  # fmt: skip


def register_fakes() -> None:
    """Shapes for fake tensors. Called once the library is loaded."""

    @torch.library.register_fake("brt_kernels::expert_mlp")
    def _(
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
        return x_ND.new_empty((x_ND.shape[0], down_PDH.shape[1]))
