"""The workloads of brt-core; others come through the hook ``brt_workloads``."""

from __future__ import annotations

from brt.bench.experts import grouped
from brt.bench.routing import routing
from brt.specs import WorkloadSpec

BUILTIN = (
    WorkloadSpec(
        name="routing",
        summary="Route, dispatch and combine, against a copy of the same bytes.",
        factory=routing,
    ),
    WorkloadSpec(
        name="grouped",
        summary="Two linear layers an expert, against dense products of the same operations.",
        factory=grouped,
    ),
)
