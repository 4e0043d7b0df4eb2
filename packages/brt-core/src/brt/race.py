"""Which of several ways to do the same is the fastest: they run in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

Objective = Literal["latency", "occupancy"]

_LEAST, _MOST = 3, 15
# One reading of the clock spans at least this: calls of microseconds are repeated within it
_READING_S = 1e-3
_MOST_CALLS = 100
_STREAMS = 4


def race(
    runs: Sequence[Callable[[], Any]],
    device: torch.device,
    *,
    seconds: float = 2.0,
    objective: Objective = "latency",
) -> list[float]:
    """Median seconds of one call of each, measured in turns after a first call that does not count.

    At least three readings are taken of each; one whose best is slower than the median of the
    fastest runs no further. It ends when one is left, after 15 readings, or after ``seconds``.

    ``objective="occupancy"`` measures what a call keeps busy instead of how long it takes: seconds
    of all the threads of the process on a CPU; on CUDA, seconds a call while four run side by side.
    """
    clock = _CLOCKS[objective, "cuda" if device.type == "cuda" else "cpu"]
    calls = []
    for run in runs:
        run()
        first = clock(run, 1, device)
        calls.append(max(1, min(_MOST_CALLS, int(_READING_S / max(first, 1e-9)))))
    found: list[list[float]] = [[] for _ in runs]
    running, start = list(range(len(runs))), time.perf_counter()
    for reading in range(_MOST):
        for i in running:
            found[i].append(clock(runs[i], calls[i], device) / calls[i])
        if reading + 1 >= _LEAST:
            fastest = min(statistics.median(times) for times in found)
            running = [i for i in running if min(found[i]) <= fastest]
        over = time.perf_counter() - start > seconds
        if len(running) < 2 or over:  # a long call is not read three times
            break
    return [statistics.median(times) for times in found]


def now(device: torch.device) -> float:
    """The wall clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _wall(run: Callable[[], Any], num_calls: int, device: torch.device) -> float:
    start = now(device)
    for _ in range(num_calls):
        run()
    return now(device) - start


def _all_threads(run: Callable[[], Any], num_calls: int, device: torch.device) -> float:
    start = time.process_time()
    for _ in range(num_calls):
        run()
    return time.process_time() - start


def _side_by_side(run: Callable[[], Any], num_calls: int, device: torch.device) -> float:
    streams = [torch.cuda.Stream(device) for _ in range(_STREAMS)]
    start = now(device)
    for _ in range(num_calls):
        for stream in streams:
            with torch.cuda.stream(stream):
                run()
    return (now(device) - start) / _STREAMS


_CLOCKS = {
    ("latency", "cpu"): _wall,
    ("latency", "cuda"): _wall,
    ("occupancy", "cpu"): _all_threads,
    ("occupancy", "cuda"): _side_by_side,
}
