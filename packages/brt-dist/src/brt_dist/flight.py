"""Rows on their way between ranks: started, landed, and brought back as gradients.

Rows travel as bytes, so that every dtype can. Two autograd nodes stand for a journey: the one that
starts it and the one that lands it, joined by an empty token. Their backwards start and land the
gradients' journey the other way, so that compute overlaps there too.

Legend: W ranks, G experts on a rank, S trailing dims of a row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from brt_dist.groups import Group, naming_failures
from brt_dist.layout import Landing, Layout

LEAST_OWN_BYTES = 512 << 10
"""On the host a rank keeps its own rows out of an exchange from here on."""


@dataclass(frozen=True, eq=False)
class Course:
    """Rows that this rank sends to, and receives from, each rank of a group."""

    what: str
    group: Group
    send: Layout
    receive: Layout

    @classmethod
    def by_rank(cls, what: str, group: Group, send: list[int], receive: list[int]) -> Course:
        """So many rows for, and of, each rank, which lie by rank."""
        layouts = (Layout(np.array(sizes)[:, None]) for sizes in (send, receive))
        return cls(what, group, *layouts)

    def reversed(self) -> Course:
        """The way back."""
        return Course(self.what, self.group, self.receive, self.send)

    @functools.cached_property
    def rank(self) -> int:
        """This one."""
        return dist.get_rank(self.group)

    @functools.cached_property
    def keeps_own(self) -> bool:
        """Whether rows of this rank for itself take no part in the exchange; each decides alone.

        On the host the exchange would copy them once more. A rank between others must then copy
        theirs, so that they lie together.
        """
        own = self.send.of_rank[self.rank]
        others = sum(self.send.of_rank) + sum(self.receive.of_rank) - 2 * own
        is_last = self.rank in (0, len(self.send.of_rank) - 1)
        return own > 0 and self.send.is_long and (is_last or 2 * own > others)


class Flight:
    """Flows under way; nobody may read the buffers until `land`."""

    def __init__(self, flows: Sequence[Tensor], course: Course) -> None:
        self._course = course
        self._landings: list[Callable[[], Tensor]] = []
        self._works: list[dist.Work] = []
        # The backend reads these until the flight has landed
        self._sent: list[Tensor] = []
        for flow in flows:
            packed = _packed(flow.detach())
            if not math.prod(flow.shape[1:]):
                empty = packed.new_empty((course.receive.num_rows, *flow.shape[1:]))
                self._landings.append(functools.partial(_same, empty))
            elif packed.device.type == "cpu" and course.keeps_own and _is_worth(packed, course):
                self._start_others(packed)
            else:
                self._start_all(packed)

    def _start_all(self, flow: Tensor) -> None:
        course = self._course
        received = flow.new_empty((course.receive.num_rows, *flow.shape[1:]))
        sent = course.send.to_rank_major(flow.device).apply(flow)
        self._start(received, sent, course.receive.of_rank, course.send.of_rank)
        order = course.receive.to_rank_major(flow.device)
        self._landings.append(functools.partial(order.undo, received))

    def _start_others(self, flow: Tensor) -> None:
        """Like `_start_all`, without the rows for this rank, which go to their place at once."""
        course, rank = self._course, self._course.rank
        sent = course.send.of_others(flow, rank)
        landing = Landing(course.receive, rank, flow, course.send.of_one(flow, rank))
        sizes = [[*layout.of_rank] for layout in (course.receive, course.send)]
        for of_rank in sizes:
            of_rank[rank] = 0
        self._start(landing.received, sent, *sizes)
        landing.keep_own()
        self._landings.append(landing.finish)

    def _start(
        self, received: Tensor, sent: Tensor, receive: Sequence[int], send: Sequence[int]
    ) -> None:
        course = self._course
        self._sent.append(sent)
        with naming_failures(course.what, course.group):
            work = dist.all_to_all_single(
                as_bytes(received),
                as_bytes(sent),
                receive,
                send,
                group=course.group,
                async_op=True,
            )
        assert work is not None
        self._works.append(work)

    def land(self) -> tuple[Tensor, ...]:
        """Wait for the rows."""
        with naming_failures(self._course.what, self._course.group):
            for work in self._works:
                work.wait()
        landed = tuple(landing() for landing in self._landings)
        self._works, self._sent, self._landings = [], [], []
        return landed


@dataclass
class Journey:
    """A flight and, where gradients flow, its return.

    Attributes:
        grad_flows: which flows have gradients, on every rank alike; empty: none are recorded.
    """

    course: Course
    grad_flows: tuple[int, ...]
    token: Tensor | None = None
    there: Flight | None = field(default=None, repr=False)
    back: Flight | None = field(default=None, repr=False)

    @classmethod
    def start(cls, flows: Sequence[Tensor], course: Course, grad_flows: Sequence[int]) -> Journey:
        """Send the flows on their way."""
        journey = cls(course, tuple(grad_flows))
        if journey.grad_flows:
            # Also on a rank whose own rows need no gradient: the backward needs every rank
            anchor = torch.empty(0, device=flows[0].device, requires_grad=True)
            journey.token = _Start.apply(journey, anchor, *flows)
        else:
            journey.there = Flight(flows, course)
        return journey

    def land(self) -> tuple[Tensor, ...]:
        """Wait for the flows."""
        if self.token is not None:
            landed: tuple[Tensor, ...] = _Land.apply(self, self.token)
            self.token = None
            return landed
        return self.take_there()

    def take_there(self) -> tuple[Tensor, ...]:
        """The landed flows, which are no longer kept here."""
        assert self.there is not None
        landed, self.there = self.there.land(), None
        return landed


class _Start(Function):
    @staticmethod
    def forward(ctx: Any, journey: Journey, anchor: Tensor, *flows: Tensor) -> Tensor:
        ctx.journey, ctx.num_flows = journey, len(flows)
        journey.there = Flight(flows, journey.course)
        return anchor.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _token: Tensor) -> tuple[Any, ...]:
        journey: Journey = ctx.journey
        assert journey.back is not None
        landed, journey.back = journey.back.land(), None
        grads: list[Tensor | None] = [None] * ctx.num_flows
        for i, grad in zip(journey.grad_flows, landed, strict=True):
            grads[i] = grad
        return None, None, *grads


class _Land(Function):
    @staticmethod
    def forward(ctx: Any, journey: Journey, token: Tensor) -> tuple[Tensor, ...]:
        ctx.journey = journey
        landed = journey.take_there()
        others = [flow for i, flow in enumerate(landed) if i not in journey.grad_flows]
        ctx.mark_non_differentiable(*others)
        return landed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        journey: Journey = ctx.journey
        wanted = [grads[i] for i in journey.grad_flows]
        journey.back = Flight(wanted, journey.course.reversed())
        return None, torch.empty(0, device=wanted[0].device)


def _is_worth(flow: Tensor, course: Course) -> bool:
    """Whether a copy of own rows takes longer than what it takes to leave it out."""
    return course.send.of_rank[course.rank] * flow[:1].nbytes >= LEAST_OWN_BYTES


def _same(rows: Tensor) -> Tensor:
    return rows


def _packed(rows: Tensor) -> Tensor:
    # Dims of size 0 or 1 may have any stride in what torch calls contiguous; bytes cannot
    if rows.is_contiguous() and rows.stride(-1) == 1:
        return rows
    return rows.new_empty(rows.shape).copy_(rows)


def as_bytes(rows: Tensor) -> Tensor:
    """Rows of any dtype as rows of bytes; the same memory."""
    flat = rows.view(rows.shape[0], math.prod(rows.shape[1:]))
    return flat.view(torch.uint8)
