"""`route` and `route_mask`.

Legend: N cells, K choices of a cell, P paths, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def route(
    choice_NK: Tensor,
    num_paths: int,
    capacity: Sequence[int] | None = None,
    priority_N: Tensor | None = None,
    group_size: int = 0,
    multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choices to (cell_R, slot_R, row_NK, offsets_P1), int64: path by path, in cell order.

    Returns R = N * K + P * (multiple - 1) rows; -1 marks padding and rows past ``offsets[-1]``.
    """
    return torch.ops.brt_kernels.route(
        choice_NK, num_paths, capacity, priority_N, group_size, multiple
    )


def route_mask(
    mask_NP: Tensor,
    capacity: Sequence[int] | None = None,
    priority_N: Tensor | None = None,
    group_size: int = 0,
    multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`route` of a mask; K = P."""
    return torch.ops.brt_kernels.route_mask(mask_NP, capacity, priority_N, group_size, multiple)


def _empty(
    decision: Tensor, num_paths: int, multiple: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_cells, num_choices = decision.shape
    num_rows = num_cells * num_choices + num_paths * (multiple - 1)
    shapes = ((num_rows,), (num_rows,), (num_cells, num_choices), (num_paths + 1,))
    return tuple(decision.new_empty(shape, dtype=torch.int64) for shape in shapes)  # type: ignore[return-value]


def register_fakes() -> None:
    """Shapes for fake tensors. Called once the library is loaded."""

    @torch.library.register_fake("brt_kernels::route")
    def _(
        choice_NK: Tensor,
        num_paths: int,
        capacity: Sequence[int] | None = None,
        priority_N: Tensor | None = None,
        group_size: int = 0,
        multiple: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _empty(choice_NK, num_paths, multiple)

    @torch.library.register_fake("brt_kernels::route_mask")
    def _(
        mask_NP: Tensor,
        capacity: Sequence[int] | None = None,
        priority_N: Tensor | None = None,
        group_size: int = 0,
        multiple: int = 1,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _empty(mask_NP, mask_NP.shape[1], multiple)
