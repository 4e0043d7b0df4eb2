"""From a graph of hundreds of nodes to the few boxes that are worth drawing.

Unpacking, sizes and parameter reads vanish, the work on one path becomes one box, and work between
routers becomes chains or, where there is still too much of it, one box.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from brt.report.data import GraphView, Kind, NodeView
from brt.report.flow import AS_IS, Flow

MOST_SINGLE = 16
MOST_CHAINS = 40
MOST_PATHS = 64
_KEPT_PATHS = 48

_ALONE = frozenset({"input", "output", "scatter", "gather", "router", "guard"})
"""Kinds that are always a box of their own."""

Level = int
"""0: nodes between routers one by one; 1: in chains; 2: as one box wherever that is possible."""


@dataclass(frozen=True)
class Box:
    """What is drawn as one: a node, or several of one kind.

    Attributes:
        name: that of its first node.
        nodes: in the order in which they run.
        scatter, path, share: as of a `NodeView`; path -1 is several paths together.
        num_paths: how many paths it stands for.
        is_identity: no work, rows of the path as they are.
    """

    name: str
    kind: Kind
    nodes: tuple[NodeView, ...]
    scatter: str | None = None
    path: int | None = None
    share: float | None = None
    num_paths: int = 1
    is_identity: bool = False


@dataclass(frozen=True)
class Edge:
    """That the rows of one box go into another."""

    source: str
    target: str


@dataclass(frozen=True)
class Drawing:
    """Boxes so that each follows what it takes, and what flows between them.

    ``packed`` names the boxes that work on the rows of all paths of a scatter at once, with that
    scatter.
    """

    boxes: tuple[Box, ...]
    edges: tuple[Edge, ...]
    packed: Mapping[str, str]

    def fan(self, scatter: str) -> tuple[Box, ...]:
        """The boxes that are fed by a scatter, on its paths."""
        fed = {edge.target for edge in self.edges if edge.source == scatter}
        return tuple(b for b in self.boxes if b.name in fed and b.scatter == scatter)


def level_for(*views: GraphView | None) -> Level:
    """The level that shows the largest of these graphs in few enough boxes."""
    given = [v for v in views if v is not None]

    def most(level: Level) -> int:
        drawings = (collapse(v, level) for v in given)
        return max((sum(b.path is None for b in d.boxes) for d in drawings), default=0)

    if most(0) <= MOST_SINGLE:
        return 0
    return 1 if most(1) <= MOST_CHAINS else 2


def collapse(view: GraphView, level: Level) -> Drawing:
    """The boxes of a graph."""
    flow = Flow(view)
    group = _grouped(flow, level)
    members: dict[Hashable, list[NodeView]] = {}
    for node in flow.nodes:
        members.setdefault(group[node.name], []).append(node)
    name_of = {node.name: nodes[0].name for nodes in members.values() for node in nodes}
    boxes = [_box(nodes) for nodes in members.values()]
    edges = dict.fromkeys(
        Edge(name_of[source], name_of[target])
        for source, target in flow.edges
        if name_of[source] != name_of[target]
    )
    ordered = _sorted(boxes, list(edges))
    return _few_paths(Drawing(ordered, tuple(edges), _packed(ordered, list(edges))))


def _grouped(flow: Flow, level: Level) -> dict[str, Hashable]:
    """A key for each node; nodes of one key are one box. Boxes never form a cycle.

    Nodes with the same routers before them and the same routers behind them can be put together:
    whatever lies on a way from one to the other is of that kind too.
    """
    before = _reach(flow.nodes, flow.edges)
    after = _reach(flow.nodes[::-1], [(b, a) for a, b in flow.edges])
    group: dict[str, Hashable] = {}
    for node in flow.nodes:
        if node.kind in _ALONE:
            group[node.name] = node.name
        else:
            key = (node.scatter, node.path, before[node.name], after[node.name])
            group[node.name] = (*key, node.name) if node.path is None and level < 2 else key
    group = _connected(flow, group)
    if level == 1:
        _chain(flow, group)
    return _acyclic(flow, group)


def _reach(nodes: Iterable[NodeView], edges: Iterable[tuple[str, str]]) -> dict[str, int]:
    """For each node, which boxes of their own come before it, as bits."""
    order = list(nodes)
    bit = {node.name: 1 << i for i, node in enumerate(order) if node.kind in _ALONE}
    sources: dict[str, list[str]] = {node.name: [] for node in order}
    for source, target in edges:
        sources[target].append(source)
    reach: dict[str, int] = {}
    for node in order:
        mask = 0
        for source in sources[node.name]:
            mask |= reach[source] | bit.get(source, 0)
        reach[node.name] = mask
    return reach


def _connected(flow: Flow, group: Mapping[str, Hashable]) -> dict[str, Hashable]:
    """Groups split into the parts that hang together."""
    parent = {node.name: node.name for node in flow.nodes}

    def find(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for source, target in flow.edges:
        if group[source] == group[target]:
            parent[find(target)] = find(source)
    return {name: find(name) for name in parent}


def _chain(flow: Flow, group: dict[str, Hashable]) -> None:
    """Merge nodes between routers where one feeds only the other, which takes nothing else."""
    users: Counter[str] = Counter(source for source, _ in flow.edges)
    takes: Counter[str] = Counter(target for _, target in flow.edges)
    free = {n.name for n in flow.nodes if n.kind not in _ALONE and n.path is None}
    for source, target in flow.edges:
        if {source, target} <= free and users[source] == 1 and takes[target] == 1:
            old, new = group[target], group[source]
            for name, key in group.items():
                if key == old:
                    group[name] = new


def _acyclic(flow: Flow, group: dict[str, Hashable]) -> dict[str, Hashable]:
    """Take apart the groups that are in a cycle of groups, if there are any."""
    takes: dict[Hashable, set[Hashable]] = {key: set() for key in group.values()}
    for source, target in flow.edges:
        if group[source] != group[target]:
            takes[group[target]].add(group[source])
    done: set[Hashable] = set()
    while True:
        ready = {key for key in takes if key not in done and takes[key] <= done}
        if not ready:
            return {name: key if key in done else (key, name) for name, key in group.items()}
        done |= ready


def _box(nodes: list[NodeView]) -> Box:
    first = nodes[0]
    paths = {(node.scatter, node.path) for node in nodes}
    scatter, path = paths.pop() if len(paths) == 1 else (None, None)
    return Box(
        name=first.name,
        kind=first.kind,
        nodes=tuple(nodes),
        scatter=scatter,
        path=path,
        share=first.share if path is not None else None,
        is_identity=first.name.endswith(AS_IS),
    )


def _sorted(boxes: Iterable[Box], edges: Iterable[Edge]) -> tuple[Box, ...]:
    """Boxes so that each follows what it takes, otherwise in the order in which they run."""
    left = list(boxes)
    takes: dict[str, set[str]] = {box.name: set() for box in left}
    for edge in edges:
        takes[edge.target].add(edge.source)
    done, order = set[str](), list[Box]()
    while left:
        ready = [box for box in left if takes[box.name] <= done]
        assert ready, "boxes in a cycle"
        order += ready
        done |= {box.name for box in ready}
        left = [box for box in left if box.name not in done]
    return tuple(order)


def _packed(boxes: Iterable[Box], edges: list[Edge]) -> dict[str, str]:
    """The boxes that take the rows of all paths of a scatter, from it or from each other."""
    found: dict[str, str] = {}
    scatters: set[str] = set()
    for box in boxes:
        if box.kind == "scatter":
            scatters.add(box.name)
        elif box.kind in ("other", "guard"):
            sources = {edge.source for edge in edges if edge.target == box.name}
            of = {found.get(name, name if name in scatters else None) for name in sources}
            on_path = any(b.scatter in of for b in boxes if b.path is not None)
            if len(of) == 1 and (scatter := of.pop()) is not None and not on_path:
                found[box.name] = scatter
    return found


def _few_paths(drawing: Drawing) -> Drawing:
    """Put the least used of very many paths into one box."""
    for scatter in [box.name for box in drawing.boxes if box.kind == "scatter"]:
        around: dict[Hashable, list[Box]] = {}
        for box in drawing.fan(scatter):
            around.setdefault(_neighbours(drawing, box.name), []).append(box)
        for boxes in around.values():
            if len(boxes) > MOST_PATHS:
                boxes.sort(key=lambda box: -(box.share or 0.0))
                drawing = _merge(drawing, boxes[_KEPT_PATHS:])
    return drawing


def _neighbours(drawing: Drawing, name: str) -> Hashable:
    return (
        frozenset(e.source for e in drawing.edges if e.target == name),
        frozenset(e.target for e in drawing.edges if e.source == name),
    )


def _merge(drawing: Drawing, boxes: list[Box]) -> Drawing:
    names = {box.name for box in boxes}
    shares = [box.share for box in boxes if box.share is not None]
    first = boxes[0]
    merged = Box(
        name=first.name,
        kind="branch",
        nodes=tuple(node for box in boxes for node in box.nodes),
        scatter=first.scatter,
        path=-1,
        share=sum(shares) if shares else None,
        num_paths=len(boxes),
    )
    at = min(i for i, box in enumerate(drawing.boxes) if box.name in names)
    kept = [box for box in drawing.boxes if box.name not in names]
    kept.insert(at, merged)
    edges = dict.fromkeys(
        Edge(
            merged.name if e.source in names else e.source,
            merged.name if e.target in names else e.target,
        )
        for e in drawing.edges
    )
    return Drawing(tuple(kept), tuple(edges), drawing.packed)
