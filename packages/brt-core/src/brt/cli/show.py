"""How commands print: a table for people, or the same rows as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from inspect import Parameter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def console() -> Console:
    """The console for tables; wide where it is no terminal, so that grep sees whole rows."""
    found = Console()
    return found if found.is_terminal else Console(width=200)


def print_json(found: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(found, indent=2))


def rows(
    found: Sequence[Mapping[str, Any]], *, as_json: bool, title: str, empty: str = "none"
) -> None:
    """Print rows that share their keys: as a JSON list, or as a table with the keys as its head."""
    if as_json:
        print_json(found)
    elif not found:
        console().print(f"{title}: {empty}")
    else:
        table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
        for name in found[0]:
            table.add_column(name.replace("_", " "), overflow="fold")
        for row in found:
            table.add_row(*(escape(cell(value)) for value in row.values()))
        console().print(table)


def cell(value: Any) -> str:
    """A value as a table shows it: lists joined, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def options(parameters: Mapping[str, Parameter]) -> list[str]:
    """A factory's options as a user writes them: ``k`` where one must be given, else ``k=2``."""
    return [
        name if parameter.default is Parameter.empty else f"{name}={parameter.default!r}"
        for name, parameter in parameters.items()
        if parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    ]
