"""One variant while it is measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from brt.bench.check import Mismatch, largest_error
from brt.bench.result import Row, Status
from brt.bench.settings import Settings
from brt.bench.timer import Call, Timer
from brt.bench.workload import Unavailable, Variant

_MAX_CALLS = 100
_STABLE = 0.05


@dataclass(kw_only=True)
class Lane:
    """One variant, its runs so far, and why it stopped if it did."""

    variant: Variant
    name: str
    calls: list[Call] = field(default_factory=list)
    """One for each set of inputs."""
    status: Status = "ok"
    reason: str = ""
    detail: str = ""
    error: float | None = None
    together: int = 1
    """Runs that one sample must hold, or a multiple of them."""
    per_round: int = 1
    inner: int = 1
    samples: dict[int, list[float]] = field(default_factory=dict)
    """Round -> seconds of each run."""
    _next_set: int = 0

    def stop(self, status: Status, reason: str) -> None:
        """Take it out: it has no numbers from here on."""
        self.status, self.reason, self.calls = status, reason, []
        self.samples.clear()

    def guarded(self, step: Callable[[], None]) -> bool:
        """Do one step; whatever it raises stops this variant only. Whether it goes on."""
        try:
            step()
        except Unavailable as reason:
            self.stop("skipped", str(reason).strip().partition("\n")[0])
        except Exception as error:
            self.stop("failed", _reason(error))
        return self.status == "ok"

    def prepare(self, sets: Sequence[tuple[Any, ...]]) -> None:
        """Untimed setup."""
        run = self.variant.make()
        self.calls = [partial(run, *inputs) for inputs in sets]

    def check(self, expected: Any, tolerance: float) -> None:
        """Run once; stop it where the outcome on the first set is not the one expected."""
        output = self.calls[0]()
        if expected is None or not self.variant.is_checked:
            return
        try:
            error = largest_error(self.variant.outcome(output), expected)
        except Mismatch as reason:
            self.stop("wrong", str(reason))
            return
        self.error = error if math.isfinite(error) else None
        if not error <= tolerance:
            self.stop("wrong", f"error {error:.1e} is above {tolerance:.1e}")

    def describe(self) -> None:
        """Ask for the row's few words, now that it has run."""
        detail = self.variant.detail
        self.detail = detail if isinstance(detail, str) else detail()

    def warm_up(self, timer: Timer, settings: Settings) -> None:
        """Run until two bursts agree, and find how many runs make a burst."""
        spent, before, self.inner = 0.0, math.inf, self.together
        while True:
            seconds = self._burst(timer, self.per_round)
            spent += sum(seconds) * self.inner
            now = max(statistics.median(seconds), 1e-9)
            enough = max(1, min(_MAX_CALLS, math.ceil(timer.shortest / now)))
            self.inner = math.ceil(enough / self.together) * self.together
            per_round = round(settings.burst_ms / 1e3 / (now * self.inner))
            self.per_round = max(1, min(_MAX_CALLS, per_round))
            if abs(now - before) <= _STABLE * before < math.inf:
                return
            if spent > settings.warm_up_ms / 1e3:
                return
            before = now

    def run_round(self, timer: Timer, index: int) -> None:
        """The runs of one round."""
        # The first of several finds the caches full of another variant's data
        cold = 1 if self.per_round > 1 else 0
        self.samples[index] = self._burst(timer, self.per_round + cold)[cold:]

    def row(self, rounds: Collection[int], tolerance: float) -> Row:
        """Its numbers over these rounds."""
        milliseconds = sorted(1e3 * s for i in rounds for s in self.samples.get(i, ()))
        row = Row(
            variant=self.name,
            kind=self.variant.kind,
            status=self.status,
            reason=self.reason,
            detail=self.detail,
            error=self.error,
            tolerance=tolerance,
        )
        return row.with_times(milliseconds, self.variant.num_bytes, self.variant.flops)

    def _burst(self, timer: Timer, num: int) -> list[float]:
        """Seconds of each of ``num`` runs, on the sets in turn."""
        num_sets = len(self.calls)
        calls: list[Call] = []
        for _ in range(num):
            group = [self.calls[(self._next_set + i) % num_sets] for i in range(self.inner)]
            self._next_set = (self._next_set + self.inner) % num_sets
            calls.append(group[0] if self.inner == 1 else partial(_call_all, group))
        return [seconds / self.inner for seconds in timer.burst(calls, keep=num_sets - 1)]


def rotated(lanes: Sequence[Lane], index: int) -> list[Lane]:
    """Another order each round, so that each follows each: rotated, and back to front in turn."""
    start = index // 2 % len(lanes)
    turned = [*lanes[start:], *lanes[:start]]
    return turned[::-1] if index % 2 else turned


def _call_all(calls: Sequence[Call]) -> Any:
    output = None
    for call in calls:
        output = call()
    return output


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
