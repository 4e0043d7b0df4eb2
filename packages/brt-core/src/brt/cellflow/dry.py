"""Calls run on tensors without data, with their cells followed."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from brt.cellflow.follow import Follow, ReadsValuesError, is_row
from brt.cellflow.layers import shape_of
from brt.cellflow.states import ORDER, Along, Axis, Flow, Mixed, Size, as_expr, same

# Code of torch and of brt means nothing by asking: it is right for any number
_KNOWS_SYMBOLS = tuple(
    f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1])
)


class Unknown:
    """A value that cannot be computed without data."""


UNKNOWN = Unknown()


class DryRun:
    """Makes tensors without data, whose numbers of rows are symbols, and runs calls on them."""

    def __init__(self) -> None:
        # Numbers that depend on data are refused: they would pass for constants
        shapes = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        self.mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
        self.fixed = False
        """Whether a call fixed the number of its cells: later ones cannot tell where it is used."""
        self._sources = itertools.count()
        self._unseen = _unseen_sizes()

    def like(self, real: Tensor) -> Tensor:
        """A tensor like this one, its number of rows a symbol (one for all of equal number)."""
        if isinstance(real, FakeTensor):
            return real
        if real.ndim == 0:
            return self.mode.from_tensor(real.detach())
        if real.shape[0] < 2:  # these would be taken for what they are
            real = real.new_empty((2 if real.shape[0] == 0 else 3, *real.shape[1:]))
        context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.DUCK] + [DimDynamic.STATIC] * (real.ndim - 1)
        )
        source = ConstantSource(f"input_{next(self._sources)}")
        return self.mode.from_tensor(real.detach(), source=source, symbolic_context=context)

    def new_size(self) -> Size:
        """A number of rows that only the data knows: a symbol of its own."""
        return self.like(torch.empty(next(self._unseen))).shape[0]

    def empty(self, num_rows: Size, trailing: tuple[Size, ...], like: Tensor) -> Tensor:
        """Rows of this number, otherwise like those of ``like``."""
        with self.mode:
            return torch.empty((num_rows, *trailing), dtype=like.dtype, device=like.device)

    def _rows_like(self, x: Tensor, trailing: tuple[int, ...]) -> Tensor:
        """`empty` for as many rows as ``x`` has, without the detour through the mode."""
        bare = torch.empty((x.shape[0], *trailing), dtype=x.dtype, device="meta")
        return FakeTensor(self.mode, bare, x.device)

    def call(
        self,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        cells: list[Tensor],
        used: set[Any] | None = None,
    ) -> tuple[Flow, Any]:
        """What a call does with the rows of ``cells``, and what it returns.

        ``used`` are the entries of the result that matter, where not all do.
        """
        if len(args) == len(cells) == 1 and args[0] is cells[0] and not kwargs and used is None:
            shape = shape_of(function, cells[0]) if isinstance(function, nn.Module) else None
            if shape is not None:
                return Flow("keeps", "every row by itself"), self._rows_like(cells[0], shape)
        numbers = [s for s in pytree.tree_leaves((args, kwargs)) if isinstance(s, torch.SymInt)]
        sizes = _distinct([t.shape[0] for t in cells if t.ndim] or numbers or [0])
        worst, value = Flow("keeps", "takes no cells"), UNKNOWN
        for i, size in enumerate(sizes):
            follow = Follow(Axis(size))
            for tensor in cells:
                rows = tensor.ndim > 0 and same(tensor.shape[0], size)
                follow.mark(tensor, Along(0) if rows else None)
            try:
                with torch.no_grad(), enable_python_dispatcher(), self.mode, follow:
                    value = function(*args, **kwargs)
            except Exception as error:  # whatever code raises where there is no data
                line = str(error).strip().partition("\n")[0]
                return Flow("mixes", f"{type(error).__name__}: {line}"[:200]), UNKNOWN
            self.fixed |= isinstance(size, torch.SymInt) and bool(as_expr(size).is_number)
            flow = _verdict(follow, value if used is None else [value[k] for k in used])
            if i == 0 or ORDER.index(flow.kind) > ORDER.index(worst.kind):
                worst = flow
            if worst.kind == "mixes":
                break
        return worst, value


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let a module run without data, and raise where its code branches on a number of cells.

    Without warnings, and without fused attention layers, which are no operators of ATen.
    """
    decide = torch.SymBool.__bool__

    def refuse(condition: torch.SymBool) -> bool:
        if not sys._getframe(1).f_code.co_filename.startswith(_KNOWS_SYMBOLS):
            raise ReadsValuesError("its code branches on the number of cells")
        return decide(condition)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.SymBool.__bool__ = refuse  # type: ignore
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.SymBool.__bool__ = decide  # type: ignore[method-assign]
        torch.backends.mha.set_fastpath_enabled(fast)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in a nest."""
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _verdict(follow: Follow, value: Any) -> Flow:
    states = [follow.state_of(t) for t in tensors_in(value)]
    if not states:
        return Flow("keeps", "gives no tensor")
    for state in states:
        if isinstance(state, Mixed):
            return Flow("mixes", state.reason)
        if isinstance(state, Along) and not is_row(state):
            where = f"in dim {state.dim}" if state.dim else "with others in dim 0"
            return Flow("mixes", f"the rows are no longer the cells: these lie {where}")
    if any(isinstance(state, Along) and state.moved for state in states):
        return Flow("permutes", "rows change places")
    return Flow("keeps", "every row by itself" if any(states) else "does not depend on cells")


def _distinct(sizes: list[Any]) -> list[Size]:
    found: list[Size] = []
    for size in sizes:
        if not any(same(size, other) for other in found):
            found.append(size)
    return found


def _unseen_sizes() -> Iterator[int]:
    """Primes over 1000: sizes that no model has."""
    found: list[int] = []
    for n in itertools.count(2):
        if all(n % p for p in found):
            found.append(n)
            if n > 1000:
                yield n
