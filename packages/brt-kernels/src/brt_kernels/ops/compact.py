"""`compact`. Legend: N cells."""

from __future__ import annotations

import torch
from torch import Tensor


def compact(keep_N: Tensor) -> tuple[Tensor, Tensor]:
    """(index_N, count_1): the indices of the cells that are kept, then -1; how many they are."""
    return torch.ops.brt_kernels.compact(keep_N)


def register_fakes() -> None:
    """Shapes for fake tensors. Called once the library is loaded."""

    @torch.library.register_fake("brt_kernels::compact")
    def _(keep_N: Tensor) -> tuple[Tensor, Tensor]:
        index_N = keep_N.new_empty((keep_N.shape[0],), dtype=torch.int64)
        return index_N, keep_N.new_empty((1,), dtype=torch.int64)
