"""What recording costs."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from brt.errors import ProfileError
from brt.graph import as_call
from brt.profile.record import Recorder, as_profiled

_RESAMPLES = 2000


def overhead(
    model: nn.Module, batch: Any, pairs: int = 200, *, window: int | None = 8, seed: int = 0
) -> dict[str, float]:
    """Time forwards with and without recording, in pairs of random order.

    Returns milliseconds (medians) of a plain forward, a recorded one with its statistics, and the
    statistics alone; the share of a recorded forward that is spent inside the recorder; and the
    median ratio of recorded to plain time with its 95 % bounds by bootstrap over pairs.
    """
    if pairs < 1:
        raise ProfileError(f"overhead: pairs must be at least 1, got {pairs}")
    args, kwargs = as_call(batch)
    on_cuda = any(isinstance(t, Tensor) and t.is_cuda for t in pytree.tree_leaves((args, kwargs)))
    order = random.Random(seed)
    plain, recorded, after, inside = [], [], [], []

    def wait() -> float:
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def run_plain() -> None:
        start = wait()
        model(*args, **kwargs)
        plain.append(wait() - start)

    def run_recorded() -> None:
        with Recorder(model, window) as recorder:
            start = wait()
            model(*args, **kwargs)
            middle = wait()
            recorder.end_forward()
            end = wait()
        recorded.append(end - start)
        after.append(end - middle)
        inside.append(recorder.seconds_inside / (middle - start))

    with as_profiled(model, training=False):
        for _ in range(3):
            run_plain()
            run_recorded()
        for times in (plain, recorded, after, inside):
            times.clear()
        for _ in range(pairs):
            runs = [run_plain, run_recorded]
            order.shuffle(runs)
            for run in runs:
                run()
    ratios = [b / a for a, b in zip(plain, recorded, strict=True)]
    medians = sorted(statistics.median(order.choices(ratios, k=pairs)) for _ in range(_RESAMPLES))
    return {
        "pairs": float(pairs),
        "plain_ms": statistics.median(plain) * 1e3,
        "recorded_ms": statistics.median(recorded) * 1e3,
        "statistics_ms": statistics.median(after) * 1e3,
        "inside_share": statistics.median(inside),
        "median_ratio": statistics.median(ratios),
        "ratio_low_95": medians[int(0.025 * _RESAMPLES)],
        "ratio_high_95": medians[int(0.975 * _RESAMPLES)],
    }
