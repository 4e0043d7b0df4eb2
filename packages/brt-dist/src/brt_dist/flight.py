"""Rows on their way between ranks: started, landed, and brought back as gradients.

Rows travel as bytes, so that every dtype can. Two autograd nodes stand for a journey: the one that
starts it and the one that lands it, joined by an empty token. Their backwards start and land the
gradients' journey the other way, so that compute overlaps there too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from brt_dist.groups import Group, naming_failures


@dataclass(frozen=True)
class Course:
    """Rows that this rank sends to, and receives from, each rank of a group."""

    what: str
    group: Group
    send: list[int]
    receive: list[int]

    def reversed(self) -> Course:
        """The way back."""
        return Course(self.what, self.group, self.receive, self.send)


class Flight:
    """Flows under way; nobody may read the buffers until `land`."""

    def __init__(self, flows: Sequence[Tensor], course: Course) -> None:
        self._course = course
        self._buffers: list[Tensor] = []
        self._works: list[dist.Work] = []
        # The backend reads these until the flight has landed
        self._sent = [_packed(flow.detach()) for flow in flows]
        num_received = sum(course.receive)
        for flow in self._sent:
            buffer = flow.new_empty((num_received, *flow.shape[1:]))
            self._buffers.append(buffer)
            if math.prod(flow.shape[1:]):
                self._start(buffer, flow)

    def _start(self, buffer: Tensor, flow: Tensor) -> None:
        course, (received, sent) = self._course, map(as_bytes, (buffer, flow))
        with naming_failures(course.what, course.group):
            work = dist.all_to_all_single(
                received, sent, course.receive, course.send, group=course.group, async_op=True
            )
        assert work is not None
        self._works.append(work)

    def land(self) -> tuple[Tensor, ...]:
        """Wait for the rows."""
        with naming_failures(self._course.what, self._course.group):
            for work in self._works:
                work.wait()
        self._works, self._sent = [], []
        return tuple(self._buffers)


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


def _packed(rows: Tensor) -> Tensor:
    # Dims of size 0 or 1 may have any stride in what torch calls contiguous; bytes cannot
    if rows.is_contiguous() and rows.stride(-1) == 1:
        return rows
    return rows.new_empty(rows.shape).copy_(rows)


def as_bytes(rows: Tensor) -> Tensor:
    """Rows of any dtype as rows of bytes; the same memory."""
    flat = rows.view(rows.shape[0], math.prod(rows.shape[1:]))
    return flat.view(torch.uint8)
