"""Train an MSDNet on handwritten digits: ``python -m brt_models.train.msdnet_digits``.

All exits are trained together, their losses summed. Thresholds are found on the part "validation"
for three budgets; "test" is measured once, at the end. Beside it, plain convolutional networks that
spend as much on every image as a budget allows are trained alike.

Shape letters: N images, C colours, H height, W width.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from brt.errors import BrtError
from brt.files import atomic_write
from brt_models import digits, weight_files
from brt_models.digits import Digits
from brt_models.macs import macs_of
from brt_models.msdnet import NEVER, MSDNet, digits_config, save
from brt_models.msdnet.budgets import accuracy, at_budgets, run
from brt_models.msdnet.files import BUDGETS
from brt_models.msdnet.layers import ConvNorm
from brt_models.train.log import Log


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, but the machine.

    The rate is the highest of a one-cycle schedule. Images are turned, sheared, zoomed and shifted
    at random, by at most these amounts: radians, and shares of the image.
    """

    seed: int = 0
    epochs: int = 100
    batch: int = 64
    rate: float = 4e-3
    weight_decay: float = 0.05
    turn: float = 0.2
    shear: float = 0.15
    zoom: float = 0.12
    shift: float = 0.09
    measure_every: int = 10  # epochs

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch, self.measure_every) < 1:
            raise BrtError(f"Recipe: epochs, batch and measure_every must be >= 1, got {self}")

    @classmethod
    def quick(cls) -> Recipe:
        """A few steps of everything, to see that it runs."""
        return cls(epochs=2)


class Plain(nn.Module):
    """Three convolutions and a classifier: images [N, 3, H, W] -> the logits of one exit."""

    def __init__(self, width: int, num_classes: int = 10) -> None:
        super().__init__()
        self.net = nn.Sequential(
            ConvNorm(3, width),
            ConvNorm(width, 2 * width, stride=2),
            ConvNorm(2 * width, 4 * width, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, num_classes),
        )

    def forward(self, x_NCHW: Tensor) -> tuple[Tensor]:
        """[N, 3, H, W] -> ([N, num_classes],)."""
        return (self.net(x_NCHW),)

    def macs(self, x_NCHW: Tensor) -> int:
        """Multiply-adds of an image."""
        return macs_of(self, self, x_NCHW[:1], [[self]])[0]

    @classmethod
    def within(cls, budget: float, x_NCHW: Tensor) -> Plain:
        """The widest one that spends at most so many multiply-adds on an image."""
        width = 1
        while cls(width + 1).macs(x_NCHW) <= budget:
            width += 1
        return cls(width)


def train(make: Callable[[], nn.Module], recipe: Recipe, log: Log, name: str) -> nn.Module:
    """The trained network, in eval mode; in training mode it gives the logits of all exits."""
    torch.manual_seed(recipe.seed)
    model = make()
    generator = torch.Generator().manual_seed(recipe.seed)
    train_set, validation = digits.load("train"), digits.load("validation")
    num_images = len(train_set.labels)
    num_steps = num_images // recipe.batch
    optimizer = torch.optim.AdamW(model.parameters(), recipe.rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.rate, total_steps=recipe.epochs * num_steps, pct_start=0.2
    )
    with log.stage(name, recipe.epochs * num_steps) as stage:
        for epoch in range(1, recipe.epochs + 1):
            model.train()
            order_N = torch.randperm(num_images, generator=generator)
            for step, picked_N in enumerate(order_N.split(recipe.batch)[:num_steps], 1):
                x_NCHW = moved(train_set.images[picked_N], recipe, generator)
                labels_N = train_set.labels[picked_N]
                logits: Sequence[Tensor] = model(x_NCHW)
                found = torch.stack([F.cross_entropy(x_NC, labels_N) for x_NC in logits])
                optimizer.zero_grad()
                found.sum().backward()
                optimizer.step()
                schedule.step()
                score = None
                if step == num_steps and (
                    epoch % recipe.measure_every == 0 or epoch == recipe.epochs
                ):
                    score = 100 * validate(model, validation)
                stage.step((epoch - 1) * num_steps + step, found.mean().item(), score)
    return model.eval()


