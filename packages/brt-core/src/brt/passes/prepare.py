"""From a model to regions that passes can work on: a copy, its traces, and their calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import Tensor, fx, nn

from brt import graph as tracing
from brt.errors import PassError, ProfileError
from brt.graph import Region
from brt.guard import compiled
from brt.optimized import Plan, expect, expect_given, take_over
from brt.passes.base import Call
from brt.passes.run import Work
from brt.passes.verify import Moved, cloned, generators, without_traces
from brt.profile import Profile
from brt.report.data import RegionReport
from brt.routers import LoopRouter, Router

_MOST_CALLS = 8
TRACE_TOLERANCE = (1e-5, 1e-6)
"""A trace runs the same operators: (relative, absolute) difference."""


def copy_of(model: nn.Module) -> nn.Module:
    """The model's modules anew around its own tensors."""
    memo: dict[int, Any] = {id(generator): generator for generator in generators(model)}
    for module in model.modules():
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        memo.update({id(tensor): tensor for tensor in held if isinstance(tensor, Tensor)})
    try:
        return deepcopy(model, memo)
    except Exception as error:
        raise PassError(
            f"optimize: {type(model).__name__} cannot be copied ({type(error).__name__}: {error}); "
            "it must survive copy.deepcopy"
        ) from error


def regions_of(
    copy: nn.Module, profile: Profile | None, sample: Any = None
) -> tuple[list[Work], list[RegionReport]]:
    """The regions to work on, with their calls on the sample, and reports of what is left alone."""
    samples: dict[str, Any] = {}
    if sample is not None:
        inside = {
            path: module
            for path, module in copy.named_modules()
            if tracing.has_routers(module) and not isinstance(module, Router)
        }
        first = _calls(copy, inside, sample, most=1, keep=False)
        samples = {path: seen[0].batch_for(inside[path]) for path, seen in first.items() if seen}
    found = tracing.regions(copy, {k: v for k, v in samples.items() if v is not None})
    left = [
        RegionReport(r.path, type(copy.get_submodule(r.path)).__name__, r.reason, None, None)
        for r in found
        if r.graph is None
    ]
    left += _closed_routers(copy, found)
    traced = {r.path: r for r in found if r.graph is not None}
    calls: Mapping[str, list[Call]] = {}
    if sample is not None:
        modules = {path: copy.get_submodule(path) for path in traced}
        calls = _calls(copy, modules, sample, most=_MOST_CALLS, keep=True)
    works = []
    for path, region in traced.items():
        work = _adopt(region, copy.get_submodule(path))
        work.calls = tuple(calls.get(path, ()))
        work.profile = _region_profile(profile, path)
        reason = _wrong_trace(work)
        if reason is None:
            works.append(work)
        else:
            left.append(RegionReport(path, type(work.scope).__name__, reason, None, None))
    return works, left


def _calls(
    copy: nn.Module, modules: Mapping[str, nn.Module], sample: Any, *, most: int, keep: bool
) -> dict[str, list[Call]]:
    """The first calls of modules while the model runs on the sample."""
    args, kwargs = tracing.as_call(sample)
    with without_traces(copy), _watched(modules, most=most, keep=keep) as calls:
        copy(*cloned(args), **cloned(kwargs))
    return calls


def _closed_routers(copy: nn.Module, found: list[Region]) -> list[RegionReport]:
    """Routers with routers inside that no graph shows."""
    opened = {path for region in found for path in _inside_graph(region)}
    return [
        RegionReport(path, type(module).__name__, _why_closed(path, found), None, None)
        for path, module in copy.named_modules()
        if isinstance(module, Router)
        and not isinstance(module, LoopRouter)
        and any(isinstance(inner, Router) for inner in module.modules() if inner is not module)
        and path not in opened
    ]


def _inside_graph(region: Region) -> set[str]:
    """The paths of the modules whose code is in a region's graph."""
    if region.graph is None:
        return set()
    called = [n.target for n in region.graph.graph.nodes if n.op == "call_module"]
    targets = [f"{region.path}.{t}" if region.path else str(t) for t in called]
    return {t[:i] for t in targets for i, char in enumerate(t) if char == "."}


