"""`brt passes`: the rewrites of a graph that `brt optimize` can run."""

from __future__ import annotations

import typer

from brt.cli import show


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("passes")(passes)


def passes(as_json: show.AsJson = False) -> None:
    """List passes, and which of them run without being named.

    [bold]Examples[/]

        brt passes

        brt passes --json
    """
    from brt.passes import DEFAULT
    from brt.plugins import collect

    found = [
        {
            "name": name,
            "options": show.options(spec.options),
            "what": spec.summary,
            "runs after": getattr(spec.factory, "after", ()),
            "by default": "yes" if name in DEFAULT else "",
            "from": owner,
        }
        for name, (spec, owner) in collect("passes").items()
    ]
    show.rows(found, as_json=as_json, title="Passes")
