"""`brt ops`: the operators, their kernels, and which one a call would run and why."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from brt.cli import show

Size = typer.Option(min=0, rich_help_panel="The call that --explain looks at")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("ops")(ops)


def ops(
    name: Annotated[
        str | None, typer.Argument(help="One operator; all where none is named.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say which kernel a call runs, and why not another.")
    ] = False,
    cells: Annotated[int, Size] = 4096,
    paths: Annotated[int, Size] = 16,
    k: Annotated[int, Size] = 2,
    dim: Annotated[int, Size] = 256,
    hidden: Annotated[int, Size] = 1024,
    dtype: Annotated[str, typer.Option(rich_help_panel=Size.rich_help_panel)] = "float32",
    device: Annotated[str, typer.Option(rich_help_panel=Size.rich_help_panel)] = "cpu",
    as_json: show.AsJson = False,
) -> None:
    """List operators and the kernels registered for them; with --explain, the choice for a call.

    [bold]Examples[/]

        brt ops

        brt ops --explain

        brt ops expert_mlp --explain --cells 512 --paths 64 --k 1 --dtype bfloat16
    """
    from brt.errors import KernelError
    from brt.ops import OPERATORS
    from brt.plugins import did_you_mean

    if name is not None and name not in OPERATORS:
        raise KernelError(
            f"no operator {name!r}; there are: {', '.join(sorted(OPERATORS))}"
            f"{did_you_mean(name, OPERATORS)}"
        )
    names = sorted(OPERATORS) if name is None else [name]
    if explain:
        _explain(names, cells, paths, k, dim, hidden, dtype, device, as_json=as_json)
    else:
        _list(names, as_json=as_json)


def _list(names: list[str], *, as_json: bool) -> None:
    from brt.plugins import collect

    found = [
        {
            "operator": spec.op,
            "device": spec.device,
            "kernel": spec.name,
            "from": owner,
        }
        for spec, owner in collect("kernels").values()
        if spec.op in names
    ]
    show.rows(found, as_json=as_json, title="Operators and their kernels")


def _explain(
    names: list[str],
    cells: int,
    paths: int,
    k: int,
    dim: int,
    hidden: int,
    dtype: str,
    device: str,
    *,
    as_json: bool,
) -> None:
    from brt.cli.samples import sample_calls
    from brt.ops import explain

    calls = sample_calls(cells, paths, k, dim, hidden, dtype, device)
    found = [explain(name, *calls[name]) for name in names if name in calls]
    if as_json:
        show.print_json([asdict(explanation) for explanation in found])
    else:
        for explanation in found:
            typer.echo(f"{explanation}\n")
