"""`brt optimize`: run passes on a model, and see what each did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from brt.cli import show
from brt.errors import BrtError
from brt.files import atomic_write

if TYPE_CHECKING:
    from torch import nn

    from brt.profile import Profile
    from brt.specs import ModelSpec


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("optimize")(optimize)


def optimize(
    model: Annotated[str, typer.Argument(help="A name that `brt models` lists.")],
    profile: Annotated[
        Path | None,
        typer.Option(help="A profile of this model, as `brt profile` saves it.", dir_okay=False),
    ] = None,
    batches: Annotated[
        int | None, typer.Option(min=1, help="Without a profile: profile so many sample batches.")
    ] = None,
    passes: Annotated[
        str | None,
        typer.Option(help="Names of passes, joined by commas; those by default otherwise."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare results on a sample batch.")
    ] = True,
    html: Annotated[
        Path | None, typer.Option(help="Write the report as a page here.", dir_okay=False)
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Save the report here, for `brt report`.", dir_okay=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Optimise a model for where its cells go, and show what each pass did.

    The passes run on a copy, which is compared with the model after each of them on a sample batch
    that the profile has not seen.

    [bold]Examples[/]

        brt optimize patch-sr --batches 8

        brt optimize patch-sr --profile patch-sr.brt --passes drop-dead-paths --html report.html

        brt optimize patch-sr --batches 8 --json
    """
    from brt import plugins
    from brt.optimize import optimize as run
    from brt.passes.run import resolve

    spec: ModelSpec = plugins.get("models", model)
    names = None if passes is None else [name.strip() for name in passes.split(",") if name.strip()]
    if names is not None:
        resolve(names)  # before the work, so that a misspelt name costs no time
    built = spec.factory() if spec.pretrained is None else spec.pretrained()
    built.eval()
    seen = _profile(spec, built, profile, batches)
    num_seen = batches or 1
    fast = run(built, seen, passes=names, sample=spec.sample(seed=num_seen), verify=verify)
    found = fast.report
    if report is not None:
        with atomic_write(report) as beside:
            beside.write_text(json.dumps(found.to_json(), indent=2), encoding="utf-8")
    if html is not None:
        with atomic_write(html) as beside:
            found.to_html(beside)
    if as_json:
        show.print_json(found.to_json())
        return
    typer.echo(str(found))
    for path in (report, html):
        if path is not None:
            typer.echo(f"wrote {path}")


def _profile(spec: ModelSpec, model: nn.Module, file: Path | None, batches: int | None) -> Profile:
    from brt.profile import Profile
    from brt.profile import profile as run

    if (file is None) == (batches is None):
        raise BrtError(
            "give either a profile (--profile FILE, made by `brt profile`) or a number of sample "
            "batches to make one of (--batches 8)"
        )
    if file is not None:
        return Profile.load(file)
    assert batches is not None
    samples: list[Any] = [spec.sample(seed=seed) for seed in range(batches)]
    progress = Console(stderr=True).is_terminal
    return run(model, samples, progress=progress)
