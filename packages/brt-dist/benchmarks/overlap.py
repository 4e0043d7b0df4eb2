"""Experts that work on some cells while others are on their way.

    python packages/brt-dist/benchmarks/overlap.py --ranks 2 4 8 --mbit 2000 --json overlap.json
    python packages/brt-dist/benchmarks/overlap.py --ranks 2 4 8 --json overlap-cores.json

A layer of experts on all ranks, whose hidden size makes their work take about as long as the
exchange. Without ``--mbit`` what travels is copied by the cores that the experts work on: where
there are no more cores than ranks there is nothing to hide.

Legend: W ranks, P experts, N cells, K choices of a cell, D model and H hidden features.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
import torch.distributed as dist
from arms import Arm, measure, run
from torch import Tensor

import brt
import brt_dist
from brt.bench import Result

EXPERTS_PER_RANK, CHOICES = 4, 2


class Case:
    """A layer, and the cells of this rank."""

    def __init__(self, options: argparse.Namespace, hidden: int) -> None:
        num_experts = EXPERTS_PER_RANK * dist.get_world_size()
        made = torch.Generator().manual_seed(0)
        size = options.features
        self.up_PHD = torch.randn(num_experts, hidden, size, generator=made) / size**0.5
        self.down_PDH = torch.randn(num_experts, size, hidden, generator=made) / hidden**0.5
        of_rank = torch.Generator().manual_seed(1 + dist.get_rank())
        self.x_ND = torch.randn(options.rows, size, generator=of_rank)
        scores_NP = torch.rand(options.rows, num_experts, generator=of_rank)
        self.weight_NK, self.choice_NK = scores_NP.topk(CHOICES)
        self.spread = brt_dist.Spread.of(num_experts)

    def expected(self) -> Tensor:
        """What one process gives."""
        router = brt.ExpertRouter(len(self.up_PHD))
        out_ND: Tensor = router(
            self.x_ND, self.choice_NK, self.weight_NK, self.up_PHD, self.down_PDH, activation="relu"
        )
        return out_ND

    def layer(self, transport: brt_dist.Transport) -> partial[Tensor]:
        """The call of the layer on all ranks."""
        layer = brt_dist.ExpertParallel(
            self.up_PHD, self.down_PDH, activation="relu", transport=transport
        )
        return partial(layer, self.x_ND, self.choice_NK, self.weight_NK)

    def exchange(self) -> partial[Tensor]:
        """The way there and back alone."""
        slot_R = self.spread.slots(self.choice_NK, 0).reshape(-1).sort().values
        num_slots = dist.get_world_size() * self.spread.num_slots
        counts_WG = torch.bincount(slot_R, minlength=num_slots).view(-1, self.spread.num_slots)
        rows_RD = self.x_ND.repeat_interleave(CHOICES, 0)
        return partial(_there_and_back, rows_RD, counts_WG)

    def experts(self) -> partial[Tensor]:
        """The work of as many rows as come to a rank on average."""
        held = list(self.spread.held)
        num_rows = self.x_ND.shape[0] * CHOICES
        rows_RD = self.x_ND.repeat_interleave(CHOICES, 0)
        offsets_P1 = torch.linspace(0, num_rows, len(held) + 1).long()
        return partial(_work, rows_RD, offsets_P1, self.up_PHD[held], self.down_PDH[held])


def _there_and_back(rows_RD: Tensor, counts_WG: Tensor) -> Tensor:
    came, exchange = brt_dist.sparse_all_to_all(rows_RD, counts_WG)
    return brt_dist.reverse_all_to_all(came, exchange)


def _work(rows_RD: Tensor, offsets_P1: Tensor, up_PHD: Tensor, down_PDH: Tensor) -> Tensor:
    hidden_RH = brt.ops.grouped_linear(rows_RD, offsets_P1, up_PHD, None, "relu")
    return brt.ops.grouped_linear(hidden_RH, offsets_P1, down_PDH, None)


def bench(options: argparse.Namespace) -> list[Result]:
    """In one piece, and in 2, 4 and 8 parts."""
    hidden = options.hidden or balanced(options)
    case = Case(options, hidden)
    arms = [
        Arm("in one piece", "eager", case.layer(brt_dist.Transport()), torch.clone),
        Arm("exchange alone", "part", case.exchange()),
        Arm("experts alone", "part", case.experts()),
    ]
    for degree in (2, 4, 8):
        call = case.layer(brt_dist.Transport(degree=degree))
        arms.append(Arm(f"in {degree} parts", "brt", call, torch.clone))
    link = f"{options.mbit} Mbit/s" if options.mbit else "no limit"
    result = measure(
        "overlap",
        f"{EXPERTS_PER_RANK} experts a rank, {options.rows} cells of {options.features}, hidden "
        f"{hidden}, link: {link}",
        arms,
        case.expected(),
        seconds=options.seconds,
        tolerance=1e-4,
        hidden=hidden,
        mbit=options.mbit,
    )
    return [result]


@torch.no_grad()
def balanced(options: argparse.Namespace) -> int:
    """The hidden size with which experts take about as long as the exchange."""
    probe = 256
    case = Case(options, probe)
    seconds = [_seconds(call) for call in (case.exchange(), case.experts())]
    dist.all_reduce(both := torch.tensor(seconds), dist.ReduceOp.MAX)
    return max(64, min(8192, round(float(both[0] / both[1]) * probe / 64) * 64))


def _seconds(call: partial[Tensor]) -> float:
    taken = []
    for _ in range(4):
        dist.barrier()
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1024, help="cells of a rank")
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=0, help="0: as long as the exchange takes")
    run(parser, bench)
