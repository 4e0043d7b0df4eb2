"""The exchange against what one would write with torch: figures 11 and 13 of Brainstorm.

    python packages/brt-dist/benchmarks/exchange.py figure-11 --ranks 2 4 8 --json figure11.json
    python packages/brt-dist/benchmarks/exchange.py figure-13 --ranks 2 4 8 --json figure13.json
    python packages/brt-dist/benchmarks/exchange.py one-megabyte --ranks 2 4 8 --json small.json

Rows go to their experts and back. Figure 11: each rank has 0 to 1023 rows for each expert, and the
baseline pads to 1024. Figure 13: each rank has 1024 rows for each expert of one rank, and one for
each other; experts stand where `brt_dist.nearest` puts them, or in equal blocks, from where rows
return or stay. OSDI 2023, whose published figures have one number more.

Legend: W ranks, G experts on a rank, P experts, M most rows for an expert, R rows, D features.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from arms import Arm, measure, run
from torch import Tensor

import brt_dist
from brt.bench import Result

MOST = 1024
Both = tuple[Tensor, Tensor]
"""Rows as they came, and the same as they returned."""


@dataclass(frozen=True, eq=False)
class Case:
    """What every rank sends.

    Attributes:
        counts_WWG: for each rank, its rows for each expert of each rank.
        num_features: D.
    """

    counts_WWG: Tensor
    num_features: int

    @property
    def counts_WG(self) -> Tensor:
        """Of this rank."""
        return self.counts_WWG[dist.get_rank()]

    def rows(self, rank: int) -> Tensor:
        """The rows of a rank, no two of which are alike."""
        num_rows = int(self.counts_WWG[rank].sum())
        column_R1 = torch.arange(num_rows, dtype=torch.float32)[:, None] + rank / 16
        return column_R1.expand(num_rows, self.num_features).contiguous()

    def expected(self) -> Both:
        """A column of what is to come, and of what is to return."""
        rank, parts = dist.get_rank(), []
        num_ranks, _, num_experts = self.counts_WWG.shape
        for expert in range(num_experts):
            for w in range(num_ranks):
                counts_WG = self.counts_WWG[w]
                before = int(counts_WG[:rank].sum() + counts_WG[rank, :expert].sum())
                part = torch.arange(before, before + int(counts_WG[rank, expert]))
                parts.append(part + w / 16)
        sent = torch.arange(int(self.counts_WG.sum())) + rank / 16
        return torch.cat(parts), sent


def column(both: Both) -> Both:
    """The last column, which is compared."""
    came, back = both
    return came[:, -1].clone(), back[:, -1].clone()


class Padded:
    """The published baseline: room for M rows of each rank for each expert, and two transposes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rows, counts = case.rows(dist.get_rank()), case.counts_WG.reshape(-1).tolist()
        self.shape = *case.counts_WG.shape, MOST, case.num_features
        self.x = torch.zeros(len(counts), MOST, case.num_features)
        for place, part in zip(self.x, rows.split(counts), strict=True):
            place[: len(part)] = part

    def __call__(self) -> Both:
        """There and back."""
        came = torch.zeros_like(self.x)
        dist.all_to_all_single(came, self.x)
        by_expert = came.view(self.shape).transpose(0, 1).contiguous()
        returning = by_expert.transpose(0, 1).contiguous().view(self.x.shape)
        back = torch.zeros_like(self.x)
        dist.all_to_all_single(back, returning)
        return by_expert, back

    def outcome(self, both: Both) -> Both:
        """Without the padding."""
        rank, (came, back) = dist.get_rank(), both
        counts_GW = self.case.counts_WWG[:, rank].t()
        sent = self.case.counts_WG.reshape(-1, 1)
        return _kept(came[..., -1], counts_GW), _kept(back[None, ..., -1], sent.t())


def _kept(padded: Tensor, counts: Tensor) -> Tensor:
    return padded[torch.arange(MOST) < counts[..., None]]


class Plain:
    """`all_to_all_single` with exact sizes; rows by rank, as they come, or by expert.

    With ``knows`` the sizes are those of the first call: no counts travel.
    """

    def __init__(self, case: Case, *, knows: bool = False, by_expert: bool = False) -> None:
        self.rows, self.counts_WG = case.rows(dist.get_rank()), case.counts_WG
        self.knows, self.by_expert = knows, by_expert
        self.received_WG: Tensor | None = None

    def __call__(self) -> Both:
        """There and back."""
        received_WG = self.received_WG
        if received_WG is None:
            received_WG = torch.empty_like(self.counts_WG)
            dist.all_to_all_single(received_WG, self.counts_WG)
            self.received_WG = received_WG if self.knows else None
        send, receive = self.counts_WG.sum(1).tolist(), received_WG.sum(1).tolist()
        came = self.rows.new_empty(sum(receive), self.rows.shape[1])
        dist.all_to_all_single(came, self.rows, receive, send)
        returning = came
        if self.by_expert:
            came = _transposed(came, received_WG)
            returning = _transposed(came, received_WG.t())
        back = torch.empty_like(self.rows)
        dist.all_to_all_single(back, returning, send, receive)
        return came, back


def _transposed(rows: Tensor, counts_AB: Tensor) -> Tensor:
    num_b = counts_AB.shape[1]
    parts = rows.split(counts_AB.reshape(-1).tolist())
    return torch.cat([part for b in range(num_b) for part in parts[b::num_b]])


