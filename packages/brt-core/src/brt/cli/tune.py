"""`brt tune`: measure what the tuning store keeps about a model, list it, clear it."""

from __future__ import annotations

import time
from typing import Annotated, Any, get_args

import typer

from brt.cli import show
from brt.errors import BrtError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("tune")(tune)


def tune(
    model: Annotated[
        str | None, typer.Argument(help="A name that `brt models` lists: measure for this model.")
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Profile so many sample batches first.")] = 4,
    objective: Annotated[
        str,
        typer.Option(
            help="What kernels are chosen by: latency, the time of a call; or occupancy, what a "
            "call keeps busy, for models that share a device with others."
        ),
    ] = "latency",
    list_all: Annotated[bool, typer.Option("--list", help="Show what is kept.")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Forget all that is kept.")] = False,
    as_json: show.AsJson = False,
) -> None:
    """Measure kernels, passes and forms for a model, so that brt.optimize need not.

    What is measured is kept in one file for each user ($BRT_TUNING names another), by device,
    versions and class of shapes.

    [bold]Examples[/]

        brt tune patch-sr

        brt tune patch-sr --objective occupancy

        brt tune --list --json

        brt tune --clear
    """
    from brt import tuning

    if (model is not None) + list_all + clear != 1:
        raise BrtError("give one of: a MODEL to measure for, --list, --clear")
    store = tuning.require_store()
    if clear:
        found = {"file": str(store.path), "forgotten": store.clear()}
        show.print_json(found) if as_json else typer.echo(
            f"forgot {found['forgotten']} choices in {store.path}"
        )
    elif list_all:
        _list(store, as_json=as_json)
    else:
        assert model is not None
        _measure(model, batches, objective, as_json=as_json)


def _list(store: Any, *, as_json: bool) -> None:
    found = [
        {
            "kind": choice.kind,
            "device": choice.device,
            "what": choice.what,
            "measured": time.strftime("%Y-%m-%d %H:%M", time.localtime(choice.made)),
        }
        | ({"value": choice.value} if as_json else {})
        for choice in store.choices()
    ]
    show.rows(found, as_json=as_json, title=f"Choices in {store.path}")


def _measure(name: str, batches: int, objective: str, *, as_json: bool) -> None:
    from brt import plugins
    from brt.profile import profile
    from brt.race import Objective
    from brt.tuning_run import tune as run

    if objective not in get_args(Objective):
        raise BrtError(f"--objective {objective!r}: there are {', '.join(get_args(Objective))}")
    spec = plugins.get("models", name)
    model = (spec.factory() if spec.pretrained is None else spec.pretrained()).eval()
    samples = [spec.sample(seed=seed) for seed in range(batches + 1)]
    fast, kernels = run(model, profile(model, samples[:-1]), samples[-1], objective)  # type: ignore[arg-type]
    rows: list[dict[str, Any]] = [
        {
            "operator": choice.op,
            "call": choice.arguments,
            "kernel": choice.kernel,
            "microseconds": {name: round(us, 1) for name, us in choice.microseconds.items()},
        }
        for choice in kernels
    ]
    if as_json:
        regions = [region.candidates for region in fast.report.regions if region.candidates]
        forms = [
            {"passes": list(one.passes), "seconds": one.seconds, "kept": one.kept}
            for candidates in regions
            for one in candidates
        ]
        show.print_json({"objective": objective, "kernels": rows, "forms": forms})
        return
    for row in rows:
        row["microseconds"] = ", ".join(f"{k} {us}" for k, us in row["microseconds"].items())
    show.rows(rows, as_json=False, title=f"Kernels, by {objective}", empty="no operator has two")
    typer.echo(str(fast.report))
