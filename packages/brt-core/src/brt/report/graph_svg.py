"""One graph as SVG: routers, the branches between them, and how much flows through each."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from brt.report.collapse import Box, Drawing, Edge
from brt.report.data import GraphView, RouterView
from brt.report.labels import Labels, percent
from brt.report.layout import Layout, Place, lay_out

_CHAR, _SMALL_CHAR = 6.3, 5.4
"""Pixels that a character takes, on average, in the two sizes of labels."""
_MARGIN = 12.0
_ROUTERS = ("scatter", "gather", "router")
_WIDEST_ROUTER = 420.0

# Up to so many branches side by side: their width. From _WORDS on there is room for words.
_FANS = ((5, 118.0), (8, 84.0), (16, 44.0), (32, 27.0))
_NARROWEST = 15.0
_WORDS = 84.0
_MERGED = 104.0

_MOST_BANDS = 64
Point = tuple[float, float, float]
"""x, y, and how far a line may lean there: pixels aside for one down."""


@dataclass(frozen=True)
class Svg:
    """The picture, and its size in pixels."""

    text: str
    width: float
    height: float


def draw(
    drawing: Drawing,
    routers: Mapping[str, RouterView],
    label: str,
    before: GraphView | None = None,
) -> Svg:
    """The SVG of a graph; ``routers`` by key, ``label`` for those who cannot see it.

    ``before`` is the graph that passes made it from: what is new is marked.
    """
    nodes = [node for box in drawing.boxes for node in box.nodes]
    return _Picture(drawing, Labels(routers, nodes, before)).svg(label)


class _Picture:
    def __init__(self, drawing: Drawing, labels: Labels) -> None:
        self.drawing = drawing
        self.labels = labels
        self.boxes = {box.name: box for box in drawing.boxes}
        self.fans = {b.name: drawing.fan(b.name) for b in drawing.boxes if b.kind == "scatter"}
        self.most = {
            name: max((b.share or 0.0 for b in fan), default=0.0) for name, fan in self.fans.items()
        }
        self.entering = Counter(edge.target for edge in drawing.edges)
        places = [self._place(i, box) for i, box in enumerate(drawing.boxes)]
        edges = [(edge.source, edge.target) for edge in drawing.edges]
        self.layout: Layout = lay_out(places, edges, self._fan_gaps())

    def svg(self, label: str) -> Svg:
        width = self.layout.width + 2 * _MARGIN
        height = self.layout.height + 2 * _MARGIN
        parts = [
            f'<svg class="graph" role="img" aria-label="{escape(label)}" width="{width:.0f}" '
            f'height="{height:.0f}" viewBox="{-_MARGIN:.0f} {-_MARGIN:.0f} {width:.0f} '
            f'{height:.0f}">',
            *self._edges(),
            *(self._box(box) for box in self.drawing.boxes),
            "</svg>",
        ]
        return Svg("\n".join(parts), width, height)

    # Sizes

    def _place(self, index: int, box: Box) -> Place:
        width, height = self._size(box)
        path = -1 if box.path is None else box.path if box.path >= 0 else 1 << 30
        return Place(box.name, width, height, rank=(path, index))

    def _size(self, box: Box) -> tuple[float, float]:
        named = len(self.labels.title(box)) * _CHAR
        if box.kind in _ROUTERS:
            return max(self._for_bands(box), named + 44), 34.0
        if _is_on_path(box):
            column = self._column(box)
            return column, 46.0 if column >= _WORDS else 34.0 if column >= 27 else 26.0
        if box.kind in ("input", "output"):
            return named + 24, 22.0
        words = self.labels.summary(box)
        wide = min(250.0, max(named, len(words) * _SMALL_CHAR) + 20)
        if box.name in self.drawing.packed:
            wide = max(wide, self._for_bands(box))
        return wide, 39.0 if words else 26.0

    def _for_bands(self, box: Box) -> float:
        """Width of a box that so many bands enter or leave."""
        bands = max(len(self.fans.get(box.name, ())), self.entering[box.name])
        view = self.labels.router(self.boxes[self.drawing.packed.get(box.name, box.name)])
        if view is not None:
            bands = max(bands, min(view.num_paths, _MOST_BANDS))
        return min(_WIDEST_ROUTER, max(110.0, 7.0 * bands))

    def _column(self, box: Box) -> float:
        if box.path == -1:
            return _MERGED
        fan = self.fans.get(box.scatter or "", ())
        digits = max((len(str(other.path)) for other in fan), default=1)
        narrowest = _NARROWEST + 4 * max(0, digits - 2)
        return next((width for most, width in _FANS if len(fan) <= most), narrowest)

    def _fan_gaps(self) -> dict[str, float]:
        """Wide fans need height, or their bands lie on each other."""
        gaps = {name: min(80.0, 2.0 * len(fan)) for name, fan in self.fans.items()}
        for edge in self.drawing.edges:
            if self.boxes[edge.target].kind == "gather":
                room = min(70.0, 1.6 * self.entering[edge.target])
                gaps[edge.source] = max(gaps.get(edge.source, 0.0), room)
        return gaps

    # Edges

    def _edges(self) -> Iterator[str]:
        leaving, entering = self._ports(down=True), self._ports(down=False)
        for edge in self.drawing.edges:
            key = (edge.source, edge.target)
            bands = self._bundle(edge)
            if bands is not None:
                yield from self._draw_bundle(edge, bands)
                continue
            start = (leaving[key], self.layout.places[edge.source].bottom, 0.0)
            stop = (entering[key], self.layout.places[edge.target].top, 0.0)
            bends = [p for bend in self.layout.bends[key] for p in bend.points()]
            yield self._line(edge, [start, *bends, stop], self._branch(edge))

    def _branch(self, edge: Edge) -> Box | None:
        """The box whose path an edge belongs to."""
        source, target = self.boxes[edge.source], self.boxes[edge.target]
        if _is_on_path(target) and target.scatter == edge.source:
            return target
        return source if _is_on_path(source) else target if _is_on_path(target) else None

    def _line(self, edge: Edge, points: Sequence[Point], branch: Box | None) -> str:
        look = 'class="edge"'
        if branch is not None:
            most = self.most.get(branch.scatter or "", 0.0)
            fan = len(self.fans.get(branch.scatter or "", ()))
            look = _band(branch.share, most, fan)
        return (
            f'<path {look} data-from="{escape(edge.source)}" data-to="{escape(edge.target)}" '
            f'd="{_curve(points)}"/>'
        )

    def _bundle(self, edge: Edge) -> Sequence[float] | None:
        """Shares of the paths that go together along an edge, most `_MOST_BANDS` of them."""
        packed = self.drawing.packed
        scatter = packed.get(edge.target, packed.get(edge.source))
        if scatter is None or edge.source not in (scatter, *packed):
            return None
        if edge.target not in packed and self.boxes[edge.target].kind != "gather":
            return None
        view = self.labels.router(self.boxes[scatter])
        return None if view is None else view.share_P[:_MOST_BANDS]

    def _draw_bundle(self, edge: Edge, share_P: Sequence[float]) -> Iterator[str]:
        upper, lower = self.layout.places[edge.source], self.layout.places[edge.target]
        most = max(share_P, default=0.0)
        for i, share in enumerate(share_P):
            at = (i + 0.5) / len(share_P) - 0.5
            points = [
                (place.x + at * max(8.0, place.width - 44), y, 0.0)
                for place, y in ((upper, upper.bottom), (lower, lower.top))
            ]
            yield (
                f'<path {_band(share, most, len(share_P))} data-from="{escape(edge.source)}" '
                f'data-to="{escape(edge.target)}" d="{_curve(points)}"/>'
            )

    def _ports(self, *, down: bool) -> dict[tuple[str, str], float]:
        """Where each edge leaves (or enters) its box, side by side in the order of the others."""
        keys_of: dict[str, list[tuple[str, str]]] = {}
        for edge in self.drawing.edges:
            key = (edge.source, edge.target)
            keys_of.setdefault(key[0 if down else 1], []).append(key)

        def other(key: tuple[str, str]) -> float:
            bends = self.layout.bends[key]
            if bends:
                return bends[0 if down else -1].x
            return self.layout.places[key[1 if down else 0]].x

        found: dict[tuple[str, str], float] = {}
        for name, keys in keys_of.items():
            place = self.layout.places[name]
            keys.sort(key=other)
            room = place.width - (44 if self.boxes[name].kind in _ROUTERS else 24)
            step = min(26.0, max(0.0, room) / len(keys))
            for i, key in enumerate(keys):
                found[key] = place.x + (i - (len(keys) - 1) / 2) * step
        return found

    # Boxes

    def _box(self, box: Box) -> str:
        place = self.layout.places[box.name]
        is_dead = _is_on_path(box) and box.share == 0
        classes = {
            box.kind: True,
            "inserted": self.labels.is_inserted(box),
            "dead": is_dead,
            "identity": box.is_identity,
            "narrow": place.width < _FANS[-1][1],
        }
        heat = ""
        most = self.most.get(box.scatter or "", 0.0)
        if box.kind == "branch" and box.share and most > 0:
            heat = f' style="--heat:{min(1.0, box.share / most):.2f}"'
        tip = escape("\n".join(self.labels.tip(box)))
        return (
            f'<g class="box {" ".join(name for name, on in classes.items() if on)}"{heat} '
            f'tabindex="0" data-name="{escape(box.name)}" data-tip="{tip}"><title>{tip}</title>'
            f"{_outline(box, place)}{''.join(self._texts(box, place))}</g>"
        )

    def _texts(self, box: Box, place: Place) -> Iterator[str]:
        def text(value: str, dy: float, kind: str = "") -> str:
            css = f' class="{kind}"' if kind else ""
            return f'<text x="{place.x:.1f}" y="{place.y + dy:.1f}"{css}>{escape(value)}</text>'

        name, words = self.labels.title(box), self.labels.summary(box)
        share = percent(box.share)
        if not _is_on_path(box) or box.kind in _ROUTERS:
            words = words if box.kind in ("other", "branch", "guard") else ""
            yield text(_fit(name, place.width - 14, _CHAR), -1.5 if words else 4)
            if words:
                yield text(_fit(words, place.width - 12, _SMALL_CHAR), 12, "small")
        elif box.path == -1:
            yield text(f"{box.num_paths} more", -4)
            yield text(f"{share} in all" if share else "", 10, "small")
        elif place.width >= _WORDS:
            up = 0 if share else 6  # in the middle where there is no third line
            yield text(_fit(name, place.width - 10, _CHAR), -9 + up)
            yield text(_fit(words, place.width - 8, _SMALL_CHAR), 4 + up, "small")
            yield text(share, 17, "small share")
        elif place.width >= 27:
            yield text(str(box.path), -2 if share else 4)
            yield text(share if place.width >= 40 else share.rstrip("%"), 10, "small share")
        else:
            yield text(str(box.path), 3.5, "tiny")


def _is_on_path(box: Box) -> bool:
    return box.path is not None and box.scatter is not None


def _band(share: float | None, most: float, num_bands: int) -> str:
    """How an edge that belongs to a path looks: as wide as its share of the most used path's."""
    if share == 0:
        return 'class="edge band dead"'
    widest = 11.0 if num_bands <= 16 else 8.0
    width = 1.5
    if share is not None and most > 0:
        width = 1.4 + (widest - 1.4) * min(1.0, share / most)
    return f'class="edge band" style="stroke-width:{width:.1f}"'


