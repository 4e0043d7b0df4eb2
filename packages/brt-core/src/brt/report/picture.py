"""The graphs of a report as one SVG that needs nothing else."""

from __future__ import annotations

from html import escape
from importlib.resources import files

from brt.report.collapse import collapse, level_for
from brt.report.data import Report
from brt.report.graph_svg import draw

_HEADING = 34.0
"""Pixels above each graph for the name of its module."""


def render_svg(report: Report) -> str:
    """Every region as it was before the passes, one below the other; those without a graph as text.

    For pages and slides: a browser draws it, light or dark as it is set.
    """
    parts: list[str] = []
    width, top = 320.0, 0.0
    for region in report.regions:
        name = f"{region.path} ({region.type})" if region.path else region.type
        words = name if region.before is not None else f"{name}: cannot be traced"
        parts.append(f'<text x="12" y="{top + 22:.0f}">{escape(words)}</text>')
        top += _HEADING
        if region.before is not None:
            routers = {view.key: view for view in region.routers}
            drawn = draw(collapse(region.before, level_for(region.before)), routers, name)
            parts.append(f'<g transform="translate(0 {top:.0f})">{drawn.text}</g>')
            width, top = max(width, drawn.width), top + drawn.height
    style = files("brt.report").joinpath("page.css").read_text(encoding="utf-8")
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{top:.0f}" '
            f'viewBox="0 0 {width:.0f} {top:.0f}">',
            f"<style><![CDATA[\n{style}",
            "svg { font: 12px system-ui, sans-serif; background: var(--page); }",
            "text { fill: var(--text); }]]></style>",
            *parts,
            "</svg>",
            "",
        ]
    )
