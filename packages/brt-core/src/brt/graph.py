"""Tracing: a module becomes a graph whose nodes are routers, layers and functions.

Routers, layers of ``torch.nn`` and public functions of brt are single nodes; the author's own
modules are opened, and so is an early exit, into stages, heads and routers. Graphs refer to the
model's own submodules and parameters, never to copies.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from brt.errors import TraceError
from brt.routers import LoopRouter, Router
from brt.tracer import Tracer, as_call, describe, expect, has_routers

__all__ = [
    "OPAQUE",
    "Region",
    "Tracer",
    "as_call",
    "expect",
    "has_routers",
    "netlet",
    "regions",
    "trace",
]

OPAQUE = "brt_opaque"
"""Key of a traced graph's `meta`: {path: why} of router-free modules that stay closed."""

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


# While it traces, torch.fx has patched nn.Module for the whole process
_ONE_AT_A_TIME = threading.RLock()


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
        hint = ", or brt.netlet(loop)" if isinstance(module, LoopRouter) else ""
        raise TraceError(
            f"trace: {type(module).__name__} is one node of the graph of the module that calls "
            f"it; trace that one{hint}"
        )
    tracer = Tracer(sample)
    tracer.root = module
    before = dict(module.__dict__)
    try:
        _refuse_patched(module)
        with _ONE_AT_A_TIME, torch.enable_grad(), tracer.watched(module, ""):
            graph = tracer.trace(module)
    except Exception as error:
        raise TraceError(
            f"trace: {describe(tracer, error)}; brt.regions(model) lists the parts that can"
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

    What routers keep inside (the netlet of a loop, the stages of an early exit that had to stay
    closed) is not part of the graph that calls them: where it has routers of its own, it follows as
    further regions.
    ``samples`` names a batch for any of the paths (see `trace`).
    """
    return list(_collect(model, "", samples or {}, set()))


def _refuse_patched(module: nn.Module) -> None:
    if "forward" in module.__dict__:
        raise TraceError("its forward was replaced on the instance; give it a class of its own")
    if module._forward_hooks or module._forward_pre_hooks:
        raise TraceError("it has forward hooks, which a graph would not run; remove them")


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
            closed = {str(n.target) for n in graph.graph.nodes if n.op == "call_module"}
            inside = {
                _join(at, name): child
                for at, router in module.named_modules()
                if isinstance(router, Router) and at in closed
                for name, child in router.named_children()
            }
    for at, child in inside.items():
        yield from _collect(child, _join(path, at), samples, seen)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
