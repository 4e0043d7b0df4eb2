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
import ctypes
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from brt.bench import Result, Row, save
from brt.bench.check import largest_error
from brt.bench.machine import describe
from brt.bench.probe import ForeignLoad, GemmProbe, kept_memory, num_cores
from brt.bench.result import compared
from brt.bench.workload import Kind

SHORTEST_S = 5e-3
"""Shorter calls are timed several at a time."""
LOWEST_PROBE, FOREIGN_CORES, MOST_ROUNDS, FEWEST_ROUNDS = 0.85, 0.25, 30, 5
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_CONTEXT = multiprocessing.get_context("forkserver")


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
    with _link(options.mbit) as network:
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


@contextmanager
def _link(mbit: int | None) -> Iterator[str | None]:
    """A network namespace whose loopback has this rate; None: that of this process, as it is."""
    if mbit is None:
        yield None
        return
    name = f"brt-link-{os.getpid()}"
    rate = "root", "tbf", "rate", f"{mbit}mbit", "burst", "256kb", "limit", "256mb"
    _command("ip", "netns", "add", name)
    try:
        _command("ip", "-n", name, "link", "set", "lo", "up")
        _command("tc", "-n", name, "qdisc", "add", "dev", "lo", *rate)
        yield name
    finally:
        _command("ip", "netns", "delete", name)


def _command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip()} (--mbit needs root, ip and tc)")


def _enter(network: str) -> None:
    with open(f"/var/run/netns/{network}") as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), _NEW_NETWORK):
            raise OSError(ctypes.get_errno(), f"setns {network}")


def on_ranks(num_ranks: int, function: Callable[[], Any], network: str | None = None) -> Any:
    """What a function gives on rank 0; every rank calls it."""
    _CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "brt_dist", "brt.bench"])
    with tempfile.TemporaryDirectory() as folder:
        place = str(Path(folder) / "store"), network
        with _started(num_ranks, place, function) as pipes:
            found = [_received(pipe) for pipe in pipes]
    for rank, (is_good, what) in enumerate(found):
        if not is_good:
            sys.exit(f"rank {rank}: {what}")
    return found[0][1]


def _received(pipe: Connection) -> tuple[bool, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return False, "it ended"


@contextmanager
def _started(
    num_ranks: int, place: tuple[str, str | None], function: Callable[[], Any]
) -> Iterator[Any]:
    pipes, processes = [], []
    for rank in range(num_ranks):
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(
            target=_serve, args=(rank, num_ranks, *place, theirs, function), daemon=True
        )
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    yield pipes
    for process in processes:
        process.join()


def _serve(
    rank: int,
    num_ranks: int,
    path: str,
    network: str | None,
    pipe: Connection,
    function: Callable[[], Any],
) -> None:
    if network is not None:
        _enter(network)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # The ranks are all here
    torch.set_num_threads(1)
    store = dist.FileStore(path, num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    try:
        with kept_memory():
            found = function()
        pipe.send((True, found if rank == 0 else None))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    dist.barrier()
    dist.destroy_process_group()
