"""The nodes of a graph that work on the rows of one path, and moving them into one module."""

from __future__ import annotations

import heapq
import operator
from dataclasses import dataclass

from torch import fx, nn

from brt.passes.base import Context
from brt.passes.match import Chain, Scatter, argument, router_of, writes
from brt.routers import GatherRouter, ScatterRouter

_REDUCTIONS = (
    "sum", "mean", "prod", "max", "min", "amax", "amin", "var", "std", "norm", "any", "all",
    "logsumexp", "argmax", "argmin", "median",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Union:
    """A gather whose result is a union of rows, which may be empty as those of a path."""

    node: fx.Node


class Branch:
    """The nodes that work on the rows of one path (or of a union, path 0), and on no others.

    A node is ``inside`` if what it takes comes from the path's rows or from before the scatter, and
    without rows its result is empty, as far as the sample (``nothing``) or its name tells; what is
    wrong about that costs time only. What depends on the branch and is not inside is `behind` it.
    """

    def __init__(
        self,
        scope: nn.Module,
        scatter: Scatter | Union,
        path: int,
        start: fx.Node,
        chain_of: dict[fx.Node, Chain],
        nothing: dict[fx.Node, bool],
    ) -> None:
        self.scope = scope
        self.starts = {start}
        if isinstance(argument(scatter.node, 0, "x"), (tuple, list)):
            self.starts |= {n for n in start.users if n.target is operator.getitem}
        self.inside: dict[fx.Node, None] = {}
        self._start = start
        self._nothing = nothing
        self._is_behind: dict[fx.Node, bool] = {}
        # In the order of the graph, so that what a node takes is known before it
        todo = [user for node in self.starts for user in node.users if user not in self.starts]
        heapq.heapify(todo)
        while todo:
            node = heapq.heappop(todo)
            if node in self.inside or node in self._is_behind:
                continue
            own = (scatter.node, path) in chain_of.get(node, ())
            own = own and not any(self.behind(n) for n in node.all_input_nodes)
            if own and self._stays_empty(node):
                self.inside[node] = None
                for user in node.users:
                    heapq.heappush(todo, user)
            else:
                self._is_behind[node] = True

    def behind(self, node: fx.Node) -> bool:
        """Whether a node outside the branch depends on it."""
        todo = [node]
        while todo:
            one = todo[-1]
            if one in self._is_behind or one in self.inside or one in self.starts:
                todo.pop()
                continue
            # What comes before the branch cannot depend on it
            taken = [n for n in one.all_input_nodes if self._start < n]
            unknown = [n for n in taken if not (n in self._is_behind or self._own(n))]
            if unknown:
                todo += unknown
            else:
                self._is_behind[one] = any(self._own(n) or self._is_behind[n] for n in taken)
                todo.pop()
        return self._is_behind.get(node, False)

    def _own(self, node: fx.Node) -> bool:
        return node in self.inside or node in self.starts

    def _stays_empty(self, node: fx.Node) -> bool:
        """Whether a node gives nothing where the path has no rows."""
        router = router_of(node, self.scope)
        if isinstance(router, ScatterRouter) or is_route(node, self.scope):
            return True
        if isinstance(router, GatherRouter):
            where = argument(node, 1, "where")
            if not isinstance(where, fx.Node) or where not in self.inside:
                return False
        elif node.target is not operator.getitem and any(
            is_route(n, self.scope) for n in node.all_input_nodes
        ):
            return False
        if writes(node, self.scope) and not self._writes_own(node):
            return False
        if node.op in ("call_function", "call_method"):
            name = str(getattr(node.target, "__name__", node.target))
            return self._nothing.get(node, name not in _REDUCTIONS)
        return self._nothing.get(node, True)

    def inputs(self) -> list[fx.Node]:
        """What the branch takes from outside; rows of the path first."""
        taken = [n for node in self.inside for n in node.all_input_nodes if n not in self.inside]
        rows = [n for n in taken if n in self.starts]
        return list(dict.fromkeys([*rows, *taken]))

    def outputs(self) -> list[fx.Node]:
        """What of the branch is read outside."""
        return [n for n in self.inside if any(user not in self.inside for user in n.users)]

    def unmovable(self) -> str | None:
        """Why the branch must stay where it is; None where it can move."""
        outputs = self.outputs()
        for node in outputs:
            if isinstance(router_of(node, self.scope), ScatterRouter) or is_route(node, self.scope):
                return f"the route of {node.name} is read outside the branch"
        between = self._between()
        for node in (*between, *self.inside):
            if writes(node, self.scope):
                if node not in self.inside:
                    return f"{node.name} writes in place between its nodes"
                if any(self.behind(n) for n in between):
                    return f"{node.name} writes in place, and others read the branch before its end"
        return None

    def _between(self) -> list[fx.Node]:
        """The nodes of others between the first and the last of the branch."""
        node, last = next(iter(self.inside)), next(reversed(self.inside))
        found = []
        while node is not last:
            node = node.next
            if node not in self.inside:
                found.append(node)
        return found

    def _writes_own(self, node: fx.Node) -> bool:
        target = node.args[0] if node.args else None
        return isinstance(target, fx.Node) and self._own(target)

    def graph(self) -> fx.Graph:
        """The branch alone."""
        alone = fx.Graph()
        copied = {node: alone.placeholder(node.name) for node in self.inputs()}
        for node in self.inside:
            copied[node] = alone.node_copy(node, copied.__getitem__)
        outputs = [copied[node] for node in self.outputs()]
        alone.output(outputs[0] if len(outputs) == 1 else tuple(outputs))
        return alone

    def move(self, graph: fx.GraphModule, ctx: Context, module: nn.Module, name: str) -> fx.Node:
        """Put one call of a module in the place of the branch."""
        inputs, outputs = self.inputs(), self.outputs()
        last = next(reversed(self.inside))
        late = [node for node in self._between() if self.behind(node)]
        target = ctx.insert(graph, module, name)
        with graph.graph.inserting_after(last):
            made = graph.graph.call_module(target, tuple(inputs))
        after, results = made, [made]
        if len(outputs) > 1:
            results = []
            for i in range(len(outputs)):
                with graph.graph.inserting_after(after):
                    after = graph.graph.call_function(operator.getitem, (made, i))
                results.append(after)
        for node in late:
            after.append(node)
            after = node
        for old, new in zip(outputs, results, strict=True):
            old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in self.inside)
        for node in reversed(self.inside):
            graph.graph.erase_node(node)
        return made


def is_route(node: fx.Node, scope: nn.Module) -> bool:
    """Whether a node is the route of a scatter."""
    if node.target is not operator.getitem or node.args[1] != 1:
        return False
    return isinstance(router_of(node.args[0], scope), ScatterRouter)  # type: ignore[arg-type]
