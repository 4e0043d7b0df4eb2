"""`brt routers`: the routers that there are."""

from __future__ import annotations

import typer

from brt.cli import show


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("routers")(routers)


def routers(as_json: show.AsJson = False) -> None:
    """List routers: the modules that send cells to paths and take them back.

    [bold]Examples[/]

        brt routers

        brt routers --json
    """
    from brt.plugins import collect

    found = [
        {
            "name": name,
            "options": show.options(spec.options),
            "what": spec.summary,
            "from": owner,
        }
        for name, (spec, owner) in collect("routers").items()
    ]
    show.rows(found, as_json=as_json, title="Routers")
