"""Regions with exits as CUDA graphs: for one cell, what is behind an exit is a conditional node.

Packages of kernels say through `offer` how such a node is made.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from brt.errors import PassError
from brt.passes.match import Chain, argument, chains, module_of, router_of, scatters, writes
from brt.passes.memory import fresh, owner
from brt.routers import EarlyExit, GatherRouter, LoopRouter, ScatterRouter
from brt.routers.scatter import _widened

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


class CannotCaptureError(Exception):
    """What runs cannot be one graph, for reasons that only running it shows."""


class OneCell:
    """Runs a region on one cell, an exit after the other, as a straight line or as it is captured.

    Raises `PassError` for a region that is not of this form: scatters of two paths of which a cell
    takes one, and gathers of all cells.
    """

    def __init__(self, graph: fx.Graph, scope: nn.Module) -> None:
        self._scope = (scope,)
        self._graph = graph
        self._chain_of = chains(graph, scope)
        _check(graph, scope, self._chain_of)
        self._needed = _needed(graph, scope)
        self._gather_of: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            if isinstance(router_of(node, scope), GatherRouter):
                for row in argument(node, 0, "rows"):
                    self._gather_of.setdefault(row, []).append(node)
        self.num_levels = max(map(len, self._chain_of.values()), default=0)

    def __deepcopy__(self, memo: dict[int, Any]) -> OneCell:
        twin = copy.copy(self)
        # Not read anew: while a model is copied, it is not whole yet
        twin._scope = (copy.deepcopy(self._scope[0], memo),)
        return twin

    def straight(self, inputs: Sequence[Any], streams: Sequence[Any]) -> _Run:
        """Every stage runs, whatever exits say: kernels are chosen, and shapes are found."""
        run = _Run(self, streams, {}, None)
        run.all_of(inputs)
        return run

    def captured(self, inputs: Sequence[Any], streams: Sequence[Any], like: _Run) -> Any:
        """What the region gives; the current stream captures it."""
        merged = {node: torch.zeros_like(value) for node, value in like.merged.items()}
        return _Run(self, streams, merged, next(iter(_makers.values()))).all_of(inputs)


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
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(scope)
        if node.op == "call_module":
            return scope.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _scattered(self, node: fx.Node, router: ScatterRouter, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["x"]
        scores = args[1] if len(args) > 1 else kwargs["scores"]
        if scores.shape[0] != 1:
            raise CannotCaptureError(f"{node.name} has {scores.shape[0]} cells")
        decision = router.protocol(_widened(scores), router.num_paths)
        choice_NK = decision.choice_NK
        if choice_NK is None or choice_NK.shape[1] != 1 or decision.weight is not None:
            raise CannotCaptureError(f"{node.name} takes several paths, or weights them")
        for p in range(router.num_paths):
            self._flags[node, p] = choice_NK.view(1) == p
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
            stack.enter_context(self._body(len(self._open), self._flags[at]))
            self._open.append((at, stack))
            self._entered.add(at[0])

    def _leave_to(self, chain: Chain) -> None:
        here = [at for at, _ in self._open]
        while here and tuple(here) != chain[: len(here)]:
            here.pop()
            self._open.pop()[1].close()

    @contextmanager
    def _body(self, level: int, flag_1: Tensor) -> Iterator[None]:
        stream, around = self._streams[level], torch.cuda.current_stream()
        if self._maker is None:
            stream.wait_stream(around)
            with torch.cuda.stream(stream):
                yield
            around.wait_stream(stream)
            return
        begin, end = self._maker
        begin(flag_1, stream.cuda_stream)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            end(stream.cuda_stream)


def _check(graph: fx.Graph, scope: nn.Module, chain_of: dict[fx.Node, Chain]) -> None:
    """Raise `PassError` where a region is not of the form that is captured."""
    found = scatters(graph, scope)
    for one in found:
        router = one.router
        plain = type(router).forward is ScatterRouter.forward and not one.guarded
        plain = plain and not (router.weighted or router.inherit_weights or router.per_path)
        if not plain or router.result != "paths" or router.num_paths != 2:
            raise PassError(f"{one.name} is no exit: a plain scatter of two paths")
    for node in graph.nodes:
        _check_node(node, scope)
        if writes(node, scope) and not _writes_own(node, scope, chain_of):
            raise PassError(f"{node.name} writes in place, perhaps to rows of another path")
    if not found:
        raise PassError("it has no exits")


def _check_node(node: fx.Node, scope: nn.Module) -> None:
    router, module = router_of(node, scope), module_of(node, scope)
    if isinstance(router, GatherRouter):
        rows = argument(node, 0, "rows")
        plain = router.result == "all" and not router.add_residual
        if not plain or not isinstance(rows, (list, tuple)):
            raise PassError(f"{node.name} does not gather all cells from a list of rows")
        if module is not router or router.overflow != "drop":
            raise PassError(f"{node.name} treats cells without a row in a way of its own")
    elif isinstance(router, (EarlyExit, LoopRouter)):
        raise PassError(f"{node.name} is one node with its exits inside")
    elif not isinstance(router, ScatterRouter) and hasattr(module, "_scope"):
        raise PassError(f"another pass put {node.target} there")


def _writes_own(node: fx.Node, scope: nn.Module, chain_of: dict[fx.Node, Chain]) -> bool:
    """Whether a node writes to what a node of the same branch has made."""
    target = node.args[0] if node.args else None
    if not isinstance(target, fx.Node):
        return False
    made = owner(target, scope)
    own = fresh(made, scope) and router_of(made, scope) is None
    return own and chain_of[made] == chain_of[node]


def _needed(graph: fx.Graph, scope: nn.Module) -> set[fx.Node]:
    """What the result is made of; which cells rows are is not asked, for there is one."""
    needed: set[fx.Node] = set()
    todo = [node for node in graph.nodes if node.op == "output"]
    while todo:
        node = todo.pop()
        if node in needed:
            continue
        needed.add(node)
        router = router_of(node, scope)
        if isinstance(router, GatherRouter):
            todo += list(argument(node, 0, "rows"))
        elif isinstance(router, ScatterRouter):
            x = argument(node, 0, "x")
            todo += [*(x if isinstance(x, (list, tuple)) else [x]), argument(node, 1, "scores")]
        else:
            todo += node.all_input_nodes
    return needed


def different_streams(num: int) -> list[Any]:
    """Different streams: torch hands out the same ones again after a while."""
    found: dict[int, Any] = {}
    while len(found) < num:
        stream = torch.cuda.Stream()
        found.setdefault(stream.cuda_stream, stream)
    return list(found.values())
