"""Following cells through the operators that a call runs, on tensors without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from brt.cellflow.call import TAKES_SIZES, Call
from brt.cellflow.states import Along, Axis, Mixed, State
from brt.cellflow.table import attention, find

# What tells sizes, and no values
_HARMLESS = {
    *("prim::device", "aten::size", "aten::sym_size", "aten::stride", "aten::sym_stride"),
    *("aten::numel", "aten::sym_numel", "aten::storage_offset", "aten::sym_storage_offset"),
    *("aten::is_contiguous", "aten::is_strides_like_format", "aten::dim"),
}


class ReadsValuesError(Exception):
    """Python code was told values of cells, so that anything may depend on them."""


class Follow(TorchDispatchMode):
    """While active, keeps for each tensor where the cells of one axis lie in it."""

    def __init__(self, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self._states: dict[int, State] = {}
        # Written through a view, or with something else than before: all that shares the memory
        self._spoilt: dict[int, Mixed] = {}
        self._alive: list[Tensor] = []

    def mark(self, tensor: Tensor, state: State) -> None:
        """Say where the cells are in a tensor."""
        self._alive.append(tensor)  # ids are not used again while we look at them
        self._states[id(tensor)] = state

    def state_of(self, tensor: Tensor) -> State:
        """Where the cells are in a tensor."""
        if self._spoilt:
            spoilt = self._spoilt.get(_memory(tensor))
            if spoilt is not None:
                return spoilt
        return self._states.get(id(tensor))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):
            raise ReadsValuesError(f"{func} has no rule")
        leaves = pytree.tree_leaves((args, kwargs))
        states = [self.state_of(t) for t in leaves if isinstance(t, Tensor)]
        outs = [t for t in pytree.tree_leaves(out) if t is not None]
        if any(not isinstance(t, Tensor) for t in outs):
            if func._schema.name not in _HARMLESS and any(s is not None for s in states):
                raise ReadsValuesError(f"{func._schema.name} reads values of cells")
            return out
        self._enter(
            func,
            {**dict(enumerate(args)), **kwargs},
            outs,
            self._infer(func, args, kwargs, out, leaves, states),
        )
        return out

    def _infer(
        self,
        func: torch._ops.OpOverload,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        leaves: list[Any],
        states: list[State],
    ) -> State | list[State]:
        mixed = next((s for s in states if isinstance(s, Mixed)), None)
        if mixed is not None:
            return mixed
        rule = find(func)
        if torch.Tag.nondeterministic_seeded in func.tags and rule is not attention:
            return Mixed(f"{func._schema.name} draws random numbers")
        uses_number = any(self.axis.mentioned_in(value) for value in leaves)
        if not uses_number and all(state is None for state in states):
            return None
        if uses_number and func._schema.name.removesuffix("_") not in TAKES_SIZES:
            return Mixed(f"{func._schema.name} uses the number of cells as a value")
        if rule is None:
            return Mixed(f"{func._schema.name} has no rule")
        return rule(Call(func, args, kwargs, out, self.axis, self.state_of))

    def _enter(
        self,
        func: torch._ops.OpOverload,
        given: dict[int | str, Any],
        outs: list[Tensor],
        found: State | list[State],
    ) -> None:
        states = found if isinstance(found, list) else [found] * len(outs)
        written = {
            id(tensor): tensor
            for i, arg in enumerate(func._schema.arguments)
            if arg.alias_info is not None and arg.alias_info.is_write
            for tensor in pytree.tree_leaves(given.get(i, given.get(arg.name)))
            if isinstance(tensor, Tensor)
        }
        for tensor, state in zip(outs, states, strict=True):
            if written.pop(id(tensor), None) is not None and state != self.state_of(tensor):
                reason = state if isinstance(state, Mixed) else Mixed("writes cells into a tensor")
                self._spoilt[_memory(tensor)] = reason
            self.mark(tensor, state)
        for tensor in written.values():  # and does not return it
            self._spoilt[_memory(tensor)] = Mixed(f"{func._schema.name} writes into it")


def is_row(state: State) -> bool:
    """Whether dim 0 are the cells, and nothing else."""
    return isinstance(state, Along) and (state.dim, state.outer, state.inner) == (0, 1, 1)


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
