"""`brt demo`: a real model at work, from profile to report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from brt.cli import show

if TYPE_CHECKING:
    from brt.specs import ModelSpec


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    source: Annotated[
        Path | None, typer.Argument(help="Your own photo; without one, the demo's.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model with a demo; without one, the first of them.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures and report.")] = Path("demo-out"),
    compiled: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="Also run torch.compile: most of the time."),
    ] = True,
    as_json: show.AsJson = False,
) -> None:
    """Profile a trained network, optimise it, run it on a photo, and show what that brought.

    Prints milliseconds eager, compiled and optimised, the quality, where cells went, and what the
    passes did; writes pictures and the report.

    [bold]Examples[/]

        brt demo

        brt demo holiday.jpg --out holiday --no-compile
    """
    spec = _spec(model)
    assert spec.demo is not None
    console = Console(stderr=True) if as_json else show.console()
    figures = spec.demo(source, out, compiled=compiled, console=console)
    if as_json:
        show.print_json(figures)


def _spec(name: str | None) -> ModelSpec:
    """The model of that name, which must have a demo; or the first that has one."""
    from brt import plugins
    from brt.errors import BrtError

    shown = {
        spec.name: spec for spec, _ in plugins.collect("models").values() if spec.demo is not None
    }
    if not shown:
        raise BrtError(
            "no installed package brings a demo; "
            "pip install packages/brt-core 'packages/brt-models[photos]' brings one"
        )
    if name is None:
        return next(iter(shown.values()))
    if name not in shown:
        plugins.get("models", name)  # an unknown name: says which there are
        raise BrtError(f"model {name!r} has no demo; these have one: {', '.join(shown)}")
    return shown[name]
