"""`optimize`: a copy of a model, rewritten by passes and checked against the original."""

from __future__ import annotations

import inspect
import platform
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, fx, nn

from brt import graph as tracing
from brt.errors import BrtError, PassError, PluginWarning, ProfileError
from brt.guard import compiled
from brt.optimized import Optimized, RegionModule, expect
from brt.passes import DEFAULT
from brt.passes.base import Call, Pass
from brt.passes.match import scatters
from brt.passes.run import Work, resolve, run_passes
from brt.passes.verify import Moved, cloned, generators, largest_error, without_traces
from brt.profile import Profile
from brt.report.data import GraphView, RegionReport, Report, RouterView
from brt.report.views import router_view, view
from brt.routers import LoopRouter, Router

_MOST_CALLS = 8


def optimize(
    model: nn.Module,
    profile: Profile | None = None,
    *,
    passes: Iterable[str | Pass] | None = None,
    sample: Any = None,
    verify: bool = True,
) -> Optimized:
    """A module that computes what ``model`` does, specialised to its profile by passes.

    The model stays as it was. The result shares its parameters and buffers, under the same names;
    graphs are copied. Inputs unlike the profile get the original's result, and are counted
    (``stats``). Where only parts of the model can be traced, those are optimised, and ``report``
    lists the rest.

    Args:
        model: in the mode (train or eval) in which it is to be used.
        profile: of this model, from `brt.profile`; passes that go by it refuse without.
        passes: names or `Pass` instances; by default `brt.passes.DEFAULT`. A pass that declares
            ``after`` waits for the passes that it names.
        sample: a batch, as `brt.profile` takes them: a tensor, a tuple of arguments or a dict of
            keywords.
        verify: run the original and the result of each pass on ``sample``, and compare.

    Raises `PassError` where a pass fails, or moves the result; `ProfileError` where the profile is
    not of this model; `PluginError` for an unknown name.
    """
    _check_model(model)
    chosen = resolve(DEFAULT if passes is None else passes)
    _check_profile(model, profile, chosen)
    args, kwargs = ((), {}) if sample is None else tracing.as_call(sample)
    copy = _copy(model)
    wanted = None
    if sample is not None:
        with without_traces(model):
            wanted = cloned(model(*cloned(args), **cloned(kwargs)))
    works, reports = _regions(copy, profile, args, kwargs, ran=sample is not None)
    before = {work.path: _view(work) for work in works}
    checks = verify and sample is not None
    run_passes(chosen, works, verify=checks, warn_refusals=passes is not None)
    fast = Optimized(_put_back(copy, works))
    error = _compare(fast, chosen, wanted, args, kwargs) if checks else None
    fast.reset_stats()
    for work in works:
        view_before, routers = before[work.path]
        view_after, _ = _view(work)
        made = RegionReport(
            work.path,
            type(work.scope).__name__,
            None,
            view_before,
            view_after,
            tuple(work.records),
            routers,
        )
        reports.append(made)
    fast._report = Report(
        model=type(model).__name__,
        num_parameters=sum(p.numel() for p in model.parameters()),
        device=_device(model),
        regions=tuple(sorted(reports, key=lambda region: region.path)),
        passes=tuple(one.name for one in chosen),
        versions=_versions(),
        verified=checks,
        max_error=error,
        profile=None if profile is None else profile.digest(),
        stats=fast.counts,
    )
    return fast


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise PassError(f"optimize: takes an nn.Module, got {type(model).__name__}")
    if any(isinstance(module, Optimized) for module in model.modules()):
        raise PassError(
            "optimize: the model is, or holds, the result of an optimize; give the original, and "
            "all passes at once"
        )
    if not tracing.has_routers(model):
        raise PassError(
            f"optimize: {type(model).__name__} has no routers, so there is nothing to go by; "
            "brt.adapt(model) makes routers of other libraries' layers"
        )


def _check_profile(model: nn.Module, profile: Profile | None, passes: tuple[Pass, ...]) -> None:
    if profile is not None:
        if not isinstance(profile, Profile):
            raise PassError(
                f"optimize: profile must be a brt.Profile, got {type(profile).__name__}; make one "
                "with brt.profile(model, batches), or Profile.load(path)"
            )
        profile.check(model)
        return
    for one in passes:
        if one.needs_profile:
            raise PassError(
                f"{one.name} needs a profile: brt.optimize(model, brt.profile(model, batches))"
            )


def _region_profile(profile: Profile | None, path: str) -> Profile | None:
    try:
        return None if profile is None else profile.region(path)
    except ProfileError:  # it knows no router in there
        return None


def _copy(model: nn.Module) -> nn.Module:
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


