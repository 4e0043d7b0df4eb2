"""`brt demo`: a real model at work, from profile to report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from brt.cli import show

if TYPE_CHECKING:
    from brt.specs import DemoSpec

FIRST = "patch-sr"  # what runs where none is named, and it is installed


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(demo)


def demo(
    name: Annotated[str | None, typer.Argument(help="Which; --list says what there is.")] = None,
    source: Annotated[
        str | None, typer.Argument(help="Your own photo or words, as --list says.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for pictures and report.")] = Path("demo-out"),
    compiled: Annotated[
        bool,
        typer.Option("--compile/--no-compile", help="Also run torch.compile: most of the time."),
    ] = True,
    listed: Annotated[bool, typer.Option("--list", help="List the demos and stop.")] = False,
    as_json: show.AsJson = False,
) -> None:
    """Profile a trained network, optimise it, and show what that brought; patch-sr unless named.

    Prints milliseconds eager, compiled and optimised, the quality, where cells went, and what the
    passes did; writes pictures and the report.

    [bold]Examples[/]

        brt demo

        brt demo patch-sr holiday.jpg --out holiday --no-compile

        brt demo digits
    """
    specs = _specs()
    if listed:
        rows = [{"name": s.name, "takes": s.source, "summary": s.summary} for s in specs.values()]
        show.rows(rows, as_json=as_json, title="Demos")
        return
    spec = _spec(name, source, specs)
    console = Console(stderr=True) if as_json else show.console()
    figures = spec.run(source, out, compiled=compiled, console=console)
    if as_json:
        show.print_json(figures)


def _specs() -> dict[str, DemoSpec]:
    from brt import plugins

    return {spec.name: spec for spec, _ in plugins.collect("demos").values()}


def _spec(name: str | None, source: str | None, specs: dict[str, DemoSpec]) -> DemoSpec:
    """The demo of that name, or the first; `BrtError` where it cannot be run so."""
    from brt import plugins
    from brt.errors import BrtError

    if not specs:
        raise BrtError(
            "no installed package brings a demo; "
            "pip install packages/brt-core 'packages/brt-models[photos]' brings some"
        )
    if name is None:
        return specs.get(FIRST) or next(iter(specs.values()))
    if name not in specs and Path(name).is_file():
        raise BrtError(f"there is no demo {name!r}; with a photo of yours: brt demo {FIRST} {name}")
    spec: DemoSpec = plugins.get("demos", name)
    if source is not None and not spec.source:
        raise BrtError(f"demo {name!r} shows something of its own, and takes no {source!r}")
    return spec
