"""defer-operations: work that only the cells of one path need moves behind the scatter."""

from __future__ import annotations

import heapq
import operator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from brt.cellflow.analysis import cellflow_with_rows
from brt.cellflow.states import Flow, Size, same
from brt.errors import PassError
from brt.passes.base import Call, Context, Pass
from brt.passes.match import (
    Chain,
    Scatter,
    argument,
    chains,
    draws_random,
    flows_read,
    module_of,
    router_of,
    scatters,
    takes_items,
    writes,
)
from brt.passes.memory import fresh
from brt.routers import ScatterRouter

_WORK = (
    "conv1d", "conv2d", "conv3d", "linear", "matmul", "mm", "bmm", "einsum", "interpolate",
    "scaled_dot_product_attention", "conv_transpose2d",
)  # fmt: skip


@dataclass(frozen=True)
class DeferOperations(Pass):
    """Move what only the cells of one path need behind the scatter that decides.

    A flow that one path alone reads need not be there before the scatter has decided. What computes
    it, and nothing else, moves behind the scatter, onto the rows of that path; what that takes
    travels in the flow's place. It may move where every row is computed by itself (`cellflow`).

    Args:
        most_nodes: larger graphs are refused: following cells takes some 10 ms a node.
    """

    most_nodes: int = 1500

    name: ClassVar[str] = "defer-operations"
    after: ClassVar[tuple[str, ...]] = ("fuse-conv-chains", "fuse-horizontal")

    def requires(self, graph: fx.GraphModule, ctx: Context) -> None:
        """A sample, for the shapes, and no random numbers."""
        if not ctx.sample:
            raise PassError(
                "shapes are needed to tell which work keeps cells apart: brt.optimize(..., "
                "sample=batch)"
            )
        num_nodes = len(graph.graph.nodes)
        if num_nodes > self.most_nodes:
            raise PassError(
                f"the graph has {num_nodes} nodes, and following cells through more than "
                f"{self.most_nodes} takes long; DeferOperations(most_nodes=...) allows it"
            )
        random = draws_random(graph.graph, ctx.scope)
        if random is not None:
            raise PassError(f"the region draws random numbers: {random}")

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Defer work at each scatter, the first one first: what moves may move on at the next."""
        found = scatters(graph.graph, ctx.scope)
        places = [i for i, scatter in enumerate(found) if _may_defer(scatter)]
        view = _View.of(graph, ctx)
        # Where nothing hangs on one path alone, there is nothing to follow cells for
        if not any(
            _Deferral(graph, ctx, found[i], path, view, None).has_work()
            for i in places
            for path in range(found[i].router.num_paths)
        ):
            return False
        rows = _Rows(*cellflow_with_rows(graph, _as_batch(ctx.sample[0], graph)))
        changed = False
        for i in places:
            for path in range(found[i].router.num_paths):
                if _Deferral(graph, ctx, found[i], path, view, rows).apply():
                    found, view = scatters(graph.graph, ctx.scope), _View.of(graph, ctx)
                    changed = True
        return changed


@dataclass(frozen=True, eq=False)
class _View:
    """What is known of a graph as it is: on whose rows nodes work, and which need no input."""

    chain_of: dict[fx.Node, Chain]
    constant: set[fx.Node]

    @classmethod
    def of(cls, graph: fx.GraphModule, ctx: Context) -> _View:
        return cls(chains(graph.graph, ctx.scope), _constants(graph.graph))


@dataclass(eq=False)
class _Rows:
    """What nodes do with cells, and of how many rows their results are."""

    flows: dict[fx.Node, Flow]
    size: dict[fx.Node, Size] = field(default_factory=dict)

    def keeps(self, node: fx.Node) -> bool:
        return node in self.flows and self.flows[node].kind == "keeps"


def _as_batch(call: Call, graph: fx.GraphModule) -> Any:
    if not call.kwargs:
        return call.args
    names = [str(node.target) for node in graph.graph.nodes if node.op == "placeholder"]
    return dict(zip(names, call.args, strict=False)) | call.kwargs


def _may_defer(scatter: Scatter) -> bool:
    """Whether a scatter is one whose flows may change, and some are read on one path only."""
    router = scatter.router
    x = argument(scatter.node, 0, "x")
    several = isinstance(x, (tuple, list))
    if scatter.guarded or router.result == "packed" or router.weighted or router.per_path:
        return False
    if type(router).forward is not ScatterRouter.forward or (several and not _all_nodes(x)):
        return False
    if several and not all(start is None or takes_items(start) for start in scatter.path_P):
        return False
    return any(len(readers) == 1 for readers in _readers(scatter).values())


def _all_nodes(values: Any) -> bool:
    return all(isinstance(value, fx.Node) for value in values)


def _readers(scatter: Scatter) -> dict[int, list[int]]:
    """Flow -> the paths that read it."""
    found: dict[int, list[int]] = {}
    for path, flows in enumerate(flows_read(scatter)):
        for flow in flows:
            found.setdefault(flow, []).append(path)
    return found


@dataclass(frozen=True, eq=False)
class _Last:
    """A node in a heap whose first is the last one in the graph."""

    node: fx.Node

    def __lt__(self, other: _Last) -> bool:
        return other.node < self.node


class _Deferral:
    """What may move behind one scatter onto the rows of one of its paths."""

    def __init__(
        self,
        graph: fx.GraphModule,
        ctx: Context,
        scatter: Scatter,
        path: int,
        view: _View,
        rows: _Rows | None,
    ) -> None:
        self.graph, self.ctx, self.scatter, self.path = graph, ctx, scatter, path
        self.rows = rows or _Rows({})
        self.is_guess = rows is None
        self.chain_of, self.constant = view.chain_of, view.constant
        x = argument(self.scatter.node, 0, "x")
        self.several = isinstance(x, (tuple, list))
        self.flows: list[fx.Node] = list(x) if self.several else [x]
        readers = _readers(self.scatter)
        self.only_here = [i for i in range(len(self.flows)) if readers.get(i) == [path]]

    def has_work(self) -> bool:
        """Whether anything might move, if all nodes kept cells apart."""
        return bool(self.only_here and self._worthwhile(self._movable()))

    def apply(self) -> bool:
        """Move it; whether there was anything."""
        if not self.only_here:
            return False
        moving = self._worthwhile(self._movable())
        if not moving:
            return False
        writer = self._writer(moving)
        if writer is not None:
            self.ctx.leave(self.scatter.name, f"{writer} writes in place before it")
            return False
        taken = [n for node in moving for n in node.all_input_nodes]
        needed = [n for n in dict.fromkeys(taken) if n not in moving and n not in self.constant]
        self._move(moving, needed)
        work = [node.name for node in moving if _is_work(node, self.ctx)]
        self.ctx.note(
            f"{self.scatter.name}: {len(moving)} nodes that only path {self.path} needs moved "
            f"behind it, {len(work)} of them layers: {', '.join(work[:8])}"
            f"{', ...' if len(work) > 8 else ''}"
        )
        return True

    def _movable(self) -> dict[fx.Node, None]:
        """Nodes that nothing but flows of this path depends on, in the order of the graph."""
        allowed = {self.flows[i] for i in self.only_here}
        others = {n for i, n in enumerate(self.flows) if i not in self.only_here}
        others |= {n for n in self.scatter.node.all_input_nodes if n not in allowed}
        scores = argument(self.scatter.node, 1, "scores")
        others |= {scores, argument(self.scatter.node, 2, "cells")}
        found: set[fx.Node] = set()
        heap = [_Last(node) for node in allowed - others]
        heapq.heapify(heap)
        while heap:
            node = heapq.heappop(heap).node
            if node in found or node in others:
                continue
            is_only_here = all(u in found or u is self.scatter.node for u in node.users)
            if is_only_here and self._may_move(node):
                found.add(node)
                for taken in node.all_input_nodes:
                    heapq.heappush(heap, _Last(taken))
        while True:
            lost = {n for n in found if not self._stands(n, found)}
            if not lost:
                break
            found -= lost
        return dict.fromkeys(sorted(found))

    def _may_move(self, node: fx.Node) -> bool:
        if not node.op.startswith("call_") or router_of(node, self.ctx.scope) is not None:
            return False
        if self._is_part_of_router(node) or node in self.constant:
            return False
        if not (self.is_guess or self.rows.keeps(node)):
            return False
        if self.chain_of.get(node) != self.chain_of.get(self.scatter.node):
            return False
        return not writes(node, self.ctx.scope) or fresh(node, self.ctx.scope)

    def _is_part_of_router(self, node: fx.Node) -> bool:
        while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            node = node.args[0]
            if router_of(node, self.ctx.scope) is not None:
                return True
        return False

    def _stands(self, node: fx.Node, found: set[fx.Node]) -> bool:
        """Whether all that reads a node moves too, and all that it takes moves or can travel."""
        if not all(u in found or u is self.scatter.node for u in node.users):
            return False
        return all(
            n in found or n in self.constant or self._is_rows(n) for n in node.all_input_nodes
        )

    def _is_rows(self, node: fx.Node) -> bool:
        """Whether a node gives one tensor with a row for each cell of the scatter."""
        if self.is_guess:
            return True
        here = self.rows.size.get(self.flows[0])
        there = self.rows.size.get(node)
        return here is not None and there is not None and same(here, there)

    def _worthwhile(self, movable: dict[fx.Node, None]) -> dict[fx.Node, None]:
        """Those that hang together with a layer: moving others saves nothing."""
        kept: set[fx.Node] = set()
        for node in movable:
            if _is_work(node, self.ctx) and node not in kept:
                todo = [node]
                while todo:
                    one = todo.pop()
                    if one not in kept:
                        kept.add(one)
                        near = (*one.all_input_nodes, *one.users)
                        todo += [n for n in near if n in movable]
        return {node: None for node in movable if node in kept}

    def _writer(self, moving: dict[fx.Node, None]) -> str | None:
        """The name of a node that writes in place between the work and the scatter."""
        node = next(iter(moving))
        while node is not self.scatter.node:
            if writes(node, self.ctx.scope) and not fresh(node, self.ctx.scope):
                return node.name
            node = node.next
        return None

    def _move(self, moving: dict[fx.Node, None], needed: list[fx.Node]) -> None:
        """Let the scatter take ``needed`` in place of what moves."""
        kept = [i for i, flow in enumerate(self.flows) if flow not in moving]
        flows = list(dict.fromkeys([*(self.flows[i] for i in kept), *needed]))
        place = {i: flows.index(self.flows[i]) for i in kept}
        self._give(tuple(flows))
        for path, start in enumerate(self.scatter.path_P):
            if start is not None:
                made = self._items(start, flows)
                if path == self.path:
                    last = made[-1]
                    for node in moving:
                        for n in needed:
                            node.replace_input_with(n, made[flows.index(n)])
                        last.append(node)
                        last = node
                        self.rows.size[node] = self.rows.size[made[0]]
                self._redirect(start, made, place)

    def _give(self, flows: tuple[fx.Node, ...]) -> None:
        node = self.scatter.node
        if node.args:
            node.args = (flows, *node.args[1:])
        else:
            node.kwargs = {**node.kwargs, "x": flows}

    def _items(self, start: fx.Node, flows: list[fx.Node]) -> list[fx.Node]:
        """New nodes for the flows of a path, behind the node of its rows."""
        olds = [start] if not self.several else list(start.users)
        num_rows = next((self.rows.size[n] for n in olds if n in self.rows.size), None)
        made, after = [], start
        for j in range(len(flows)):
            with self.graph.graph.inserting_after(after):
                after = self.graph.graph.call_function(operator.getitem, (start, j))
            made.append(after)
            if num_rows is not None:
                self.rows.size[after] = num_rows
        return made

    def _redirect(self, start: fx.Node, made: list[fx.Node], place: dict[int, int]) -> None:
        """Let readers of the old flows of a path read the new ones, or what moved."""
        new = set(made)
        if not self.several:
            to = made[place[0]] if 0 in place else self.flows[0]
            start.replace_all_uses_with(to, delete_user_cb=lambda user: user not in new)
            return
        for old in [user for user in start.users if user not in new]:
            item: Any = old.args[1]
            flow = item % len(self.flows)
            moved = self.flows[flow]
            old.replace_all_uses_with(made[place[flow]] if flow in place else moved)
            self.graph.graph.erase_node(old)


def _constants(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on no input."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op.startswith("call_") and all(n in found for n in node.all_input_nodes)
        ):
            found.add(node)
    return found


def _is_work(node: fx.Node, ctx: Context) -> bool:
    """Whether a node is worth moving: a layer with weights, or a product."""
    module = module_of(node, ctx.scope)
    if module is not None:
        return next(module.parameters(), None) is not None
    return str(getattr(node.target, "__name__", node.target)) in _WORK
