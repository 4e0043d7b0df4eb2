"""`optimize`: a copy of a model, rewritten by passes and checked against the original."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import torch
from torch import fx, nn

from brt import graph as tracing
from brt import tuning
from brt.drift import Follower, OnDrift
from brt.errors import BrtError, PassError, PluginWarning
from brt.ops import measured
from brt.optimized import Optimized, RegionModule
from brt.passes import DEFAULT, forms
from brt.passes.base import Pass
from brt.passes.match import scatters
from brt.passes.prepare import TRACE_TOLERANCE, copy_of, put_back, regions_of
from brt.passes.remembered import Remembered
from brt.passes.run import Work, resolve, run_passes
from brt.passes.verify import Moved, cloned, largest_error, without_traces
from brt.profile import Profile
from brt.report.data import GraphView, RegionReport, Report, RouterView
from brt.report.views import router_view, view


def optimize(
    model: nn.Module,
    profile: Profile | None = None,
    *,
    passes: Iterable[str | Pass] | None = None,
    sample: Any = None,
    verify: bool = True,
    measure: bool | None = None,
    on_drift: OnDrift | None = None,
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
        measure: time each region on ``sample``, as it was and after each pass, and keep the fastest
            form, which may be the original. By default where passes were not named: those that you
            name run, whether they help or not. Without a sample nothing is measured.
        on_drift: count where cells go while the result runs, and, where that is no longer as the
            profile saw it, plan anew in the background and swap (`brt.OnDrift`).

    What is measured is remembered on this machine (`brt.tuning`), so that it is measured once.

    Raises `PassError` where a pass fails, or moves the result; `ProfileError` where the profile is
    not of this model; `PluginError` for an unknown name.
    """
    named, store = passes is not None, tuning.store()
    measured.load(store)
    chosen = DEFAULT if passes is None else tuple(passes)

    def made(model: nn.Module, profile: Profile | None, sample: Any) -> Optimized:
        return optimize_as(
            model,
            profile,
            chosen,
            sample=sample,
            verify=verify,
            warn_refusals=named,
            measure=not named if measure is None else measure,
            memory=Remembered(store),
        )

    fast = made(model, profile, sample)
    if on_drift is not None:
        if profile is None:
            raise PassError("optimize: on_drift needs a profile to compare loads with")
        fast._follower = Follower(fast, model, profile, on_drift, made)
    return fast


def optimize_as(
    model: nn.Module,
    profile: Profile | None,
    passes: Iterable[str | Pass] | None,
    *,
    sample: Any,
    verify: bool,
    warn_refusals: bool,
    measure: bool,
    memory: Remembered,
) -> Optimized:
    """`optimize`, with what is known already (`brt.load`)."""
    _check_model(model)
    chosen = resolve(DEFAULT if passes is None else passes)
    _check_profile(model, profile, chosen)
    copy = copy_of(model)
    wanted = None if sample is None else _run(model, sample)
    works, reports = regions_of(copy, profile, sample)
    if not works:
        reasons = "; ".join(f"{r.path or 'the model'}: {r.reason}" for r in reports)
        warnings.warn(f"optimize: nothing to work on: {reasons}", PluginWarning, stacklevel=2)
    before = {work.path: _view(work) for work in works}
    checks = verify and sample is not None
    forms.begin(works, chosen, memory, measure=measure)
    run_passes(chosen, works, verify=checks, warn_refusals=warn_refusals, memory=memory)
    forms.keep_fastest(works, chosen, memory)
    put_back(works)
    fast = Optimized(copy)
    error = _compare(fast, chosen, wanted, sample) if checks else None
    fast.reset_stats()
    reports += [_reported(work, *before[work.path]) for work in works]
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
    fast._made_by = (chosen, profile)
    return fast


def _reported(work: Work, before: GraphView, routers: tuple[RouterView, ...]) -> RegionReport:
    after, _ = _view(work)
    records = tuple(work.records)
    return RegionReport(
        work.path, work.type, None, before, after, records, routers, work.closed, work.candidates
    )


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise PassError(f"optimize: takes an nn.Module, got {type(model).__name__}")
    if any(isinstance(module, (Optimized, RegionModule)) for module in model.modules()):
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


def _run(model: nn.Module, sample: Any) -> Any:
    args, kwargs = tracing.as_call(sample)
    with without_traces(model):
        return cloned(model(*cloned(args), **cloned(kwargs)))


def _compare(fast: Optimized, passes: tuple[Pass, ...], wanted: Any, sample: Any) -> float:
    def tolerance(dtype: torch.dtype) -> tuple[float, float]:
        each = [TRACE_TOLERANCE, *(one.tolerance(dtype) for one in passes)]
        return max(r for r, _ in each), max(a for _, a in each)

    try:
        return largest_error(_run(fast, sample), wanted, tolerance)
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
