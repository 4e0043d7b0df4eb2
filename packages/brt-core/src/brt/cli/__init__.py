"""The `brt` command.

Each command group is a module here with ``register(app)``. It imports torch, or what imports
torch, inside its functions, so that help and completion answer at once.

Exit codes: 0 done, 1 failed, 2 something that the user can mend, 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module, metadata
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from brt.errors import BrtError

COMMANDS = (
    "demo",
    "profile",
    "optimize",
    "tune",
    "report",
    "bench",
    "models",
    "load",
    "adapt",
    "place",
    "protocols",
    "routers",
    "passes",
    "ops",
    "plugins",
)

_HELP = """Dynamic neural networks: profile where cells go, optimise for it, see what it brings.

Start with [bold]brt demo[/], which does all of that to a photo. Every command has examples:
[bold]brt COMMAND --help[/].
"""

# What a wrong path or missing permission raises: the user's to mend, like a BrtError.
_PATH_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"brt {metadata.version('brt-core')}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option(
        "--version", help="Print the version and stop.", is_eager=True, callback=_print_version
    ),
]


def make_app() -> typer.Typer:
    """The command with all of its groups."""
    app = typer.Typer(
        name="brt",
        help=_HELP,
        no_args_is_help=True,
        rich_markup_mode="rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def options(version: Version = False) -> None:
        pass

    for name in COMMANDS:
        import_module(f"brt.cli.{name}").register(app)
    return app


def main() -> None:
    """Run the command that ``sys.argv`` names, and exit."""
    stderr = Console(stderr=True, soft_wrap=True)

    def show_warning(message: Warning | str, *_: object, **__: object) -> None:
        stderr.print(f"[yellow]brt: warning:[/] {escape(str(message))}")

    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            make_app()(prog_name="brt")
        except BrtError as error:
            stderr.print(f"[red]brt: error:[/] {escape(str(error))}")
        except _PATH_ERRORS as error:
            stderr.print(f"[red]brt: error:[/] {error.strerror}: {escape(str(error.filename))}")
    sys.exit(2)
