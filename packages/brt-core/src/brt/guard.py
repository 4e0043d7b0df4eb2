"""Guards: what keeps a rewrite right on inputs that the profile has not seen.

A guard is a condition that is checked where it costs nothing (a size that the host has anyway),
the generic code that runs where it does not hold, and two counts. `Spill` is the first lowering:
rows that were not expected go through the branch as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from brt.cells import Root

_MOST_RECIPES = 64


@dataclass(frozen=True)
class Count:
    """How often a guard's assumption held, and how often the generic code ran instead."""

    hits: int = 0
    fallbacks: int = 0

    def __str__(self) -> str:
        return f"{self.hits} hits, {self.fallbacks} fallbacks"


class Guard:
    """The name of an assumption, and how often it held. May be counted by several threads.

    Args:
        name: unique in a model: ``pass:router[path]``.
        assumes: the assumption, in words.
    """

    def __init__(self, name: str, assumes: str) -> None:
        self.name = name
        self.assumes = assumes
        self._lock = threading.Lock()
        self._hits = self._fallbacks = 0

    def count(self, held: bool) -> None:
        """Count one check."""
        with self._lock:
            if held:
                self._hits += 1
            else:
                self._fallbacks += 1

    def read(self) -> Count:
        """The counts so far."""
        with self._lock:
            return Count(self._hits, self._fallbacks)

    def reset(self) -> None:
        """Count from zero again."""
        with self._lock:
            self._hits = self._fallbacks = 0

    def __repr__(self) -> str:
        return f"Guard({self.name!r}, {self.assumes!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Locks cannot be copied, and a copied model counts its own calls
        return Guard, (self.name, self.assumes)


class Guarded(nn.Module):
    """A module that a pass puts into a graph: it checks an assumption and counts.

    It owns no parameters: what it runs is found by name in ``scope``, the region's own module,
    which it hides from `torch.nn`, so that names in the state dict stay as they were.
    """

    def __init__(self, guard: Guard, scope: nn.Module) -> None:
        super().__init__()
        self.guard = guard
        self._scope = (scope,)

    @property
    def scope(self) -> nn.Module:
        """The region's module."""
        return self._scope[0]

    def forget(self) -> None:
        """Drop what was remembered about dtypes and devices, which have changed."""

    def extra_repr(self) -> str:
        """The assumption."""
        return f"{self.guard.name}: {self.guard.assumes}"


class Branch:
    """The code of a branch, and what it gives where there are no rows for it.

    Attributes:
        nodes: names of its nodes.
        calls: the modules that it calls.
    """

    def __init__(self, branch: fx.Graph) -> None:
        self.nodes = tuple(n.name for n in branch.nodes if n.op not in ("placeholder", "output"))
        self.calls = frozenset(str(n.target) for n in branch.nodes if n.op == "call_module")
        self.run = compiled(branch)
        """``run(scope, rows, *others)``"""
        self._recipes: dict[Any, _Recipe | None] = {}

    def nothing(self, scope: nn.Module, *inputs: Any) -> Any:
        """Empty tensors, whose shapes it learns by running the branch once without rows."""
        leaves = inputs if all(type(x) is Tensor for x in inputs) else _leaves(inputs)
        key = _signature(leaves)
        recipe = None if key is None else self._recipes.get(key)
        if recipe is not None:
            return recipe.make(leaves)
        out = self.run(scope, *inputs)
        if key is not None and key not in self._recipes:
            if len(self._recipes) >= _MOST_RECIPES:
                self._recipes.clear()
            self._recipes[key] = _Recipe.of(out, leaves)
        return out

    def forget(self) -> None:
        """Learn shapes and dtypes anew."""
        self._recipes.clear()

    def __str__(self) -> str:
        return f"{len(self.nodes)} nodes: {', '.join(self.nodes)}"


class Skip(nn.Module):
    """A branch that does nothing while there are no rows for it.

    As `Spill`, where nothing is expected: it counts nothing, and holds for any input.
    """

    def __init__(self, scope: nn.Module, branch: fx.Graph) -> None:
        super().__init__()
        self._scope = (scope,)
        self._branch = Branch(branch)
        self.calls = self._branch.calls

    def forward(self, rows: Any, *others: Any) -> Any:
        """The result of the branch."""
        is_needed = torch.compiler.is_compiling() or torch.is_grad_enabled() or _num_rows(rows)
        run = self._branch.run if is_needed else self._branch.nothing
        return run(self._scope[0], rows, *others)

    def forget(self) -> None:
        """Learn shapes and dtypes anew."""
        self._branch.forget()

    def extra_repr(self) -> str:
        """The work that is skipped."""
        return str(self._branch)


