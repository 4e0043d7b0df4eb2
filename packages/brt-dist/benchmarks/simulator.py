"""The simulator against measured exchanges: a link fitted to even ones predicts skewed ones.

    torchrun --nproc-per-node 4 packages/brt-dist/benchmarks/simulator.py

Gloo on the CPUs of one host; each rank one thread. The time of an exchange is that of its slowest
rank, the median of repeats. Then how a step grows with the number of ranks, by the model alone.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import numpy as np
import torch
import torch.distributed as dist

from brt_dist.placement import Work
from brt_dist.simulator import Simulator, calibrate, even_step
from brt_dist.topology import Topology

EVEN_BYTES = (4e3, 2e4, 1e5, 5e5, 2e6)
REPEATS = 11
ROW_BYTES = 1024


def measured(rows_WW: np.ndarray) -> float:
    """Seconds of an exchange of these rows."""
    rank = dist.get_rank()
    send, receive = rows_WW[rank].tolist(), rows_WW[:, rank].tolist()
    x_RD = torch.zeros(sum(send), ROW_BYTES // 4)
    out_RD = torch.zeros(sum(receive), ROW_BYTES // 4)
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        start = time.perf_counter()
        dist.all_to_all_single(out_RD, x_RD, receive, send)
        seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        times.append(float(seconds))
    return median(times)


def compare(num_ranks: int) -> None:
    """Calibrate by even exchanges, predict skewed ones."""
    others = num_ranks - 1
    even = [max(round(size / ROW_BYTES), 1) for size in EVEN_BYTES]
    seconds = [measured(np.full((num_ranks, num_ranks), rows)) for rows in even]
    sent = [rows * ROW_BYTES * others for rows in even]
    link, error = calibrate(sent, seconds, [others] * len(even))
    topology = Topology(ranks_per_host=num_ranks, within=link)
    work = Work(row_bytes=ROW_BYTES, row_flops=0)
    simulator = Simulator(topology=topology, work=work, shared_within=True)
    rng = np.random.default_rng(0)
    ratios = []
    for mean_rows in (30, 300, 1000):
        for _ in range(4):
            rows_WW = 1 + rng.gamma(0.5, 2 * mean_rows, (num_ranks, num_ranks)).astype(np.int64)
            ratios.append(simulator.exchange_s(rows_WW.astype(float)) / measured(rows_WW))
    off = np.abs(np.log(ratios))
    say(
        f"{num_ranks} ranks: alpha {link.alpha_us:.0f} us, beta {link.beta_gbs:.2f} GB/s, fit "
        f"{error:.0%} off on average; skewed: predicted over measured {median(ratios):.2f}, "
        f"{np.expm1(off.mean()):.0%} off on average, {np.expm1(off.max()):.0%} at most"
    )


def grow() -> None:
    """64 layers of 256 experts, 8 a token, rows as DeepSeek-V3's, 1024 tokens a rank."""
    work = Work(row_bytes=7168 * 2, row_flops=6 * 7168 * 2048)
    for num_ranks in (8, 64, 256, 512, 4096):
        for exchange in ("direct", "hierarchical", "padded"):
            topology = Topology(hosts=num_ranks // 8, ranks_per_host=8)
            simulator = Simulator(topology=topology, work=work, exchange=exchange)
            step = even_step(
                simulator, num_experts=256, top_k=8, num_layers=64, cells_per_rank=1024
            )
            say(
                f"{num_ranks:5} ranks, {exchange:12}: exchange {1e3 * step.exchange_s:7.1f} ms, "
                f"experts {1e3 * step.compute_s:6.1f} ms"
            )


def say(text: str) -> None:
    """A line, from the first rank."""
    if dist.get_rank() == 0:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if dist.get_world_size() > 1:
        compare(dist.get_world_size())
    grow()
    dist.destroy_process_group()
