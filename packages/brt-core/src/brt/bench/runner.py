"""The benchmark runner: variants alternate in one process, and disturbed rounds do not count."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from brt.bench.lane import Lane, rotated
from brt.bench.probe import kept_memory, num_cores
from brt.bench.result import Result, compared
from brt.bench.settings import Instruments, Settings
from brt.bench.timer import replays
from brt.bench.workload import Unavailable, Variant, Workload

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many steps are done, and of how many."""

_MODES = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
}
_ENOUGH_ROUNDS = 3


def measure(
    workload: Workload,
    *,
    settings: Settings | None = None,
    variants: Sequence[str] = (),
    progress: Progress | None = None,
    instruments: Instruments | None = None,
) -> Result:
    """Measure a workload. ``variants`` (regular expressions) keep those whose names match one."""
    settings = settings or Settings()
    chosen = workload.only(variants)
    with contextlib.ExitStack() as stack:
        keeps = stack.enter_context(kept_memory())
        stack.enter_context(_threads(settings.threads))
        stack.enter_context(_no_collector())
        stack.enter_context(_MODES[workload.mode]())
        tools = instruments or Instruments.of(workload.device)
        return _Run(workload, chosen, settings, tools, progress).result(keeps)


@dataclass(frozen=True)
class _Round:
    slowest_probe: float
    foreign: float | None


class _Run:
    def __init__(
        self,
        workload: Workload,
        variants: Sequence[Variant],
        settings: Settings,
        tools: Instruments,
        progress: Progress | None,
    ) -> None:
        self.workload, self.settings, self.tools = workload, settings, tools
        together = len(workload.sets) if workload.is_uneven else 1
        self.lanes = [Lane(variant=v, name=v.name, together=together) for v in variants]
        self.rounds: list[_Round] = []
        self.best_probe = 0.0
        self._progress = progress or (lambda what, done, total: None)
        used = torch.get_num_threads() if workload.device.type == "cpu" else 1
        self._free_cores = max(0, num_cores() - used)

    @property
    def active(self) -> list[Lane]:
        return [lane for lane in self.lanes if lane.status == "ok"]

    def result(self, keeps_memory: bool) -> Result:
        self._set_up()
        for i, lane in enumerate(self.active):
            self._progress(f"warm-up: {lane.name}", i, len(self.lanes))
            lane.guarded(partial(lane.warm_up, self.tools.timer, self.settings))
        self._measure()
        for lane in self.active:  # is it still right after all those runs?
            lane.guarded(partial(lane.check, self._expected, self.workload.tolerance))
        return self._summary(keeps_memory)

    def _set_up(self) -> None:
        """Make each variant and compare what it gives with the reference."""
        workload, total = self.workload, len(self.lanes)
        self._expected = None
        if workload.reference is not None and any(x.variant.is_checked for x in self.lanes):
            self._progress("reference", 0, total)
            self._expected = workload.reference(*workload.sets[0])
        for i, lane in enumerate(tuple(self.lanes)):
            self._progress(f"set-up: {lane.name}", i, total)
            check = partial(lane.check, self._expected, workload.tolerance)
            steps = (partial(lane.prepare, workload.sets), check, lane.describe)
            if all(lane.guarded(step) for step in steps) and lane.variant.replay:
                self._add_replay(lane)

    def _add_replay(self, lane: Lane) -> None:
        """On CUDA, the same variant once more as the replay of a graph."""
        if self.workload.device.type != "cuda":
            return
        name = f"{lane.name} (graph replay)"
        replay = Lane(variant=lane.variant, name=name, together=lane.together)
        self.lanes.insert(self.lanes.index(lane) + 1, replay)

        def capture() -> None:
            try:
                replay.calls = replays(lane.calls, self.workload.device)
            except Exception as error:  # what waits for the device cannot be captured
                raise Unavailable(f"no capture: {type(error).__name__}: {error}") from error

        if replay.guarded(capture):
            replay.guarded(partial(replay.check, self._expected, self.workload.tolerance))

    def _measure(self) -> None:
        """Rounds of all variants until enough are clean, or too many were not."""
        wanted, most = self.settings.repeats, self.settings.repeats + self.settings.retries
        probe = max(self._probe() for _ in range(3))
        self.tools.foreign()
        while self.active and len(self.rounds) < most:
            done, index = len(self._clean()), len(self.rounds)
            if done >= wanted:
                return
            self._progress(f"round {index + 1}", done, wanted)
            for lane in rotated(self.active, index):
                lane.guarded(partial(lane.run_round, self.tools.timer, index))
            after = self._probe()
            self.rounds.append(_Round(min(probe, after), self.tools.foreign()))
            gc.collect(1)  # what rounds left is young
            probe = after
            if self._disturbance(self.rounds[-1]) and len(self.rounds) < most:
                self.tools.sleep(self.settings.pause_s)
                probe = self._probe()
                self.tools.foreign()

    def _probe(self) -> float:
        rate = self.tools.gemm()
        self.best_probe = max(self.best_probe, rate)
        return rate

    def _disturbance(self, one: _Round) -> str | None:
        """What disturbed a round; judged anew when a later probe is the best."""
        share = one.slowest_probe / self.best_probe
        if share < self.settings.lowest_probe:
            return f"the product ran at {share:.2f} of its best"
        allowed = self._free_cores + self.settings.foreign_cores
        if one.foreign is not None and one.foreign > allowed:
            return f"other processes took {one.foreign:.1f} cores"
        return None

    def _clean(self) -> list[int]:
        return [i for i, one in enumerate(self.rounds) if self._disturbance(one) is None]

    def _summary(self, keeps_memory: bool) -> Result:
        clean, wanted = self._clean(), self.settings.repeats
        enough = len(clean) >= min(_ENOUGH_ROUNDS, wanted)
        used: Collection[int] = clean if enough else range(len(self.rounds))
        workload, device = self.workload, self.workload.device
        rows = [lane.row(used, workload.tolerance) for lane in self.lanes]
        return Result(
            workload=workload.name,
            shapes=workload.shapes,
            dtype=str(workload.dtype).removeprefix("torch."),
            device=str(device),
            threads=torch.get_num_threads(),
            machine=self.tools.describe(device, self.best_probe, keeps_memory),
            rows=compared(rows),
            disturbed=bool(self.active) and len(clean) < wanted,
            rounds=len(clean),
            rounds_rejected=len(self.rounds) - len(clean),
            disturbances=tuple(why for one in self.rounds if (why := self._disturbance(one))),
            options=dict(workload.options),
            settings=asdict(self.settings),
        )


@contextlib.contextmanager
def _threads(num: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if num is not None:
        torch.set_num_threads(num)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
