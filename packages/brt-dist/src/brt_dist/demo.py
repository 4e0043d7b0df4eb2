"""A sparse layer on several ranks, equal to one process: ``torchrun ... -m brt_dist.demo``.

    torchrun --standalone --nproc-per-node 4 -m brt_dist.demo

Each rank has cells of its own, which like some experts better than others. The layer runs with its
experts in equal blocks, and again with each expert nearer to the cells that like it.

Legend: W ranks, N cells of a rank, P experts, K choices per cell, D model and H hidden features.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from scipy.optimize import linear_sum_assignment
from torch import Tensor

import brt
from brt_dist.experts import ExpertParallel

NUM_EXPERTS, TOP_K, NUM_CELLS, DIM, HIDDEN = 16, 2, 512, 64, 128
_NUM_RUNS = 5


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of one rank, and where its gate sends them."""

    x_ND: Tensor
    choice_NK: Tensor
    weight_NK: Tensor

    @classmethod
    def of(cls, rank: int, num_ranks: int) -> Cells:
        """Cells that like every num_ranks-th expert; the same on every rank that asks."""
        made = torch.Generator().manual_seed(rank)
        liked_P = (torch.arange(NUM_EXPERTS) % num_ranks == rank) * 2.0
        scores_NP = torch.randn(NUM_CELLS, NUM_EXPERTS, generator=made) + liked_P
        weight_NK, choice_NK = scores_NP.softmax(1).topk(TOP_K, 1)
        return cls(torch.randn(NUM_CELLS, DIM, generator=made), choice_NK, weight_NK)


def main() -> None:
    """Run the layer both ways, check it, and let rank 0 say what came of it."""
    if "RANK" not in os.environ:
        sys.exit("start it on ranks: torchrun --standalone --nproc-per-node 2 -m brt_dist.demo")
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    all_cells = [Cells.of(r, num_ranks) for r in range(num_ranks)]
    counts_WP = np.stack([_counts_P(cells) for cells in all_cells])
    made = torch.Generator().manual_seed(0)
    up_PHD = torch.randn(NUM_EXPERTS, 2 * HIDDEN, DIM, generator=made) / DIM**0.5
    down_PDH = torch.randn(NUM_EXPERTS, DIM, HIDDEN, generator=made) / HIDDEN**0.5
    wanted = _in_one_process(all_cells[rank], up_PHD, down_PDH)
    _say(f"{NUM_EXPERTS} experts, top-{TOP_K}, {NUM_CELLS} cells on each of {num_ranks} ranks")
    _say(f"{'placement':<12}{'rows that move':>16}{'MB':>8}{'ms':>8}{'largest error':>16}")
    for name, placement in (("blocks", None), ("nearer", nearer(counts_WP))):
        layer = ExpertParallel(up_PHD, down_PDH, placement=placement)
        error, milliseconds = _run(layer, all_cells[rank], wanted)
        moved = moving_rows(counts_WP, layer.router.spread.rank_P)
        megabytes = 2 * moved * DIM * up_PHD.element_size() / 1e6  # there and back
        share = f"{moved} ({moved / counts_WP.sum():.0%})"
        _say(f"{name:<12}{share:>16}{megabytes:>8.2f}{milliseconds:>8.2f}{error:>16.1e}")
    dist.destroy_process_group()


def nearer(counts_WP: np.ndarray) -> list[int]:
    """As many experts on each rank, so that the most rows are where their expert is."""
    num_ranks, num_experts = counts_WP.shape
    num_slots = -(-num_experts // num_ranks)
    experts, slots = linear_sum_assignment(counts_WP.repeat(num_slots, 0).T, maximize=True)
    placement = [0] * num_experts
    for expert, slot in zip(experts.tolist(), slots.tolist(), strict=True):
        placement[expert] = slot // num_slots
    return placement


def moving_rows(counts_WP: np.ndarray, rank_P: tuple[int, ...]) -> int:
    """Rows whose expert is on another rank."""
    at_home = sum(int(counts_WP[rank, expert]) for expert, rank in enumerate(rank_P))
    return int(counts_WP.sum()) - at_home


def _counts_P(cells: Cells) -> np.ndarray:
    return np.bincount(cells.choice_NK.flatten().numpy(), minlength=NUM_EXPERTS)


def _in_one_process(cells: Cells, up_PHD: Tensor, down_PDH: Tensor) -> Tensor:
    router = brt.ExpertRouter(NUM_EXPERTS)
    out: Tensor = router(cells.x_ND, cells.choice_NK, cells.weight_NK, up_PHD, down_PDH)
    return out


@torch.no_grad()
def _run(layer: ExpertParallel, cells: Cells, wanted: Tensor) -> tuple[float, float]:
    """(largest error of any rank, best milliseconds of a few runs)."""
    error = (layer(cells.x_ND, cells.choice_NK, cells.weight_NK) - wanted).abs().max()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    if error > 1e-4:
        sys.exit(f"the ranks differ from one process by {error}")
    seconds = []
    for _ in range(_NUM_RUNS):
        dist.barrier()
        start = time.perf_counter()
        layer(cells.x_ND, cells.choice_NK, cells.weight_NK)
        seconds.append(time.perf_counter() - start)
    return float(error), 1e3 * min(seconds)


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
