"""Rows that lie in segments, laid out in another sequence of the segments.

Legend: S segments, R rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class Reorder:
    """A permutation of rows: ``result[i] = rows[order_R[i]]``.

    Attributes:
        order_R: int64, the row that each row of the result was; None: all stay where they are.
    """

    order_R: Tensor | None = None

    @classmethod
    def of(cls, sizes_S: Tensor, sequence_S: Tensor, device: torch.device) -> Reorder:
        """Segments of these sizes, laid out in this sequence. Both tensors are on the host."""
        # numpy: of so few numbers, torch would take four times as long
        sizes, sequence = sizes_S.numpy(), sequence_S.numpy()
        taken = sequence[sizes[sequence] > 0]
        if (np.diff(taken) > 0).all():
            return cls()
        begin, sizes_taken = np.cumsum(sizes) - sizes, sizes[taken]
        moved_by = begin[taken] - (np.cumsum(sizes_taken) - sizes_taken)
        order_R = np.arange(sizes.sum()) + np.repeat(moved_by, sizes_taken)
        return cls(torch.from_numpy(order_R).to(device))

    @classmethod
    def transposing(cls, sizes_AB: Tensor, device: torch.device) -> Reorder:
        """Segments that lie ``[a][b]``, laid out ``[b][a]``."""
        sequence_S = torch.arange(sizes_AB.numel()).view(sizes_AB.shape).t().reshape(-1)
        return cls.of(sizes_AB.reshape(-1), sequence_S, device)

    @functools.cached_property
    def inverse_R(self) -> Tensor:
        """The row of the result that each row becomes."""
        assert self.order_R is not None
        row_R = torch.arange(self.order_R.shape[0], device=self.order_R.device)
        return torch.empty_like(self.order_R).scatter_(0, self.order_R, row_R)

    def index_R(self, undo: bool) -> Tensor:
        """The rows to take for the new order, or the old one again."""
        index_R = self.inverse_R if undo else self.order_R
        assert index_R is not None
        return index_R

    def apply(self, rows: Tensor) -> Tensor:
        """The rows in the new order; differentiable."""
        return self._select(rows, undo=False)

    def undo(self, rows: Tensor) -> Tensor:
        """The rows in the old order; differentiable."""
        return self._select(rows, undo=True)

    def _select(self, rows: Tensor, undo: bool) -> Tensor:
        if self.order_R is None:
            return rows
        permuted: Tensor = _Permute.apply(rows, self, undo)
        return permuted


class _Permute(Function):
    """index_select whose backward is one too: that of torch adds up into zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, reorder: Reorder, undo: bool) -> Tensor:
        ctx.reorder, ctx.undo = reorder, undo
        return rows.index_select(0, reorder.index_R(undo))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.reorder.index_R(not ctx.undo)), None, None
