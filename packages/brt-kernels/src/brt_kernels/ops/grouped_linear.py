"""`grouped_linear`.

Legend: R rows, P paths, I features in, O features out.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_linear(
    x_RI: Tensor,
    offsets_P1: Tensor,
    weight_POI: Tensor,
    bias_PO: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """``act(x @ weight[p].T + bias[p])`` for the rows of each path, zero past the last offset."""
    return torch.ops.brt_kernels.grouped_linear(x_RI, offsets_P1, weight_POI, bias_PO, activation)


def register_fakes() -> None:
    """Shapes for fake tensors. Called once the library is loaded."""

    @torch.library.register_fake("brt_kernels::grouped_linear")
    def _(
        x_RI: Tensor,
        offsets_P1: Tensor,
        weight_POI: Tensor,
        bias_PO: Tensor | None = None,
        activation: str = "none",
    ) -> Tensor:
        return x_RI.new_empty((x_RI.shape[0], weight_POI.shape[1]))
