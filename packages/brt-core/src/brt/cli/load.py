"""`brt load`: whether a checkpoint is one of a model, and what is in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from brt.cli import show
from brt.errors import BrtError, CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from brt.specs import ModelSpec

MENDABLE = 2


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("load")(load)


def load(
    model: Annotated[str, typer.Argument(help="A name that `brt models` lists.")],
    checkpoint: Annotated[
        Path, typer.Option(help="A file, or a folder with config and weights.", exists=True)
    ],
    option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE of the model's loader.", show_default=False),
    ] = None,
    as_json: show.AsJson = False,
) -> None:
    """Load a checkpoint into a model, and say what was found.

    Nothing in the file is executed. What does not fit is listed to the last name: what is missing,
    what is too much, other shapes and dtypes.

    Exit codes: 0 it is loaded, 2 it does not fit or cannot be read.

    [bold]Examples[/]

        brt load switch-base-8 --checkpoint switch-base-8/

        brt load msdnet --checkpoint msdnet.pth --json

        brt load dynamic-routing --checkpoint dynamic.pth --option network=Raw
    """
    from brt import plugins

    spec: ModelSpec = plugins.get("models", model)
    if spec.load is None:
        able = [name for name, (one, _) in plugins.collect("models").items() if one.load]
        raise BrtError(
            f"{model} loads no checkpoints; there are loaders of: {', '.join(able) or 'none'}"
        )
    about = {"model": model, "checkpoint": str(checkpoint)} | _size_of(checkpoint)
    try:
        built = spec.load(checkpoint, **_options(spec.load, option or []))
    except CheckpointError as error:
        if not as_json:
            raise
        show.print_json(about | {"loaded": False, "complaints": list(error.complaints)})
        raise typer.Exit(MENDABLE) from error
    except BrtError as error:
        if not as_json:
            raise
        show.print_json(about | {"loaded": False, "complaints": [str(error)]})
        raise typer.Exit(MENDABLE) from error
    found = about | {"loaded": True, "complaints": []} | _describe(built)
    if as_json:
        show.print_json(found)
    else:
        _print(found)


def _describe(model: nn.Module) -> dict[str, Any]:
    from brt.routers import Router

    state = model.state_dict()
    config = getattr(model, "config", None)
    return {
        "class": type(model).__name__,
        "tensors": len(state),
        "missing": 0,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}),
        "routers": sum(isinstance(module, Router) for module in model.modules()),
        "config": asdict(config) if is_dataclass(config) and not isinstance(config, type) else {},
    }


def _size_of(path: Path) -> dict[str, int]:
    files = [one for one in path.rglob("*") if one.is_file()] if path.is_dir() else [path]
    return {"files": len(files), "bytes": sum(one.stat().st_size for one in files)}


def _print(found: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    config = ", ".join(f"{name}={value!r}" for name, value in found.pop("config").items())
    table = Table.grid(padding=(0, 2))
    for name, value in (found | ({"config": config} if config else {})).items():
        if name not in ("loaded", "complaints"):
            table.add_row(f"[dim]{name}[/]", escape(show.cell(value)))
    show.console().print(table)


def _options(loader: Callable[..., Any], given: Sequence[str]) -> dict[str, Any]:
    """The options of a loader, of the types of their defaults."""
    from brt.bench.run import parsed
    from brt.plugins import did_you_mean

    known = {name: one for i, (name, one) in enumerate(signature(loader).parameters.items()) if i}
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise BrtError(f"--option {text}: expected NAME=VALUE, such as layer=3")
        if name not in known:
            there = ", ".join(known) or "none"
            raise BrtError(f"no option {name!r}{did_you_mean(name, known)}; there are: {there}")
        default = known[name].default
        found[name] = _dtype(value) if name == "dtype" else parsed(name, value, default)
    return found


def _dtype(name: str) -> torch.dtype:
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise BrtError(f"--option dtype={name}: expected float32, bfloat16, float16 or float64")
    return found
