"""The simulator against measured steps, and what it says of sizes that nobody has here; a picture.

    python packages/brt-dist/benchmarks/simulator.py [--ranks 2 4 8] [--out simulator.png]

Gloo on the CPUs of one host, each rank one thread. Exchanges and experts with even loads give the
link and the speed; with them exchanges of skewed loads, and steps of mixtures under two placements,
are predicted, and measured. Cases take turns, a time is that of the slowest rank, the median of
repeats. Then how a step grows with the number of ranks, by the model alone.

Legend: W ranks, E experts, L layers, D features.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from brt_dist.placement import Work, plan
from brt_dist.placement.traffic import of_loads
from brt_dist.simulator import Simulator, StepTime, calibrate, even_step
from brt_dist.topology import Topology

REPEATS = 11
NUM_FEATURES, NUM_HIDDEN = 256, 1024
WORK = Work(row_bytes=4 * NUM_FEATURES, row_flops=4 * NUM_FEATURES * NUM_HIDDEN)
EVEN_ROWS = (4, 20, 100, 500, 2000)
EXPERT_ROWS = 1000
NUM_LAYERS, NUM_EXPERTS = 4, 16
GROWN = (8, 64, 256, 512, 4096)


@dataclass(frozen=True)
class Found:
    """What was fitted and how well the rest was predicted: pairs (predicted, measured) seconds."""

    simulator: Simulator
    fit_error: float
    exchanges: list[tuple[float, float]]
    steps: list[tuple[float, float]]


class Cases:
    """What is measured, by name; each is run by all ranks together."""

    def __init__(self, num_ranks: int) -> None:
        self.rank = dist.get_rank()
        self.run: dict[str, Callable[[], None]] = {}
        rng = np.random.default_rng(0)
        for rows in EVEN_ROWS:
            self.add_exchange(f"even {rows}", np.full((num_ranks, num_ranks), rows))
        self.skewed = {
            f"skewed {index}": 1 + rng.gamma(0.5, 2 * mean, (num_ranks, num_ranks)).astype(int)
            for index, mean in enumerate([30, 300, 1000] * 3)
        }
        for name, rows_WW in self.skewed.items():
            self.add_exchange(name, rows_WW)
        self.run["experts"] = lambda: expert(torch.ones(EXPERT_ROWS, NUM_FEATURES))
        # Rows of each expert from each rank, and the two placements
        load_LE = np.ceil(rng.gamma(0.5, 2 * EXPERT_ROWS / num_ranks, (NUM_LAYERS, NUM_EXPERTS)))
        self.traffic = of_loads((num_ranks * load_LE).tolist())
        contiguous = np.arange(NUM_EXPERTS) * num_ranks // NUM_EXPERTS
        self.placed = {
            "step, contiguous": np.tile(contiguous, (NUM_LAYERS, 1)),
            "step, planned": plan(self.traffic, num_ranks, "balance").rank_LE,
        }
        for name, rank_LE in self.placed.items():
            pairs = zip(rank_LE, load_LE, strict=True)
            rows_LW = [np.bincount(r, load, num_ranks).astype(int) for r, load in pairs]
            self.run[name] = lambda rows_LW=rows_LW: step(rows_LW)

    def add_exchange(self, name: str, rows_WW: np.ndarray) -> None:
        """Rows from rank to rank."""
        send, receive = rows_WW[self.rank].tolist(), rows_WW[:, self.rank].tolist()
        self.run[name] = lambda: exchange(send, receive)

    def measure(self) -> dict[str, float]:
        """Seconds of each case."""
        times: dict[str, list[float]] = {name: [] for name in self.run}
        for _ in range(REPEATS):
            for name, run in self.run.items():
                dist.barrier()
                start = time.perf_counter()
                run()
                seconds = torch.tensor(time.perf_counter() - start)
                dist.all_reduce(seconds, dist.ReduceOp.MAX)
                times[name].append(float(seconds))
        return {name: median(found) for name, found in times.items()}


def exchange(send: list[int], receive: list[int]) -> torch.Tensor:
    """So many rows to each rank."""
    out_RD = torch.empty(sum(receive), NUM_FEATURES)
    dist.all_to_all_single(out_RD, torch.zeros(sum(send), NUM_FEATURES), receive, send)
    return out_RD


def expert(rows_RD: torch.Tensor) -> None:
    """What an expert computes of its rows."""
    weight_DH = torch.ones(NUM_FEATURES, NUM_HIDDEN)
    (rows_RD @ weight_DH) @ weight_DH.T


def step(rows_LW: list[np.ndarray]) -> None:
    """Layer after layer: there, experts, and back. All ranks send alike."""
    for rows_W in rows_LW:
        send, receive = rows_W.tolist(), [int(rows_W[dist.get_rank()])] * len(rows_W)
        expert(exchange(send, receive))
        exchange(receive, send)


def compare(num_ranks: int) -> Found:
    """Calibrate by even cases, predict the others."""
    cases, others = Cases(num_ranks), num_ranks - 1
    seconds = cases.measure()
    even = [seconds[f"even {rows}"] for rows in EVEN_ROWS]
    sent = [rows * WORK.row_bytes * others for rows in EVEN_ROWS]
    link, error = calibrate(sent, even, [others] * len(EVEN_ROWS))
    cores = len(os.sched_getaffinity(0))
    waits = max(num_ranks / cores, 1.0)
    tflops = waits * EXPERT_ROWS * WORK.row_flops / seconds["experts"] / 1e12
    topology = Topology(ranks_per_host=num_ranks, within=link, tflops=tflops)
    simulator = Simulator(topology=topology, work=WORK, shared_within=True, shared_cores=cores)
    exchanges = [
        (simulator.exchange_s(rows_WW.astype(float)), seconds[name])
        for name, rows_WW in cases.skewed.items()
    ]
    steps = [
        (simulator.step(cases.traffic, rank_LE, cases.traffic.num_cells).total_s, seconds[name])
        for name, rank_LE in cases.placed.items()
    ]
    return Found(simulator, error, exchanges, steps)


def serve(rank: int, num_ranks: int, folder: str, pipe: Connection) -> None:
    """One rank."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", num_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
    found = compare(num_ranks)
    if rank == 0:
        pipe.send(found)
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(num_ranks: int) -> Found:
    """What the first of so many processes finds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "brt_dist.simulator"])
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        started = [
            context.Process(target=serve, args=(rank, num_ranks, folder, theirs), daemon=True)
            for rank in range(num_ranks)
        ]
        for process in started:
            process.start()
        theirs.close()
        found: Found = ours.recv()
        for process in started:
            process.join()
    return found


def off(pairs: list[tuple[float, float]]) -> str:
    """How far predictions are from what was measured."""
    ratios = [predicted / measured for predicted, measured in pairs]
    away = np.abs(np.log(ratios))
    return (
        f"predicted over measured {median(ratios):.2f}, {np.expm1(away.mean()):.0%} off on "
        f"average, {np.expm1(away.max()):.0%} at most"
    )


def grow() -> dict[str, list[StepTime]]:
    """64 layers of 256 experts, 8 a token, rows as DeepSeek-V3's, 1024 tokens a rank."""
    work = Work(row_bytes=7168 * 2, row_flops=6 * 7168 * 2048)
    found: dict[str, list[StepTime]] = {"direct": [], "hierarchical": []}
    for num_ranks in GROWN:
        for exchange, steps in found.items():
            topology = Topology(hosts=num_ranks // 8, ranks_per_host=8)
            simulator = Simulator(topology=topology, work=work, exchange=exchange)
            size = {"num_experts": 256, "top_k": 8, "num_layers": 64, "cells_per_rank": 1024}
            steps.append(even_step(simulator, **size))
            say(
                f"{num_ranks:5} ranks, {exchange:12}: exchange {1e3 * steps[-1].exchange_s:7.1f} "
                f"ms, experts {1e3 * steps[-1].compute_s:6.1f} ms"
            )
    return found


def draw(found: dict[int, Found], grown: dict[str, list[StepTime]], path: Path) -> None:
    """Predicted by measured, and how a step grows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    against, growth = figure.subplots(1, 2)
    every = [pair for each in found.values() for pair in each.exchanges + each.steps]
    ends = 1e3 * np.array([np.min(every), np.max(every)])
    against.plot(ends, ends, color="grey", linewidth=0.8)
    for (num_ranks, each), color in zip(found.items(), ("C0", "C1", "C2", "C3"), strict=False):
        for pairs, marker, what in ((each.exchanges, "o", "exchanges"), (each.steps, "s", "steps")):
            predicted, measured = 1e3 * np.array(pairs).T
            label = f"{num_ranks} ranks, {what}"
            against.scatter(measured, predicted, s=22, c=color, marker=marker, label=label)
    against.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms")
    against.set_title("skewed loads, gloo on one host", fontsize=9, loc="left")
    for exchange, steps in grown.items():
        growth.plot(GROWN, [1e3 * step.total_s for step in steps], marker="o", label=exchange)
    growth.set(xscale="log", xlabel="ranks", ylabel="step, ms", ylim=(0, None))
    growth.set_xticks(GROWN, [str(num_ranks) for num_ranks in GROWN])
    growth.set_title("64 layers x 256 experts, predicted", fontsize=9, loc="left")
    for axes in (against, growth):
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def say(text: str) -> None:
    """A line, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4, 8])
    parser.add_argument("--out", type=Path, default=Path("simulator.png"))
    given = parser.parse_args()
    found = {num_ranks: on_ranks(num_ranks) for num_ranks in given.ranks}
    for num_ranks, each in found.items():
        topology = each.simulator.topology
        say(
            f"{num_ranks} ranks: alpha {topology.within.alpha_us:.0f} us, beta "
            f"{topology.within.beta_gbs:.2f} GB/s ({each.fit_error:.0%} off on average), "
            f"{1e3 * topology.tflops:.1f} GFLOP/s a core\n"
            f"  skewed exchanges: {off(each.exchanges)}\n  steps: {off(each.steps)}; placed for "
            f"balance / contiguous: predicted {each.steps[1][0] / each.steps[0][0]:.2f}, measured "
            f"{each.steps[1][1] / each.steps[0][1]:.2f}"
        )
    draw(found, grow(), given.out)
    say(f"written: {given.out}")


if __name__ == "__main__":
    main()
