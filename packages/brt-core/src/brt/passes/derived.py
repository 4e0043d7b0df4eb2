"""Tensors that passes compute from a model's weights and keep while these stay as they are."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Slots:
    """Where parameters and buffers of modules are kept, for reading thousands of them at each call.

    `torch.nn.Module` takes a microsecond to look one up.
    """

    places: tuple[tuple[Any, str], ...]

    @classmethod
    def of(cls, owned: Iterable[tuple[nn.Module, str]]) -> Slots:
        """The places of (module, name) pairs."""
        places: list[tuple[Any, str]] = []
        for module, name in owned:
            tables = (module._parameters, module._buffers)
            found: Any = next((table for table in tables if name in table), module)
            places.append((found, name))
        return cls(tuple(places))

    @classmethod
    def under(cls, module: nn.Module) -> Slots:
        """Those of a module and all modules in it that hold a tensor."""
        return cls.of(
            (inner, name)
            for inner in module.modules()
            for table in (inner._parameters, inner._buffers)
            for name, tensor in table.items()
            if tensor is not None
        )

    def read(self) -> list[Tensor]:
        """The tensors that are there now."""
        return [
            place[name] if type(place) is dict else getattr(place, name)
            for place, name in self.places
        ]


def state_of(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]] | None:
    """Where tensors lie and how often they were written to; None: inference tensors do not tell."""
    try:
        return [t._version for t in tensors], [t.data_ptr() for t in tensors]
    except RuntimeError:
        return None


@dataclass(frozen=True, eq=False)
class _Derived:
    # Kept alive, so that neither their identity nor their memory is somebody else's by now
    sources: Sequence[Tensor]
    state: tuple[list[int], list[int]]
    made: tuple[Tensor, ...]

    def holds(self, sources: Sequence[Tensor], state: tuple[list[int], list[int]]) -> bool:
        """Whether these are the same tensors, with the values that they had."""
        return self.state == state and all(map(operator.is_, self.sources, sources))


class DerivedTensors:
    """What ``make()`` gave for some sources, until one of them is replaced, moved or written to.

    While gradients of a source are needed, under a compiler, and for inference tensors, which tell
    no versions, it is made in each call, so that gradients reach the sources.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, _Derived] = {}

    def get(
        self, key: Hashable, sources: Sequence[Tensor], make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """The tensors of ``key``."""
        if torch.compiler.is_compiling():
            return make()
        if torch.is_grad_enabled() and any([t.requires_grad for t in sources]):
            return make()
        state = state_of(sources)
        if state is None:
            return make()
        found = self._kept.get(key)
        if found is None or not found.holds(sources, state):
            with torch.no_grad():
                made = tuple(t.detach() for t in make())
            found = self._kept[key] = _Derived(sources, state, made)
        return found.made

    def __deepcopy__(self, memo: dict[int, Any]) -> DerivedTensors:
        """An empty one: a copy has sources of its own."""
        return DerivedTensors()
