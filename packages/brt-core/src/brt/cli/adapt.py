"""`brt adapt`: what `brt.adapt` would change in a model of another library."""

from __future__ import annotations

from typing import Annotated

import typer

from brt.cli import show


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("adapt")(adapt)


def adapt(
    model: Annotated[
        str, typer.Argument(help="A model class (MixtralForCausalLM), or a folder of a checkpoint.")
    ],
    as_json: show.AsJson = False,
) -> None:
    """Show which modules of a model run by brt after brt.adapt(model), and which do not, and why.

    The model is built without weights, so that large ones take no memory.

    [bold]Examples[/]

        brt adapt MixtralForCausalLM

        brt adapt path/to/checkpoint --json
    """
    import brt
    from brt import plugins

    specs = [spec for spec, _ in plugins.collect("adapters").values()]
    openers = [spec.opens for spec in specs if spec.opens is not None]
    opened = next((found for opens in openers if (found := opens(model)) is not None), None)
    if opened is None:
        known = ", ".join(spec.name for spec in specs) or "none: install brt-models"
        raise brt.BrtError(
            f"adapt: no adapter knows a model class or a checkpoint folder {model!r}; adapters: "
            f"{known}"
        )
    adapted = brt.adapt(opened)
    rows = [{"module": path, "adapter": by, "left because": ""} for path, by in adapted.changed]
    rows += [{"module": path, "adapter": "", "left because": why} for path, why in adapted.left]
    show.rows(rows, as_json=as_json, title=type(opened).__name__, empty="no mixture of experts")
