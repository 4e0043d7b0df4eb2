"""`brt models`: the models that plugins offer, and the routers inside one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brt.cli import router_tree, show
from brt.files import atomic_write

if TYPE_CHECKING:
    from torch import nn

    from brt.specs import ModelSpec

_HELP = """List models; [bold]brt models show NAME[/] draws one's routers.

[bold]Examples[/]

    brt models

    brt models --json

    brt models show patch-sr
"""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help=_HELP, invoke_without_command=True)
    group.callback()(models)
    group.command("show")(show_model)
    app.add_typer(group, name="models")


def models(context: typer.Context, as_json: show.AsJson = False) -> None:
    """List models."""  # Typer shows _HELP
    if context.invoked_subcommand is not None:
        return
    from brt.plugins import collect

    found = [_describe(spec, owner) for spec, owner in collect("models").values()]
    show.rows(
        found,
        as_json=as_json,
        title="Models",
        empty="none is installed; pip install packages/brt-core packages/brt-models brings some",
    )


def show_model(
    name: Annotated[str, typer.Argument(help="A name that `brt models` lists.")],
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write a page with the graphs and where cells of a sample batch go.",
            show_default=False,
            dir_okay=False,
        ),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option(
            help="Write the same graphs as a picture.", show_default=False, dir_okay=False
        ),
    ] = None,
    as_json: show.AsJson = False,
) -> None:
    """Draw the routers of a model, with their places and protocols.

    Parts that are alike are drawn once, with all of their numbers.

    [bold]Examples[/]

        brt models show patch-sr

        brt models show patch-sr --html patch-sr.html --svg patch-sr.svg

        brt models show patch-sr --json
    """
    from brt import plugins

    spec, owner = plugins.collect("models").get(name) or (plugins.get("models", name), "")
    if html is not None or svg is not None:
        _draw(spec, html, svg)
    found = _routers(_shape_of(spec))
    if as_json:
        show.print_json(_describe(spec, owner) | {"routers": found})
        return
    show.console().print(router_tree.drawn(spec.title or name, spec.summary, found))
    for path in filter(None, (html, svg)):
        typer.echo(f"wrote {path}")


def _draw(spec: ModelSpec, html: Path | None, svg: Path | None) -> None:
    """The report of a model that no pass has changed, as a page and as a picture."""
    import brt
    from brt.report.picture import render_svg

    model = spec.factory() if spec.pretrained is None else spec.pretrained()
    profile = brt.profile(model.eval(), [spec.sample()])
    report = brt.optimize(model, profile, passes=[]).report
    if html is not None:
        with atomic_write(html) as beside:
            report.to_html(beside)
    if svg is not None:
        with atomic_write(svg) as beside:
            beside.write_text(render_svg(report), encoding="utf-8")


def _describe(spec: ModelSpec, owner: str) -> dict[str, Any]:
    model = _shape_of(spec)
    return {
        "name": spec.name,
        "what": spec.summary,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "routers": len(_routers(model)),
        "cells": spec.cells,
        "weights": "shipped" if spec.pretrained else "",
        "checkpoints": spec.checkpoints,
        "paper": spec.paper,
        "from": owner,
    }


def _shape_of(spec: ModelSpec) -> nn.Module:
    """The model without memory for its parameters."""
    import torch

    with torch.device("meta"):
        model: nn.Module = spec.factory()
    return model


def _routers(model: nn.Module) -> list[dict[str, str]]:
    from brt.routers import Router

    return [
        {"place": place, "router": type(module).__name__, "what": module.extra_repr()}
        for place, module in model.named_modules()
        if isinstance(module, Router)
    ]
