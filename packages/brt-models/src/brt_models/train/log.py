"""What training shows: a progress bar for each stage, curves, and a plot of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from brt.files import atomic_write


@dataclass
class Curve:
    """One stage's losses, and its decibels over bicubic on the profile photos where measured."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    gain: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Stage:
    """One stage at work; `Log.stage` makes it."""

    name: str
    curve: Curve
    progress: Progress
    task: TaskID

    def step(self, step: int, loss: float, gain: float | None = None) -> None:
        """Note one step."""
        self.curve.loss.append((step, loss))
        text = f"loss {loss:.4f}"
        if gain is not None:
            self.curve.gain.append((step, gain))
        if self.curve.gain:
            text += f"  {self.curve.gain[-1][1]:+.2f} dB"
        self.progress.update(self.task, completed=step, text=text)


@dataclass
class Log:
    """The curves of all stages, in order."""

    console: Console
    curves: dict[str, Curve] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, num_steps: int) -> Iterator[Stage]:
        """A progress bar while the stage runs, left standing afterwards."""
        columns = (
            TextColumn("{task.description:28}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=self.console, refresh_per_second=2) as progress:
            task = progress.add_task(name, total=num_steps, text="")
            yield Stage(name, self.curves.setdefault(name, Curve()), progress, task)

    def plot(self, path: Path) -> None:
        """Losses and gains of all stages as one picture."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.2), layout="constrained")
        losses, gains = figure.subplots(1, 2)
        for name, curve in self.curves.items():
            if curve.gain:
                step, loss = zip(*_smoothed(curve.loss), strict=True)
                losses.plot(step, loss, label=name, linewidth=1.2)
                gains.plot(*zip(*curve.gain, strict=True), label=name, marker="o", markersize=3)
        losses.set(xlabel="step", ylabel="L1 loss (mean of 50 steps)", yscale="log")
        gains.set(xlabel="step", ylabel="dB over bicubic, profile photos")
        gains.legend(fontsize="small")
        for axes in (losses, gains):
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        with atomic_write(path) as beside:
            figure.savefig(beside, dpi=110)


def _smoothed(points: list[tuple[int, float]], window: int = 50) -> list[tuple[int, float]]:
    chunks = [points[i : i + window] for i in range(0, len(points), window)]
    return [(chunk[-1][0], sum(loss for _, loss in chunk) / len(chunk)) for chunk in chunks]
