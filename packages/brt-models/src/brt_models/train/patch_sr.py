"""Train the patch super-resolution network: ``python -m brt_models.train.patch_sr``.

Four stages: every branch alone, on all patches; the gate, which learns to predict the error that
each branch makes; the branches through the routers, each on the patches it gets; the gate again.
Choices by looking at results used the photos of the split "profile"; "held-out" is measured once,
at the end.

Shape letters: N patches, P paths, C colours, H height, W width.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from brt import annotate_patches
from brt.errors import BrtError
from brt.files import atomic_write
from brt_models import photos, quality, weight_files
from brt_models.patch_sr import Gate, PatchSR, PatchSRConfig, centred, save
from brt_models.resampling import enlarge
from brt_models.train.crops import Crops
from brt_models.train.log import Log

GREY_LEVEL = 1 / 255


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, but the machine.

    Rates are the highest of a one-cycle schedule.
    """

    seed: int = 0
    batch: int = 16
    branch_steps: tuple[int, ...] = (1500, 2000, 2000, 3500)
    branch_rates: tuple[float, ...] = (4e-3, 3e-3, 2e-3, 2e-3)
    gate_patches: int = 6144
    gate_epochs: int = 20
    gate_batch: int = 64
    gate_rate: float = 3e-3
    specialise_steps: int = 1000
    specialise_rate: float = 5e-4
    refresh_every: int = 100  # steps
    measure_every: int = 500  # steps

    def __post_init__(self) -> None:
        if len(self.branch_steps) != len(self.branch_rates):
            raise BrtError("Recipe: branch_steps and branch_rates need one number a path")

    @classmethod
    def quick(cls) -> Recipe:
        """A few steps of everything, to see that it runs."""
        return cls(branch_steps=(2,) * 4, gate_patches=64, gate_epochs=2, specialise_steps=2)


def train(
    recipe: Recipe, config: PatchSRConfig, log: Log, device: torch.device | None = None
) -> PatchSR:
    """The trained model, in eval mode, on the CPU; ``device`` is where it is trained."""
    if len(recipe.branch_steps) != config.num_paths:
        raise BrtError(
            f"train: the recipe is for {len(recipe.branch_steps)} paths, "
            f"the config has {config.num_paths}"
        )
    torch.manual_seed(recipe.seed)
    model = PatchSR(config)
    start_at_bicubic(model)
    model.to(device)
    crops = Crops(
        [photos.load(photo) for photo in photos.split("train")],
        config.scale,
        config.size,
        torch.Generator().manual_seed(recipe.seed),
        device,
    )
    for path in range(config.num_paths):
        train_branch(model, path, crops, recipe, log)
    train_gate(model, crops, recipe, log, "gate")
    train_specialists(model, crops, recipe, log)
    train_gate(model, crops, recipe, log, "gate again")
    return model.cpu().eval()


def start_at_bicubic(model: PatchSR) -> None:
    """Scale down what blocks and branches add, so that training starts near bicubic."""
    with torch.no_grad():
        for name, weight in model.branches.named_parameters():
            if "conv2" in name or "upscale" in name:
                weight.mul_(0.1)


def train_branch(model: PatchSR, path: int, crops: Crops, recipe: Recipe, log: Log) -> None:
    """One branch alone, on patches of every kind."""
    branch, config = model.branches[path], model.config

    def upscale(x_BCHW: Tensor) -> Tensor:
        cells_NCHW, grid = annotate_patches(x_BCHW, config.size, config.stride)
        residual_NCHW = branch(centred(cells_NCHW))
        return enlarge(x_BCHW, config.scale) + grid.restore(residual_NCHW, config.scale)

    descend(
        f"path {path}: {config.path_names[path]}",
        branch,
        upscale,
        branch.parameters(),
        recipe.branch_steps[path],
        recipe.branch_rates[path],
        crops,
        recipe,
        log,
    )


def train_specialists(model: PatchSR, crops: Crops, recipe: Recipe, log: Log) -> None:
    """The branches through the routers, each on the patches it gets; the gate stays."""
    descend(
        "specialise",
        model.residual,
        model,
        model.branches.parameters(),
        recipe.specialise_steps,
        recipe.specialise_rate,
        crops,
        recipe,
        log,
    )


def descend(
    name: str,
    residual: Callable[[Tensor], Tensor],
    upscale: Callable[[Tensor], Tensor],
    parameters: Iterable[nn.Parameter],
    num_steps: int,
    rate: float,
    crops: Crops,
    recipe: Recipe,
    log: Log,
) -> None:
    """Minimise the L1 error of ``residual(patches)``; measure ``upscale(photo)`` now and then."""
    optimizer = torch.optim.Adam(parameters, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=max(2, num_steps), pct_start=0.05
    )
    with log.stage(name, num_steps) as stage:
        for step in range(1, num_steps + 1):
            if step % recipe.refresh_every == 0:
                crops.refresh()
            low_NCHW, wanted_NCHW = crops.draw(recipe.batch)
            loss = F.l1_loss(residual(centred(low_NCHW)), wanted_NCHW)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            gain = None
            if step % recipe.measure_every == 0 or step == num_steps:
                found = quality.measure(upscale, photos.split("profile"), crops.scale, crops.device)
                gain = quality.mean_gain(found)
            stage.step(step, loss.item(), gain)


