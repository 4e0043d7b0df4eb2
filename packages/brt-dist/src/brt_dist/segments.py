"""Rows that lie in segments, laid out in another sequence of the segments.

Legend: S segments, R rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# On the CPU, from so many rows a segment on, copying segments beats copying rows
LONG = 8


@dataclass(frozen=True, eq=False)
class Reorder:
    """A permutation of rows, segment by segment.

    Attributes:
        sizes_S: int64 on the host, rows of the segments as they lie; None: all stay where they are.
        sequence: the segments that have rows, in their new sequence.
        device: where indices of rows are wanted.
    """

    sizes_S: NDArray[np.int64] | None = None
    sequence: NDArray[np.int64] | None = None
    device: torch.device | None = None

    @classmethod
    def of(cls, sizes_S: Tensor, sequence_S: Tensor, device: torch.device) -> Reorder:
        """Segments of these sizes, laid out in this sequence. Both tensors are on the host."""
        # numpy: of so few numbers, torch would take four times as long
        sizes, sequence = sizes_S.numpy(), sequence_S.numpy()
        taken = sequence[sizes[sequence] > 0]
        if (taken[1:] > taken[:-1]).all():
            return cls()
        return cls(sizes, taken, device)

    @classmethod
    def transposing(cls, sizes_AB: Tensor, device: torch.device) -> Reorder:
        """Segments that lie ``[a][b]``, laid out ``[b][a]``."""
        if 1 in sizes_AB.shape:
            return cls()
        sequence_S = torch.arange(sizes_AB.numel()).view(sizes_AB.shape).t().reshape(-1)
        return cls.of(sizes_AB.reshape(-1), sequence_S, device)

    @functools.cached_property
    def order_R(self) -> Tensor:
        """int64: ``result[i] = rows[order_R[i]]``."""
        assert self.sizes_S is not None
        sizes, taken = self.sizes_S, self.sequence
        begin, sizes_taken = np.cumsum(sizes) - sizes, sizes[taken]
        moved_by = begin[taken] - (np.cumsum(sizes_taken) - sizes_taken)
        order_R = np.arange(sizes.sum()) + np.repeat(moved_by, sizes_taken)
        return torch.from_numpy(order_R).to(self.device)

    @functools.cached_property
    def inverse_R(self) -> Tensor:
        """The row of the result that each row becomes."""
        row_R = torch.arange(self.order_R.shape[0], device=self.order_R.device)
        return torch.empty_like(self.order_R).scatter_(0, self.order_R, row_R)

    @functools.cached_property
    def parts(self) -> tuple[tuple[list[int], list[int]], ...]:
        """(sizes of the parts that rows are cut into, their new sequence), there and back."""
        assert self.sizes_S is not None
        assert self.sequence is not None
        # Segments without rows are not taken on the way there, and are no part of the way back
        there = self.sizes_S.tolist(), self.sequence.tolist()
        return there, (self.sizes_S[self.sequence].tolist(), np.argsort(self.sequence).tolist())

    def apply(self, rows: Tensor) -> Tensor:
        """The rows in the new order; differentiable."""
        return self._select(rows, undo=False)

    def undo(self, rows: Tensor) -> Tensor:
        """The rows in the old order; differentiable."""
        return self._select(rows, undo=True)

    def moved(self, rows: Tensor, undo: bool) -> Tensor:
        """The rows in the new order, or the old one again; no gradient is recorded."""
        assert self.sequence is not None
        if rows.device.type == "cpu" and rows.shape[0] >= LONG * len(self.sequence):
            sizes, sequence = self.parts[undo]
            parts = rows.split(sizes)
            return torch.cat([parts[i] for i in sequence])
        return rows.index_select(0, self.inverse_R if undo else self.order_R)

    def _select(self, rows: Tensor, undo: bool) -> Tensor:
        if self.sizes_S is None:
            return rows
        if not (rows.requires_grad and torch.is_grad_enabled()):
            return self.moved(rows, undo)
        permuted: Tensor = _Permute.apply(rows, self, undo)
        return permuted


class _Permute(Function):
    """A permutation whose backward is one too: that of torch adds up into zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, reorder: Reorder, undo: bool) -> Tensor:
        ctx.reorder, ctx.undo = reorder, undo
        return reorder.moved(rows, undo)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.reorder.moved(grad, not ctx.undo), None, None
