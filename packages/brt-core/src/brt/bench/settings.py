"""How a benchmark is run, and through what it looks at the world."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from brt.bench.machine import describe
from brt.bench.probe import ForeignLoad, GemmProbe
from brt.bench.result import Machine
from brt.bench.timer import Timer, timer_for
from brt.errors import BrtError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured, and what counts as disturbed."""

    repeats: int = 20
    """Clean rounds wanted; in each, every variant runs for about `burst_ms`."""
    retries: int = 20
    """Rounds that may be thrown away before the result is marked as disturbed."""
    threads: int | None = None
    """torch's threads while it runs; None: as they are."""
    burst_ms: float = 20.0
    warm_up_ms: float = 1000.0
    """At most, for each variant; it ends when two bursts agree within 5 %."""
    lowest_probe: float = 0.85
    """A round is disturbed if the product probed before or after it runs below this of its best."""
    foreign_cores: float = 0.25
    """... or if other processes take this much more than the cores that are left to them."""
    pause_s: float = 0.5
    """Wait after a disturbed round."""

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.retries < 0 or (self.threads is not None and self.threads < 1):
            raise BrtError(
                "bench: repeats and threads must be at least 1 and retries at least 0, got "
                f"repeats={self.repeats}, threads={self.threads}, retries={self.retries}"
            )


@dataclass(kw_only=True)
class Instruments:
    """What the runner looks at the world through; tests give others."""

    timer: Timer
    gemm: Callable[[], float]
    foreign: Callable[[], float | None]
    sleep: Callable[[float], None] = time.sleep
    describe: Callable[[torch.device, float, bool], Machine] = describe

    @classmethod
    def of(cls, device: torch.device) -> Instruments:
        """Those of a device."""
        return cls(timer=timer_for(device), gemm=GemmProbe(device), foreign=ForeignLoad())
