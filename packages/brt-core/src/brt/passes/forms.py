"""Forms of a region, the original and what passes made of it; the fastest is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from brt.guard import compiled
from brt.optimized import Plan
from brt.passes.base import Call, Candidate, Left, Pass, Record
from brt.passes.match import writes
from brt.passes.remembered import Remembered, region_key
from brt.passes.run import Form, Work, run_pass
from brt.passes.verify import cloned, training, without_traces
from brt.race import race
from brt.routers import Router

# Another form must take at most this share of the original's time to be kept
_WORTH = 0.98
# A pass after which a region takes this much longer is left out, and what follows tried without it
_HARM = 1.03
_SECONDS = 10.0


def keep_fastest(works: Sequence[Work], passes: tuple[Pass, ...], memory: Remembered) -> None:
    """Let each region have the fastest of the forms that it had on the way through the passes.

    Where a pass made a region slower and others changed it afterwards, these run again without it,
    and that is a form too. Forms are measured in turns on the region's calls on the sample. A
    region that was never called stays as the passes left it.
    """
    measured = [work for work in works if len(work.forms) > 1]
    end = time.perf_counter() + _SECONDS
    for i, work in enumerate(measured):
        left = max(end - time.perf_counter(), 0.0) / (len(measured) - i)
        _choose(work, passes, memory, left)


def begin(
    works: Sequence[Work], passes: tuple[Pass, ...], memory: Remembered, *, measure: bool
) -> None:
    """Keep the forms of regions that are to be measured.

    Where it is known which form of a region was kept before, only its passes need to run. Regions
    that wait for other processes stay as the passes leave them.
    """
    for work in works:
        if memory.store is not None and work.calls:
            work.key = region_key(work)
        # How often a form runs in a race goes by the clock, which is another one in each process
        alone = not any(isinstance(m, Router) and m.waits_for_others for m in work.scope.modules())
        found = memory.form(work, passes) if measure and alone else None
        if found is not None:
            work.wanted, work.candidates = found
        elif measure and alone and work.calls:
            work.snapshot()


def _choose(work: Work, passes: tuple[Pass, ...], memory: Remembered, seconds: float) -> None:
    records, forms = list(work.records), list(work.forms)
    times = _times(work, forms, seconds)
    harmful = {
        form.passes[-1]
        for form, before, after in zip(forms[1:], times, times[1:], strict=False)
        if after > _HARM * before
    }
    rest = tuple(name for name in forms[-1].passes if name not in harmful)
    again: dict[str, Record] = {}
    if rest and rest not in [form.passes for form in forms]:
        again = _without(work, forms[0], rest, passes, memory)
        if work.forms[-1].passes == rest:
            best = min(range(len(forms)), key=times.__getitem__)
            new, against, original = _times(work, [work.forms[-1], forms[best], forms[0]], seconds)
            # Both in the time of the first race, so that all candidates compare
            times.append(new * (times[best] / against if best else times[0] / original))
            forms.append(work.forms[-1])
    best = min(range(len(forms)), key=times.__getitem__)
    if times[best] > _WORTH * times[0]:
        best = 0
    kept = forms[best]
    work.restore(kept)
    work.forms, work.changed = [], best > 0
    work.candidates = tuple(
        Candidate(form.passes, seconds, i == best)
        for i, (form, seconds) in enumerate(zip(forms, times, strict=True))
    )
    at_last = again if kept.passes == rest and again else {}
    work.records = [_final(record, at_last, kept.passes, times, forms) for record in records]
    memory.keep_form(work, passes, (kept.passes, work.candidates))


def _without(
    work: Work, original: Form, names: tuple[str, ...], passes: tuple[Pass, ...], memory: Remembered
) -> dict[str, Record]:
    """Run only some of the passes on the original; their records."""
    known = {key: worth for r in work.records for key, worth in r.decisions.items()}
    work.restore(original)
    work.forms, work.records = [original], []
    for one in passes:
        if one.name in names:
            run_pass(one, work, replace(memory, decisions=known))
    return {record.name: record for record in work.records}


def _final(
    record: Record,
    again: Mapping[str, Record],
    kept: tuple[str, ...],
    times: list[float],
    forms: list[Form],
) -> Record:
    """The record of a pass, once it is known whether its rewriting is kept."""
    if not record.changed or record.name in kept:
        return again.get(record.name, record)
    at = next(i for i, form in enumerate(forms) if form.passes[-1:] == (record.name,))
    why = f"measured {1e3 * times[at]:.3f} ms with it, {1e3 * times[at - 1]:.3f} ms before it"
    left = (*record.left, Left("its rewriting", f"{why}; a form without it is kept"))
    return replace(
        record, changed=False, nodes_after=record.nodes_before, left=left, max_error=None
    )


def _times(work: Work, forms: Sequence[Form], seconds: float) -> list[float]:
    """Median seconds of each form on the region's calls."""
    runs = [_arm(work, form) for form in forms]
    with without_traces(work.scope):
        return race(runs, work.device, seconds=seconds)


def _arm(work: Work, form: Form) -> Callable[[], None]:
    """Run a form as it would run in the optimised model, once for each call."""
    scope = work.scope
    own: Callable[..., Any] = type(scope).forward
    answer = own
    if form.passes:
        plan = Plan(scope, compiled(form.graph), work.path, work.opened, form.inserted)

        def answer(module: Any, *args: Any, **kwargs: Any) -> Any:
            return plan(module, own, args, kwargs)

    in_place = any(writes(node, scope) for node in work.forms[0].graph.nodes)
    learning = training(scope) is not None

    def run() -> None:
        scope.__dict__.update(form.inserted)
        for call in work.calls:
            args, kwargs = call.args, call.kwargs
            if in_place:
                args, kwargs = cloned(args), cloned(kwargs)
            if learning:
                _forward_and_backward(answer, work, Call(args, kwargs, None))
            else:
                answer(scope, *args, **kwargs)

    return run


def _forward_and_backward(answer: Callable[..., Any], work: Work, call: Call) -> None:
    weights = [p for p in work.scope.parameters() if p.requires_grad]
    with torch.enable_grad():
        leaves = pytree.tree_leaves(answer(work.scope, *call.args, **call.kwargs))
        outs = [out for out in leaves if isinstance(out, Tensor) and out.requires_grad]
        if outs and weights:
            ones = [torch.ones_like(out) for out in outs]
            torch.autograd.grad(outs, weights, ones, allow_unused=True)
