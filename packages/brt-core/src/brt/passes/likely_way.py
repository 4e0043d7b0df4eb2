"""What of a graph runs where all cells go the likely way, and how."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from brt.passes.match import Scatter, argument, module_of, router_of
from brt.passes.memory import may_share, written_after
from brt.passes.speculation import decided, gathered
from brt.passes.unmoved import may_lend
from brt.routers import GatherRouter, ScatterRouter


@dataclass(frozen=True, eq=False)
class Choice:
    """A scatter, and the path that all its cells are taken to take."""

    scatter: Scatter
    path: int


class Likely:
    """Reads nodes in the order of a graph: what of them runs where cells take the chosen paths.

    What other paths give, and the routes, are not there (``hidden``): nothing outside the nodes
    that were read may ask for them. A gather takes the rows of the likely path alone.
    """

    def __init__(self, scope: nn.Module) -> None:
        self.scope = scope
        self.hidden: set[fx.Node] = set()
        self._absent: set[fx.Node] = set()
        self._choices: dict[fx.Node, Choice] = {}
        self._items: dict[fx.Node, tuple[fx.Node, int]] = {}
        self._route_of: dict[fx.Node, Choice] = {}
        self._gathers: dict[fx.Node, tuple[list[fx.Node], list[fx.Node]]] = {}

    @classmethod
    def of(cls, scope: nn.Module, nodes: Iterable[fx.Node], choices: Sequence[Choice]) -> Likely:
        """These nodes, with these choices."""
        made, choice_of = cls(scope), {choice.scatter.node: choice for choice in choices}
        for node in nodes:
            if node in choice_of:
                made.choose(choice_of[node])
            made.read(node)
        return made

    def is_absent(self, node: fx.Node) -> bool:
        """Whether a node takes what is not there."""
        return any(taken in self._absent for taken in node.all_input_nodes)

    def choose(self, choice: Choice) -> None:
        """Take a scatter's path for granted; before its node is read."""
        scatter = choice.scatter
        self._choices[scatter.node] = choice
        self.hidden.add(scatter.node)
        if scatter.rows is not None:
            self.hidden.add(scatter.rows)
        for path, start in enumerate(scatter.path_P):
            self._take(start, scatter, 0, is_there=path == choice.path)
        if scatter.route is not None:
            self.hidden.add(scatter.route)
            self._route_of[scatter.route] = choice
            for user in scatter.route.users:
                if user.target is operator.getitem:
                    self._take(user, scatter, 1, is_there=bool(user.args[1] == choice.path))

    def _take(self, node: fx.Node | None, scatter: Scatter, item: int, *, is_there: bool) -> None:
        if node is None:
            return
        if is_there:
            self._items[node] = (scatter.node, item)
        else:
            self._hide(node)

    def _hide(self, node: fx.Node) -> None:
        self._absent.add(node)
        self.hidden.add(node)

    def read(self, node: fx.Node) -> None:
        """The next node."""
        if node in self.hidden or node in self._items:
            return
        by_route = any(taken in self._route_of for taken in node.all_input_nodes)
        if not by_route and not self.is_absent(node):
            return
        there = self._there(node) if is_plain_gather(node, self.scope) else None
        if there is None:
            self._hide(node)
        else:
            self._gathers[node] = there

    def _there(self, node: fx.Node) -> tuple[list[fx.Node], list[fx.Node]] | None:
        """What a gather takes of likely paths: (rows, their cells); None for nothing."""
        rows, where = argument(node, 0, "rows"), argument(node, 1, "where")
        residual = argument(node, 2, "residual")
        if self._lacks(residual):
            return None
        if isinstance(where, fx.Node):
            choice = self._route_of.get(where)
            row = None if choice is None else rows[choice.path]
            return None if row is None or self._lacks(row) else ([row], [where])
        pairs = list(zip(rows, where, strict=True))
        if any(self._lacks(row) != (cells in self._absent) for row, cells in pairs):
            return None
        kept = [(row, cells) for row, cells in pairs if not self._lacks(row)]
        return ([row for row, _ in kept], [cells for _, cells in kept]) if kept else None

    def _lacks(self, row: Any) -> bool:
        return any(n in self._absent for n in _nodes_of(row))

    def graph(self, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Any) -> fx.Graph:
        """``f(is_early, *inputs) -> (outputs, hits)``: a flag for each chosen scatter."""
        made = fx.Graph()
        is_early = made.placeholder("is_early")
        new: dict[fx.Node, Any] = {node: made.placeholder(node.name) for node in inputs}
        hits = []
        for node in nodes:
            if node in self._choices:
                new[node] = self._decided(made, self._choices[node], new, is_early)
                hits.append(made.call_function(operator.getitem, (new[node], 2)))
            elif node in self._items:
                scatter, item = self._items[node]
                new[node] = made.call_function(operator.getitem, (new[scatter], item))
            elif node in self._gathers:
                new[node] = self._gathered(made, node, new)
            elif node not in self.hidden:
                new[node] = made.node_copy(node, new.__getitem__)
        made.output((fx.node.map_arg(outputs, new.__getitem__), hits))
        return made

    def _decided(
        self, made: fx.Graph, choice: Choice, new: dict[fx.Node, Any], is_early: fx.Node
    ) -> fx.Node:
        scatter = choice.scatter
        given = [argument(scatter.node, i, name) for i, name in enumerate(("x", "scores", "cells"))]
        router = made.get_attr(scatter.target)
        args = fx.node.map_arg(tuple(given), new.__getitem__)
        return made.call_function(
            decided, (router, *args, choice.path, self._is_copied(choice), is_early)
        )

    def _is_copied(self, choice: Choice) -> bool:
        """Whether the rows of the path must not be those that the scatter was given."""
        start = choice.scatter.path_P[choice.path]
        if start is None:
            return False
        given = _nodes_of(argument(choice.scatter.node, 0, "x"))
        written = written_after(choice.scatter.node, given, self.scope)
        return written is not None or may_share(start, self.scope) is not None

    def _gathered(self, made: fx.Graph, node: fx.Node, new: dict[fx.Node, Any]) -> fx.Node:
        rows, where = self._gathers[node]
        by_route = where[0] in self._route_of
        router = made.get_attr(str(node.target))
        if by_route:
            scatter = self._route_of[where[0]].scatter.node
            cells = [made.call_function(operator.getitem, (new[scatter], 1))]
        else:
            cells = [new[one] for one in where]
        is_lent = len(rows) == 1 and may_lend(rows[0], self.scope)
        residual = fx.node.map_arg(argument(node, 2, "residual"), new.__getitem__)
        taken = fx.node.map_arg(rows, new.__getitem__)
        return made.call_function(gathered, (router, taken, cells, residual, by_route, is_lent))


