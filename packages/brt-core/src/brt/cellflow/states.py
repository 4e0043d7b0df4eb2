"""Where cells lie in a tensor, and the arithmetic of sizes that may be symbols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

Size = int | torch.SymInt

ORDER = ("keeps", "permutes", "mixes")


@dataclass(frozen=True)
class Flow:
    """What a node does with cells, the rows of its inputs' dim 0.

    Attributes:
        kind: "keeps": row i of what comes out depends on row i of what goes in only. "permutes":
            each row depends on one row, at another place. "mixes": on several, or nobody knows.
        reason: why, in a sentence.
    """

    kind: Literal["keeps", "permutes", "mixes"]
    reason: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


@dataclass(frozen=True)
class Along:
    """Cells lie along one dim, whose index is ``(a * N + cell) * inner + b``, a < outer, b < inner.

    Attributes:
        dim: that dim.
        outer, inner: what else is merged into it; 1 where its index is the cell.
        moved: 0 where cells are in their order; else the move that they went through.
    """

    dim: int
    outer: int = 1
    inner: int = 1
    moved: int = 0

    def at(self, dim: int) -> Along:
        """The same cells along another dim."""
        return Along(dim, self.outer, self.inner, self.moved)


@dataclass(frozen=True)
class Mixed:
    """An element depends on several cells, on their number or places, or nobody knows."""

    reason: str


State = Along | Mixed | None
"""Where the cells are; None = the same whatever the cells are."""


class Axis:
    """The cells that an analysis follows: how many there are, perhaps a symbol."""

    def __init__(self, size: Size) -> None:
        self.size = size

    @property
    def expr(self) -> sympy.Expr:
        """The number, as an expression."""
        return as_expr(self.size)

    def mentioned_in(self, value: Any) -> bool:
        """Whether a number was computed from the number of cells."""
        if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return False
        return bool(value.node.expr.free_symbols & self.expr.free_symbols)

    def ratio(self, size: Size) -> int | None:
        """Size / number of cells, where that is a whole number."""
        return whole(as_expr(size) / self.expr) if self.expr != 0 else None


def as_expr(size: Size) -> sympy.Expr:
    """A size as an expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def whole(expr: sympy.Expr) -> int | None:
    """The positive whole number that an expression is, or None."""
    value = sympy.cancel(expr)
    return int(value) if value.is_Integer and value > 0 else None


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are certainly equal, without assuming anything."""
    return statically_known_true(a == b)


def size_of(tensor: Tensor, dim: int) -> Size:
    """One size of a tensor."""
    return tensor.shape[dim]
