"""What is made of weights for a kernel, kept while they are unchanged."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from typing import Generic, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")

_version_of = attrgetter("_version")


class Same:
    """A key that equals itself alone, without a look at all that is in it."""

    __slots__ = ("what",)

    def __init__(self, what: object) -> None:
        self.what = what  # alive, so that its identity is nobody else's

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.what is self.what

    def __hash__(self) -> int:
        return id(self.what)


class PackedWeights(Generic[Made]):
    """A bounded cache of packed weights, by the identity and the version of their sources.

    A source that was freed, written in place or given other storage makes its entry worthless;
    entries hold no source alive, and go with the first that is freed. Inference tensors have no
    versions, so nothing is kept for them. Safe to share between threads.
    """

    def __init__(self, max_entries: int = 16, *, values: bool = True) -> None:
        self._max_entries = max_entries
        self._values = values  # whether what is kept depends on more than shapes and dtypes
        self._entries: OrderedDict[Hashable, tuple[list[weakref.ref[Tensor]], object, Made]]
        self._entries = OrderedDict()
        self._lock = threading.RLock()  # a source may be freed while it is held

    def get(self, sources: Sequence[Tensor], extra: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make()`` returns, or returned for the same sources and ``extra``."""
        if torch.compiler.is_compiling():
            return make()
        # There may be thousands of sources, and this runs in every call
        try:
            state = self._values and (
                list(map(_version_of, sources)),
                list(map(Tensor.data_ptr, sources)),
            )
        except RuntimeError:  # of inference tensors
            return make()
        key = (tuple(map(id, sources)), extra)
        with self._lock:
            found = self._entries.get(key)
            if found is not None and found[1] == state:
                self._entries.move_to_end(key)
                return found[2]
        made = make()

        def forget(_: object) -> None:
            with self._lock:
                self._entries.pop(key, None)

        with self._lock:
            self._entries[key] = ([weakref.ref(t, forget) for t in sources], state, made)
            self._entries.move_to_end(key)
            while len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)
        return made

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._entries.clear()
