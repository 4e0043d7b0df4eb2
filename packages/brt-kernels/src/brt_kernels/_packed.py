"""Weights in the layout that a kernel reads, kept while their sources are unchanged."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor


class PackedWeights:
    """A bounded cache of packed weights, by the identity and the version of their sources.

    A source that was freed, written in place or given other storage makes its entry worthless;
    entries hold no source alive. Inference tensors have no versions, so nothing is kept for them.
    Safe to share between threads.
    """

    def __init__(self, max_entries: int = 16) -> None:
        self._max_entries = max_entries
        self._entries: OrderedDict[Hashable, tuple[list[weakref.ref[Tensor]], object, Tensor]]
        self._entries = OrderedDict()
        self._lock = threading.Lock()

    def get(self, sources: Sequence[Tensor], extra: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What ``make()`` returns, or returned for the same sources and ``extra``."""
        # Lists, not generators: there may be thousands of sources, and this runs in every call
        if torch.compiler.is_compiling() or any([t.is_inference() for t in sources]):
            return make()
        state = ([t._version for t in sources], [t.data_ptr() for t in sources])
        key = (tuple([id(t) for t in sources]), extra)
        with self._lock:
            found = self._entries.get(key)
            if found is not None:
                refs, known_state, packed = found
                same = [ref() is t for ref, t in zip(refs, sources, strict=True)]
                if all(same) and known_state == state:
                    self._entries.move_to_end(key)
                    return packed
        packed = make()
        with self._lock:
            self._entries[key] = ([weakref.ref(t) for t in sources], state, packed)
            self._entries.move_to_end(key)
            while len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)
        return packed

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._entries.clear()
