"""`brt place`: which experts go on which rank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brt.cli import show

if TYPE_CHECKING:
    from collections.abc import Callable


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("place")(place)


def place(
    source: Annotated[
        Path,
        typer.Argument(help="A profile, a trace (.npz) or loads (.json).", metavar="PROFILE"),
    ],
    topology: Annotated[
        Path, typer.Option(help="Hosts, ranks and links: TOML or JSON.", dir_okay=False)
    ],
    objective: Annotated[str, typer.Option(help="traffic, balance or both.")] = "both",
    memory: Annotated[
        int | None,
        typer.Option(help="Experts of a layer on a rank.", show_default="an even share"),
    ] = None,
    replicas: Annotated[
        int, typer.Option(min=0, help="Experts of a layer that stand on a rank more.")
    ] = 0,
    balance_weight: Annotated[
        float, typer.Option(min=0, help="What uneven load counts against traffic.")
    ] = 5.0,
    solver: Annotated[str, typer.Option(help="Its name.")] = "descent",
    seed: Annotated[int, typer.Option(help="The same seed gives the same plan.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Save the plan here.", show_default=False, dir_okay=False),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw loads and moves before and after here, as a PNG.",
            show_default=False,
            dir_okay=False,
        ),
    ] = None,
    as_json: show.AsJson = False,
) -> None:
    """Plan which experts go on which rank: less traffic between ranks, and an even load.

    Shows the default placement, balanced packing (EPLB), the plan, and a bound that no placement
    is better than.

    [bold]Examples[/]

        brt place profile.safetensors --topology two-hosts.toml --out plan.json

        brt place trace.npz --topology two-hosts.toml --objective traffic --plot plan.png
    """
    plan = _command()(
        source,
        topology,
        objective=objective,
        memory=memory,
        replicas=replicas,
        balance_weight=balance_weight,
        solver=solver,
        seed=seed,
    )
    if out is not None:
        plan.save(out)
    if plot is not None:
        plan.plot(plot, source)
    if as_json:
        show.print_json(plan.to_json())
        return
    title = f"{plan.model}: {plan.num_experts} experts on {plan.num_ranks} ranks"
    show.rows(plan.rows(), as_json=False, title=f"{title}, {plan.seconds:.2f} s")
    typer.echo(plan.says())
    for written in (out, plot):
        if written is not None:
            typer.echo(f"wrote {written}")


def _command() -> Callable[..., Any]:
    """What plans, of the first installed package that does."""
    from brt import plugins
    from brt.errors import BrtError

    specs = [spec for spec, _ in plugins.collect("solvers").values()]
    found = next((spec.command for spec in specs if spec.command is not None), None)
    if found is None:
        raise BrtError(
            "no installed package plans placements; pip install packages/brt-core "
            "packages/brt-dist brings one"
        )
    return found
