"""The sparse all-to-all: rows to the ranks of their experts and back, without padding.

Legend: W ranks of the group, G experts on a rank, R rows, S trailing dims of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

from brt_dist.agree import agree, telling
from brt_dist.errors import ExchangeError
from brt_dist.flight import Course, Journey
from brt_dist.groups import Group, device_types, resolve
from brt_dist.layout import Layout

Rows = TypeVar("Rows", Tensor, tuple[Tensor, ...])
Result = TypeVar("Result")
_WHAT = "sparse_all_to_all"


@dataclass(frozen=True, eq=False)
class Exchange:
    """Who sent how many rows to whom: what `sparse_all_to_all` gives and its inverse takes.

    Attributes:
        group: the ranks that took part.
        sent_WG: int64 on the host, rows of this rank for each expert of each rank.
        received_WG: int64 on the host, rows that each rank had for each expert of this one.
    """

    group: Group
    sent_WG: Tensor
    received_WG: Tensor

    @property
    def load_G(self) -> Tensor:
        """Rows of each expert of this rank, int64 on the host."""
        return self.received_WG.sum(0)

    @functools.cached_property
    def course(self) -> Course:
        """Rows that lie by rank travel, and lie by expert then."""
        several = self.received_WG.shape[1] > 1  # else by rank is by expert, and needs no copy
        there = Layout(self.sent_WG.numpy()), Layout(self.received_WG.numpy(), several)
        return Course(_WHAT, self.group, *there)


class Handle(Generic[Result]):
    """An exchange under way. `wait` gives what the call without ``async_op`` would have."""

    def __init__(self, finish: Callable[[], Result]) -> None:
        self._finish: Callable[[], Result] | None = finish
        self._result: Result | None = None

    def wait(self) -> Result:
        """Wait for the rows. A second call gives the same."""
        if self._finish is not None:
            self._result, self._finish = self._finish(), None
        assert self._result is not None
        return self._result


@overload
def sparse_all_to_all(
    rows: Rows,
    counts_WG: Tensor,
    group: Group | None = None,
    *,
    async_op: Literal[False] = False,
) -> tuple[Rows, Exchange]: ...
@overload
def sparse_all_to_all(
    rows: Rows, counts_WG: Tensor, group: Group | None = None, *, async_op: Literal[True]
) -> Handle[tuple[Rows, Exchange]]: ...
@torch.compiler.disable
def sparse_all_to_all(
    rows: Rows, counts_WG: Tensor, group: Group | None = None, *, async_op: bool = False
) -> tuple[Rows, Exchange] | Handle[tuple[Rows, Exchange]]:
    """Send each row to the rank of its expert: ``(rows, exchange)``.

    Every rank of the group must call it. ``rows`` are ``[R, *S]`` of any dtype, or a tuple of such
    flows that travel by the same counts; they lie by rank and, within a rank, by expert.
    ``counts_WG`` (int64) says how many rows are for each of the G experts of each rank; where ranks
    hold different numbers of experts, G is the largest, and the counts of the others are 0. What
    comes back lies by expert and, within an expert, by the rank it is from: expert g has
    ``exchange.load_G[g]`` rows. Gradients return the same way; the backward, too, needs every rank.

    With ``async_op`` counts are exchanged at once and rows in the background, until
    ``handle.wait()``. The sent rows must not be written to before.

    Raises:
        ExchangeError: on every rank, where one of them has wrong counts, or rows of another dtype
            or shape, or is gone; named by its global rank.
    """
    group = resolve(group)
    with telling(_WHAT, group):
        flows = flows_of(rows)
        (counts_WG,) = check(flows, [counts_WG], group)
    (exchange,), grad_flows = exchange_counts(flows, [counts_WG], group)
    finish = start(rows, exchange, grad_flows)

    def result() -> tuple[Rows, Exchange]:
        return finish(), exchange

    return Handle(result) if async_op else result()


def exchange_counts(
    flows: Sequence[Tensor], counts: Sequence[Tensor], group: Group, note: str = ""
) -> tuple[list[Exchange], tuple[int, ...]]:
    """Exchanges for several ``counts_WG`` in one message, and which flows have gradients."""
    sent_WC = torch.cat(list(counts), 1) if len(counts) > 1 else counts[0]
    wishes = sum(1 << i for i, flow in enumerate(flows) if flow.requires_grad)
    agreed = agree(
        _WHAT,
        _signature(flows) + note,
        sent_WC,
        group,
        grad_flows=wishes if torch.is_grad_enabled() else 0,
    )
    sizes = [counts_WG.shape[1] for counts_WG in counts]
    received = agreed.received_WC.split(sizes, 1) if len(counts) > 1 else [agreed.received_WC]
    made = [
        Exchange(group, sent_WG, received_WG)
        for sent_WG, received_WG in zip(counts, received, strict=True)
    ]
    return made, tuple(i for i in range(len(flows)) if agreed.grad_flows >> i & 1)


def start(rows: Rows, exchange: Exchange, grad_flows: Sequence[int]) -> Callable[[], Rows]:
    """Send rows on their way; what is returned waits for them."""
    journey = Journey.start(flows_of(rows), exchange.course, grad_flows)

    def finish() -> Rows:
        landed = journey.land()
        return landed[0] if isinstance(rows, Tensor) else landed

    return finish


@overload
def reverse_all_to_all(
    rows: Rows, exchange: Exchange, *, async_op: Literal[False] = False
) -> Rows: ...
@overload
def reverse_all_to_all(
    rows: Rows, exchange: Exchange, *, async_op: Literal[True]
) -> Handle[Rows]: ...
@torch.compiler.disable
def reverse_all_to_all(
    rows: Rows, exchange: Exchange, *, async_op: bool = False
) -> Rows | Handle[Rows]:
    """Send rows back to where they came from, in the order they had there.

    ``rows`` lie as `sparse_all_to_all` gave them, one for each (or a tuple of flows); dtype and
    trailing dims may be others, the same on every rank. No counts are exchanged. In grad mode every
    floating flow of the result has gradients, also where nothing on this rank needs them.

    Raises:
        ExchangeError: on this rank alone where the number of rows is another.
    """
    flows = flows_of(rows)
    num_rows = exchange.course.receive.num_rows
    for flow in flows:
        if flow.ndim < 1 or flow.shape[0] != num_rows:
            raise ExchangeError(
                f"reverse_all_to_all: the exchange gave {num_rows} rows, {list(flow.shape)} came "
                "back"
            )
    floating = [i for i, f in enumerate(flows) if f.is_floating_point() or f.is_complex()]
    grad_flows = floating if torch.is_grad_enabled() else ()
    journey = Journey.start(flows, exchange.course.reversed(), grad_flows)

    def finish() -> Rows:
        landed = journey.land()
        return landed[0] if isinstance(rows, Tensor) else landed

    return Handle(finish) if async_op else finish()


def flows_of(rows: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rows as a tuple of flows."""
    flows = (rows,) if isinstance(rows, Tensor) else tuple(rows)
    if not flows or not all(isinstance(flow, Tensor) for flow in flows):
        raise ExchangeError(f"rows must be a tensor or a tuple of tensors, got {type(rows)}")
    return flows


