"""Timing of a burst of calls, on the host's clock or by CUDA events."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from brt.bench.probe import cache_bytes

Call = Callable[[], Any]


class Timer(Protocol):
    """Times calls one by one."""

    shortest: float
    """Seconds below which several calls are timed as one, because of the clock."""

    def burst(self, calls: Sequence[Call], keep: int) -> list[float]:
        """Seconds of each call; ``keep`` outputs stay alive, so that their memory rotates too."""
        ...


class HostTimer:
    """The host's clock, for what is done when the call returns."""

    shortest = 20e-6

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def burst(self, calls: Sequence[Call], keep: int) -> list[float]:
        """Seconds of each call."""
        clock, outputs = self._clock, deque[Any](maxlen=keep)
        seconds = []
        for call in calls:
            start = clock()
            output = call()
            seconds.append(clock() - start)
            outputs.append(output)
        return seconds


class DeviceTimer:
    """CUDA events around each call, with L2 flushed before it."""

    shortest = 0.0

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(2 * cache_bytes(device), dtype=torch.uint8, device=device)

    def burst(self, calls: Sequence[Call], keep: int) -> list[float]:
        """Seconds of each call on the device, its waits for the host included."""
        outputs = deque[Any](maxlen=keep)
        events = []
        with torch.cuda.device(self.device):
            for call in calls:
                start = torch.cuda.Event(enable_timing=True)
                stop = torch.cuda.Event(enable_timing=True)
                self._flush.zero_()
                start.record()
                outputs.append(call())
                stop.record()
                events.append((start, stop))
            torch.cuda.synchronize()
        return [start.elapsed_time(stop) / 1e3 for start, stop in events]


def timer_for(device: torch.device) -> Timer:
    """The timer of a device."""
    return DeviceTimer(device) if device.type == "cuda" else HostTimer()


def replays(calls: Sequence[Call], device: torch.device) -> list[Call]:
    """Each call captured as a CUDA graph; what each returns is the same tensors every time."""

    def captured(call: Call) -> Call:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = call()

        def replay() -> Any:
            graph.replay()
            return output

        return replay

    with torch.cuda.device(device):
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        return [captured(call) for call in calls]
