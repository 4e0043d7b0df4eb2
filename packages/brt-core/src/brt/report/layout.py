"""Places for boxes and edges: layers from top to bottom, few crossings, straight long edges."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_SWEEPS = 6
_GAP = 14.0
_LAYER_GAP = 34.0
_BEND_WIDTH = 10.0
_BEND_WEIGHT = 4.0
_CLEAR = 24.0


@dataclass(eq=False)
class Place:
    """Where a box, or the bend of a long edge, lies: its middle, and its size."""

    name: str
    width: float
    height: float
    rank: tuple[float, ...] = ()
    layer: int = 0
    x: float = 0.0
    y: float = 0.0
    is_bend: bool = False
    room: float = math.inf
    """Of a bend: how far the nearest box beside it is."""
    reach: float = 0.0
    """Of a bend: half the height of its layer."""
    above: list[Place] = field(default_factory=list, repr=False)
    below: list[Place] = field(default_factory=list, repr=False)

    @property
    def top(self) -> float:
        """Its upper edge."""
        return self.y - self.height / 2

    @property
    def bottom(self) -> float:
        """Its lower edge."""
        return self.y + self.height / 2

    def points(self) -> list[tuple[float, float, float]]:
        """Of a bend: x, y and the most that a line may lean there; straight down beside a box."""
        if self.room < _CLEAR and self.reach:
            return [(self.x, self.y - self.reach, 0.0), (self.x, self.y + self.reach, 0.0)]
        return [(self.x, self.y, (self.room - _CLEAR / 2) / max(self.reach, 1.0))]


@dataclass(frozen=True)
class Layout:
    """Places by name, the bends of each edge, and the size of it all."""

    places: Mapping[str, Place]
    bends: Mapping[tuple[str, str], tuple[Place, ...]]
    width: float
    height: float


def lay_out(
    boxes: Sequence[Place], edges: Sequence[tuple[str, str]], fan_gap: Mapping[str, float]
) -> Layout:
    """Place boxes, given in an order in which each follows what it takes.

    ``rank`` of a box says where it goes among others that nothing else tells apart. ``fan_gap`` is
    extra room below a box.
    """
    places = {box.name: box for box in boxes}
    _layers(boxes, edges)
    bends = {edge: _bend(places, edge) for edge in edges}
    layers: list[list[Place]] = [[] for _ in range(max((p.layer for p in boxes), default=0) + 1)]
    for place in [*boxes, *(bend for chain in bends.values() for bend in chain)]:
        layers[place.layer].append(place)
    _order(layers)
    _columns(layers)
    for _ in range(2):
        for (source, target), chain in bends.items():
            _straighten(layers, chain, (places[source].x + places[target].x) / 2)
    every = [place for layer in layers for place in layer]
    left = min((p.x - p.width / 2 for p in every), default=0.0)
    for place in every:
        place.x -= left
    y = 0.0
    for layer in layers:
        height = max((place.height for place in layer), default=0.0)
        for place in layer:
            place.y = y + height / 2
            place.room, place.reach = _room(place, layer), height / 2
        y += height + _LAYER_GAP + max((fan_gap.get(p.name, 0.0) for p in layer), default=0.0)
    width = max((p.x + p.width / 2 for p in every), default=0.0)
    return Layout(places, bends, width, max((p.bottom for p in every), default=0.0))


def _layers(boxes: Sequence[Place], edges: Sequence[tuple[str, str]]) -> None:
    """Each box one below the lowest that it takes; what takes nothing right above its first use."""
    places = {box.name: box for box in boxes}
    takes: dict[str, list[Place]] = {box.name: [] for box in boxes}
    feeds: dict[str, list[Place]] = {box.name: [] for box in boxes}
    for source, target in edges:
        takes[target].append(places[source])
        feeds[source].append(places[target])
    for box in boxes:
        box.layer = max((p.layer + 1 for p in takes[box.name]), default=0)
    for box in boxes:
        if not takes[box.name] and feeds[box.name]:
            box.layer = min(p.layer for p in feeds[box.name]) - 1


def _bend(places: Mapping[str, Place], edge: tuple[str, str]) -> tuple[Place, ...]:
    """The bends of an edge, one in each layer that it passes; links neighbours."""
    source, target = places[edge[0]], places[edge[1]]
    chain = [
        Place(f"{edge[0]}>{edge[1]}@{layer}", _BEND_WIDTH, 0.0, layer=layer, is_bend=True)
        for layer in range(source.layer + 1, target.layer)
    ]
    stops = [source, *chain, target]
    for upper, lower in itertools.pairwise(stops):
        upper.below.append(lower)
        lower.above.append(upper)
    return tuple(chain)


def _order(layers: Sequence[list[Place]]) -> None:
    """Sort each layer by the middle of its neighbours, downwards and upwards in turn."""
    for layer in layers:
        layer.sort(key=lambda p: (p.is_bend, p.rank))
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else layers[::-1]:
            at = {
                id(p): i / max(len(other) - 1, 1) if len(other) > 1 else 0.5
                for other in layers
                for i, p in enumerate(other)
            }

            def key(
                place: Place, at: Mapping[int, float] = at, down: bool = down
            ) -> tuple[float, bool, tuple[float, ...]]:
                near = (place.above if down else place.below) or [place]
                middle = sum(at[id(p)] for p in near) / len(near)
                return (round(middle, 6), not place.is_bend, place.rank)

            layer.sort(key=key)


def _columns(layers: Sequence[list[Place]]) -> None:
    """Give each place an x near those of its neighbours, without overlaps."""
    for layer in layers:
        _apart(layer, [0.0] * len(layer))
    for sweep in range(2 * _SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else layers[::-1]:
            wanted = []
            for place in layer:
                wanted.append(_wanted(place, down=down))
            _apart(layer, wanted)


def _straighten(layers: Sequence[list[Place]], chain: Sequence[Place], middle: float) -> None:
    """Put all bends of an edge on one vertical line, where their neighbours leave room for it."""
    least, most = -math.inf, math.inf
    for bend in chain:
        layer = layers[bend.layer]
        at = layer.index(bend)
        if at > 0:
            least = max(least, layer[at - 1].x + _distance(layer[at - 1], bend))
        if at + 1 < len(layer):
            most = min(most, layer[at + 1].x - _distance(bend, layer[at + 1]))
    if least <= most:
        for bend in chain:
            bend.x = min(max(middle, least), most)


def _wanted(place: Place, *, down: bool) -> float:
    """The x that pulls on a place: the middle of its neighbours; for a bend, a straight line."""
    near = place.above if down else place.below
    near = near or (place.below if down else place.above)
    if place.is_bend:
        near = [*place.above, *place.below]
    if not near:
        return place.x
    weights = [_pull(place, p) for p in near]
    return sum(p.x * w for p, w in zip(near, weights, strict=True)) / sum(weights)


def _pull(place: Place, other: Place) -> float:
    """How much a neighbour counts: bends for each other, and less than boxes for boxes."""
    if place.is_bend:
        return _BEND_WEIGHT if other.is_bend else 1 / _BEND_WEIGHT
    return 1 / _BEND_WEIGHT if other.is_bend else 1.0


def _room(bend: Place, layer: Sequence[Place]) -> float:
    """How far a bend is from the nearest box beside it."""
    return min((abs(p.x - bend.x) - p.width / 2 for p in layer if not p.is_bend), default=math.inf)


def _apart(layer: Sequence[Place], wanted: Sequence[float]) -> None:
    """The x nearest to those wanted (least squares) that keep boxes in order and apart.

    Pools neighbours that would overlap, each pool at the mean of what its places want.
    """
    pools: list[tuple[float, float, int]] = []  # weighted sum, weight, number of places
    offsets, offset = [], 0.0
    for i, place in enumerate(layer):
        if i:
            offset += _distance(layer[i - 1], place)
        offsets.append(offset)
        weight = _BEND_WEIGHT if place.is_bend else 1.0
        pools.append(((wanted[i] - offset) * weight, weight, 1))
        while len(pools) > 1 and pools[-2][0] / pools[-2][1] > pools[-1][0] / pools[-1][1]:
            (a, wa, na), (b, wb, nb) = pools[-2:]
            pools[-2:] = [(a + b, wa + wb, na + nb)]
    i = 0
    for total, weight, num in pools:
        for _ in range(num):
            layer[i].x = total / weight + offsets[i]
            i += 1


def _distance(left: Place, right: Place) -> float:
    """How far the middles of neighbours must be from each other."""
    gap = _GAP
    if not (left.is_bend or right.is_bend):
        gap = max(2.0, min(_GAP, (min(left.width, right.width) - 11) / 3))
    return (left.width + right.width) / 2 + gap
