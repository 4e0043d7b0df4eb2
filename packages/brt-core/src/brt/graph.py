"""Tracing: a module becomes a graph whose nodes are routers, layers and functions.

Routers, layers of ``torch.nn`` and public functions of brt are single nodes; the author's own
modules are opened. Graphs refer to the model's own submodules and parameters, never to copies.
"""

from __future__ import annotations

import inspect
import operator
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect

from brt import losses, ops
from brt.cells import annotate, annotate_patches
from brt.errors import TraceError
from brt.grouped import each
from brt.routers import GatherRouter, LoopRouter, Router, ScatterRouter

OPAQUE = "brt_opaque"
"""Key of a traced graph's `meta`: {path: why} of router-free modules that stay closed."""

_WRAPPED: list[Callable[..., Any]] = [
    *(f for name in ops.OPERATORS if inspect.isfunction(f := getattr(ops, name, None))),
    *(
        f
        for name, f in vars(losses).items()
        if inspect.isfunction(f) and f.__module__ == losses.__name__ and not name.startswith("_")
    ),
]
# These take sizes, and would not notice that one comes from a tensor
_FACTORIES: list[Callable[..., Any]] = [
    *(torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand),
    *(torch.randint, torch.randn, torch.randperm, torch.zeros),
]
_NOT_USER_CODE = (str(Path(torch.__file__).parent), __file__)
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_BRANCHES = (
    "its Python code branches on a value that only a call knows; make the decision a router's "
    "(brt.ScatterRouter, brt.EarlyExit, brt.LoopRouter) or torch.where's"
)
_ITERATES = (
    "its Python code iterates over a value of unknown length; index it, or, for *args and "
    "**kwargs, pass trace(module, sample=...)"
)
_CHANGES_MODE = (
    "no_grad, inference_mode or autocast begins inside it, which a graph does not keep; move that "
    "part into a module of its own without routers, which then stays one node"
)


@dataclass(frozen=True, eq=False)
class Region:
    """One part of a model that passes work on, or why it cannot be one.

    Attributes:
        path: the submodule; "" is the model itself.
        graph: its trace; None where it cannot be traced.
        reason: why it cannot be traced; None where it can.
        opaque: {path in the model: why} of its router-free submodules that stay one node.
    """

    path: str
    graph: fx.GraphModule | None
    reason: str | None = None
    opaque: Mapping[str, str] = field(default_factory=dict)


def trace(module: nn.Module, sample: Any = None) -> fx.GraphModule:
    """The graph of a module's forward; raises `TraceError` where Python code depends on values.

    Modules of ``torch.nn``, routers, and modules without routers that cannot be traced stay single
    nodes. The paths of a scatter are unpacked at once, so that ``zip(experts, paths)`` works. The
    graph is that of the mode (train or eval) which the module is in now.

    Arguments of forward that default to a plain value (None, a flag, a number) are fixed at it:
    the graph raises where it is called with another one. ``sample`` is a batch as `brt.profile`
    takes them (a tensor, a tuple of arguments or a dict of keywords): arguments that it names are
    inputs, or fixed at its value where that is plain, and it tells the number of ``*args``.
    """
    if not isinstance(module, nn.Module):
        raise TraceError(f"trace: takes an nn.Module, got {type(module).__name__}")
    if isinstance(module, Router):
        hint = ", or brt.graph.netlet(loop)" if isinstance(module, LoopRouter) else ""
        raise TraceError(
            f"trace: {type(module).__name__} is one node of the graph of the module that calls "
            f"it; trace that one{hint}"
        )
    tracer = Tracer(sample)
    tracer.root = module
    before = dict(module.__dict__)
    try:
        _refuse_patched(module)
        with torch.enable_grad(), tracer.watched(module, ""):
            graph = tracer.trace(module)
    except Exception as error:
        raise TraceError(
            f"trace: {_describe(tracer, error)}; brt.graph.regions(model) lists the parts that can"
        ) from error
    finally:
        # Constant tensors, which torch.fx leaves on the module that it traces
        constants = {name: module.__dict__.pop(name) for name in set(module.__dict__) - set(before)}
    for node in reversed(graph.nodes):
        # Or the code made of the graph would wrap it for every later trace in this process
        node.meta.pop("is_wrapped", None)
        if node.target is operator.getitem and not node.users:
            graph.erase_node(node)
    return _assemble(module, graph, constants, tracer.opaque)