def _why_closed(path: str, found: list[Region]) -> str:
    reasons = [region.opaque[path] for region in found if path in region.opaque]
    return reasons[0] if reasons else "its exits are inside one router, which no graph shows"


@contextmanager
def _watched(
    modules: Mapping[str, nn.Module], *, most: int, keep: bool
) -> Iterator[dict[str, list[Call]]]:
    """Record the first calls of modules; ``keep`` copies their tensors, and the results."""
    calls: dict[str, list[Call]] = {path: [] for path in modules}
    handles = []
    for path, module in modules.items():
        open_calls: list[tuple[Any, Any]] = []

        def begin(
            _: nn.Module, args: Any, kwargs: Any, *, path: str = path, to: Any = open_calls
        ) -> None:
            wanted = keep and len(calls[path]) < most
            to.append((cloned(args), cloned(kwargs)) if wanted else (args, kwargs))

        def end(
            _: nn.Module,
            args: Any,
            kwargs: Any,
            out: Any,
            *,
            path: str = path,
            to: Any = open_calls,
        ) -> None:
            given, named = to.pop()
            if len(calls[path]) < most:
                calls[path].append(Call(given, named, cloned(out) if keep else None))

        handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(module.register_forward_hook(end, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _adopt(region: Region, scope: nn.Module) -> Work:
    """Let a trace share the parameters and modules of its region's module."""
    graph = region.graph
    assert graph is not None
    for name, tensor in graph._buffers.items():
        if name in scope._buffers:
            continue
        # A constant of the trace, or a tensor in a plain attribute: neither is ever converted
        scope.__dict__.setdefault(name, tensor)
        graph.__dict__[name] = tensor
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        graph.__dict__[name] = scope.__dict__[name]
    graph.__dict__["_modules"] = dict(scope._modules)
    _check_arguments(graph.graph)
    graph.recompile()
    return Work(region.path, scope, graph, tuple(_opened(scope, graph.graph)), region.opaque)


def _opened(module: nn.Module, graph: fx.Graph) -> Iterator[nn.Module]:
    """The modules inside whose own code is in the graph: it depends on their mode and hooks."""
    closed = {str(n.target) for n in graph.nodes if n.op == "call_module"}
    for name, inner in module.named_modules():
        around = {name[:i] for i, char in enumerate(name) if char == "."} | {name}
        if around & closed or inner is module or type(inner).forward is nn.Module.forward:
            continue
        yield inner


def _check_arguments(graph: fx.Graph) -> None:
    """Let a graph end by `OtherArguments` where it is called unlike the trace."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in graph.nodes:
        if node.target is tracing.expect:
            node.target = expect
    with graph.inserting_after(inputs[-1] if inputs else None):
        for node in inputs:
            fixed = any(user.target is expect for user in node.users)
            if node.args == (None,) and node.users and not fixed:
                graph.call_function(expect_given, (node, str(node.target)))


def _wrong_trace(work: Work) -> str | None:
    """Why the trace of a region cannot be used; None where it answers as its module does."""
    for inner in work.opened:
        if inner._forward_hooks or inner._forward_pre_hooks:
            return f"{type(inner).__name__} in it has forward hooks, which a graph does not run"
    try:
        work.check(lambda _: TRACE_TOLERANCE)
    except Moved as error:
        return f"its trace gives another result on the sample: {error}"
    except Exception as error:
        return f"its trace does not run on the sample: {type(error).__name__}: {error}"
    return None


def _region_profile(profile: Profile | None, path: str) -> Profile | None:
    try:
        return None if profile is None else profile.region(path)
    except ProfileError:  # it knows no router in there
        return None


def put_back(works: list[Work]) -> None:
    """Let the modules of rewritten regions run by their graphs."""
    for work in works:
        if work.changed:
            run = compiled(work.graph.graph)
            take_over(work.scope, Plan(work.scope, run, work.path, work.opened, work.inserted()))
