"""What all routers have in common: they can be observed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from brt.route import Route

Observer = Callable[["Router", Route, Tensor], None]


class Router(nn.Module):
    """A module that decides, or carries out, where cells go."""

    waits_for_others: ClassVar[bool] = False
    """Whether a call ends only when other processes make it too: nothing may repeat it alone."""
    stands_for: str = ""
    """The router of the model, by its name in the region, that a pass put this one in place of."""

    def __init__(self) -> None:
        super().__init__()
        self._observers: OrderedDict[int, Observer] = OrderedDict()

    def register_observer(self, observer: Observer) -> RemovableHandle:
        """Call ``observer(router, route, scores)`` after each decision, until ``handle.remove()``.

        Observers see eager calls only: a compiled graph does not stop for them.
        """
        handle = RemovableHandle(self._observers)
        self._observers[handle.id] = observer
        return handle

    def _observe(self, route: Route, scores: Tensor) -> None:
        if self._observers and not torch.compiler.is_compiling():
            for observer in tuple(self._observers.values()):
                observer(self, route, scores)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__
        # Observers belong to whoever registered them, not to copies of the module
        return {**state, "_observers": OrderedDict()}
