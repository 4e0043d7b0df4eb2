"""Results as a table for people."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from brt.bench.result import Result, Row

_STYLES = {"brt": "bold", "limit": "dim", "oracle": "dim", "part": "dim"}


def as_text(result: Result, width: int = 140) -> str:
    """The table and what stands around it, as plain text."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        show(result, console)
    return capture.get().rstrip("\n")


def show(result: Result, console: Console) -> None:
    """Print the table, the machine, and whether the numbers may be quoted."""
    console.print(table(result))
    for text in footer(result):
        console.print(text)


def table(result: Result) -> RenderableType:
    """One row a variant; columns that nobody has a number for are left out."""
    timed = [row for row in result.rows if row.status == "ok"]
    columns = [c for c in _COLUMNS if c[1] is None or any(c[1](row) for row in timed)]
    shown = Table(
        title=f"{result.workload}: {result.shapes} {result.dtype} on {result.device}, "
        f"{result.threads} {'thread' if result.threads == 1 else 'threads'}",
        title_justify="left",
        title_style="bold",
    )
    for header, filled, _ in columns:
        wraps = header in ("variant", "")
        left = filled is None and header != "median ms"
        shown.add_column(header, justify="left" if left or wraps else "right", no_wrap=not wraps)
    for row in result.rows:
        if row.status == "ok":
            shown.add_row(*(Text(text(row)) for _, _, text in columns), style=_style(row))
        else:
            shown.add_row(Text(row.variant), row.kind, row.status, style=_style(row))
    return shown


def footer(result: Result) -> list[Text]:
    """What the numbers need beside them."""
    machine = result.machine
    best = next((row for row in result.rows if row.best_peer), None)
    limit = next((row for row in result.rows if row.limit), None)
    found = [
        Text(f"{row.variant}: {row.status}: {row.reason}", style=_style(row))
        for row in result.rows
        if row.status != "ok"
    ]
    lines = []
    if best is not None:
        lines.append(f"best peer: {best.best_peer}")
    if limit is not None:
        lines.append(f"limit: {limit.limit}")
    lines.append(
        f"{machine.name}, {machine.cores} cores: product {machine.gemm_gflops:.0f} GFLOP/s, copy "
        f"{machine.copy_gbps:.0f} GB/s (read + write)"
    )
    lines.append(", ".join(f"{name} {version}" for name, version in machine.versions.items()))
    found += [Text(line, style="dim") for line in lines]
    rounds = f"{result.rounds} clean rounds, {result.rounds_rejected} rejected"
    if result.disturbed:
        why = "; ".join(result.disturbances[-3:])
        found.append(Text(f"DISTURBED, do not quote: {rounds}: {why}", style="bold red"))
    else:
        found.append(Text(rounds, style="dim"))
    return found


def _number(value: float | None, spec: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{spec}}{unit}"


def _ms(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}" if value >= 1 else f"{value:.3f}"


def _style(row: Row) -> str:
    if row.status in ("wrong", "failed"):
        return "red"
    return "dim" if row.status == "skipped" else _STYLES.get(row.kind, "")


# header, whether a row has it (None: always shown), its text
_COLUMNS: list[tuple[str, Callable[[Row], object] | None, Callable[[Row], str]]] = [
    ("variant", None, lambda row: row.variant),
    ("kind", None, lambda row: row.kind),
    ("median ms", None, lambda row: _ms(row.median_ms)),
    ("p95", lambda row: row.p95_ms, lambda row: _ms(row.p95_ms)),
    ("min", lambda row: row.min_ms, lambda row: _ms(row.min_ms)),
    ("x eager", lambda row: row.ratio_to_eager, lambda row: _number(row.ratio_to_eager, ".2f")),
    (
        "x best peer",
        lambda row: row.ratio_to_best_peer,
        lambda row: _number(row.ratio_to_best_peer, ".2f"),
    ),
    ("of limit", lambda row: row.limit_fraction, lambda row: _number(row.limit_fraction, ".2f")),
    ("GB/s", lambda row: row.gbps, lambda row: _number(row.gbps, ".1f")),
    ("GFLOP/s", lambda row: row.gflops, lambda row: _number(row.gflops, ".1f")),
    ("max error", lambda row: row.error is not None, lambda row: _number(row.error, ".1e")),
    ("", lambda row: row.detail, lambda row: row.detail),
]
