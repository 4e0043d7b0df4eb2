"""The demo of exits: handwritten digits leave a network as soon as it is sure of them.

Shape letters: N images, C colours, H height, W width, K exits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import brt
from brt.files import atomic_write
from brt_models import digits, msdnet, profiles, weight_files
from brt_models.demo import parts
from brt_models.demo.digit_pictures import draw_budgets, draw_exits
from brt_models.demo.parts import step
from brt_models.demo.timing import alternate
from brt_models.msdnet.budgets import Point, accuracy, at_budgets
from brt_models.msdnet.budgets import run as run_once
from brt_models.msdnet.files import BUDGETS, DIGITS

BATCH = 100  # images that are timed


def run(
    out: Path = Path("demo-out"),
    *,
    compiled: bool = True,
    seconds: float = 8.0,
    console: Console | None = None,
) -> Mapping[str, Any]:
    """Let the test images leave where they are sure, tell what that costs; return the figures.

    Thresholds are searched here, on validation images, for three budgets. Written into ``out``:
    which digit left where, what a budget buys, the report of the optimisation.
    """
    console = console or Console()
    model = msdnet.pretrained_digits()
    validation, test = digits.load("validation"), digits.load("test")
    with step(console, f"thresholds for {len(BUDGETS)} budgets, {len(test.labels)} test images"):
        cost_K = model.macs_K(test.images)
        points = at_budgets(model, BUDGETS, validation, test)
        kept = model.thresholds
        model.set_thresholds(msdnet.NEVER)
        whole = accuracy(run_once(model, test.images).logits_NC, test.labels)
        model.set_thresholds(kept)
    with step(console, "profiling on validation images"):
        profile = profiles.digit_exits(model)
    x_NCHW = test.images[:BATCH]
    with step(console, "optimising"):
        fast = brt.optimize(model, profile, sample=x_NCHW)
    variants: dict[str, Callable[[Tensor], Tensor]] = {"eager": model, "optimised": fast}
    if compiled:
        with step(console, "torch.compile, for comparison"):
            variants |= parts.compiled(model, x_NCHW, console)
    with step(console, "timing all of them in turns"):
        milliseconds = alternate(variants, x_NCHW, seconds)
    with step(console, "drawing"):
        taken = run_once(model, test.images)
        with torch.inference_mode():
            difference = float((fast(x_NCHW) - model(x_NCHW)).abs().max())
        draw_exits(test, taken, cost_K, out / "exits.png")
        quality = weight_files.record_of(weight_files.shipped(DIGITS))["quality"]
        draw_budgets(points, whole, cost_K, quality["budgets"], out / "budgets.png")
        with atomic_write(out / "report.html") as beside:
            fast.report.to_html(beside)

    figures = {
        "images": len(test.labels),
        "threads": torch.get_num_threads(),
        "batch": BATCH,
        "milliseconds": milliseconds,
        "macs": list(cost_K),
        "accuracy": whole,
        "budgets": [_row(point, cost_K[-1]) for point in points],
        **parts.told(fast),
        "difference_from_eager": difference,
        "files": [str(out / file) for file in ("exits.png", "budgets.png", "report.html")],
    }
    _show(figures, console)
    return figures


def _row(point: Point, full: int) -> dict[str, Any]:
    """A budget and what came of it, ready for JSON."""
    lists = {"thresholds": list(point.thresholds), "left_K": list(point.left_K)}
    return asdict(point) | lists | {"share": point.macs / full}


def _show(figures: Mapping[str, Any], console: Console) -> None:
    full = figures["macs"][-1]
    console.print(
        f"\n[bold]{figures['images']} handwritten digits[/] that nothing was trained on; "
        f"{figures['threads']} threads",
        highlight=False,
    )
    columns = ("budget", "multiply-adds an image", "of all", "left at each exit", "recognised")
    table = Table(*columns, box=None, header_style="dim")
    for row in figures["budgets"]:
        table.add_row(
            f"{row['budget']:.0%}",
            f"{row['macs']:,.0f}",
            f"{row['share']:.1%}",
            " ".join(map(str, row["left_K"])),
            f"{row['accuracy']:.1%}",
        )
    left = " ".join(["0"] * (len(figures["macs"]) - 1) + [str(figures["images"])])
    table.add_row("all exits", f"{full:,}", "100.0%", left, f"{figures['accuracy']:.1%}")
    console.print(table)
    console.print(f"{figures['batch']} images at a budget of {BUDGETS[1]:.0%}:", highlight=False)
    parts.show_times(figures["milliseconds"], console)
    parts.show_rest(figures, console)