def moved(x_NCHW: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Images turned, sheared, zoomed and shifted, each in its own way; what comes in is black."""

    def within(most: float) -> Tensor:
        return most * (2 * torch.rand(len(x_NCHW), generator=generator) - 1)

    turn_N, zoom_N, shear_N = within(recipe.turn), 1 + within(recipe.zoom), within(recipe.shear)
    # Coordinates go from -1 to 1, so that a share of the image is twice as many of theirs
    right_N, down_N = within(2 * recipe.shift), within(2 * recipe.shift)
    cos_N, sin_N = zoom_N * turn_N.cos(), zoom_N * turn_N.sin()
    rows = [
        torch.stack([cos_N, shear_N - sin_N, right_N], 1),
        torch.stack([sin_N, cos_N, down_N], 1),
    ]
    grid_NHW2 = F.affine_grid(torch.stack(rows, 1), list(x_NCHW.shape), align_corners=False)
    black = x_NCHW.amin()
    return F.grid_sample(x_NCHW - black, grid_NHW2, align_corners=False) + black


@torch.inference_mode()
def validate(model: nn.Module, part: Digits) -> float:
    """The share that the last exit recognises, or would."""
    model.eval()
    logits = model.all_exits(part.images) if isinstance(model, MSDNet) else model(part.images)
    return accuracy(logits[-1], part.labels)


def report(model: MSDNet, recipe: Recipe, log: Log, console: Console) -> dict[str, Any]:
    """Measure the exits on the test images, beside plain networks; print a table, return it.

    Leaves the thresholds of the second budget with the model.
    """
    validation, test = digits.load("validation"), digits.load("test")
    full = model.macs_K(test.images)[-1]
    rows = [asdict(point) for point in at_budgets(model, BUDGETS, validation, test)]
    for row in rows:
        budget = row["budget"] * full

        def make(budget: float = budget) -> Plain:
            return Plain.within(budget, test.images)

        plain = train(make, recipe, log, f"plain, {budget / 1e3:.0f}k")
        assert isinstance(plain, Plain)
        row["plain_accuracy"] = validate(plain, test)
        row["plain_macs"] = plain.macs(test.images)
    model.set_thresholds(NEVER)
    whole = accuracy(run(model, test.images).logits_NC, test.labels)
    model.set_thresholds(rows[1]["thresholds"])
    table = Table("budget", "multiply-adds", "left at each exit", "accuracy", "plain", "accuracy")
    for row in rows:
        table.add_row(
            f"{row['budget']:.0%}",
            f"{row['macs']:,.0f} ({row['macs'] / full:.1%})",
            " ".join(map(str, row["left_K"])),
            f"{row['accuracy']:.1%}",
            f"{row['plain_macs']:,}",
            f"{row['plain_accuracy']:.1%}",
        )
    table.add_row("whole", f"{full:,}", "", f"{whole:.1%}", "", "")
    console.print(table)
    return {"macs": full, "accuracy": whole, "budgets": rows}


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for weights, curves and figures.")] = Path(
        "msdnet_digits_training"
    ),
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
    threads: Annotated[int, typer.Option(help="The same number gives the same weights.")] = 2,
    quick: Annotated[bool, typer.Option(help="A few steps, to see that it runs.")] = False,
) -> None:
    """Train an MSDNet on the handwritten digits that scikit-learn ships."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    console = Console()
    log = Log(console, "cross-entropy, mean of exits", "validation images recognised", "%")
    recipe = Recipe.quick() if quick else Recipe()
    recipe = Recipe(**(asdict(recipe) | {"seed": seed}))
    started = time.perf_counter()
    model = train(lambda: MSDNet(digits_config()), recipe, log, "msdnet")
    assert isinstance(model, MSDNet)
    quality = report(model, recipe, log, console)
    seconds = round(time.perf_counter() - started)
    record = {
        "recipe": asdict(recipe),
        "threads": threads,
        "versions": weight_files.versions("torch", "scikit-learn"),
        "quality": quality,
    }
    save(model, out / "msdnet_digits.safetensors", record)
    log.plot(out / "curves.png")
    with atomic_write(out / "figures.json") as beside:
        beside.write_text(json.dumps(record | {"seconds": seconds}, indent=2) + "\n")
    console.print(f"trained in {seconds} s; wrote {out}")


if __name__ == "__main__":
    app()
