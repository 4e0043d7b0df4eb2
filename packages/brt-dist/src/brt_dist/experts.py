"""Stacked experts of which each rank holds some.

Legend: N cells, P experts, K choices per cell, R routed rows, W ranks, G experts on a rank at most,
D model and H hidden features (up has 2H rows where it is gated).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from brt import Decision, Route, Router, ops
from brt.route import make_route
from brt_dist.agree import agree, telling
from brt_dist.errors import ParallelError
from brt_dist.exchange import Exchange, exchange_counts, reverse_all_to_all, start
from brt_dist.fastest import Cells, Fastest
from brt_dist.groups import Group
from brt_dist.hierarchical import hierarchical_all_to_all, reverse_hierarchical_all_to_all
from brt_dist.padded import Padded
from brt_dist.replicated import add_up, gather_cells
from brt_dist.spread import Placement, Spread
from brt_dist.stacked import Activation, StackedExperts, share_of
from brt_dist.symmetric import Buffers
from brt_dist.transport import Transport

_DEFAULT = Transport()


class ParallelExpertRouter(Router):
    """`brt.ExpertRouter` where the experts are spread over ranks. Every rank must call it.

    ``forward`` takes what `brt.ExpertRouter` does; of stacked weights it takes those of this rank's
    experts (ascending), or all, of which it then uses its own.

    Args:
        spread: which rank holds which expert.
        transport: how cells travel.
    """

    waits_for_others = True

    def __init__(self, spread: Spread, transport: Transport = _DEFAULT) -> None:
        super().__init__()
        transport.check(spread.group)
        self.num_paths = spread.num_experts
        self.spread = spread
        self.transport = transport
        self._fastest: Fastest[ParallelExpertRouter] | None = None
        if transport.among:
            self._fastest = Fastest(transport, spread, partial(ParallelExpertRouter, spread))
        self._agreed: set[str] = set()
        self._rooms: dict[tuple[int, torch.dtype, torch.device], Buffers] = {}

    @property
    def chosen(self) -> dict[int, Transport]:
        """Of ``transport.among`` the fastest so far, by the number of cells from which on it is."""
        if self._fastest is None:
            return {}
        return {size: self.transport.among[i] for size, i in self._fastest.chosen.items()}

    @torch.compiler.disable
    def forward(
        self,
        x_ND: Tensor,
        choice_NK: Tensor,
        weight_NK: Tensor | None,
        up_PHD: Tensor,
        down_PDH: Tensor,
        *,
        up_bias_PH: Tensor | None = None,
        down_bias_PD: Tensor | None = None,
        activation: Activation = "swiglu",
    ) -> Tensor:
        """``[N, D]`` -> ``[N, D]`` for the cells of this rank."""
        if self._fastest is not None:
            args = x_ND, choice_NK, weight_NK, up_PHD, down_PDH
            names = {"up_bias_PH": up_bias_PH, "down_bias_PD": down_bias_PD}
            with telling("ParallelExpertRouter", self.spread.group):
                self._look_at(x_ND, choice_NK, weight_NK)
                cells = Cells.of(x_ND, choice_NK, up_PHD, down_PDH)
            return self._fastest(
                lambda router: router(*args, **names, activation=activation), cells
            )
        with telling("ParallelExpertRouter", self.spread.group):
            weights = StackedExperts(
                self._own("up", up_PHD),
                None if up_bias_PH is None else self._own("up_bias", up_bias_PH),
                self._own("down", down_PDH),
                None if down_bias_PD is None else self._own("down_bias", down_bias_PD),
                activation,
            )
            self._look_at(x_ND, choice_NK, weight_NK)
            symmetric = self.transport.symmetric is not None and not torch.is_grad_enabled()
            if not (self.transport.replicated or self.transport.capacity or symmetric):
                chunks = [self._chunk(*part) for part in self._parts(x_ND, choice_NK, weight_NK)]
        if self.transport.capacity is not None:
            self._agree_once(x_ND)
            return self._padded(x_ND, choice_NK, weight_NK, weights, self.transport.capacity)
        if symmetric:
            self._agree_once(x_ND)
            return self._symmetric(x_ND, choice_NK, weight_NK, weights)
        if self.transport.replicated:
            return self._replicated(x_ND, choice_NK, weight_NK, weights)
        if self.transport.hosts is not None:
            return self._by_hosts(*chunks[0], weights)
        return self._overlapped(chunks, weights)

    def _look_at(self, x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor | None) -> None:
        """Show observers what the gate decided, and check that there is a decision a cell."""
        decision = Decision(self.num_paths, choice_NK=choice_NK, weight=weight_NK)
        if self._observers:
            self._observe(make_route(decision, x_ND.shape[0]), choice_NK)
        sizes = x_ND.shape[0], choice_NK.shape[0]
        ops.same_size("ParallelExpertRouter: cells and choices", *sizes)

    def _own(self, what: str, stacked: Tensor) -> Tensor:
        """The part of a stacked weight that is for this rank's experts."""
        held = self.spread.held
        if stacked.shape[0] == len(held):
            return stacked
        if stacked.shape[0] == self.num_paths:
            return stacked[list(held)]
        raise ParallelError(
            f"ParallelExpertRouter: {what} must hold this rank's {len(held)} experts or all "
            f"{self.num_paths}, got {list(stacked.shape)}"
        )

    def _parts(
        self, x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor | None
    ) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        degree = self.transport.degree
        if degree == 1:
            return [(x_ND, choice_NK, weight_NK)]
        weights: Sequence[Tensor | None] = [None] * degree
        if weight_NK is not None:
            weights = weight_NK.tensor_split(degree)
        return list(
            zip(x_ND.tensor_split(degree), choice_NK.tensor_split(degree), weights, strict=True)
        )

    def _chunk(
        self, x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor | None
    ) -> tuple[Tensor, Route, Tensor]:
        """(rows by rank and expert, how they were laid out, counts of an exchange)."""
        num_slots = len(self.spread.held_W) * self.spread.num_slots
        slot_NK = self.spread.slots(choice_NK, turn=dist.get_rank(self.spread.group))
        decision = Decision(num_slots, choice_NK=slot_NK, weight=weight_NK)
        route = make_route(decision, x_ND.shape[0]).with_sizes()
        rows_RD = ops.dispatch(x_ND, route.cell_R, route.row_NK)
        counts_WG = torch.tensor(route.sizes).view(-1, self.spread.num_slots)
        return rows_RD, route, counts_WG

    def _overlapped(
        self, chunks: Sequence[tuple[Tensor, Route, Tensor]], weights: StackedExperts
    ) -> Tensor:
        """Every chunk leaves at once; experts work on one while others are on their way."""
        counts = [counts_WG for _, _, counts_WG in chunks]
        note = f" for {self.spread}"
        exchanges, grad_flows = exchange_counts([chunks[0][0]], counts, self.spread.group, note)
        arriving = [
            start(rows_RD, exchange, grad_flows)
            for (rows_RD, _, _), exchange in zip(chunks, exchanges, strict=True)
        ]
        returning = [
            _send_back(weights.run(finish(), exchange.load_G), exchange)
            for finish, exchange in zip(arriving, exchanges, strict=True)
        ]
        outs = [
            _combine(finish(), route)
            for finish, (_, route, _) in zip(returning, chunks, strict=True)
        ]
        return torch.cat(outs) if len(outs) > 1 else outs[0]

    def _by_hosts(
        self, rows_RD: Tensor, route: Route, counts_WG: Tensor, weights: StackedExperts
    ) -> Tensor:
        hosts = self.transport.hosts
        assert hosts is not None
        rows_RD, hops = hierarchical_all_to_all(rows_RD, counts_WG, hosts)
        rows_RD = reverse_hierarchical_all_to_all(weights.run(rows_RD, hops.load_G), hops)
        return _combine(rows_RD, route)

    def _padded(
        self,
        x_ND: Tensor,
        choice_NK: Tensor,
        weight_NK: Tensor | None,
        weights: StackedExperts,
        capacity: int,
    ) -> Tensor:
        group = self.spread.group
        slot_NK = self.spread.slots(choice_NK, turn=dist.get_rank(group))
        padded = Padded.of(slot_NK, capacity, self.spread.num_slots, group)
        return padded.back(weights.run(padded.there(x_ND), padded.load_G()), weight_NK)

    def _symmetric(
        self, x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor | None, weights: StackedExperts
    ) -> Tensor:
        assert self.transport.symmetric is not None
        group, num_slots = self.spread.group, self.spread.num_slots
        kind = (x_ND.shape[1], x_ND.dtype, x_ND.device)
        if kind not in self._rooms:
            dim, dtype, device = kind
            self._rooms[kind] = Buffers(
                self.transport.symmetric, dim, num_slots, dtype, device, group
            )
        buffers = self._rooms[kind]
        sent = buffers.dispatch(x_ND, self.spread.slots(choice_NK, turn=dist.get_rank(group)))
        return buffers.combine(weights.run(sent.rows_QD, sent.load_G), sent, weight_NK)

    def _agree_once(self, x_ND: Tensor) -> None:
        """Compare what never changes, at the first call; captures begin after that."""
        words = f"rows of {x_ND.dtype} {list(x_ND.shape[1:])}, {self.transport} for {self.spread}"
        if words not in self._agreed:
            num_ranks = len(self.spread.held_W)
            counts_W1 = torch.zeros(num_ranks, 1, dtype=torch.int64)
            agree("ParallelExpertRouter", words, counts_W1, self.spread.group)
            self._agreed.add(words)

    def _replicated(
        self, x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor | None, weights: StackedExperts
    ) -> Tensor:
        group, held = self.spread.group, self.spread.held
        flows = [x_ND, choice_NK] if weight_NK is None else [x_ND, choice_NK, weight_NK]
        gathered = gather_cells(flows, (0, -1, 0)[: len(flows)], group, f" for {self.spread}")
        num_slots, rank = self.spread.num_slots, dist.get_rank(group)
        slot_NK = self.spread.slots(gathered[1], turn=0)
        own_NK = torch.where(slot_NK // num_slots == rank, slot_NK % num_slots, -1)
        weight = gathered[2] if len(gathered) > 2 else None
        decision = Decision(max(len(held), 1), choice_NK=own_NK, weight=weight)
        route = make_route(decision, own_NK.shape[0]).with_sizes()
        rows_RD = ops.dispatch(gathered[0], route.cell_R, route.row_NK)
        out = _combine(weights.run(rows_RD, torch.tensor(route.sizes)), route)
        return add_up(out, x_ND.shape[0], group)

    def extra_repr(self) -> str:
        """Where the experts are, and how cells travel."""
        return f"{self.spread}, {self.transport}"


class ExpertParallel(nn.Module):
    """A sparse MLP whose experts are spread over the ranks of a group; every rank must call it.

    ``forward(x_ND, choice_NK, weight_NK)`` takes the cells of this rank with the choices and
    weights of their gate, and gives ``[N, D]``: what `brt.ExpertRouter` with all experts would. The
    gradients of the experts are those of all ranks' cells, so of the sum of the ranks' losses.

    Args:
        up_PHD, down_PDH, up_bias_PH, down_bias_PD: the weights of all experts, alike on every rank;
            the module keeps its own.
        activation: as `brt.ExpertRouter` takes it.
        placement: for each expert the rank of the group that holds it, or several ranks; None =
            equal blocks.
        group: None = all ranks.
        transport: how cells travel.
    """

    up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        up_PHD: Tensor,
        down_PDH: Tensor,
        *,
        up_bias_PH: Tensor | None = None,
        down_bias_PD: Tensor | None = None,
        activation: Activation = "swiglu",
        placement: Placement | None = None,
        group: Group | None = None,
        transport: Transport = _DEFAULT,
    ) -> None:
        super().__init__()
        spread = Spread.of(up_PHD.shape[0], group, placement)
        self.router = ParallelExpertRouter(spread, transport)
        self.activation = activation
        self.up, self.down = share_of(up_PHD, spread), share_of(down_PDH, spread)
        self.up_bias = None if up_bias_PH is None else share_of(up_bias_PH, spread)
        self.down_bias = None if down_bias_PD is None else share_of(down_bias_PD, spread)

    def forward(self, x_ND: Tensor, choice_NK: Tensor, weight_NK: Tensor | None = None) -> Tensor:
        """``[N, D]`` -> ``[N, D]`` for the cells of this rank."""
        out_ND: Tensor = self.router(
            x_ND, choice_NK, weight_NK, self.up, self.down, up_bias_PH=self.up_bias,
            down_bias_PD=self.down_bias, activation=self.activation,
        )  # fmt: skip
        return out_ND


def _send_back(rows_RD: Tensor, exchange: Exchange) -> Callable[[], Tensor]:
    return reverse_all_to_all(rows_RD, exchange, async_op=True).wait


def _combine(rows_RD: Tensor, route: Route) -> Tensor:
    return ops.combine(rows_RD, route.row_NK, route.cell_R, route.weight_R)