class Spill(Guarded):
    """A branch that is expected to get no rows, and then does nothing.

    ``forward(rows, *others)``: without rows it returns what the branch returns for no rows, empty
    tensors, whose shapes it learnt by running the branch so once. With rows, and under
    ``torch.compile``, the branch runs. So it does while gradients are recorded: those of a branch
    without rows are zeros, not None.
    """

    def __init__(self, guard: Guard, scope: nn.Module, branch: fx.Graph) -> None:
        super().__init__(guard, scope)
        self._branch = Branch(branch)
        self.nodes, self.calls = self._branch.nodes, self._branch.calls

    def forward(self, rows: Any, *others: Any) -> Any:
        """The result of the branch."""
        if torch.compiler.is_compiling():
            return self._branch.run(self.scope, rows, *others)
        expected = _num_rows(rows) == 0
        self.guard.count(expected)
        run = self._branch.nothing if expected and not torch.is_grad_enabled() else self._branch.run
        return run(self.scope, rows, *others)

    def forget(self) -> None:
        """Learn shapes and dtypes anew."""
        self._branch.forget()

    def extra_repr(self) -> str:
        """The assumption and the work that is skipped."""
        return f"{super().extra_repr()}; {self._branch}"


def _num_rows(rows: Any) -> int:
    """Of a tensor, or of the first flow that is there."""
    if isinstance(rows, tuple):
        rows = next(flow for flow in rows if flow is not None)
    return int(rows.shape[0])


@dataclass(frozen=True)
class _Recipe:
    """How to make a branch's result for no rows: empty tensors, and parts of its inputs."""

    spec: pytree.TreeSpec | None  # None: one tensor
    leaves: tuple[Callable[[tuple[Any, ...]], Any], ...]

    @classmethod
    def of(cls, out: Any, inputs: tuple[Any, ...]) -> _Recipe | None:
        """None where the result is not determined by the inputs' signature alone."""
        if isinstance(out, Tensor):
            return cls(None, (_empty_like(out),)) if out.numel() == 0 else None
        leaves, spec = pytree.tree_flatten(out, is_leaf=_is_root)
        made = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.numel():
                    return None
                made.append(_empty_like(leaf))
            elif isinstance(leaf, Root):
                at = next(
                    (i for i, x in enumerate(inputs) if isinstance(x, Root) and x == leaf), -1
                )
                if at < 0:
                    return None
                made.append(_item(at))
            elif leaf is None or isinstance(leaf, (bool, int, float, str)):
                made.append(_constant(leaf))
            else:
                return None
        return cls(spec, tuple(made))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Recipe:
        return self  # it never changes

    def make(self, inputs: tuple[Any, ...]) -> Any:
        """The result, in new tensors."""
        if self.spec is None:
            return self.leaves[0](inputs)
        return pytree.tree_unflatten([leaf(inputs) for leaf in self.leaves], self.spec)


def _empty_like(out: Tensor) -> Callable[[tuple[Any, ...]], Tensor]:
    shape, stride, dtype, device = out.shape, out.stride(), out.dtype, out.device
    return lambda _: torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _item(at: int) -> Callable[[tuple[Any, ...]], Any]:
    return lambda inputs: inputs[at]


def _constant(value: Any) -> Callable[[tuple[Any, ...]], Any]:
    return lambda _: value


def _is_root(value: Any) -> bool:
    return isinstance(value, Root)


def _leaves(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(pytree.tree_leaves(inputs, is_leaf=_is_root))


def _signature(leaves: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What shapes and dtypes of a result depend on; None where that cannot be told."""
    device = leaves[0].device.type
    parts: list[Any] = [torch.is_autocast_enabled(device)]
    if parts[0]:
        parts.append(torch.get_autocast_dtype(device))
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            parts += (leaf.shape, leaf.dtype, leaf.device)
        elif isinstance(leaf, Root):
            parts.append(leaf.num_cells)  # its key changes from call to call
        elif leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)):
            parts.append(leaf)
        else:
            return None
    return tuple(parts)


def compiled(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a function of the module that its targets are names in, and of its inputs."""
    code = graph.python_code("self")
    made: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, f"<brt graph {id(graph):x}>", "exec"), made)
    return made["forward"]
