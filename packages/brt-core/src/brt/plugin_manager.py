"""The manager of plugins: loads them, calls their hooks and keeps what they offer.

`brt.plugins` has the one that brt asks, and says how it behaves.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import threading
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import metadata
from typing import TYPE_CHECKING, Any, cast

import pluggy

from brt import builtins, hookspecs
from brt.errors import PluginError, PluginWarning
from brt.specs import ANY_DEVICE, SPECS, AnySpec, KernelSpec

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from brt.passes import Record

HOOKS = tuple(sorted(name for name in vars(hookspecs) if name.startswith("brt_")))

# Packages of this repository that offer what brt-core alone has none of.
_HOMES = {
    "models": "brt-models",
    "adapters": "brt-models",
    "demos": "brt-models",
    "solvers": "brt-dist",
}


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """One plugin, as `brt plugins` lists it."""

    name: str
    owner: str
    """The distribution and its version; of a plugin handed over in code, its own name."""
    installed: bool
    """Found through an entry point. What breaks in such a plugin is a warning, not an error."""
    hooks: tuple[str, ...] = ()
    skipped: str | None = None
    """Why it is left out; None where it is in."""


class Manager:
    """The plugins that a look-up sees. Building one loads them; it may be shared by threads."""

    def __init__(self, *plugins: object, entry_points: bool = True) -> None:
        self._pm = pluggy.PluginManager("brt")
        self._pm.add_hookspecs(hookspecs)
        self._lock = threading.RLock()
        self._traces = os.environ.get("BRT_TRACE_PLUGINS", "") not in ("", "0")
        self._registered: dict[int, Plugin] = {}  # by id of the plugin's module or object
        self._skipped: list[Plugin] = []
        self._failures: list[str] = []
        self._offers: dict[str, list[tuple[Any, str]]] = {}
        self._by_name: dict[str, dict[str, tuple[Any, str]]] = {}
        self._kernels: dict[tuple[str, str], list[tuple[KernelSpec, str]]] = {}

        core = Plugin(name="builtins", owner=_version_of_core(), installed=False)
        self._register(builtins, core)
        for plugin in plugins:
            name = getattr(plugin, "__name__", type(plugin).__name__)
            self._register(plugin, Plugin(name=name, owner=name, installed=False))
        if entry_points:
            self._load_entry_points()

    @property
    def plugins(self) -> tuple[Plugin, ...]:
        """Every plugin: those that are in, in the order of loading, then those left out."""
        return (*self._registered.values(), *self._skipped)

    @property
    def failures(self) -> tuple[str, ...]:
        """What went wrong with installed plugins so far, a sentence each."""
        return tuple(self._failures)

    def collect(self, kind: str) -> Mapping[str, tuple[Any, str]]:
        """Name -> (spec, owner) of everything offered of a kind, sorted by name.

        The hook is called the first time only. Two offers of one name raise `PluginError`.
        """
        found = self._by_name.get(kind)
        if found is None:
            with self._lock:
                found = self._by_name[kind] = _by_name(self._offered(kind))
        return found

    def get(self, kind: str, name: str) -> Any:
        """The spec of this name; `PluginError` with the nearest names where nobody offers it."""
        found = self.collect(kind)
        if name not in found:
            raise PluginError(self._not_found(kind, name, found))
        return found[name][0]

    def kernels(self, op: str, device: str) -> list[tuple[KernelSpec, str]]:
        """(spec, owner) of each kernel of an operator for a `torch.device.type`, by name."""
        found = self._kernels.get((op, device))
        if found is None:
            found = [
                (spec, owner)
                for spec, owner in self.collect("kernels").values()
                if spec.op == op and spec.device in (device, ANY_DEVICE)
            ]
            found.sort(key=lambda offer: (offer[0].name, offer[0].device))
            self._kernels[op, device] = found
        return found

    def pass_ran(self, record: Record, graph: GraphModule) -> None:
        """Tell every observer that a pass ran; what an observer raises becomes a warning."""
        values = {"record": record, "graph": graph}
        for impl in self._pm.hook.brt_pass_ran.get_hookimpls():
            owner = self._registered[id(impl.plugin)].owner
            try:
                with self._traced("brt_pass_ran", owner):
                    impl.function(*(values[name] for name in impl.argnames))
            except Exception as error:
                self._fail(f"brt_pass_ran of {owner} failed: {_reason(error)}")

    def _offered(self, kind: str) -> list[tuple[Any, str]]:
        """Call the hook of a kind on every plugin, once in the life of this manager."""
        if kind not in SPECS:
            raise PluginError(f"plugins offer no {kind!r}{did_you_mean(kind, SPECS)}")
        if kind in self._offers:
            return self._offers[kind]
        hook = SPECS[kind].hook
        offers: list[tuple[Any, str]] = []
        for impl in getattr(self._pm.hook, hook).get_hookimpls():
            plugin = self._registered[id(impl.plugin)]
            try:
                with self._traced(hook, plugin.owner):
                    specs = list(_checked(hook, SPECS[kind], impl.function()))
            except Exception as error:
                if not plugin.installed:
                    raise
                self._fail(f"{hook} of {plugin.owner} is left out: {_reason(error)}")
            else:
                offers += [(spec, plugin.owner) for spec in specs]
        self._offers[kind] = offers
        return offers

    def _not_found(self, kind: str, name: str, found: Collection[str]) -> str:
        message = f"no {name!r} among {SPECS[kind].hook}"
        home = _HOMES.get(kind)
        if found:
            message += f"; there are: {', '.join(found)}{did_you_mean(name, found)}"
        elif home and not any(plugin.owner.startswith(home) for plugin in self._skipped):
            message += f"; pip install packages/brt-core packages/{home} brings some"
        left_out = [f"plugin {p.name!r} ({p.owner}) {p.skipped}" for p in self._skipped]
        return "\n  ".join(dict.fromkeys((message, *self._failures, *left_out)))

    def _register(self, plugin: Any, entry: Plugin) -> None:
        if self._pm.is_registered(plugin):
            raise PluginError(f"it is registered already, as {self._pm.get_name(plugin)!r}")
        name = f"{entry.name} of {entry.owner}"
        if self._pm.has_plugin(name):  # another object of the same class
            name += f" ({len(self._registered)})"
        try:
            self._pm.register(plugin, name=name)
            self._pm.check_pending()
        except pluggy.PluginValidationError as error:
            hint = ""
            if self._pm.is_registered(plugin):
                pending = self._hooks_of(plugin) - set(HOOKS)
                hint = "".join(did_you_mean(hook, HOOKS) for hook in sorted(pending))
                self._pm.unregister(plugin)
            raise PluginError(f"{error}{hint}") from error
        hooks = self._hooks_of(plugin)
        self._registered[id(plugin)] = replace(entry, hooks=tuple(sorted(hooks)))
        for hook in set(HOOKS) - hooks:
            if inspect.isroutine(getattr(plugin, hook, None)):
                self._fail(f"{hook} of {entry.owner} is not called: it lacks @brt.hookimpl")

    def _hooks_of(self, plugin: object) -> set[str]:
        return {hook.name for hook in self._pm.get_hookcallers(plugin) or ()}

    def _load_entry_points(self) -> None:
        points = sorted(metadata.entry_points(group="brt"), key=lambda p: (p.name, _owner(p)))
        wanted = self._wanted([point.name for point in points])
        for point in points:
            entry = Plugin(name=point.name, owner=_owner(point), installed=True)
            if wanted is not None and point.name not in wanted:
                reason = f"is left out by BRT_PLUGINS={os.environ['BRT_PLUGINS']}"
                self._skipped.append(replace(entry, skipped=reason))
                continue
            try:
                self._register(point.load(), entry)
            except Exception as error:
                reason = f"did not load: {_reason(error)}"
                self._skipped.append(replace(entry, skipped=reason))
                self._fail(f"plugin {entry.name!r} ({entry.owner}) {reason}")

    def _wanted(self, names: Collection[str]) -> set[str] | None:
        """The entry points that BRT_PLUGINS names; None where it is not set."""
        if "BRT_PLUGINS" not in os.environ:
            return None
        wanted = {name.strip() for name in os.environ["BRT_PLUGINS"].split(",")} - {""}
        for name in sorted(wanted.difference(names)):
            self._fail(
                f"BRT_PLUGINS names {name!r}, which is not installed{did_you_mean(name, names)}"
            )
        return wanted

    def _fail(self, message: str) -> None:
        self._failures.append(message)
        warnings.warn(message, PluginWarning, stacklevel=2)

    @contextlib.contextmanager
    def _traced(self, hook: str, owner: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._traces:
                spent = 1e3 * (time.perf_counter() - start)
                sys.stderr.write(f"brt plugins: {hook} of {owner} took {spent:.1f} ms\n")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known ones, or nothing."""
    near = get_close_matches(name, list(names), n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def _checked(hook: str, wanted: type, specs: Iterable[object]) -> Iterator[AnySpec]:
    if not isinstance(specs, Iterable):
        raise PluginError(f"{hook} must return an iterable of {wanted.__name__}, got {specs!r}")
    for spec in specs:
        if not isinstance(spec, wanted):
            raise PluginError(f"{hook} must yield {wanted.__name__}, got {type(spec).__name__}")
        yield cast(AnySpec, spec)


def _by_name(offers: list[tuple[Any, str]]) -> dict[str, tuple[Any, str]]:
    found: dict[str, tuple[Any, str]] = {}
    for spec, owner in offers:
        if spec.key in found:
            first = found[spec.key][1]
            raise PluginError(
                f"{spec.hook}: {spec.key!r} comes from both {first} and {owner}; uninstall one, "
                "or name in BRT_PLUGINS the plugins to load"
            )
        found[spec.key] = (spec, owner)
    return dict(sorted(found.items()))


def _owner(point: metadata.EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def _version_of_core() -> str:
    try:
        return f"brt-core {metadata.version('brt-core')}"
    except metadata.PackageNotFoundError:  # run from the source tree
        return "brt-core"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
