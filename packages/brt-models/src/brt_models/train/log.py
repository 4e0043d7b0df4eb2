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
    """One stage's losses, and its scores where measured, each with its step."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    score: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class Stage:
    """One stage at work; `Log.stage` makes it."""

    name: str
    curve: Curve
    progress: Progress
    task: TaskID
    unit: str

    def step(self, step: int, loss: float, score: float | None = None) -> None:
        """Note one step."""
        self.curve.loss.append((step, loss))
        text = f"loss {loss:.4f}"
        if score is not None:
            self.curve.score.append((step, score))
        if self.curve.score:
            text += f"  {self.curve.score[-1][1]:.2f} {self.unit}"
        self.progress.update(self.task, completed=step, text=text)


@dataclass
class Log:
    """The curves of all stages, in order, and what the axes of their plot say."""

    console: Console
    loss: str
    score: str
    unit: str  # of a score
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
            yield Stage(name, self.curves.setdefault(name, Curve()), progress, task, self.unit)

    def plot(self, path: Path) -> None:
        """Losses and scores of all stages that have scores, as one picture."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.2), layout="constrained")
        losses, scores = figure.subplots(1, 2)
        for name, curve in self.curves.items():
            if curve.score:
                step, loss = zip(*_smoothed(curve.loss), strict=True)
                losses.plot(step, loss, label=name, linewidth=1.2)
                scores.plot(*zip(*curve.score, strict=True), label=name, marker="o", markersize=3)
        losses.set(xlabel="step", ylabel=f"{self.loss} (mean of 50 steps)", yscale="log")
        scores.set(xlabel="step", ylabel=f"{self.score} ({self.unit})")
        scores.legend(fontsize="small")
        for axes in (losses, scores):
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        with atomic_write(path) as beside:
            figure.savefig(beside, dpi=110)


def _smoothed(points: list[tuple[int, float]], window: int = 50) -> list[tuple[int, float]]:
    chunks = [points[i : i + window] for i in range(0, len(points), window)]
    return [(chunk[-1][0], sum(loss for _, loss in chunk) / len(chunk)) for chunk in chunks]
