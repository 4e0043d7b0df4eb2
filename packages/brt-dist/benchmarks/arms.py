"""What the benchmarks of exchanges share: ranks on this machine, and arms that take turns on them.

All arms of a workload run in one process group, in rounds whose order rotates. The time of an arm
in a round is that of its slowest rank. Outcomes are compared with a reference on every rank.
Results are those of `brt.bench`: the same table, the same JSON, the same marks where other
processes took the cores. Gloo on the CPUs of one host; each rank has one thread. With ``--mbit``,
as root, ranks talk over a link of that rate, in a network namespace: what travels then waits for a
wire and not for cores, as between hosts.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from launch import link, on_ranks

from brt.bench import Result, Row, save
from brt.bench.check import largest_error
from brt.bench.machine import describe
from brt.bench.probe import ForeignLoad, GemmProbe, num_cores
from brt.bench.result import compared
from brt.bench.workload import Kind

SHORTEST_S = 5e-3
"""Shorter calls are timed several at a time."""
LOWEST_PROBE, FOREIGN_CORES, MOST_ROUNDS, FEWEST_ROUNDS = 0.85, 0.25, 30, 5


@dataclass(eq=False)
class Arm:
    """One way to do the work of a workload.

    Attributes:
        kind: what `brt.bench` calls it: ratios are to "eager" and to the best "peer".
        outcome: what of the call's result is compared; None: nothing is.
        seconds: of each round, on the slowest rank.
        cpu_seconds: of each round, of all ranks together: it says more where cores are shared.
    """

    name: str
    kind: Kind
    call: Callable[[], Any]
    outcome: Callable[[Any], Any] | None = None
    inner: int = 1
    error: float | None = None
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def burst(self) -> float:
        """Seconds of a call on this rank."""
        dist.barrier()
        cpu_s, start = time.process_time(), time.perf_counter()
        for _ in range(self.inner):
            self.call()
        taken = (time.perf_counter() - start) / self.inner
        self.cpu_seconds.append((time.process_time() - cpu_s) / self.inner)
        return taken

    def row(self, rounds: Sequence[int], tolerance: float) -> Row:
        """What `brt.bench` shows of it."""
        is_wrong = self.error is not None and not self.error <= tolerance
        row = Row(
            variant=self.name,
            kind=self.kind,
            status="wrong" if is_wrong else "ok",
            reason=f"error {self.error:.1e} is above {tolerance:.1e}" if is_wrong else "",
            detail=f"{1e3 * median(self.cpu_seconds[i] for i in rounds):.2f} ms of all cores",
            error=self.error,
            tolerance=tolerance,
        )
        times = [] if is_wrong else sorted(1e3 * self.seconds[i] for i in rounds)
        return row.with_times(times, None, None)


@torch.no_grad()
def measure(
    name: str,
    shapes: str,
    arms: Sequence[Arm],
    expected: Any,
    *,
    seconds: float,
    tolerance: float = 0.0,
    **options: Any,
) -> Result:
    """Let the arms take turns for so many seconds; every rank must call it."""
    disturbances = _Disturbances()
    for arm in arms:
        _check(arm, expected)
        arm.inner = max(1, min(100, math.ceil(SHORTEST_S / _slowest([arm.burst()])[0])))
        arm.cpu_seconds.clear()
    disturbances.begin()
    end, num_rounds, going = time.perf_counter() + seconds, 0, True
    while going:
        for arm in _rotated(arms, num_rounds):
            arm.seconds.append(arm.burst())
        num_rounds += 1
        disturbances.close_round()
        late = time.perf_counter() > end and num_rounds >= FEWEST_ROUNDS
        going = _slowest([late or num_rounds >= MOST_ROUNDS])[0] == 0
    for arm in arms:
        arm.seconds, arm.cpu_seconds = _slowest(arm.seconds), _together(arm.cpu_seconds)
    return disturbances.result(name, shapes, arms, tolerance, options)


class _Disturbances:
    """Which rounds others disturbed; only rank 0 knows."""

    def __init__(self) -> None:
        self.probe, self.foreign = GemmProbe(torch.device("cpu")), ForeignLoad()
        self.free_cores = max(0, num_cores() - dist.get_world_size())
        self.rates: list[float] = []
        self.cores: list[float | None] = []
        self._cpu_s, self._start = 0.0, 0.0

    def begin(self) -> None:
        self._probe()
        self.foreign()
        self._cpu_s, self._start = _cpu_seconds(), time.perf_counter()

    def close_round(self) -> None:
        """How fast the machine is, and what others took of it since the last round."""
        cpu_s, now = _cpu_seconds(), time.perf_counter()
        others = torch.tensor(0.0 if dist.get_rank() == 0 else cpu_s - self._cpu_s)
        dist.all_reduce(others)
        if dist.get_rank() == 0:
            taken = self.foreign()
            if taken is not None:  # by all but this process; the other ranks are no strangers
                taken = max(0.0, taken - float(others) / (now - self._start))
            self.cores.append(taken)
        self._probe()
        self._cpu_s, self._start = _cpu_seconds(), time.perf_counter()

    def _probe(self) -> None:
        if dist.get_rank() == 0:
            self.rates.append(self.probe())
        dist.barrier()

    def _of(self, one: int) -> str | None:
        share = min(self.rates[one : one + 2]) / max(self.rates)
        if share < LOWEST_PROBE:
            return f"the product ran at {share:.2f} of its best"
        cores = self.cores[one]
        if cores is not None and cores > self.free_cores + FOREIGN_CORES:
            return f"other processes took {cores:.1f} cores"
        return None

    def result(
        self, name: str, shapes: str, arms: Sequence[Arm], tolerance: float, options: Any
    ) -> Result:
        num_rounds = len(self.rates) - 1 if self.rates else 0
        found = [self._of(one) for one in range(num_rounds)]
        clean = [one for one, why in enumerate(found) if why is None]
        enough = len(clean) >= FEWEST_ROUNDS
        used = clean if enough else list(range(len(arms[0].seconds)))
        rows = compared([arm.row(used, tolerance) for arm in arms])
        rate = max(self.rates, default=1.0)
        return Result(
            workload=name,
            shapes=f"{dist.get_world_size()} ranks, {shapes}",
            dtype="float32",
            device="cpu",
            threads=torch.get_num_threads(),
            machine=describe(torch.device("cpu"), rate, keeps_memory=True),
            rows=rows,
            disturbed=not enough,
            rounds=len(clean),
            rounds_rejected=num_rounds - len(clean),
            disturbances=tuple(why for why in found if why is not None),
            options={"ranks": dist.get_world_size()} | options,
            settings={"shortest_s": SHORTEST_S, "lowest_probe": LOWEST_PROBE},
        )


def _check(arm: Arm, expected: Any) -> None:
    """The first call, whose outcome is compared."""
    result = arm.call()
    if arm.outcome is not None:
        error = largest_error(arm.outcome(result), expected)
        arm.error = _slowest([error])[0]


def _slowest(values: Sequence[float]) -> list[float]:
    """The largest on any rank."""
    most = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.tolist()


def _together(values: Sequence[float]) -> list[float]:
    """The sum of all ranks."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def _rotated(arms: Sequence[Arm], index: int) -> list[Arm]:
    start = index // 2 % len(arms)
    turned = [*arms[start:], *arms[:start]]
    return turned[::-1] if index % 2 else turned


def _cpu_seconds() -> float:
    times = os.times()
    return times.user + times.system


def run(
    parser: argparse.ArgumentParser,
    bench: Callable[[argparse.Namespace], list[Result]],
    args: Sequence[str] | None = None,
) -> list[Result]:
    """The command line of a benchmark: start ranks, show tables, write JSON."""
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="in turn")
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each table, about")
    parser.add_argument("--mbit", type=int, help="a second that all ranks share; needs root")
    options = parser.parse_args(args)
    results = []
    with link(options.mbit) as network:
        for num_ranks in options.ranks:
            for result in on_ranks(num_ranks, partial(bench, options), network):
                results.append(result)
                sys.stdout.write(f"{result}\n\n")
                sys.stdout.flush()
    if options.json is not None:
        save(results, options.json)
    if any(result.failed for result in results):
        sys.exit(1)
    return results
