"""What brt-dist offers to brt."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import brt


@brt.hookimpl
def brt_passes() -> Iterable[brt.PassSpec]:
    from brt_dist.passes import OverlapExchange, PlaceExperts

    yield brt.PassSpec.of(OverlapExchange)
    yield brt.PassSpec.of(PlaceExperts)


@brt.hookimpl
def brt_solvers() -> Iterable[brt.SolverSpec]:
    from brt_dist.placement import Descent, Packing

    yield brt.SolverSpec.of(Descent, name="descent", command=_place)
    yield brt.SolverSpec.of(Packing, name="packing")


def _place(source: Path, topology: Path, **options: Any) -> Any:
    from brt_dist.placement import plan

    return plan(source, topology, **options)