def _fit(text: str, width: float, char: float) -> str:
    most = max(2, int(width / char))
    if len(text) <= most:
        return text
    head, dot, tail = text.rpartition(".")
    if dot and len(tail) + 2 <= most and len(head) > 2:  # the end of a module path tells most
        return ".." + text[-(most - 2) :]
    return text[: most - 2].rstrip(" ,") + ".."


def _outline(box: Box, place: Place) -> str:
    left, top = place.x - place.width / 2, place.top
    right, bottom = place.x + place.width / 2, place.bottom
    slant = 14.0
    if box.kind == "scatter":
        points = ((left + slant, top), (right - slant, top), (right, bottom), (left, bottom))
    elif box.kind == "gather":
        points = ((left, top), (right, top), (right - slant, bottom), (left + slant, bottom))
    else:
        radius = 11 if box.kind in ("input", "output", "router") else min(5, int(place.width / 5))
        return (
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{place.width:.1f}" '
            f'height="{place.height:.1f}" rx="{radius}"/>'
        )
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polygon points="{joined}"/>'


def _curve(points: Sequence[Point]) -> str:
    """A smooth line down through points, vertical at both ends."""
    slopes = [0.0]
    for (x0, y0, _), (x1, y1, most), (x2, y2, _) in zip(
        points, points[1:], points[2:], strict=False
    ):
        # The flatter of both sides, and none where it turns back: a line must not overshoot
        before, after = (x1 - x0) / max(y1 - y0, 1.0), (x2 - x1) / max(y2 - y1, 1.0)
        lean = min(abs(before), abs(after), most) if before * after > 0 else 0.0
        slopes.append(math.copysign(lean, before))
    slopes.append(0.0)
    (x, y, _), *rest = points
    parts = [f"M{x:.1f} {y:.1f}"]
    for i, (to_x, to_y, _) in enumerate(rest):
        # Short handles between bends, long ones where a single curve does it all
        reach = (to_y - y) * (0.5 if len(rest) == 1 else 0.4)
        near, far = x + slopes[i] * reach, to_x - slopes[i + 1] * reach
        parts.append(
            f"C{near:.1f} {y + reach:.1f} {far:.1f} {to_y - reach:.1f} {to_x:.1f} {to_y:.1f}"
        )
        x, y = to_x, to_y
    return "".join(parts)
