"""`brt report`: a saved report, as text or as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from brt.errors import BrtError
from brt.files import atomic_write


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("report")(report)


def report(
    file: Annotated[
        Path, typer.Argument(help="From brt optimize --report.", exists=True, dir_okay=False)
    ],
    html: Annotated[
        Path | None,
        typer.Option(help="Write one self-contained page.", show_default=False, dir_okay=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, checked and complete.")
    ] = False,
) -> None:
    """Show a saved report: what each pass did, and how often its guards held.

    With [bold]--html[/] it becomes a page with the graphs before and after and the loads of every
    router. The page needs no network; print it from the browser.

    [bold]Examples[/]

        brt report report.json

        brt report report.json --html report.html
    """
    from brt.report.load import from_json

    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BrtError(f"{file} is not JSON: {error}") from error
    try:
        found = from_json(data)
    except BrtError as error:
        raise BrtError(f"{file}: {error}") from error
    if html is not None:
        with atomic_write(html) as beside:
            found.to_html(beside)
        typer.echo(f"wrote {html}")
    elif as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        typer.echo(str(found))
