"""`brt plugins`: which plugins there are, and which are left out and why."""

from __future__ import annotations

import typer

from brt.cli import show


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("plugins")(plugins)


def plugins(as_json: show.AsJson = False) -> None:
    """List plugins, the hooks they implement, and why any is left out.

    [dim]BRT_PLUGINS=[/] loads no installed plugin, [dim]BRT_PLUGINS=acme,kernels[/] those two,
    and [dim]BRT_TRACE_PLUGINS=1[/] prints each hook call.

    [bold]Examples[/]

        brt plugins

        BRT_PLUGINS=kernels brt plugins --json
    """
    from brt.plugins import current

    found = [
        {
            "name": plugin.name,
            "from": plugin.owner,
            "hooks": plugin.hooks,
            "state": plugin.skipped or "loaded",
        }
        for plugin in current().plugins
    ]
    show.rows(found, as_json=as_json, title="Plugins")
