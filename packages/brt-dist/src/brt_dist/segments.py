"""Rows that lie in segments, laid out in another sequence of the segments.

Legend: S segments, R rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


@dataclass(frozen=True, eq=False)
class Reorder:
    """A permutation of rows: ``result[i] = rows[order_R[i]]``; None where it changes nothing.

    Attributes:
        order_R: int64, the row that each row of the result was.
        inverse_R: int64, the row of the result that each row becomes.
    """

    order_R: Tensor | None = None
    inverse_R: Tensor | None = None

    @classmethod
    def of(cls, sizes_S: Tensor, sequence_S: Tensor, device: torch.device) -> Reorder:
        """Segments of these sizes, laid out in this sequence. Both tensors are on the host."""
        taken_S = sequence_S[sizes_S[sequence_S] > 0]
        if taken_S.numel() < 2 or bool((taken_S.diff() > 0).all()):
            return cls()
        sizes_taken_S = sizes_S[taken_S]
        begin_S = (sizes_S.cumsum(0) - sizes_S)[taken_S]
        begin_result_S = sizes_taken_S.cumsum(0) - sizes_taken_S
        row_R = torch.arange(int(sizes_S.sum()))
        order_R = row_R + (begin_S - begin_result_S).repeat_interleave(sizes_taken_S)
        inverse_R = torch.empty_like(order_R).scatter_(0, order_R, row_R)
        return cls(order_R.to(device), inverse_R.to(device))

    @classmethod
    def transposing(cls, sizes_AB: Tensor, device: torch.device) -> Reorder:
        """Segments that lie ``[a][b]``, laid out ``[b][a]``."""
        sequence_S = torch.arange(sizes_AB.numel()).view(sizes_AB.shape).t().reshape(-1)
        return cls.of(sizes_AB.reshape(-1), sequence_S, device)

    def apply(self, rows: Tensor) -> Tensor:
        """The rows in the new order; differentiable."""
        return _select(rows, self.order_R, self.inverse_R)

    def undo(self, rows: Tensor) -> Tensor:
        """The rows in the old order; differentiable."""
        return _select(rows, self.inverse_R, self.order_R)


class _Permute(Function):
    """index_select whose backward is one too: that of torch adds up into zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_R)
        return rows.index_select(0, order_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return grad.index_select(0, inverse_R), None, None


def _select(rows: Tensor, order_R: Tensor | None, inverse_R: Tensor | None) -> Tensor:
    if order_R is None or inverse_R is None:
        return rows
    permuted: Tensor = _Permute.apply(rows, order_R, inverse_R)
    return permuted
