"""What of a graph is work, and what flows between: the rest is unpacking, sizes and parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from brt.report.data import GraphView, NodeView

AS_IS = ".as_is"
"""Ends the name of the node that stands for rows of a path that nothing is done to."""


class _Source(NamedTuple):
    """Where a value comes from."""

    node: NodeView
    item: NodeView | None
    """What took the rows of one path out of a scatter's result, on the way."""
    beside: bool
    """Whether it is a size, an attribute or a route: not the rows themselves."""


class Flow:
    """The nodes that the output needs and that do something, and the edges between them."""

    def __init__(self, view: GraphView) -> None:
        nodes = list(_each_opened(view.nodes))
        needed = _needed(nodes)
        sources = _sources(nodes)
        self.nodes: list[NodeView] = []
        edges: dict[tuple[str, str], bool] = {}
        for node in nodes:
            if node.name not in needed or not any(s.node is node for s in sources[node.name]):
                continue
            for source in (s for name in node.inputs for s in sources[name]):
                key = (source.node.name, node.name)
                if source.item is not None and not source.beside and node.kind == "gather":
                    made = replace(source.item, name=f"{source.item.name}{AS_IS}", kind="branch")
                    if (key[0], made.name) not in edges:
                        self.nodes.append(made)
                    edges[key[0], made.name] = edges[made.name, node.name] = False
                else:
                    edges[key] = edges.get(key, True) and source.beside
            self.nodes.append(node)
        # What goes beside the rows is drawn only where no rows go the same way
        every = list(edges)
        self.edges = [e for e, beside in edges.items() if not (beside and _reaches(every, *e))]


def _each_opened(nodes: Sequence[NodeView]) -> Iterator[NodeView]:
    """``brt.each`` as the calls that it makes: one module on each path."""
    calls: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        inputs = tuple(name for i in node.inputs for name in calls.get(i, (i,)))
        if inputs != node.inputs and node.op == "call_function" and _is_item(node):
            calls[node.name] = inputs  # one of the results: which one is not known
            continue
        node = replace(node, inputs=tuple(dict.fromkeys(inputs)))
        num_paths = len(node.inputs) // 2
        if node.target.endswith("grouped.each") and num_paths and len(node.inputs) % 2 == 0:
            known = {other.name: other for other in nodes}
            made = [
                replace(
                    known[path],
                    name=f"{node.name}.{i}",
                    op="call_module",
                    target=known[module].target,
                    type=known[module].type,
                    kind="branch",
                    inputs=(path,),
                    users=node.users,
                )
                for i, (module, path) in enumerate(
                    zip(node.inputs[:num_paths], node.inputs[num_paths:], strict=True)
                )
                if module in known and path in known
            ]
            if len(made) == num_paths:
                calls[node.name] = tuple(call.name for call in made)
                yield from made
                continue
        yield node


def _is_item(node: NodeView) -> bool:
    return node.op == "call_function" and node.target.endswith("getitem") and len(node.inputs) == 1


def _is_side(node: NodeView, side: set[str]) -> bool:
    """Whether a node reads an attribute or a size, or reckons with those only."""
    if node.op == "call_method" and node.target in ("size", "dim"):
        return True
    if node.op != "call_function":
        return False
    if node.target.endswith("getattr"):
        return True
    reckons = node.target.startswith(("operator.", "_operator."))
    return reckons and bool(node.inputs) and side.issuperset(node.inputs)


def _needed(nodes: Sequence[NodeView]) -> set[str]:
    """What the output depends on, and scatters, whose paths may all be unused."""
    needed: set[str] = set()
    for node in reversed(nodes):
        if node.kind in ("output", "scatter") or node.name in needed:
            needed |= {node.name, *node.inputs}
    return needed


def _sources(nodes: Sequence[NodeView]) -> dict[str, tuple[_Source, ...]]:
    """For each node the nodes whose work its value is: itself, unless it only unpacks or reads."""
    found: dict[str, tuple[_Source, ...]] = {}
    side: set[str] = set()
    for node in nodes:
        is_side = _is_side(node, side)
        if is_side:
            side.add(node.name)
        if not (is_side or _is_item(node) or node.op == "get_attr"):
            found[node.name] = (_Source(node, None, False),)
            continue
        through = []
        for source in (s for name in node.inputs for s in found[name]):
            item, beside = source.item, source.beside or is_side
            if source.node.kind == "scatter" and item is None:
                # Rows of one path; or the route, and what is taken from it
                item = node if node.scatter == source.node.name else None
                beside = item is None
            through.append(_Source(source.node, item, beside))
        found[node.name] = tuple(through)
    return found


def _reaches(edges: Iterable[tuple[str, str]], source: str, target: str) -> bool:
    """Whether a way leads from source to target through other nodes."""
    users: dict[str, list[str]] = {}
    for a, b in edges:
        users.setdefault(a, []).append(b)
    left = [name for name in users.get(source, ()) if name != target]
    seen = set(left)
    while left:
        for name in users.get(left.pop(), ()):
            if name == target:
                return True
            if name not in seen:
                seen.add(name)
                left.append(name)
    return False
