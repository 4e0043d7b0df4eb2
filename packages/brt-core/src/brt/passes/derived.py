"""Tensors that passes compute from a model's weights and keep while these stay as they are."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

State = tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class _Derived:
    sources: list[weakref.ref[Tensor]]
    state: State
    made: tuple[Tensor, ...]

    def holds(self, sources: Sequence[Tensor], state: State) -> bool:
        """Whether these are the same tensors, with the values that they had."""
        same = all(ref() is source for ref, source in zip(self.sources, sources, strict=True))
        return same and self.state == state


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
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in sources)
        if needs_grad or torch.compiler.is_compiling() or any(t.is_inference() for t in sources):
            return make()
        state = tuple((t.data_ptr(), t._version) for t in sources)
        found = self._kept.get(key)
        if found is None or not found.holds(sources, state):
            with torch.no_grad():
                made = tuple(t.detach() for t in make())
            found = _Derived([weakref.ref(t) for t in sources], state, made)
            self._kept[key] = found
        return found.made
