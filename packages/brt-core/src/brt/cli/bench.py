"""`brt bench`: variants of one workload, side by side."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brt.cli import show
from brt.errors import BrtError
from brt.files import atomic_write

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

WRONG, DISTURBED = 1, 3


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("bench")(bench)


def bench(
    workload: Annotated[
        str | None, typer.Argument(help="Its name.", show_default=False, metavar="WORKLOAD")
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="List workloads and stop.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    threads: Annotated[
        int | None, typer.Option(min=1, help="torch's threads.", show_default="as torch has it")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Undisturbed rounds wanted.")] = 20,
    retries: Annotated[
        int, typer.Option(min=0, help="Disturbed rounds to throw away before giving up.")
    ] = 20,
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE of the workload. A name given twice sweeps over its values.",
            show_default=False,
        ),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Only rows whose names match this expression.", show_default=False),
    ] = None,
    json_path: Annotated[
        Path | None,
        typer.Option(
            "--json",
            help="Write the results (with --list, the list) here; - is the standard output.",
            show_default=False,
            dir_okay=False,
        ),
    ] = None,
) -> None:
    """Measure variants of a workload in one process, taking turns.

    A product is timed between rounds: a round in which it was slow, or in which other processes
    took the cores, is thrown away and repeated, and a result with too few clean rounds says so.
    Outputs are compared with a reference: a wrong variant has no numbers.

    Exit codes: 1 if a variant of brt is wrong or failed, 3 if the machine was disturbed.

    [bold]Examples[/]

        brt bench --list

        brt bench routing --threads 2 --json routing.json

        brt bench grouped --option p=64 --option skew=uniform --option skew=zipf
    """
    if list_all or workload is None:
        _list(json_path)
        return
    from brt.bench import Settings, make_workload, run
    from brt.bench.result import as_json
    from brt.bench.table import show as show_result

    settings = Settings(repeats=repeats, retries=retries, threads=threads)
    kind, console = _dtype(dtype), show.console()
    to_stdout = str(json_path) == "-"
    results = []
    for options in _sweep(option or []):
        made = make_workload(workload, device, kind, options)
        with _progress() as progress:
            result = run(made, settings=settings, variants=variant or [], progress=progress)
        if not to_stdout:
            show_result(result, console)
        results.append(result)
    if json_path is not None:
        _write(as_json(results), json_path)
    if any(result.failed for result in results):
        raise typer.Exit(WRONG)
    if any(result.disturbed for result in results):
        raise typer.Exit(DISTURBED)


def _list(json_path: Path | None) -> None:
    from brt.plugins import collect

    found = [
        {
            "name": name,
            "what": spec.summary,
            "options": [o for o in show.options(spec.options) if o not in ("device", "dtype")],
            "from": owner,
        }
        for name, (spec, owner) in collect("workloads").items()
    ]
    if json_path is None:
        show.rows(found, as_json=False, title="Workloads")
    else:
        _write(json.dumps(found, indent=2) + "\n", json_path)


def _write(text: str, path: Path) -> None:
    """The whole text, or nothing."""
    if str(path) == "-":
        typer.echo(text, nl=False)
    else:
        with atomic_write(path) as beside:
            beside.write_text(text, encoding="utf-8")


def _sweep(given: Sequence[str]) -> Iterator[dict[str, str]]:
    """Every combination of the values that options were given."""
    values: dict[str, list[str]] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise BrtError(f"--option {text}: expected NAME=VALUE, such as n=4096")
        values.setdefault(name, []).append(value)
    for combination in itertools.product(*values.values()):
        yield dict(zip(values, combination, strict=True))


def _dtype(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise BrtError(f"--dtype {name}: expected float32, bfloat16, float16 or float64")
    return found


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal's stderr, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    # No refresh thread: it would take a core's time from what is measured
    with Progress(
        *columns, console=Console(stderr=True), transient=True, auto_refresh=False
    ) as bar:
        task = bar.add_task("")

        def update(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)
            bar.refresh()

        yield update
