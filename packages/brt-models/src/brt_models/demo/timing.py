"""Milliseconds of several ways to compute the same, measured in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def alternate(
    variants: Mapping[str, Callable[[Tensor], Tensor]],
    x: Tensor,
    seconds: float,
    min_rounds: int = 5,
) -> dict[str, float]:
    """The median milliseconds of each variant on ``x``.

    A round calls every variant once, so that what disturbs the machine disturbs all of them. There
    are rounds for ``seconds``, and at least ``min_rounds``; one more before them is not counted.
    """
    taken: dict[str, list[float]] = {name: [] for name in variants}
    with torch.inference_mode():
        for variant in variants.values():
            variant(x)
        started = time.perf_counter()
        while (
            time.perf_counter() - started < seconds
            or len(min(taken.values(), key=len)) < min_rounds
        ):
            for name, variant in variants.items():
                before = time.perf_counter()
                variant(x)
                if x.is_cuda:
                    torch.cuda.synchronize(x.device)
                taken[name].append(1e3 * (time.perf_counter() - before))
    return {name: statistics.median(times) for name, times in taken.items()}