def netlet(loop: LoopRouter, sample: Any = None) -> fx.GraphModule:
    """The graph of a loop's body: ``netlet(x, state) -> (x, scores, state)``."""
    return trace(loop.netlet, sample)


def regions(model: nn.Module, samples: Mapping[str, Any] | None = None) -> list[Region]:
    """The largest submodules with routers that can be traced, and what cannot be with its reason.

    What routers keep inside (the netlet of a loop, the stages of an early exit) is not part of the
    graph that calls them: where it has routers of its own, it follows as further regions.
    ``samples`` names a batch for any of the paths (see `trace`).
    """
    return list(_collect(model, "", samples or {}, set()))


def as_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch -> the arguments of one call: a tensor, a tuple or list of them, or keywords."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    return (tuple(batch), {}) if isinstance(batch, (tuple, list)) else ((batch,), {})


def has_routers(module: nn.Module) -> bool:
    """Whether a module, or one inside it, is a router."""
    return any(isinstance(m, Router) for m in module.modules())


class RouteProxy(fx.Proxy):
    """A route while tracing: its number of paths is known."""

    def __init__(self, node: fx.Node, tracer: fx.Tracer, num_paths: int) -> None:
        super().__init__(node, tracer)
        self.num_paths = num_paths

    def __len__(self) -> int:
        return self.num_paths

    def __iter__(self) -> Iterator[Any]:
        return (operator.getitem(self, p) for p in range(self.num_paths))


