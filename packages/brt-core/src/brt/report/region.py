"""One region on the page: its graphs before and after, and the loads of its routers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from html import escape

from brt.report.charts import load_chart
from brt.report.collapse import collapse, level_for
from brt.report.data import GraphView, RegionReport, RouterView
from brt.report.graph_svg import Svg, draw

_SIDE_BY_SIDE = 590.0
"""Pixels that each of two graphs may be wide to stand beside the other."""
_MOST_BESIDE = 12
"""Loads of more paths have a line of the page to themselves."""
_MOST_CHARTS = 6
"""The charts of more routers are folded."""

_KEYS = (
    ('<path d="M1 6H25" class="edge band" style="stroke-width:7"/>', "width: share of the cells"),
    ('<path d="M1 6H25" class="edge band dead"/>', "no cell in the profile"),
    (
        '<g class="box guard dead"><rect x="3" y="1" width="20" height="10" rx="3"/></g>',
        "put in by a pass, with its check",
    ),
)


def region_parts(index: int, given: RegionReport) -> Iterator[str]:
    """Heading, graphs and loads of a region; nothing of one that was left alone."""
    if given.reason is not None:
        return
    name = f"<code>{escape(given.path)}</code>" if given.path else "The model"
    yield f'<h2>{name} <span class="muted">({escape(given.type)})</span></h2>'
    yield from _graphs(index, given)
    yield from _loads(given.routers)


def _graphs(index: int, region: RegionReport) -> Iterator[str]:
    level = level_for(region.before, region.after)
    routers = {view.key: view for view in region.routers}
    pictures: list[tuple[str, str, Svg]] = []
    for when, view in (("before", region.before), ("after", _with_routers(region))):
        if view is not None and (when == "before" or _changed(region)):
            drawing = collapse(view, level)
            label = f"{region.path or 'the model'} {when} the passes"
            caption = f"<b>{when.capitalize()}</b>, {len(view):,} nodes"
            made_from = region.before if when == "after" else None
            pictures.append((when, caption, draw(drawing, routers, label, made_from)))
    if not pictures:
        yield '<div class="panel muted">There is no graph of this region.</div>'
        return
    beside = len(pictures) == 2 and max(svg.width for _, _, svg in pictures) <= _SIDE_BY_SIDE
    yield f'<div class="bar">{_legend()}'
    if len(pictures) == 2 and not beside:
        buttons = "".join(
            f'<button type="button" value="{value}">{value}</button>'
            for value in ("before", "after", "both")
        )
        yield f'<span class="views" data-of="graphs-{index}">{buttons}</span>'
    yield "</div>"
    yield f'<div class="graphs{" beside" if beside else ""}" id="graphs-{index}">'
    for when, caption, svg in pictures:
        if len(pictures) == 1:
            caption = f"{len(region.before or ()):,} nodes, which no pass changed"
        yield f'<figure data-when="{when}"><figcaption>{caption}</figcaption>'
        yield f'<div class="canvas">{svg.text}</div></figure>'
    yield "</div>"


def _with_routers(region: RegionReport) -> GraphView | None:
    """The graph after the passes; scatters that came in place of others show those's loads."""
    if region.before is None or region.after is None:
        return region.after
    old, new = (
        [node for node in view.nodes if node.kind == "scatter"]
        for view in (region.before, region.after)
    )
    if len(old) != len(new):
        return region.after
    keys = {b.name: b.router or a.router for a, b in zip(old, new, strict=True)}
    nodes = (replace(n, router=keys.get(n.name, n.router)) for n in region.after.nodes)
    return GraphView(tuple(nodes))


def _changed(region: RegionReport) -> bool:
    return region.before != region.after or any(record.changed for record in region.records)


def _legend() -> str:
    return "".join(
        f'<span class="key"><svg width="26" height="12">{drawn}</svg>{words}</span>'
        for drawn, words in _KEYS
    )


def _loads(routers: Iterable[RouterView]) -> Iterator[str]:
    views = list(routers)
    yield "<h3>Loads</h3>"
    if not views:
        yield '<div class="panel muted">No profile: where cells go is not known.</div>'
        return
    yield (
        '<p class="muted">Rows of each path in a forward: a bar to the mean, a line from the least '
        "to the most, a box from 25 to 75 %.</p>"
    )
    charts = [_load(view) for view in views]
    yield from ('<div class="charts">', *charts[:_MOST_CHARTS], "</div>")
    if len(charts) > _MOST_CHARTS:
        more = len(charts) - _MOST_CHARTS
        yield f'<details><summary>{more} routers more</summary><div class="charts">'
        yield from (*charts[_MOST_CHARTS:], "</div></details>")


def _load(view: RouterView) -> str:
    mean = sum(view.rows_mean_P) / max(view.num_paths, 1)
    facts = [
        f"{view.num_paths} paths",
        f"{view.num_cells:,} cells in {view.num_forwards:,} forwards",
    ]
    if mean > 0:
        facts.append(f"most used path {max(view.rows_mean_P) / mean:.1f} x the mean")
    for paths, words in ((view.always_P, "take every cell"), (view.never_P, "never used")):
        if any(paths):
            facts.append(f"{sum(paths)} {words}")
    if view.num_dropped:
        facts.append(f"{view.num_dropped:,} choices dropped by capacity")
    wide = " wide" if view.num_paths > _MOST_BESIDE else ""
    return (
        f'<div class="panel{wide}"><p><code>{escape(view.key)}</code> '
        f'<span class="muted">&#183; {" &#183; ".join(facts)}</span></p>'
        f'<div class="scroll">{load_chart(view)}</div></div>'
    )
