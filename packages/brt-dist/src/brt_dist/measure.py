"""Which transport is fastest for a layer, by measurement on all its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from brt_dist.experts import ParallelExpertRouter
from brt_dist.timing import side_by_side
from brt_dist.transport import Transport


def measure_transports(
    router: ParallelExpertRouter,
    transports: Sequence[Transport],
    *args: Any,
    repeats: int = 5,
    **kwargs: Any,
) -> list[float]:
    """Seconds that a layer takes by each transport: of the slowest rank, the median of repeats.

    Every rank must call it. ``args`` and ``kwargs`` are those of a call of the router: measure with
    cells like those to come, since what is fastest goes by their number. The same on every rank.
    """
    routers = [ParallelExpertRouter(router.spread, transport) for transport in transports]
    calls = [partial(one, *args, **kwargs) for one in routers]
    return side_by_side(calls, router.spread.group, repeats)
