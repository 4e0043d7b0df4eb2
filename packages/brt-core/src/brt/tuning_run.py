"""Measuring all that the tuning store keeps about a model, on purpose: `brt tune`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from brt import graph as tracing
from brt import tuning
from brt.ops import measured
from brt.ops.measured import KernelChoice
from brt.optimize import optimize_as
from brt.optimized import Optimized
from brt.passes.remembered import Remembered
from brt.profile import Profile
from brt.race import Objective
from brt.tuning import Choice, Store


class _Anew(Store):
    """The store, as one that knows nothing yet: everything is measured, and written."""

    def get(self, key: str) -> Choice | None:
        """Nothing."""


def tune(
    model: nn.Module, profile: Profile, sample: Any, objective: Objective = "latency"
) -> tuple[Optimized, list[KernelChoice]]:
    """Measure kernels, then passes and forms of regions, on a sample; the store keeps all of it.

    What the store knew about these before is replaced. ``objective`` is what kernels are chosen by
    (`brt.race.race`). Raises `BrtError` where there is to be no store.
    """
    store = _Anew(tuning.require_store().path)

    def made(measure: bool) -> Optimized:
        return optimize_as(
            model,
            profile,
            None,
            sample=sample,
            verify=True,
            warn_refusals=False,
            measure=measure,
            memory=Remembered(store if measure else None),
        )

    args, kwargs = tracing.as_call(sample)
    with torch.no_grad(), measured.watching() as calls:
        for one in (model, made(measure=False)):
            one(*args, **kwargs)
    kernels = measured.measure(calls, objective, store)
    return made(measure=True), kernels
