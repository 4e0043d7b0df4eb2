"""One call of an operator, as the rules of the table see it, and what they share.

A rule is given a `Call` of which at least one tensor carries cells (or a number was computed from
their number), and none is mixed; it returns where the cells are in the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from brt.cellflow.states import Along, Axis, Mixed, Size, State, as_expr, same, size_of

Rule = Callable[["Call"], "State | list[State]"]

RULES: dict[str, Rule] = {}
"""Rules by operator name without overload ("aten::mm")."""

TAKES_SIZES: set[str] = set()
"""Operators that may be given the number of cells: their rules look at it."""


class Call:
    """One call of an operator: its arguments by name, and where cells lie in them."""

    def __init__(
        self,
        func: torch._ops.OpOverload,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        out: Any,
        axis: Axis,
        state_of: Callable[[Tensor], State],
    ) -> None:
        self.name = func._schema.name
        self.args = {arg.name: arg.default_value for arg in func._schema.arguments}
        self.args.update(zip(self.args, args, strict=False))
        self.args.update(kwargs)
        self.out = out
        self.axis = axis
        self.state_of = state_of

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [t for t in pytree.tree_leaves(list(self.args.values())) if isinstance(t, Tensor)]

    def first(self) -> Tensor:
        """The first tensor argument."""
        return self.tensors()[0]

    def along(self, tensor: Tensor | None) -> Along | None:
        """Where the cells lie in a tensor that is not mixed."""
        state = None if tensor is None else self.state_of(tensor)
        assert not isinstance(state, Mixed)
        return state

    def carriers(self) -> list[tuple[Tensor, Along]]:
        """The tensors with cells."""
        return [(t, a) for t in self.tensors() if (a := self.along(t)) is not None]

    def uses_number(self) -> bool:
        """Whether any number among the arguments was computed from the number of cells."""
        return any(self.axis.mentioned_in(v) for v in pytree.tree_leaves(list(self.args.values())))


def rule(*names: str, sizes: bool = False) -> Callable[[Rule], Rule]:
    """Enter a rule into the table under these names of ATen operators."""

    def enter(given: Rule) -> Rule:
        for name in names:
            RULES[f"aten::{name}"] = given
            if sizes:
                TAKES_SIZES.add(f"aten::{name}")
        return given

    return enter


def only(call: Call, tensor: Tensor) -> Along | Mixed:
    """Cells of this argument, where no other one has any."""
    if any(t is not tensor for t, _ in call.carriers()):
        return Mixed(f"{call.name} takes cells in several arguments")
    found = call.along(tensor)
    return Mixed(f"{call.name} uses the number of cells") if found is None else found


def dims_of(given: Any, ndim: int) -> list[int]:
    """Dims as a list of non-negative ones; none given means all."""
    if given is None or (isinstance(given, (list, tuple)) and not given):
        return list(range(ndim))
    listed = given if isinstance(given, (list, tuple)) else [given]
    return [d % max(ndim, 1) for d in listed]


def product_of(sizes: Sequence[Size]) -> Any:
    """How many elements sizes make, as an expression."""
    return math.prod([as_expr(s) for s in sizes], start=as_expr(1))


def varies(tensor: Tensor, dim: int) -> bool:
    """Whether a constant may differ along a dim (counted from the front; negative = not there)."""
    return dim >= 0 and not same(size_of(tensor, dim), 1)


def broadcast(call: Call, tensors: Sequence[Tensor], ndim: int) -> State:
    """Tensors are lined up from their last dims; every element is made of those at its place."""
    found: Along | None = None
    for tensor in tensors:
        along = call.along(tensor)
        if along is None:
            continue
        here = along.at(along.dim + ndim - tensor.ndim)
        if found is not None and here != found:
            return Mixed(f"{call.name} combines cells that lie in different places")
        found = here
    if found is None:
        return None
    for tensor in tensors:
        if call.along(tensor) is None and varies(tensor, found.dim - (ndim - tensor.ndim)):
            return Mixed(f"{call.name} takes a constant that differs from cell to cell")
    return found
