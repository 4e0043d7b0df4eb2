"""The page of the demo of experts: text whose letters are coloured by expert, for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from brt_models.demo.passages import COLOURS, Passage, letters

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; } h3 { font-size: 1rem; }
pre { font: 14px/1.65 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre span, td.name { color: #111; } pre span { padding: 1px 0; }
pre .new { border-bottom: 1px solid #777; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem; text-align: left; }
td.name { text-align: center; } td.bar div { height: .7rem; border-radius: 2px; }
td.typical { font-family: ui-monospace, monospace; }
"""


def page(passages: Sequence[Passage], layers: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """One HTML page that needs nothing else."""
    body = [
        "<h1>Which expert takes which byte</h1>",
        "<p>A language model of bytes whose second and fourth layers send each byte to one of "
        f"{len(layers[0])} experts. A letter has the colour of its expert; point at it to read "
        "which. What the model wrote itself is underlined.</p>",
    ]
    for found in passages:
        body.append(f"<h2>{escape(found.title)}</h2>")
        for layer in range(len(layers)):
            body.append(f"<h3>sparse layer {layer + 1}</h3>")
            body.append(f"<pre>{_coloured(found, layer)}</pre>")
    for layer, rows in enumerate(layers):
        body.append(f"<h2>experts of sparse layer {layer + 1}, held-out text</h2>{_table(rows)}")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>brt demo text</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _coloured(found: Passage, layer: int) -> str:
    """The letters of a text; neighbours that look alike share an element."""
    runs: list[tuple[int, bool, list[str]]] = []
    for letter, place in letters(found):
        expert, is_new = found.expert_LN[layer][place], place >= found.num_given
        if not runs or runs[-1][:2] != (expert, is_new):
            runs.append((expert, is_new, []))
        runs[-1][2].append(letter)
    return "".join(
        f'<span title="expert {expert}"{" class=new" if is_new else ""} '
        f'style="background:{COLOURS[expert % len(COLOURS)]}">{escape("".join(text))}</span>'
        for expert, is_new, text in runs
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The experts of a layer: share and typical bytes."""
    widest = max(row["share"] for row in rows) or 1
    lines = ["<tr><th>expert</th><th>share</th><th></th><th>typical bytes</th></tr>"]
    for row in rows:
        colour = COLOURS[row["expert"] % len(COLOURS)]
        lines.append(
            f'<tr><td class="name" style="background:{colour}">{row["expert"]}</td>'
            f"<td>{row['share']:.0%}</td>"
            f'<td class="bar"><div style="width:{14 * row["share"] / widest:.2f}rem;'
            f'background:{colour}"></div></td>'
            f'<td class="typical">{escape("  ".join(row["typical"]))}</td></tr>'
        )
    return "<table>\n" + "\n".join(lines) + "\n</table>"
