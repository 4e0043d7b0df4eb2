"""What all demos do: steps with their seconds, torch.compile beside, times and passes told."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from brt import Optimized


@contextmanager
def step(console: Console, what: str) -> Iterator[None]:
    """Say what goes on, and afterwards how long it took."""
    started = time.perf_counter()
    with console.status(what):
        yield
    console.print(f"[dim]{time.perf_counter() - started:6.1f} s  {what}[/]", highlight=False)


def compiled(model: nn.Module, x: Tensor, console: Console) -> dict[str, Callable[..., Any]]:
    """The model under torch.compile, already compiled for ``x``; empty where that fails."""
    try:
        made = torch.compile(model)
        with torch.inference_mode():
            made(x)
    except Exception as error:  # whatever its backend raises: the demo goes on without
        reason = str(error).strip().partition("\n")[0]
        console.print(f"torch.compile does not run here: {escape(reason)}")
        return {}
    return {"torch.compile": made}


def told(fast: Optimized) -> dict[str, Any]:
    """What the passes and guards of an optimised model did, ready for JSON."""
    return {
        "passes": [record.to_json() for record in fast.report.records],
        "guards": fast.report.guards(),
    }


def show_times(milliseconds: Mapping[str, float], console: Console) -> None:
    """The median of each variant, and how much longer eager takes."""
    table = Table("variant", "median", "eager takes", box=None, header_style="dim")
    for variant, median in milliseconds.items():
        times = milliseconds["eager"] / median
        table.add_row(variant, f"{median:.1f} ms", f"{times:.2f} x")
    console.print(table)


def show_rest(figures: Mapping[str, Any], console: Console) -> None:
    """Passes, guards, the difference from eager, and the files that were written."""
    for record in figures["passes"]:
        what = "refused: " + record["refused"] if record["refused"] else "; ".join(record["notes"])
        what = textwrap.shorten(what, 240, placeholder=" ... (all of it: the report)")
        done = "applied" if record["changed"] else "no change"
        console.print(f"pass {record['name']}: {done}{': ' if what else ''}{escape(what)}")
    for guard, count in figures["guards"].items():
        console.print(f"guard {guard}: {count['hits']} hits, {count['fallbacks']} fallbacks")
    console.print(f"largest difference from eager: {figures['difference_from_eager']:.2g}")
    for file in figures["files"]:
        console.print(f"wrote {escape(file)}", soft_wrap=True)
