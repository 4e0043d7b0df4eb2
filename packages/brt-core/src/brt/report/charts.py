"""The loads of one router as SVG: rows of each path in a forward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape

from brt.report.data import RouterView

_HEIGHT, _LEFT, _TOP, _BOTTOM = 150.0, 46.0, 10.0, 24.0
_WIDEST, _ROOM, _HALF = 46.0, 1060.0, 262.0
_NARROWEST = 4.0


def load_chart(view: RouterView) -> str:
    """For each path a bar to the mean, a line from the least to the most, a box 25 to 75 %."""
    top = max([*view.rows_max_P, 1.0])
    step, ceiling = _scale(top)
    room = _ROOM if view.num_paths > 12 else _HALF
    column = max(_NARROWEST, min(_WIDEST, room / max(view.num_paths, 1)))
    width = _LEFT + column * view.num_paths + 12
    parts = [
        f'<svg class="loads" role="img" width="{width:.0f}" height="{_HEIGHT:.0f}" '
        f'viewBox="0 0 {width:.0f} {_HEIGHT:.0f}" '
        f'aria-label="rows of each path of {escape(view.key)}">'
    ]
    value = 0.0
    while value <= ceiling + step / 2:
        y = _y(value, ceiling)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{width - 6:.0f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="axis" x="{_LEFT - 6}" y="{y + 3.5:.1f}">{_number(value)}</text>'
        )
        value += step
    every = max(1, math.ceil((8 + 6 * len(str(view.num_paths))) / column))
    for path in range(view.num_paths):
        parts += _path(view, path, column, ceiling, labelled=path % every == 0)
    return "\n".join([*parts, "</svg>"])


def _path(
    view: RouterView, path: int, column: float, ceiling: float, *, labelled: bool
) -> Iterator[str]:
    middle = _LEFT + column * (path + 0.5)
    bar = column * (0.62 if column > 9 else 0.8)
    zero = _y(0, ceiling)
    low, high = view.rows_min_P[path], view.rows_max_P[path]
    mean = view.rows_mean_P[path]
    state = "always" if view.always_P[path] else "never" if view.never_P[path] else ""
    tip = escape("\n".join(describe(view, path)))
    yield f'<g class="load {state}" tabindex="0" data-tip="{tip}"><title>{tip}</title>'
    yield _rect("hit", middle - column / 2, _TOP, column, zero - _TOP)
    if state == "never":
        small = " small" if column < 10 else ""
        yield f'<text class="none{small}" x="{middle:.1f}" y="{zero - 4:.1f}">&#215;</text>'
    else:
        y = _y(mean, ceiling)
        yield _rect("mean", middle - bar / 2, y, bar, max(0.8, zero - y))
        yield (
            f'<line class="range" x1="{middle:.1f}" x2="{middle:.1f}" '
            f'y1="{_y(low, ceiling):.1f}" y2="{_y(high, ceiling):.1f}"/>'
        )
        if column > 18:
            yield from _quartiles(view, path, middle, bar, ceiling)
    if labelled:
        yield f'<text class="path" x="{middle:.1f}" y="{zero + 14:.1f}">{path}</text>'
    yield "</g>"


def _quartiles(
    view: RouterView, path: int, middle: float, bar: float, ceiling: float
) -> Iterator[str]:
    given = view.rows_percentiles_P
    if "25" in given and "75" in given:
        upper, lower = _y(given["75"][path], ceiling), _y(given["25"][path], ceiling)
        yield _rect("quartiles", middle - bar / 4, upper, bar / 2, max(1.0, lower - upper))


def describe(view: RouterView, path: int) -> Iterator[str]:
    """The numbers of one path in words."""
    yield f"path {path}: {100 * view.share_P[path]:.1f} % of the cells"
    if view.always_P[path]:
        yield "every cell, in every forward"
    if view.never_P[path]:
        yield "no cell, in any forward"
    yield f"rows in a forward: mean {_number(view.rows_mean_P[path])}"
    yield f"least {_number(view.rows_min_P[path])}, most {_number(view.rows_max_P[path])}"
    for percent, rows_P in view.rows_percentiles_P.items():
        yield f"{percent} %: {_number(rows_P[path])}"


def _y(value: float, ceiling: float) -> float:
    room = _HEIGHT - _TOP - _BOTTOM
    return _TOP + room * (1 - min(value, ceiling) / ceiling)


def _scale(top: float) -> tuple[float, float]:
    """A round step, and the end of an axis that reaches ``top`` in two to five of them."""
    rough = top / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    return step, step * math.ceil(top / step)


def _number(value: float) -> str:
    if value >= 1e5:
        return f"{value / 1e3:,.0f}k"
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _rect(kind: str, x: float, y: float, width: float, height: float) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
    )
