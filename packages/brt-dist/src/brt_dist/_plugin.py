"""What brt-dist offers to brt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import brt


@brt.hookimpl
def brt_passes() -> Iterable[brt.PassSpec]:
    from brt_dist.passes import OverlapExchange, PlaceExperts

    yield brt.PassSpec.of(OverlapExchange)
    yield brt.PassSpec.of(PlaceExperts)


@brt.hookimpl
def brt_demos() -> Iterable[brt.DemoSpec]:
    yield brt.DemoSpec(
        name="dist",
        summary="a language model with its experts on four ranks, equal to one process",
        run=_show,
    )


@brt.hookimpl
def brt_solvers() -> Iterable[brt.SolverSpec]:
    from brt_dist.placement import Descent, Packing

    yield brt.SolverSpec.of(Descent, name="descent", command=_place)
    yield brt.SolverSpec.of(Packing, name="packing")


def _show(source: str | None, out: Path, **options: Any) -> Mapping[str, Any]:
    from brt_dist.demo import show

    return show(source, out, **options)


def _place(source: Path, topology: Path, **options: Any) -> Any:
    from brt_dist.placement import plan

    return plan(source, topology, **options)