def check(flows: Sequence[Tensor], counts: Sequence[Tensor], group: Group) -> list[Tensor]:
    """The counts on the host, if they fit the rows."""
    num_ranks, known = dist.get_world_size(group), device_types(group)
    for i, flow in enumerate(flows):
        if flow.ndim < 1 or flow.shape[0] != flows[0].shape[0] or flow.layout != torch.strided:
            raise ExchangeError(
                f"flow {i} must be dense rows [R, ...] with R of flow 0, got {list(flow.shape)}, "
                f"and flow 0 {list(flows[0].shape)}"
            )
        if flow.device != flows[0].device or flow.device.type not in known:
            raise ExchangeError(
                f"flow {i} is on {flow.device}, flow 0 on {flows[0].device}; the group carries "
                f"{' and '.join(sorted(known))}"
            )
    for counts_WG in counts:
        if not isinstance(counts_WG, Tensor) or counts_WG.dtype != torch.int64:
            kind = counts_WG.dtype if isinstance(counts_WG, Tensor) else type(counts_WG).__name__
            raise ExchangeError(f"counts must be an int64 tensor [W, G], got {kind}")
        if counts_WG.ndim != 2 or counts_WG.shape[0] != num_ranks or not counts_WG.shape[1]:
            raise ExchangeError(
                f"counts must be [{num_ranks}, G]: a row for each rank of the group, a column for "
                f"each expert of a rank; got {list(counts_WG.shape)}"
            )
    found = [counts_WG.detach().cpu() for counts_WG in counts]
    total = sum(int(counts_WG.numpy().sum()) for counts_WG in found)
    least = min(int(counts_WG.numpy().min()) for counts_WG in found)
    if least < 0:
        raise ExchangeError(f"counts must not be negative, got {least}")
    if total != flows[0].shape[0]:
        raise ExchangeError(f"counts sum to {total}, but there are {flows[0].shape[0]} rows")
    return found


def _signature(flows: Sequence[Tensor]) -> str:
    kinds = [f"{str(f.dtype).removeprefix('torch.')} {list(f.shape[1:])}" for f in flows]
    return "rows of " + ", ".join(kinds)