def _regions(
    copy: nn.Module,
    profile: Profile | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    ran: bool,
) -> tuple[list[Work], list[RegionReport]]:
    """The regions to work on, and reports of what is left alone."""
    samples: dict[str, Any] = {}
    if ran:
        inside = {
            path: module
            for path, module in copy.named_modules()
            if tracing.has_routers(module) and not isinstance(module, Router)
        }
        with without_traces(copy), _watched(inside, most=1, keep=False) as first:
            copy(*cloned(args), **cloned(kwargs))
        samples = {path: _batch(inside[path], *seen) for path, seen in first.items() if seen}
    found = tracing.regions(copy, {k: v for k, v in samples.items() if v is not None})
    left = [
        RegionReport(r.path, type(copy.get_submodule(r.path)).__name__, r.reason, None, None)
        for r in found
        if r.graph is None
    ]
    left += _closed_routers(copy)
    traced = {r.path: r.graph for r in found if r.graph is not None}
    calls: Mapping[str, list[Call]] = {}
    if ran:
        modules = {path: copy.get_submodule(path) for path in traced}
        with without_traces(copy), _watched(modules, most=_MOST_CALLS, keep=True) as calls:
            copy(*cloned(args), **cloned(kwargs))
    works = []
    for path, graph in traced.items():
        work = _adopt(path, copy.get_submodule(path), graph, tuple(calls.get(path, ())))
        work.profile = _region_profile(profile, path)
        reason = _wrong_trace(work)
        if reason is None:
            works.append(work)
        else:
            left.append(RegionReport(path, type(work.scope).__name__, reason, None, None))
    if not works:
        reasons = "; ".join(f"{r.path or 'the model'}: {r.reason}" for r in left)
        warnings.warn(f"optimize: nothing to work on: {reasons}", PluginWarning, stacklevel=3)
    return works, left


def _closed_routers(copy: nn.Module) -> list[RegionReport]:
    why = "its exits are inside one router, which a graph shows as one node"
    return [
        RegionReport(path, type(module).__name__, why, None, None)
        for path, module in copy.named_modules()
        if isinstance(module, Router)
        and not isinstance(module, LoopRouter)
        and any(isinstance(inner, Router) for inner in module.modules() if inner is not module)
    ]


def _batch(module: nn.Module, call: Call) -> Any:
    """A call's arguments as the batch that `trace` takes; None where they are none."""
    try:
        signature = inspect.signature(module.forward)
        bound = signature.bind(*call.args, **call.kwargs)
    except (TypeError, ValueError):
        return None
    kinds = {signature.parameters[name].kind for name in bound.arguments}
    if kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}:
        return dict(bound.arguments)
    return call.args if not call.kwargs else None


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


def _adopt(path: str, scope: nn.Module, graph: fx.GraphModule, calls: tuple[Call, ...]) -> Work:
    """Let a trace share the parameters and modules of its region's module."""
    for name, tensor in graph._buffers.items():
        if name in scope._buffers:
            continue
        if hasattr(scope, name):  # a tensor in a plain attribute
            graph.__dict__[name] = tensor
        else:  # a constant of the trace
            scope.register_buffer(name, tensor, persistent=False)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        graph.__dict__[name] = scope.__dict__[name]
    for node in graph.graph.nodes:
        if node.target is tracing.expect:
            node.target = expect
    graph.recompile()
    return Work(path, scope, graph, calls)


def _wrong_trace(work: Work) -> str | None:
    """Why the trace of a region cannot be used; None where it answers as its module does."""
    try:
        work.check(lambda _: (1e-5, 1e-6))
    except Moved as error:
        return f"its trace gives another result on the sample: {error}"
    except Exception as error:
        return f"its trace does not run on the sample: {type(error).__name__}: {error}"
    return None


def _put_back(copy: nn.Module, works: list[Work]) -> nn.Module:
    """Put rewritten regions in the place of their modules; returns the root."""
    root = copy
    for work in works:
        if not work.changed:
            continue
        region = RegionModule(work.scope, work.graph, compiled(work.graph.graph), work.path)
        if work.scope is copy:
            root = region
            continue
        for module in list(copy.modules()):
            for name, child in module._modules.items():
                if child is work.scope:
                    module._modules[name] = region
    return root


def _compare(
    fast: Optimized,
    passes: tuple[Pass, ...],
    wanted: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> float:
    def tolerance(dtype: torch.dtype) -> tuple[float, float]:
        each = [(1e-5, 1e-6), *(one.tolerance(dtype) for one in passes)]
        return max(r for r, _ in each), max(a for _, a in each)

    try:
        with without_traces(fast):
            found = fast(*cloned(args), **cloned(kwargs))
        return largest_error(found, wanted, tolerance)
    except Moved as error:
        raise PassError(f"optimize: the result as a whole differs: {error}") from error
    except BrtError:
        raise
    except Exception as error:
        raise PassError(
            f"optimize: the result does not run on the sample: {type(error).__name__}: {error}"
        ) from error


def _view(work: Work) -> tuple[GraphView, tuple[RouterView, ...]]:
    seen: dict[fx.Node, RouterView] = {}
    for scatter in scatters(work.graph.graph, work.scope):
        key = f"{scatter.target}#{scatter.call}"
        if work.profile is not None and key in work.profile.routers:
            name = f"{work.path}.{key}" if work.path else key
            seen[scatter.node] = router_view(name, work.profile.routers[key])
    return view(work.graph.graph, work.scope, seen), tuple(seen.values())


def _device(model: nn.Module) -> str:
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    words = []
    for device in sorted(devices, key=str):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        words.append(f"{device} ({name})")
    return ", ".join(words) or "cpu"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("brt-core", "brt-kernels", "brt-models", "brt-dist"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
