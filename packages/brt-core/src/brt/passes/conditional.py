"""Regions with exits as CUDA graphs: for one cell, what is behind an exit is a conditional node.

For several cells see `brt.passes.exit_batches`. Packages of kernels say through `offer` how such a
node is made.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from brt.passes.exit_region import CannotCaptureError, ExitRegion, choice_of, value_of
from brt.passes.match import Chain, router_of
from brt.routers import GatherRouter, ScatterRouter

Begin = Callable[[Tensor, int], Any]
"""``begin(flag_1, stream)``: what ``stream`` captures from here on runs only if the flag is set."""
End = Callable[[int], Any]
"""``end(stream)``: no more of it."""

_makers: dict[str, tuple[Begin, End]] = {}


def offer(name: str, begin: Begin, end: End) -> None:
    """Say how conditional nodes are made while the current stream is captured."""
    _makers[name] = begin, end


def can_capture() -> bool:
    """Whether some package makes them."""
    return bool(_makers)


class OneCell(ExitRegion):
    """Runs a region on one cell, exit after exit, as a straight line or as it is captured."""

    def straight(self, inputs: Sequence[Any], streams: Sequence[Any]) -> _Run:
        """Every stage runs, whatever exits say: kernels are chosen, and shapes are found."""
        run = _Run(self, streams, {}, None)
        run.all_of(inputs)
        return run

    def captured(self, inputs: Sequence[Any], streams: Sequence[Any], like: _Run) -> Any:
        """What the region gives; the current stream captures it."""
        merged = {node: torch.zeros_like(value) for node, value in like.merged.items()}
        return _Run(self, streams, merged, the_maker()).all_of(inputs)


class _Run:
    """One run: the values so far, and the bodies that are open."""

    def __init__(
        self,
        what: OneCell,
        streams: Sequence[Any],
        merged: dict[fx.Node, Tensor],
        maker: tuple[Begin, End] | None,
    ) -> None:
        self._what, self._streams, self._maker = what, streams, maker
        self.merged = merged
        """The result of each gather, which exits write to."""
        self._values: dict[fx.Node, Any] = {}
        self._flags: dict[tuple[fx.Node, int], Tensor] = {}
        self._open: list[tuple[tuple[fx.Node, int], ExitStack]] = []
        self._entered: set[fx.Node] = set()

    def all_of(self, inputs: Sequence[Any]) -> Any:
        given = iter(inputs)
        try:
            for node in self._what._graph.nodes:
                if node.op == "placeholder":
                    self._values[node] = next(given)
                elif node.op == "output":
                    self._leave_to(())
                    return fx.node.map_arg(node.args[0], self._values.__getitem__)
                elif node in self._what._needed:
                    self._values[node] = self._value(node)
                    self._deliver(node)
        finally:
            self._leave_to(())
        raise AssertionError("a graph without an output")

    def _value(self, node: fx.Node) -> Any:
        scope = self._what._scope[0]
        router, chain = router_of(node, scope), self._what._chain_of[node]
        if isinstance(router, GatherRouter):
            self._leave_to(chain)
            return self.merged[node]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.get)
        if node.target is operator.getitem:  # no work: it needs no body
            return operator.getitem(*args)
        self._enter(chain)
        if isinstance(router, ScatterRouter):
            return self._scattered(node, router, args, kwargs)
        return value_of(node, scope, args, kwargs)

    def _scattered(self, node: fx.Node, router: ScatterRouter, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["x"]
        scores = args[1] if len(args) > 1 else kwargs["scores"]
        if scores.shape[0] != 1:
            raise CannotCaptureError(f"{node.name} has {scores.shape[0]} cells")
        choice_N = choice_of(node, router, scores)
        for p in range(router.num_paths):
            self._flags[node, p] = choice_N == p
        flows = x if isinstance(x, Tensor) else tuple(x)
        return (flows,) * router.num_paths, None

    def _deliver(self, node: fx.Node) -> None:
        """Write a branch's result where its gather's result is."""
        for gather in self._what._gather_of.get(node, ()):
            value, chain = self._values[node], self._what._chain_of[node]
            last = chain[-1][0] if chain else None
            here = tuple(at for at, _ in self._open)
            # Rows that leave as they came need no body: those that stay write over them
            if not (chain and here == chain[:-1] and last not in self._entered):
                self._enter(chain)
            elif last is not None:
                self._entered.add(last)
            if self._maker is None:
                self.merged[gather] = value
            else:
                self.merged[gather].copy_(value)

    def _enter(self, chain: Chain) -> None:
        """Open the bodies that a node belongs to, and close the others."""
        self._leave_to(chain)
        for at in chain[len(self._open) :]:
            stack = ExitStack()
            stream = self._streams[len(self._open)]
            stack.enter_context(body(self._maker, stream, self._flags[at]))
            self._open.append((at, stack))
            self._entered.add(at[0])

    def _leave_to(self, chain: Chain) -> None:
        here = [at for at, _ in self._open]
        while here and tuple(here) != chain[: len(here)]:
            here.pop()
            self._open.pop()[1].close()


@contextmanager
def body(maker: tuple[Begin, End] | None, stream: Any, flag_1: Tensor) -> Iterator[None]:
    """What is captured in the block runs only if the flag is set; it runs where nobody captures."""
    around = torch.cuda.current_stream()
    if maker is None:
        stream.wait_stream(around)
        with torch.cuda.stream(stream):
            yield
        around.wait_stream(stream)
        return
    begin, end = maker
    begin(flag_1, stream.cuda_stream)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        end(stream.cuda_stream)


def the_maker() -> tuple[Begin, End]:
    """How conditional nodes are made."""
    return next(iter(_makers.values()))


def different_streams(num: int) -> list[Any]:
    """Different streams: torch hands out the same ones again after a while."""
    found: dict[int, Any] = {}
    while len(found) < num:
        stream = torch.cuda.Stream()
        found.setdefault(stream.cuda_stream, stream)
    return list(found.values())
