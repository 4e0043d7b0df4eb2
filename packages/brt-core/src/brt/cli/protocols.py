"""`brt protocols`: the routing functions that there are."""

from __future__ import annotations

import typer

from brt.cli import show


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("protocols")(protocols)


def protocols(as_json: show.AsJson = False) -> None:
    """List protocols: the functions from scores to the paths that cells take.

    [bold]Examples[/]

        brt protocols

        brt protocols --json
    """
    from brt.plugins import collect

    found = [
        {
            "name": name,
            "options": show.options(spec.options),
            "what": spec.summary,
            "paper": spec.paper,
            "from": owner,
        }
        for name, (spec, owner) in collect("protocols").items()
    ]
    show.rows(found, as_json=as_json, title="Protocols")