class Tracer(fx.Tracer):
    """`torch.fx.Tracer` that knows routers, and what `trace` promises."""

    # Buffers too: or operations on them alone would run, once, while tracing
    proxy_buffer_attributes = True

    def __init__(self, sample: Any = None) -> None:
        super().__init__(autowrap_functions=(*_WRAPPED, *_FACTORIES))
        self._autowrap_search += [torch, ops, losses]
        self.sample = None if sample is None else as_call(sample)
        self.opaque: dict[str, str] = {}
        self.failed_at: str | None = None
        with torch.enable_grad():
            self._modes = _modes()
        self._parameters: dict[str, fx.Proxy] = {}
        self._lengths: dict[str, list[str] | int] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Routers, and layers of torch that hold none."""
        if isinstance(m, Router):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not has_routers(m)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """One node for a leaf, with its outputs unpacked; other modules are opened."""
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            out = super().call_module(m, forward, args, kwargs)
            return _unpacked(self, m, out, args, kwargs)
        start = next(iter(reversed(self.graph.nodes)), None)
        stack = dict(self.module_stack)
        try:
            with self.watched(m, path):
                return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            if self.failed_at is None:
                self.failed_at = path
            if has_routers(m):
                raise
            # Nothing in it concerns routing: it can stay closed
            self.opaque[path] = _describe(self, error)
            self.failed_at = None
            self._forget_after(start, stack)
            return self.create_proxy("call_module", path, args, kwargs)

    def _forget_after(self, start: fx.Node | None, stack: dict[str, Any]) -> None:
        self.module_stack.clear()
        self.module_stack.update(stack)
        for node in reversed(self.graph.nodes):
            if node is start:
                break
            self.graph.erase_node(node)
        alive = set(self.graph.nodes)
        for name in [n for n, proxy in self._parameters.items() if proxy.node not in alive]:
            del self._parameters[name]

    def watched(self, m: nn.Module, path: str) -> _Watched:
        """Raise at the end of the block where the forward of ``m`` set attributes of it."""
        return _Watched(self, m, path)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node, unless a mode that it would run in differs from that of the trace."""
        if _modes() != self._modes:
            raise TraceError(_CHANGES_MODE)
        return super().create_node(*args, **kwargs)

    def create_proxy(self, *args: Any, **kwargs: Any) -> Any:
        """A proxy; functions with results of known number give a tuple or list of them."""
        proxy: Any = super().create_proxy(*args, **kwargs)
        if proxy.node.op == "call_function":
            if proxy.node.target in (annotate, annotate_patches):
                return proxy[0], proxy[1]
            if proxy.node.target is each:
                return [proxy[p] for p in range(len(proxy.node.args[0]))]
        return proxy

    def create_arg(self, a: Any) -> Any:
        """An argument of a node; a module becomes a reference to it."""
        if isinstance(a, nn.Module):
            return self.create_node("get_attr", self.path_of_module(a), (), {})
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """A parameter or buffer as a node."""
        self._parameters = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refuse."""
        raise TraceError(_BRANCHES)

    def iter(self, obj: Any) -> Iterator[Any]:
        """``*args`` where the sample tells how many."""
        length = self._lengths.get(obj.node.name)
        if not isinstance(length, int):
            raise TraceError(_ITERATES)
        return (obj[i] for i in range(length))

    def keys(self, obj: fx.Proxy) -> Any:
        """The names of ``**kwargs`` where the sample tells them."""
        names = self._lengths.get(obj.node.name)
        if not isinstance(names, list):
            raise TraceError(_ITERATES)
        return names

    def _proxy_placeholder(
        self, name: str, concrete_args: Any, sig: inspect.Signature, fn_for_analysis: Any
    ) -> Any:
        proxy = super()._proxy_placeholder(name, None, sig, fn_for_analysis)
        names = list(sig.parameters)[1:]
        given: dict[str, Any] = {}
        if self.sample is not None:
            bound = sig.bind(self.root, *self.sample[0], **self.sample[1])
            given = {n: v for n, v in bound.arguments.items() if n in names}
        if name.startswith("*"):
            value = given.get(name.lstrip("*"))
            if self.sample is not None:
                more = list(value or {}) if name.startswith("**") else len(value or ())
                self._lengths[proxy.node.name] = more
            return proxy
        value = given.get(name, sig.parameters[name].default)
        if value is not None and not isinstance(value, (bool, int, float, str)):
            return proxy
        self.create_proxy("call_function", expect, (proxy, value, name), {})
        return value


@has_side_effect
def expect(value: Any, fixed: Any, name: str) -> None:
    """Raise where an argument that a trace fixed has another value."""
    if value is not fixed and (isinstance(value, Tensor) or value != fixed):
        raise TraceError(
            f"{name}={value!r}: this graph was traced with {name}={fixed!r}; trace the module with "
            "a sample that has it"
        )


class _Watched:
    def __init__(self, tracer: Tracer, module: nn.Module, path: str) -> None:
        self.tracer, self.module, self.path = tracer, module, path

    def __enter__(self) -> None:
        self.before = dict(self.module.__dict__)

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        now = self.module.__dict__
        changed = [
            name
            for name in {**self.before, **now}
            if now.get(name, self) is not self.before.get(name, self)
            and not isinstance(now.get(name), Tensor)
        ]
        for name in changed:
            if name in self.before:
                now[name] = self.before[name]
            else:
                del now[name]
        if changed and kind is None:
            self.tracer.failed_at = self.path
            raise TraceError(
                f"its forward sets self.{changed[0]}, which a graph does not; return the value"
            )


def _unpacked(
    tracer: Tracer, m: nn.Module, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The output of a leaf, taken apart as far as its structure is known."""
    named = dict(zip(("x", "scores", "cells"), args, strict=False)) | kwargs
    if isinstance(m, ScatterRouter):
        x, rows = named.get("x"), out[0]
        route = RouteProxy(out[1].node, tracer, m.num_paths)
        if m.result == "packed":
            return _like(rows, x), route
        return tuple(_like(rows[p], x) for p in range(m.num_paths)), route
    if isinstance(m, GatherRouter):
        given = args[0] if args else kwargs.get("rows")
        first = given[0] if isinstance(given, (list, tuple)) and given else None
        if m.result == "union":
            return _like(out[0], first), out[1]
        return _like(out, first)
    if isinstance(m, LoopRouter):
        return out[0], _like(out[1], args[1] if len(args) > 1 else kwargs.get("state"))
    return out