def train_gate(model: PatchSR, crops: Crops, recipe: Recipe, log: Log, name: str) -> None:
    """The gate learns to predict the error of each path; what it does with it is the config's.

    It fits logarithms: of the first path's error, and of what each further one saves. Errors below
    one grey level count as one.
    """
    gate = model.gate
    assert isinstance(gate, Gate)
    crops.refresh()
    cells_NCHW, error_NP = errors(model, crops, recipe.gate_patches)
    wanted_NP = (error_NP + GREY_LEVEL**2).log()
    wanted_NP[:, 1:] -= wanted_NP[:, :-1].clone()
    spread_P = wanted_NP.std(0).clamp(min=1e-6)
    spread_P[0] = 1
    with torch.no_grad():  # start at the means
        out_P = gate.linear(gate.detail(cells_NCHW[:256])).mean(0)
        mean_P = wanted_NP.mean(0)
        mean_P[1:] = mean_P[1:].clamp(max=-1e-3).neg().expm1().log()  # softplus undone
        gate.linear.bias.add_(mean_P - out_P)

    num_cells = len(cells_NCHW)
    batch = min(recipe.gate_batch, num_cells)
    optimizer = torch.optim.Adam(gate.parameters(), recipe.gate_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.gate_rate, total_steps=recipe.gate_epochs * (num_cells // batch)
    )
    with log.stage(name, recipe.gate_epochs) as stage:
        for epoch in range(1, recipe.gate_epochs + 1):
            order_N = torch.randperm(num_cells, generator=crops.generator).to(crops.device)
            losses = []
            for picked_N in order_N[: num_cells - num_cells % batch].split(batch):
                found_NP = gate.log_steps(cells_NCHW[picked_N])
                loss = ((found_NP - wanted_NP[picked_N]) / spread_P).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
            stage.step(epoch, sum(losses) / len(losses))


@torch.no_grad()
def errors(model: PatchSR, crops: Crops, num_patches: int) -> tuple[Tensor, Tensor]:
    """Centred patches [N, 3, H, W] and the mean squared error of each path on them [N, P]."""
    all_cells, all_errors = [], []
    for start in range(0, num_patches, 64):
        low_NCHW, wanted_NCHW = crops.draw(min(64, num_patches - start))
        cells_NCHW = centred(low_NCHW)
        lacks = [branch(cells_NCHW) - wanted_NCHW for branch in model.branches]
        all_cells.append(cells_NCHW)
        all_errors.append(torch.stack([lack.square().mean((1, 2, 3)) for lack in lacks], 1))
    return torch.cat(all_cells), torch.cat(all_errors)


def report(model: PatchSR, console: Console) -> list[dict[str, object]]:
    """Measure every photo that the weights did not come from; print a table, return its rows."""
    table = Table("photo", "split", "bicubic", "model", "gain", "gain (luma)", "patches per path")
    rows: list[dict[str, object]] = []
    for photo in photos.split("profile") + photos.split("held-out"):
        with quality.loads(model.scatter) as load_P:
            (found,) = quality.measure(model, [photo], model.config.scale)
        rows.append(asdict(found) | {"split": photo.split, "loads": load_P})
        table.add_row(
            photo.name,
            photo.split,
            f"{found.rgb_bicubic:.2f} dB",
            f"{found.rgb:.2f} dB",
            f"{found.rgb_gain:+.2f}",
            f"{found.luma_gain:+.2f}",
            " ".join(map(str, load_P)),
        )
    console.print(table)
    return rows


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for weights, curves and figures.")] = Path(
        "patch_sr_training"
    ),
    seed: Annotated[int, typer.Option(help="Of weights and patches.")] = 0,
    threads: Annotated[int, typer.Option(help="The same number gives the same weights.")] = 2,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda.")] = "cpu",
    quick: Annotated[bool, typer.Option(help="A few steps, to see that it runs.")] = False,
) -> None:
    """Train the patch super-resolution network on photos that Python packages ship."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=device != "cpu")
    console = Console()
    log = Log(console, "L1 loss", "over bicubic, profile photos", "dB")
    recipe = Recipe.quick() if quick else Recipe()
    recipe = Recipe(**(asdict(recipe) | {"seed": seed}))
    started = time.perf_counter()
    model = train(recipe, PatchSRConfig(), log, torch.device(device))
    seconds = time.perf_counter() - started
    record = {
        "recipe": asdict(recipe),
        "device": device,
        "threads": threads,
        "versions": weight_files.versions("torch", "scikit-image", "scikit-learn"),
        "quality": report(model, console),
    }
    save(model, out / "patch_sr.safetensors", record)
    log.plot(out / "curves.png")
    with atomic_write(out / "figures.json") as beside:
        beside.write_text(json.dumps(record | {"seconds": round(seconds)}, indent=2) + "\n")
    console.print(f"trained in {seconds:.0f} s; wrote {out}")


if __name__ == "__main__":
    app()