def sparse(rows: Tensor, counts_WG: Tensor) -> Both:
    """Ours."""
    came, exchange = brt_dist.sparse_all_to_all(rows, counts_WG)
    return came, brt_dist.reverse_all_to_all(came, exchange)


def stays(rows: Tensor, counts_WG: Tensor) -> Both:
    """Ours, with the locality-aware return: rows stay where most of them are."""
    came, exchange = brt_dist.sparse_all_to_all(rows, counts_WG)
    assignment = brt_dist.assign_sources(exchange)
    return came, brt_dist.return_to_assigned(came, exchange, assignment)


def arms_of(case: Case, *, padded: bool) -> list[Arm]:
    """All ways to exchange the rows of a case."""
    arms = [
        Arm("torch, exact sizes", "peer", Plain(case)),
        Arm("torch, exact sizes, by expert", "peer", Plain(case, by_expert=True), column),
        Arm("torch, sizes known", "limit", Plain(case, knows=True)),
        Arm("brt_dist", "brt", ours(case), column),
    ]
    if padded:
        baseline = Padded(case)
        arms.insert(0, Arm("torch, padded", "eager", baseline, baseline.outcome))
    return arms


def ours(case: Case) -> Callable[[], Both]:
    """The call of our exchange."""
    return partial(sparse, case.rows(dist.get_rank()), case.counts_WG)


def figure_11(options: argparse.Namespace) -> list[Result]:
    """Sweeps over experts of a rank and over the size of a cell."""
    return [_skewed(num, size, MOST, options) for num, size in _points(options)]


def one_megabyte(options: argparse.Namespace) -> list[Result]:
    """What the host adds where a rank sends one megabyte."""
    num_ranks = dist.get_world_size()
    rows = 2 * (1 << 20) // (4 * 512 * num_ranks)  # of which half are sent, on average
    return [_skewed(num, 512, rows // num, options) for num in (1, 4)]


def _skewed(num_experts: int, size: int, most: int, options: argparse.Namespace) -> Result:
    num_ranks = dist.get_world_size()
    generator = torch.Generator().manual_seed(options.seed)
    counts_WWG = torch.randint(most, (num_ranks, num_ranks, num_experts), generator=generator)
    case = Case(counts_WWG, size)
    return measure(
        options.workload,
        f"{num_experts} experts a rank, cells of {size}, 0 to {most - 1} rows for each",
        arms_of(case, padded=most == MOST),
        case.expected(),
        seconds=options.seconds,
        experts=num_experts,
        cell=size,
    )


def figure_13(options: argparse.Namespace) -> list[Result]:
    """Experts in equal blocks, and where the rows are."""
    return [_placed(num, size, options) for num, size in _points(options)]


def _points(options: argparse.Namespace) -> list[tuple[int, int]]:
    return [(num, 512) for num in options.experts] + [(4, size) for size in options.cells]


def _placed(num_experts: int, size: int, options: argparse.Namespace) -> Result:
    num_ranks = dist.get_world_size()
    counts_WP = torch.ones(num_ranks, num_ranks * num_experts, dtype=torch.int64)
    for rank in range(num_ranks):
        first = (rank + 1) % num_ranks * num_experts
        counts_WP[rank, first : first + num_experts] = MOST
    blocks = brt_dist.Spread.of(counts_WP.shape[1])
    planned = brt_dist.Spread.of(counts_WP.shape[1], None, brt_dist.nearest(counts_WP.numpy()))
    cases = [Case(_counts(spread, counts_WP), size) for spread in (blocks, planned)]
    arms = [
        Arm(name, kind, ours(case), partial(_agrees, case, dist.get_rank()))
        for name, kind, case in (
            ("in equal blocks", "eager", cases[0]),
            ("placed by the solver", "brt", cases[1]),
        )
    ]
    stay = partial(stays, cases[0].rows(dist.get_rank()), cases[0].counts_WG)
    source = (dist.get_rank() - 1) % num_ranks  # whose rows are for this one's experts
    arms.append(Arm("in equal blocks, rows stay", "brt", stay, partial(_agrees, cases[0], source)))
    return measure(
        options.workload,
        f"{num_experts} experts a rank, cells of {size}, {MOST} rows for each of one rank",
        arms,
        torch.zeros(1),
        seconds=options.seconds,
        experts=num_experts,
        cell=size,
    )


def _counts(spread: brt_dist.Spread, counts_WP: Tensor) -> Tensor:
    held: Sequence[Sequence[int]] = spread.held_W
    return torch.stack([torch.stack([row[list(h)] for h in held]) for row in counts_WP])


def _agrees(case: Case, source: int, both: Both) -> Tensor:
    """How far rows are from those expected, where those of a rank returned."""
    num_rows = int(case.counts_WWG[source].sum())
    expected = case.expected()[0], torch.arange(num_rows) + source / 16
    pairs = zip(column(both), expected, strict=True)
    return sum(((came - wanted).abs().max() for came, wanted in pairs), torch.zeros(1))


BENCHES = {"figure-11": figure_11, "figure-13": figure_13, "one-megabyte": one_megabyte}


def bench(options: argparse.Namespace) -> list[Result]:
    """The workload asked for."""
    return BENCHES[options.workload](options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("workload", choices=BENCHES)
    parser.add_argument("--experts", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--cells", type=int, nargs="*", default=[32, 2048])
    parser.add_argument("--seed", type=int, default=0)
    run(parser, bench)
