"""Segments of a graph in which, by the profile, all cells are likely to go one way.

Legend: F forwards, P paths.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx, nn

from brt.passes.base import Context
from brt.passes.likely_way import Choice, Likely, unreadable
from brt.passes.match import Scatter, module_of, scatters, writes
from brt.passes.memory import fresh
from brt.routers import Router, ScatterRouter


@dataclass(frozen=True, eq=False)
class Segment:
    """Nodes in succession, and the paths that their scatters are taken to take.

    Attributes:
        scope: the region's module.
        nodes: from the first scatter to where the cells of all are together again.
        choices: the scatters that are speculated on.
        probability: that all hit, by the profile.
    """

    scope: nn.Module
    nodes: tuple[fx.Node, ...]
    choices: tuple[Choice, ...]
    probability: float

    @property
    def name(self) -> str:
        """Its first and last scatter."""
        names = [choice.scatter.name for choice in self.choices]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"

    @property
    def words(self) -> str:
        """What is assumed."""
        each = (f"path {one.path} of {one.scatter.name}" for one in self.choices)
        return f"every cell takes {', '.join(each)}"

    @property
    def inputs(self) -> list[fx.Node]:
        """What it takes from before."""
        taken = [n for node in self.nodes for n in node.all_input_nodes]
        return [n for n in dict.fromkeys(taken) if n not in self.nodes]

    @property
    def outputs(self) -> list[fx.Node]:
        """What is read behind it."""
        return [n for n in self.nodes if any(user not in self.nodes for user in n.users)]

    def replace(self, graph: fx.GraphModule, target: str) -> None:
        """Call the module in the place of the nodes."""
        outputs, inputs = self.outputs, self.inputs
        with graph.graph.inserting_after(self.nodes[-1]):
            made = graph.graph.call_module(target, tuple(inputs))
        after, results = made, [made]
        if len(outputs) != 1:
            results = []
            for i in range(len(outputs)):
                with graph.graph.inserting_after(after):
                    after = graph.graph.call_function(operator.getitem, (made, i))
                results.append(after)
        inside = set(self.nodes)
        for old, new in zip(outputs, results, strict=True):
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in inside)
        for node in reversed(self.nodes):
            graph.graph.erase_node(node)


class Search:
    """Finds segments in a graph; what is left alone is said to the context."""

    def __init__(self, graph: fx.GraphModule, ctx: Context, least_probability: float) -> None:
        self._ctx, self._least = ctx, least_probability
        self._nodes = list(graph.graph.nodes)
        self._place = {node: i for i, node in enumerate(self._nodes)}
        self._scatters = {found.node: found for found in scatters(graph.graph, ctx.scope)}
        self._why: dict[str, str] = {}

    def segments(self) -> list[Segment]:
        """Those that are likely enough, in order; they do not overlap."""
        found: list[Segment] = []
        at = 0
        while at < len(self._nodes):
            segment = self._from(at) if self._nodes[at] in self._scatters else None
            if segment is not None and segment.outputs:
                found.append(segment)
            at += 1 if segment is None else len(segment.nodes)
        for segment in found:
            for choice in segment.choices:
                self._why.pop(choice.scatter.name, None)
        for name, why in self._why.items():
            self._ctx.leave(name, why)
        return found

    def _from(self, start: int) -> Segment | None:
        """The longest segment that begins at a node."""
        likely, choices = Likely(self._ctx.scope), list[Choice]()
        alive: frozenset[int] | None = None
        best: Segment | None = None
        end = start
        total = len(self._forwards(self._scatters[self._nodes[start]]))
        for at in range(start, len(self._nodes)):
            node = self._nodes[at]
            why = self._stops(node)
            if why is not None:
                if best is None:
                    self._why.setdefault(self._scatters[self._nodes[start]].name, why)
                return best
            scatter = self._scatters.get(node)
            if scatter is not None and not likely.is_absent(node):
                taken = self._choose(scatter, alive, total)
                if taken is not None:
                    choice, alive = taken
                    choices.append(choice)
                    likely.choose(choice)
                elif at == start or at > end:
                    return best  # a router that is asked: the next segment may begin behind it
            likely.read(node)
            if node in likely.hidden:
                end = max(end, *(self._place[user] for user in node.users), at)
            if (
                at == end
                and alive is not None
                and (best is None or choices[-1] not in best.choices)
            ):
                nodes = tuple(self._nodes[start : at + 1])
                best = Segment(self._ctx.scope, nodes, tuple(choices), len(alive) / total)
        raise AssertionError("a graph without an output")

    def _stops(self, node: fx.Node) -> str | None:
        """Why a node cannot be run twice, in words."""
        scope = self._ctx.scope
        if node.op == "output":
            return "its route, or what its other paths give, is among the results"
        if writes(node, scope) and not fresh(node, scope):
            return f"{node.name}, before its cells are together again, writes in place"
        module = module_of(node, scope)
        for inner in () if module is None else module.modules():
            if isinstance(inner, Router) and inner.waits_for_others:
                return f"{node.name} waits for other processes, and cannot be run again"
        return None

    def _forwards(self, scatter: Scatter) -> frozenset[int]:
        """The forwards in which a scatter had cells."""
        seen = self._ctx.seen(scatter)
        return frozenset() if seen is None else frozenset(seen.forward_F[seen.cells_F > 0].tolist())

    def _choose(
        self, scatter: Scatter, alive: frozenset[int] | None, total: int
    ) -> tuple[Choice, frozenset[int]] | None:
        """The path that most often takes all cells where those before hit, and the forwards."""
        why = self._unfit(scatter)
        seen = self._ctx.seen(scatter)
        if why is None and (seen is None or not seen.cells or not total):
            why = "the profile never saw a cell there"
        if why is None:
            assert seen is not None
            is_all_FP = (seen.rows_FP == seen.cells_F[:, None]) & (
                seen.rows_FP.sum(1) == seen.cells_F
            )[:, None]
            hits_P = [
                frozenset(seen.forward_F[is_all_FP[:, p]].tolist())
                & (self._forwards(scatter) if alive is None else alive)
                for p in range(seen.num_paths)
            ]
            path = max(range(seen.num_paths), key=lambda p: len(hits_P[p]))
            probability = len(hits_P[path]) / total
            if probability >= self._least:
                return Choice(scatter, path), hits_P[path]
            why = (
                f"all cells took path {path} in {probability:.1%} of the forwards, less than "
                f"{self._least:.1%}"
            )
        self._why[scatter.name] = why
        return None

    def _unfit(self, scatter: Scatter) -> str | None:
        router = scatter.router
        if scatter.guarded:
            return "another pass put a module in its place"
        if type(router).forward is not ScatterRouter.forward:
            return f"{type(router).__name__} has a forward of its own"
        if router.result == "packed" or router.weighted or router.per_path:
            return "it changes rows on the way: they are packed, weighted, or per path"
        if router.inherit_weights:
            return "its weights are those of the route before too"
        return unreadable(scatter, self._ctx.scope)
