"""The report as one page of HTML that needs nothing else: no network, no fonts, no libraries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files

from brt.passes.base import Record
from brt.report.data import Report
from brt.report.region import region_parts

_MOST_OPEN = 6
"""Longer lists are folded."""


def render(report: Report) -> str:
    """The whole page."""
    body = [
        *_header(report),
        *_cards(report),
        *_passes(report),
        *_candidates(report),
        *_guards(report.guards()),
        *(part for i, one in enumerate(report.regions) for part in region_parts(i, one)),
        *_left_alone(report),
        *_footer(report),
    ]
    name = escape(report.model)
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">",
            f"<title>{name}: brt report</title>",
            '<link rel="icon" href="data:,">',
            f"<style>\n{_text_of('page.css')}</style>",
            "</head>",
            "<body>",
            "<main>",
            *body,
            "</main>",
            '<div id="tip" role="tooltip"></div>',
            f"<script>\n{_text_of('page.js')}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def _text_of(name: str) -> str:
    return files("brt.report").joinpath(name).read_text(encoding="utf-8")


def _header(report: Report) -> Iterator[str]:
    profile = (
        f" &#183; profile <code>{escape(report.profile[:12])}</code>" if report.profile else ""
    )
    yield "<header><div>"
    yield '<div class="eyebrow">brt report</div>'
    yield f"<h1>{escape(report.model)} {_verified(report)}</h1>"
    yield f"<p>{report.num_parameters:,} parameters on {escape(report.device)}{profile}</p>"
    yield '</div><button id="theme" type="button" hidden>light / dark</button></header>'


def _verified(report: Report) -> str:
    if not report.verified:
        return _badge("not verified: no sample was given", "warn")
    if not report.max_error:
        return _badge("&#10003; same output on the sample", "good")
    return _badge(f"&#10003; within {report.max_error:.2g} of the original on the sample", "good")


def _badge(text: str, kind: str = "") -> str:
    return f'<span class="badge {kind}">{text}</span>'


def _cards(report: Report) -> Iterator[str]:
    worked = [region for region in report.regions if region.reason is None]
    changed = {record.name for record in report.records if record.changed}
    before = sum(len(region.before) for region in worked if region.before is not None)
    after = sum(len(region.after) for region in worked if region.after is not None)
    guards = report.guards()
    hits = sum(count["hits"] for count in guards.values())
    fallbacks = sum(count["fallbacks"] for count in guards.values())
    left = len(report.regions) - len(worked)
    yield '<div class="cards">'
    yield _card(f"{len(worked)}", f"regions optimised, {left} left alone")
    if worked:
        yield _card(f"{before:,} &#8594; {after:,}", "nodes before and after")
    yield _card(f"{len(changed)} of {len(report.passes)}", "passes changed something")
    if not guards:
        yield _card("0", "guards: nothing is assumed")
    elif hits + fallbacks:
        yield _card(f"{fallbacks:,} of {hits + fallbacks:,}", "checks of guards fell back")
    else:
        yield _card(f"{len(guards)}", "guards, not called yet")
    yield "</div>"


def _card(number: str, words: str) -> str:
    return f'<div class="card"><b>{number}</b><span>{words}</span></div>'


def _passes(report: Report) -> Iterator[str]:
    yield "<h2>Passes</h2>"
    if not report.records:
        what = "No pass took a region." if report.passes else "No passes were asked for."
        yield f'<div class="panel muted">{what}</div>'
        return
    yield '<div class="panel scroll"><table>'
    yield (
        '<tr><th>pass</th><th>region</th><th>outcome</th><th class="num">nodes</th>'
        '<th class="num">time</th><th class="num">largest difference</th></tr>'
    )
    for record in report.records:
        yield _pass_row(record)
    yield "</table></div>"


def _candidates(report: Report) -> Iterator[str]:
    rows = [(region, one) for region in report.regions for one in region.candidates]
    if not rows:
        return
    yield "<h2>Forms that were measured</h2>"
    yield '<div class="panel scroll"><table>'
    yield (
        '<tr><th>form</th><th>region</th><th class="num">time</th>'
        '<th class="num">of the original</th><th></th></tr>'
    )
    for region, one in rows:
        share = one.seconds / max(region.candidates[0].seconds, 1e-12)
        kept = _badge("kept", "good") if one.kept else ""
        yield (
            f"<tr><td>{escape(one.name)}</td><td>{escape(region.path or 'the model')}</td>"
            f'<td class="num">{1e3 * one.seconds:.3f} ms</td><td class="num">{share:.2f}</td>'
            f"<td>{kept}</td></tr>"
        )
    yield "</table></div>"


def _pass_row(record: Record) -> str:
    if record.refused is not None:
        outcome = _badge("refused", "warn")
    else:
        outcome = _badge("changed", "good") if record.changed else _badge("no change")
    nodes = f"{record.nodes_before:,} &#8594; {record.nodes_after:,}"
    error = "" if record.max_error is None else f"{record.max_error:.2g}"
    parts = [f"<p>{escape(record.refused)}</p>"] if record.refused else []
    left = [f"{one.what}: {one.why}" for one in record.left]
    if record.notes:
        label = '<span class="label">decisions</span>' if left else ""
        parts += _list(label, "decisions", record.notes)
    if left:
        parts += _list('<span class="label">left alone</span>', "left alone", left)
    more = f'<tr class="more"><td colspan="6">{"".join(parts)}</td></tr>' if parts else ""
    return (
        f'<tr class="pass"><td><code>{escape(record.name)}</code></td>'
        f"<td>{_where(record.region)}</td>"
        f'<td>{outcome}</td><td class="num">{nodes}</td>'
        f'<td class="num">{1e3 * record.seconds:,.1f} ms</td>'
        f'<td class="num">{error}</td></tr>{more}'
    )


def _list(label: str, what: str, items: Sequence[str]) -> list[str]:
    lines = [f"<li>{escape(item)}</li>" for item in items]
    if len(items) <= _MOST_OPEN:
        return [label, "<ul>", *lines, "</ul>"]
    return [
        f"<details><summary>{len(items)} {what}</summary>",
        "<ul>",
        *lines,
        "</ul></details>",
    ]


def _where(path: str) -> str:
    return f"<code>{escape(path)}</code>" if path else '<span class="nowrap">the model</span>'


def _guards(guards: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    yield "<h2>Guards</h2>"
    if not guards:
        yield '<div class="panel muted">No pass assumed anything: there is nothing to guard.</div>'
        return
    yield (
        '<p class="muted">What passes took from the profile is checked at each call. Where it '
        "holds, that is a hit; where it does not, the original code runs: a fallback.</p>"
    )
    rows = [_guard_row(name, count) for name, count in guards.items()]
    table = (
        "<table>",
        '<tr><th>guard</th><th class="num">hits</th><th class="num">fallbacks</th><th></th></tr>',
    )
    yield '<div class="panel scroll">'
    if len(rows) <= 2 * _MOST_OPEN:
        yield from (*table, *rows, "</table></div>")
        return
    worst = [
        _guard_row(name, count)
        for name, count in sorted(guards.items(), key=lambda item: -item[1]["fallbacks"])
        if count["fallbacks"]
    ][:_MOST_OPEN]
    if worst:
        yield from (*table, *worst, "</table>")
    else:
        yield f"<p>{len(rows)} guards, and none of them fell back.</p>"
    yield f"<details><summary>all {len(rows)} guards</summary>"
    yield from (*table, *rows, "</table></details></div>")


def _guard_row(name: str, count: Mapping[str, int]) -> str:
    hits, fallbacks = count["hits"], count["fallbacks"]
    total = hits + fallbacks
    bar = '<span class="muted">not called yet</span>'
    if total:
        bar = f'<span class="share-bar"><i style="width:{100 * hits / total:.1f}%"></i></span>'
    return (
        f'<tr><td><code>{escape(name)}</code></td><td class="num">{hits:,}</td>'
        f'<td class="num">{fallbacks:,}</td><td>{bar}</td></tr>'
    )


def _left_alone(report: Report) -> Iterator[str]:
    left = [region for region in report.regions if region.reason is not None]
    if not left:
        return
    yield "<h2>Left alone</h2>"
    yield '<div class="panel scroll"><table><tr><th>region</th><th>class</th><th>why</th></tr>'
    for region in left:
        yield (
            f"<tr><td>{_where(region.path)}</td><td>{escape(region.type)}</td>"
            f"<td>{escape(region.reason or '')}</td></tr>"
        )
    yield "</table></div>"


def _footer(report: Report) -> Iterator[str]:
    versions = " &#183; ".join(f"{escape(n)} {escape(v)}" for n, v in report.versions.items())
    passes = ", ".join(f"<code>{escape(name)}</code>" for name in report.passes) or "none"
    yield f"<footer><p>Passes, in their order: {passes}</p><p>{versions}</p></footer>"
