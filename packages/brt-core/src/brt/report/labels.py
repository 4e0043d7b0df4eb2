"""What boxes are called, and what a reader sees who points at one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence

from brt.report.collapse import Box
from brt.report.data import GraphView, NodeView, RouterView

_MOST_LISTED = 14
_MOST_ROOTS = 3


class Labels:
    """Words for the boxes of a graph; ``before`` is the graph that passes made it from."""

    def __init__(
        self,
        routers: Mapping[str, RouterView],
        nodes: Collection[NodeView] = (),
        before: GraphView | None = None,
    ) -> None:
        self.routers = routers
        there = {node.name for node in nodes}
        self._known = None if before is None else {n.name: n.target for n in before.nodes}
        self._gone: dict[tuple[str | None, int | None], list[NodeView]] = {}
        for node in () if before is None else before.nodes:
            unpacks = node.target.endswith("getitem")
            if node.kind == "branch" and node.name not in there and not unpacks:
                self._gone.setdefault((node.scatter, node.path), []).append(node)

    def is_inserted(self, box: Box) -> bool:
        """Whether a pass put it in."""
        first = box.nodes[0]
        if self._known is None or first.op != "call_module" or box.is_identity:
            return False
        return all(self._known.get(node.name) != node.target for node in box.nodes)

    def router(self, box: Box) -> RouterView | None:
        """What the profile saw of a box that is a router."""
        return self.routers.get(box.nodes[0].router or "")

    def title(self, box: Box) -> str:
        """What a box is called: its module, or what its only node does."""
        first = box.nodes[0]
        if box.is_identity or (box.kind == "guard" and box.path is not None):
            return f"path {box.path}"
        if len(box.nodes) > 1:
            return _common(box.nodes)
        if first.op == "output":
            return "output"
        if first.op != "call_module":
            return short(first)
        if self.is_inserted(box) and first.type:
            of = (first.router or "").partition("#")[0]
            if first.type == "ScatterRouter":  # the same router, with its rows in one tensor
                return of or first.target
            return f"{of}: {first.type}" if of else first.type
        return first.target

    def summary(self, box: Box) -> str:
        """What a box of several nodes does, or the type of its only module."""
        if box.is_identity:
            return "as it is"
        if len(box.nodes) == 1:
            node = box.nodes[0]
            return "" if node.type == self.title(box) else node.type
        names = [short(node) for node in box.nodes]
        if len(names) <= _MOST_ROOTS:
            words = ", ".join(names)
            return "" if words == self.title(box) else words
        counts = Counter(names)
        return ", ".join(n if c == 1 else f"{c} {n}" for n, c in counts.most_common())

    def tip(self, box: Box) -> Iterator[str]:
        """Lines for a reader who points at a box."""
        if box.path == -1:
            yield f"{box.num_paths} paths of {box.scatter}, the least used"
        elif box.path is not None:
            yield f"path {box.path} of {box.scatter}"
        view = self.router(box)
        if view is not None:
            yield f"{view.key}: {view.num_paths} paths"
            yield f"{view.num_cells:,} cells in {view.num_forwards:,} forwards"
        if box.share is not None:
            yield f"{percent(box.share)} of its cells come here"
        if self.is_inserted(box):
            yield "put in by a pass"
        if box.kind == "guard":
            yield "what it assumes is checked at each call"
        yield from _listed(box.nodes)
        inside = self._gone.get((box.scatter, box.path), ())
        if inside and box.kind == "guard":
            yield "inside it now:"
            yield from _listed(inside)


def short(node: NodeView) -> str:
    """What a node does, in a word."""
    return node.type or node.target.rpartition(".")[2]


def percent(share: float | None) -> str:
    """A share as text, short."""
    if share is None:
        return ""
    value = 100 * share
    if 0 < value < 0.1:
        return "<0.1%"
    return f"{value:.0f}%" if value >= 9.95 or value == 0 else f"{value:.1f}%"


def _common(nodes: Sequence[NodeView]) -> str:
    """The module that holds all of these, or the few that do."""
    modules = [node.target.split(".") for node in nodes if node.op == "call_module"]
    common: list[str] = []
    for parts in zip(*modules, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    if common:
        return ".".join(common)
    roots = list(dict.fromkeys(parts[0] for parts in modules))
    if not roots and len(nodes) <= _MOST_ROOTS:
        return ", ".join(short(node) for node in nodes)
    return ", ".join(roots) if 0 < len(roots) <= _MOST_ROOTS else f"{len(nodes)} nodes"


def _listed(nodes: Sequence[NodeView]) -> Iterator[str]:
    for node in nodes[:_MOST_LISTED]:
        if node.op == "call_module":
            yield f"{node.target} ({node.type})" if node.type else node.target
        elif node.op in ("placeholder", "output"):
            yield f"{node.op}: {node.name}"
        else:
            yield f"{node.name}: {node.target}"
    if len(nodes) > _MOST_LISTED:
        yield f"... {len(nodes) - _MOST_LISTED} nodes more"
