"""How brt finds what is offered: protocols, routers, passes, kernels, models and the rest.

Nothing is loaded before the first look-up. Each installed plugin is loaded by itself; one that
breaks is left out with a `PluginWarning`, and its reason is repeated where a name is then not
found. Two offers of one name are an error, whoever came first.

``BRT_PLUGINS=`` loads no installed plugin and ``BRT_PLUGINS=acme,kernels`` those two (names of
entry points); ``BRT_TRACE_PLUGINS=1`` prints each hook call to stderr.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from brt.plugin_manager import HOOKS, Manager, Plugin, did_you_mean
from brt.specs import KernelSpec

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from brt.passes import Record

__all__ = [
    "HOOKS",
    "Manager",
    "Plugin",
    "collect",
    "current",
    "did_you_mean",
    "generation",
    "get",
    "kernels",
    "manager",
    "pass_ran",
    "using",
]


def manager(*plugins: object, entry_points: bool = True) -> Manager:
    """A manager with the built-ins, these plugins and, unless told not to, the installed ones."""
    return Manager(*plugins, entry_points=entry_points)


_lock = threading.RLock()
_current: Manager | None = None
_generation = 0


def current() -> Manager:
    """The manager that brt itself asks; made at the first call."""
    global _current
    if _current is None:
        with _lock:
            if _current is None:
                _current = Manager()
    return _current


@contextlib.contextmanager
def using(*plugins: object, entry_points: bool = False) -> Iterator[Manager]:
    """Let the whole process see these plugins, and by default no installed one, for a while.

    For tests and notebooks: it is not confined to a thread, because kernels also run on
    autograd's.
    """
    mine = Manager(*plugins, entry_points=entry_points)
    before = _swap(mine)
    try:
        yield mine
    finally:
        _swap(before)


def _swap(new: Manager | None) -> Manager | None:
    global _current, _generation
    with _lock:
        old, _current = _current, new
        _generation += 1
    return old


def generation() -> int:
    """A number that changes when what the look-ups find may have changed; for caches."""
    return _generation


def collect(kind: str) -> Mapping[str, tuple[Any, str]]:
    """Name -> (spec, owner) of everything offered of a kind ("passes"), sorted by name."""
    return current().collect(kind)


def get(kind: str, name: str) -> Any:
    """The spec of this name; `PluginError` with the nearest names where nobody offers it."""
    return current().get(kind, name)


def kernels(op: str, device: str) -> list[tuple[KernelSpec, str]]:
    """(spec, owner) of each kernel of an operator for a `torch.device.type`, by name."""
    return current().kernels(op, device)


def pass_ran(record: Record, graph: GraphModule) -> None:
    """Tell every observer that a pass ran."""
    current().pass_ran(record, graph)
