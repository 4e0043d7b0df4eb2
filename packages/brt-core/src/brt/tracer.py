"""The tracer: `torch.fx.Tracer` that knows routers, cells and the functions of brt."""

from __future__ import annotations

import inspect
import operator
import os
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect

from brt import losses, ops
from brt.cells import annotate, annotate_patches
from brt.errors import TraceError
from brt.grouped import each
from brt.routers import EarlyExit, GatherRouter, LoopRouter, Router, ScatterRouter

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
_NOT_USER_CODE = (f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parent}{os.sep}")
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
_HOW_MANY = (
    "nobody can tell how many tensors this stage of an early exit gives; let it end in a layer of "
    "torch.nn or return a tuple"
)
# What gives several tensors: as a stage's result these are as many flows
_SEVERAL = (
    "chunk", "split", "tensor_split", "unbind", "topk", "sort", "max", "min", "median",
    "var_mean", "std_mean", "meshgrid", "broadcast_tensors", "aminmax", "frexp", "split_with_sizes",
)  # fmt: skip


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
        self._thread = threading.get_ident()
        with torch.enable_grad():
            self._modes = _modes()
        self._parameters: dict[str, fx.Proxy] = {}
        self._stages: set[int] = set()
        self._lengths: dict[str, list[str] | int] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Routers but early exits, and layers of torch that hold none."""
        if isinstance(m, Router):
            if type(m) is EarlyExit:
                self._stages.update(id(stage) for stage in m.stages)
                return False
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
        if self._is_elsewhere():
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            out = super().call_module(m, forward, args, kwargs)
            return self._stage_of_exit(m, _unpacked(self, m, out, args, kwargs))
        start = next(iter(reversed(self.graph.nodes)), None)
        stack = dict(self.module_stack)
        try:
            with self.watched(m, path):
                return self._stage_of_exit(m, super().call_module(m, forward, args, kwargs))
        except Exception as error:
            if self.failed_at is None:
                self.failed_at = path
            if has_routers(m) and not isinstance(m, EarlyExit):
                raise
            # Nothing in it concerns routing, or one node can do it all: it can stay closed
            self.opaque[path] = describe(self, error)
            self.failed_at = None
            self._forget_after(start, stack)
            return self._stage_of_exit(m, self.create_proxy("call_module", path, args, kwargs))

    def _stage_of_exit(self, m: nn.Module, out: Any) -> Any:
        """What a module gave; raises where an early exit cannot tell how many flows that is."""
        if id(m) in self._stages and isinstance(out, fx.Proxy) and not self._is_tensor(out.node):
            raise TraceError(_HOW_MANY)
        return out

    def _is_tensor(self, node: fx.Node) -> bool:
        """Whether a node is known to give one tensor."""
        if node.op != "call_module":
            name = str(getattr(node.target, "__name__", node.target))
            return node.op in ("call_function", "call_method") and name not in _SEVERAL
        assert isinstance(self.root, nn.Module)
        module: Any = self.root.get_submodule(str(node.target))
        while isinstance(module, nn.Sequential) and len(module):
            module = module[-1]
        known = type(module).__module__.startswith("torch.nn.modules.")
        return known and not isinstance(module, (nn.RNNBase, nn.MultiheadAttention, nn.Sequential))

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
        if self._is_elsewhere():
            return attr_val
        self._parameters = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _is_elsewhere(self) -> bool:
        """Whether another thread calls a module meanwhile: torch.fx patches nn.Module for all."""
        return threading.get_ident() != self._thread

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


def describe(tracer: Tracer, error: Exception) -> str:
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