def _like(proxy: Any, given: Any) -> Any:
    """A proxy for what has the structure of ``given``, taken apart into that structure."""
    if isinstance(given, (tuple, list)):
        return type(given)(_like(proxy[i], item) for i, item in enumerate(given))
    if isinstance(given, dict):
        return {key: _like(proxy[key], item) for key, item in given.items()}
    return proxy


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def _refuse_patched(module: nn.Module) -> None:
    if "forward" in module.__dict__:
        raise TraceError("its forward was replaced on the instance; give it a class of its own")
    if module._forward_hooks or module._forward_pre_hooks:
        raise TraceError("it has forward hooks, which a graph would not run; remove them")


def _describe(tracer: Tracer, error: Exception) -> str:
    """Which module failed, why, and where in the user's code."""
    path = tracer.failed_at or ""
    root = tracer.root
    assert isinstance(root, nn.Module)
    what = type(root.get_submodule(path)).__name__ + (f" at {path!r}" if path else "")
    cause = str(error) if isinstance(error, TraceError) else f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith(_NOT_USER_CODE)]
    where = f" ({own[-1].filename}:{own[-1].lineno}: {own[-1].line})" if own else ""
    return f"{what} cannot be traced: {cause}{where}"


def _assemble(
    module: nn.Module, graph: fx.Graph, constants: dict[str, Any], opaque: dict[str, str]
) -> fx.GraphModule:
    """A GraphModule with every parameter, buffer and submodule of the module, in its order."""
    for name, value in constants.items():
        setattr(module, name, value)
    try:
        built = fx.GraphModule(module, graph, type(module).__name__)
    finally:
        for name in constants:
            delattr(module, name)
    targets = [str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")]
    opened = {"", *(t[:i] for t in targets for i, char in enumerate(t) if char == ".")}
    _mirror(module, built, "", opened, set(targets))
    built.meta[OPAQUE] = dict(opaque)
    return built


def _mirror(
    source: nn.Module, built: nn.Module, path: str, opened: set[str], targets: set[str]
) -> None:
    """Give ``built`` what ``source`` has: opened modules as new containers, others themselves."""
    kept = {name: t for name, t in built._buffers.items() if name not in source._buffers}
    built.training = source.training
    built._parameters = dict(source._parameters)
    built._buffers = {**source._buffers, **kept}
    # What torch.fx registers besides (constants, tensors in plain attributes) is no state
    built._non_persistent_buffers_set = {*source._non_persistent_buffers_set, *kept}
    modules: dict[str, nn.Module | None] = {}
    for name, child in source._modules.items():
        inner = f"{path}.{name}" if path else name
        if child is None or inner in targets or inner not in opened:
            modules[name] = child
        else:
            modules[name] = container = type(child)() if type(child) in _LISTS else nn.Module()
            made = built._modules.get(name)
            if made is not None:  # by torch.fx, with what the graph refers to
                container._buffers, container._modules = made._buffers, made._modules
            _mirror(child, container, inner, opened, targets)
    built._modules = modules


def _collect(
    module: nn.Module, path: str, samples: Mapping[str, Any], seen: set[int]
) -> Iterator[Region]:
    if id(module) in seen or not has_routers(module):
        return
    seen.add(id(module))
    inside = dict(module.named_children())
    if isinstance(module, Router):
        if not path:
            name = type(module).__name__
            yield Region("", None, f"the model is a router ({name}): nothing around it to rewrite")
    elif type(module).forward is not nn.Module.forward:  # a container has none
        try:
            graph = trace(module, samples.get(path))
        except TraceError as error:
            yield Region(path, None, str(error))
        else:
            opaque = {_join(path, at): why for at, why in graph.meta[OPAQUE].items()}
            yield Region(path, graph, None, opaque)
            inside = {
                _join(at, name): child
                for at, router in module.named_modules()
                if isinstance(router, Router)
                for name, child in router.named_children()
            }
    for at, child in inside.items():
        yield from _collect(child, _join(path, at), samples, seen)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
