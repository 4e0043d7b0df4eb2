"""`brt profile`: where the cells of a model's sample inputs go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from brt.cli import show


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("profile")(profile)


def profile(
    model: Annotated[str, typer.Argument(help="A name that `brt models` lists.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Save the profile here.", show_default=False, dir_okay=False),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw it here, as a PNG.", show_default=False, dir_okay=False),
    ] = None,
    batches: Annotated[int, typer.Option(help="How many batches to run.", min=1)] = 8,
    as_json: show.AsJson = False,
) -> None:
    """Run a model on its sample inputs, and show which paths the cells take.

    The model comes with its weights where some are shipped. A saved profile is what
    [bold]brt optimize --profile[/] specialises a model to.

    [bold]Examples[/]

        brt profile patch-sr

        brt profile patch-sr --batches 32 --out patch-sr.safetensors --plot patch-sr.png
    """
    from brt import plugins
    from brt.profile import profile as run

    spec = plugins.get("models", model)
    made = (spec.pretrained or spec.factory)()
    samples = [spec.sample(seed=seed) for seed in range(batches)]
    found = run(made, samples, progress=False if as_json else None)
    if out is not None:
        found.save(out)
    if plot is not None:
        found.plot(plot)
    if as_json:
        show.print_json(found.to_json())
        return
    typer.echo(str(found))
    for written in (out, plot):
        if written is not None:
            typer.echo(f"wrote {written}")
