"""`grouped_outer`.

Legend: R rows, P paths, I O features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_outer(y_RO: Tensor, x_RI: Tensor, offsets_P1: Tensor) -> Tensor:
    """``out[p] = y_p.T @ x_p`` over the rows of path p; ``[P, O, I]``."""
    return torch.ops.brt_kernels.grouped_outer(y_RO, x_RI, offsets_P1)


def register_fakes() -> None:
    """Shapes for fake tensors. Called once the library is loaded."""

    @torch.library.register_fake("brt_kernels::grouped_outer")
    def _(y_RO: Tensor, x_RI: Tensor, offsets_P1: Tensor) -> Tensor:
        return x_RI.new_empty((offsets_P1.shape[0] - 1, y_RO.shape[1], x_RI.shape[1]))
