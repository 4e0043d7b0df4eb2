"""How fast the machine is right now, and who else uses it.

A run that shares its cores with another process can show any ratio at all, so the runner asks
these before and after each round.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_DEFAULT_CACHE = 32 << 20
_MAX_SETS = 64
_SMALLEST, _LARGEST, _PROBE_SECONDS = 768, 6144, 3e-3

# Parameters of mallopt, from malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_DEFAULT_TRIM, _DEFAULT_MMAP_MAX = 128 << 10, 65536


class GemmProbe:
    """FLOP/s of one dense float32 product: the median of three short ones."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._resize(_SMALLEST)
        # As large as takes a few milliseconds: less would measure how threads are started
        while self.size < _LARGEST:
            self._once()
            if min(self._once(), self._once()) > _PROBE_SECONDS:
                break
            self._resize(3 * self.size // 2)

    def __call__(self) -> float:
        """Measure now."""
        seconds = statistics.median(self._once() for _ in range(3))
        return float(2 * self.size**3 / seconds)

    def _resize(self, size: int) -> None:
        self.size = size
        self._a = torch.ones((size, size), device=self.device)
        self._b = torch.ones((size, size), device=self.device)
        self._out = torch.empty((size, size), device=self.device)

    def _once(self) -> float:
        _wait(self.device)
        start = time.perf_counter()
        torch.mm(self._a, self._b, out=self._out)
        _wait(self.device)
        return time.perf_counter() - start


class CopyProbe:
    """Bytes/s, read and written, of copying between buffers beyond the last-level cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        num = max(32 << 20, 2 * cache_bytes(device))
        self._source = torch.ones(num, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)

    def __call__(self) -> float:
        """Measure now: the best of five."""
        best = float("inf")
        for _ in range(5):
            _wait(self.device)
            start = time.perf_counter()
            self._target.copy_(self._source)
            _wait(self.device)
            best = min(best, time.perf_counter() - start)
        return 2 * self._source.numel() / best


class ForeignLoad:
    """How many cores' time went to other processes, and to other guests, since the last call.

    Reads ``/proc/stat`` for the cores this process may use; None where there is none, or where too
    little time has passed for its ticks of 10 ms.
    """

    MIN_SECONDS = 0.2

    def __init__(self) -> None:
        self._last = self._read()

    def __call__(self) -> float | None:
        """Cores, on average, since the last call that gave a number."""
        now = self._read()
        if now is None or self._last is None:
            return None
        wall, own, busy = (a - b for a, b in zip(now, self._last, strict=True))
        if wall < self.MIN_SECONDS:
            return None
        self._last = now
        return max(0.0, (busy - own) / wall)

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            lines = Path("/proc/stat").read_text().splitlines()
            cores = {f"cpu{i}" for i in os.sched_getaffinity(0)}
            tick = os.sysconf("SC_CLK_TCK")
        except (OSError, AttributeError, ValueError):
            return None
        busy = 0
        for line in lines:
            name, *fields = line.split()
            if name in cores:
                # user nice system (idle iowait) irq softirq steal
                busy += sum(int(fields[i]) for i in (0, 1, 2, 5, 6, 7) if i < len(fields))
        times = os.times()
        return time.perf_counter(), times.user + times.system, busy / tick


def num_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache (on CUDA, of L2)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_size_of(path) for path in _CACHES.glob("index*/size")]
    return max(sizes, default=0) or _DEFAULT_CACHE


def num_sets_beyond_cache(set_bytes: int, device: torch.device) -> int:
    """How many sets of this size a workload must rotate so that none is still in the cache."""
    wanted = -(-2 * cache_bytes(device) // max(set_bytes, 1)) + 1
    return max(2, min(_MAX_SETS, wanted))


def device_name(device: torch.device) -> str:
    """Name of the GPU or the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def kept_memory() -> Iterator[bool]:
    """Let malloc keep freed memory, as the allocator of a long-running server does.

    Otherwise every large tensor is mapped and page-faulted anew at each call, in all variants
    alike, which on a virtual machine costs more than what is measured. Yields whether it could.
    """
    try:
        libc = ctypes.CDLL(None)
        set_option, trim = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):  # another libc
        yield False
        return
    kept = bool(set_option(_M_MMAP_MAX, 0)) and bool(set_option(_M_TRIM_THRESHOLD, -1))
    try:
        yield kept
    finally:
        set_option(_M_MMAP_MAX, _DEFAULT_MMAP_MAX)
        set_option(_M_TRIM_THRESHOLD, _DEFAULT_TRIM)
        trim(0)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _size_of(path: Path) -> int:
    try:
        text = path.read_text().strip()
    except OSError:
        return 0
    units = {"K": 10, "M": 20, "G": 30}
    return int(text[:-1]) << units[text[-1]] if text[-1:] in units else int(text or 0)