def _nodes_of(value: Any) -> list[fx.Node]:
    """The nodes in an argument."""
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return found


def is_plain_gather(node: fx.Node, scope: nn.Module) -> bool:
    """Whether a node is a gather as it comes, of rows that are listed one path at a time."""
    module = module_of(node, scope)
    if not isinstance(module, GatherRouter) or type(module).forward is not GatherRouter.forward:
        return False
    rows, where = argument(node, 0, "rows"), argument(node, 1, "where")
    return isinstance(rows, (list, tuple)) and isinstance(where, (fx.Node, list, tuple))


def unreadable(scatter: Scatter, scope: nn.Module) -> str | None:
    """Why a scatter's paths cannot be taken for granted; None where they can."""
    for node in (scatter.node, scatter.rows, scatter.route):
        for user in () if node is None else node.users:
            known = user in (scatter.rows, scatter.route, *scatter.path_P)
            if node is scatter.route:
                known = _is_item(user, scatter) or _gathers(user, scatter, scope)
                why = next((n.name for n in user.users if not _takes_cells(n, scope)), None)
                if _is_item(user, scatter) and why is not None:
                    return f"{why} looks which cells take a path"
            if not known:
                return f"{user.name} reads all its paths, or its route"
    return None


def _is_item(node: fx.Node, scatter: Scatter) -> bool:
    if node.target is not operator.getitem or not isinstance(node.args[1], int):
        return False
    return 0 <= node.args[1] < scatter.router.num_paths


def _gathers(node: fx.Node, scatter: Scatter, scope: nn.Module) -> bool:
    where = argument(node, 1, "where")
    return is_plain_gather(node, scope) and where is scatter.route


def _takes_cells(node: fx.Node, scope: nn.Module) -> bool:
    return is_plain_gather(node, scope) or isinstance(router_of(node, scope), ScatterRouter)
