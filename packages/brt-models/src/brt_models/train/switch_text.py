"""Train the language model of bytes: ``python -m brt_models.train.switch_text``.

The same network with one expert, which is dense and spends as much on a byte, is trained alike
beside it. Choices by looking at results used the part "validation" of the text; "held-out" is
measured once, at the end.

Legend: B sequences, S bytes of one.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from brt.errors import BrtError
from brt.files import atomic_write
from brt_models import english, weight_files
from brt_models.macs import macs_of
from brt_models.switch.attention import position_bucket
from brt_models.switch.config import SwitchConfig
from brt_models.switch.training import SwitchLoss, with_routers
from brt_models.switch_text import SwitchText, bits_per_byte, save, small_config
from brt_models.train.log import Log


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, but the machine and the text of its Python.

    The rate is the highest of a one-cycle schedule.
    """

    seed: int = 0
    steps: int = 800
    batch: int = 8
    length: int = 256
    rate: float = 2e-3
    weight_decay: float = 0.05
    max_norm: float = 1.0
    measure_every: int = 100  # steps

    def __post_init__(self) -> None:
        if min(self.steps, self.batch, self.length, self.measure_every) < 1:
            raise BrtError(f"Recipe: steps, batch, length, measure_every must be >= 1, got {self}")

    @classmethod
    def quick(cls) -> Recipe:
        """A few steps, to see that it runs."""
        return cls(steps=12, batch=2, length=64)


def train(recipe: Recipe, config: SwitchConfig, log: Log, name: str) -> SwitchText:
    """The trained model, in eval mode."""
    torch.manual_seed(recipe.seed)
    model = SwitchText(config).train()
    start_near(model)
    generator = torch.Generator().manual_seed(recipe.seed)
    ids_S, validation_S = english.ids("train"), english.ids("validation")
    others = [p for name, p in model.named_parameters() if not name.startswith("position.")]
    groups: list[dict[str, Any]] = [
        {"params": others},
        {"params": list(model.position.parameters()), "weight_decay": 0.0},
    ]
    rates = [recipe.rate, 10 * recipe.rate]
    optimizer = torch.optim.AdamW(
        groups,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=max(2, recipe.steps), pct_start=0.1
    )
    with log.stage(name, recipe.steps) as stage:
        for step in range(1, recipe.steps + 1):
            found = loss(model, drawn(ids_S, recipe, generator))
            optimizer.zero_grad()
            found.total.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_norm)
            optimizer.step()
            schedule.step()
            score = None
            if step % recipe.measure_every == 0 or step == recipe.steps:
                score = bits_per_byte(model, validation_S[:16384])
            stage.step(step, found.words.item(), score)
    return model.eval()


@torch.no_grad()
def start_near(model: SwitchText) -> None:
    """Start with heads that look at nearby bytes, each further than the one before.

    Biases of distances as in ALiBi (Press et al. 2022, arXiv:2108.12409); learning them from zero
    takes more steps than all of this training. What layers add is scaled down to the size of the
    embedding.
    """
    config = model.config
    far_T = torch.arange(config.relative_attention_max_distance)
    bucket_T = position_bucket(-far_T, False, config.relative_attention_num_buckets, len(far_T))
    slope_H = 4.0 ** -torch.arange(config.num_heads)
    model.position.embed.weight[bucket_T] = -far_T[:, None] * slope_H
    for name, weight in model.blocks.named_parameters():
        if name.endswith(("attention.o.weight", "wo.weight")):
            weight.mul_(0.1)


def drawn(ids_S: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Pieces [B, S + 1] of the text, from anywhere."""
    last = len(ids_S) - recipe.length
    start_B = torch.randint(last, (recipe.batch,), generator=generator)
    return torch.stack([ids_S[start : start + recipe.length + 1] for start in start_B.tolist()])


def loss(model: SwitchText, ids_BS: Tensor) -> SwitchLoss:
    """Cross-entropy of every byte but the first, and the losses of the routers."""
    logits_BSV, scores = model.with_scores(ids_BS[:, :-1])
    words = F.cross_entropy(logits_BSV.flatten(0, 1), ids_BS[:, 1:].flatten())
    return with_routers(words, scores, model.config)


def macs_per_byte(model: SwitchText) -> float:
    """Multiply-adds of linear layers, the gates' and the embedding's left out."""
    ids_BS = english.ids("validation")[None, :256]
    (macs,) = macs_of(model, model, ids_BS, [[model]])
    return macs / ids_BS.numel()


def report(models: dict[str, SwitchText], console: Console) -> dict[str, dict[str, Any]]:
    """Measure the models on the held-out text; print a table, return its rows."""
    held_out_S, validation_S = english.ids("held-out"), english.ids("validation")
    table = Table("model", "parameters", "multiply-adds a byte", "validation", "held out")
    rows: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        rows[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "macs_per_byte": macs_per_byte(model),
            "validation_bits_per_byte": round(bits_per_byte(model, validation_S), 4),
            "held_out_bits_per_byte": round(bits_per_byte(model, held_out_S), 4),
        }
        parameters, macs, validation, held_out = rows[name].values()
        bits = f"{validation:.3f} bits", f"{held_out:.3f} bits"
        table.add_row(name, f"{parameters:,}", f"{macs:,.0f}", *bits)
    console.print(table)
    return rows


app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for weights, curves and figures.")] = Path(
        "switch_text_training"
    ),
    seed: Annotated[int, typer.Option(help="Of weights and batches.")] = 0,
    threads: Annotated[int, typer.Option(help="The same number gives the same weights.")] = 2,
    quick: Annotated[bool, typer.Option(help="A few steps, to see that it runs.")] = False,
) -> None:
    """Train the language model of bytes, and a dense one beside it, on Python's own help."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    console = Console()
    log = Log(console, "cross-entropy, nats a byte", "validation text", "bits a byte")
    recipe = Recipe.quick() if quick else Recipe()
    recipe = Recipe(**(asdict(recipe) | {"seed": seed}))
    started = time.perf_counter()
    experts = {"switch, 8 experts": 8, "dense": 1}
    models = {name: train(recipe, small_config(e), log, name) for name, e in experts.items()}
    seconds = round(time.perf_counter() - started)
    record = {
        "recipe": asdict(recipe),
        "threads": threads,
        "versions": weight_files.versions("torch"),
        "quality": report(models, console),
    }
    save(models["switch, 8 experts"], out / "switch_text.safetensors", record)
    log.plot(out / "curves.png")
    with atomic_write(out / "figures.json") as beside:
        beside.write_text(json.dumps(record | {"seconds": seconds}, indent=2) + "\n")
    console.print(f"trained in {seconds} s; wrote {out}")


if __name__ == "__main__":
    app()
