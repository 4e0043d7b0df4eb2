"""A language model with its experts on several ranks, equal to one process.

    torchrun --standalone --nproc-per-node 4 -m brt_dist.demo

or ``brt demo dist``, which starts the ranks itself. Each rank has sequences of its own. The model
runs with its experts in equal blocks, and again with each expert nearer to the tokens that take it;
the plan is made from other sequences than those that are counted.

Legend: W ranks, P paths (experts).
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import brt
from brt import plugins
from brt_dist.nearest import nearest
from brt_dist.parallelize import Parallelized, parallelize

if TYPE_CHECKING:
    from rich.console import Console

MODELS = ("switch-text", "switch-base-8")
"""The first of these that an installed package offers is shown."""
NUM_RANKS = 4
_NUM_BATCHES, _NUM_RUNS = 4, 5
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """What one placement brings.

    Attributes:
        placement: its name.
        moved: rows, of all layers and ranks, whose expert is on another rank.
        rows: all of them.
        milliseconds: of a forward, the best of a few.
        error: largest difference from one process, relative to the largest output.
    """

    placement: str
    moved: int
    rows: int
    milliseconds: float
    error: float


def show(source: str | None, out: Path, *, compiled: bool, console: Console) -> Mapping[str, Any]:
    """``brt demo dist``: start the ranks and wait for them."""
    spec()
    out.mkdir(parents=True, exist_ok=True)
    figures = out / "dist.json"
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={NUM_RANKS}"]
    command = [sys.executable, *ranks, "-m", "brt_dist.demo", str(figures)]
    # The ranks are all here; host names need not resolve
    env = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise brt.BrtError(f"demo: the ranks failed: {done.stderr.strip()[:3000]}")
    console.print(done.stdout.rstrip(), highlight=False, markup=False)
    found: Mapping[str, Any] = json.loads(figures.read_text())
    return found


def spec() -> brt.ModelSpec:
    """The model to show; an error that says what to install where there is none."""
    offered = plugins.collect("models")
    for name in MODELS:
        if name in offered:
            found: brt.ModelSpec = offered[name][0]
            return found
    raise brt.BrtError(
        f"demo: it shows {' or '.join(MODELS)}, which brt-models brings: "
        "pip install packages/brt-core packages/brt-models"
    )


def main() -> None:
    """What torchrun starts: run the model both ways, and let rank 0 say what came of it."""
    if "RANK" not in os.environ:
        sys.exit("start it on ranks: torchrun --standalone --nproc-per-node 4 -m brt_dist.demo")
    try:
        shown = spec()
    except brt.BrtError as error:
        sys.exit(str(error))
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rows = compare(shown)
    if dist.get_rank() == 0 and len(sys.argv) > 1:
        found = {"model": shown.name, "ranks": dist.get_world_size(), "rows": [*map(asdict, rows)]}
        Path(sys.argv[1]).write_text(json.dumps(found) + "\n", encoding="utf-8")
    dist.destroy_process_group()


def compare(shown: brt.ModelSpec) -> list[Row]:
    """What each placement of a model's experts brings; every rank must call it."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    whole = (shown.pretrained or shown.factory)().eval()
    batches = [shown.sample(seed=r) for r in range(num_ranks)]
    wanted = _in_one_process(whole, batches)
    _say(f"{shown.name} on {num_ranks} ranks, {_size(whole)}")
    seen = brt.profile(whole, [shown.sample(seed=_other(rank, i)) for i in range(_NUM_BATCHES)])
    counted = brt.profile(whole, [batches[rank]])
    rows: list[Row] = []
    for name, placement in (("blocks", None), ("nearer", placements(seen))):
        model = copy.deepcopy(whole)
        spread = parallelize(model, placement=placement)
        if not rows:
            _say(f"{spread}\n{'placement':<12}{'rows that move':>18}{'ms':>10}{'error':>10}")
        rows.append(_row(name, model, spread, batches[rank], wanted, counted))
        share = f"{rows[-1].moved} ({rows[-1].moved / rows[-1].rows:.0%})"
        _say(f"{name:<12}{share:>18}{rows[-1].milliseconds:>10.2f}{rows[-1].error:>10.0e}")
    return rows


def placements(profile: brt.Profile) -> dict[str, list[int]]:
    """For each mixture, experts near to the cells of the profiles of all ranks."""
    return {path: nearest(counts_WP) for path, counts_WP in _counts(profile).items()}


def moving_rows(counts_WP: np.ndarray, rank_P: tuple[int, ...]) -> int:
    """Rows whose expert is on another rank."""
    at_home = sum(int(counts_WP[rank, expert]) for expert, rank in enumerate(rank_P))
    return int(counts_WP.sum()) - at_home


def _counts(profile: brt.Profile) -> dict[str, np.ndarray]:
    """Rows that the cells of each rank have for each expert, by the path of the mixture."""
    found: dict[str, np.ndarray] = {}
    for router in profile.routers.values():
        load_P = router.rows_FP.sum(0).long()
        load_WP = [torch.empty_like(load_P) for _ in range(dist.get_world_size())]
        dist.all_gather(load_WP, load_P)
        path = router.module.rpartition(".")[0]
        found[path] = found.get(path, 0) + torch.stack(load_WP).numpy()
    return found


def _other(rank: int, i: int) -> int:
    """The seed of a batch that is not counted."""
    return 1000 + _NUM_BATCHES * rank + i


@torch.no_grad()
def _in_one_process(model: nn.Module, batches: list[tuple[Any, ...]]) -> Tensor:
    """What this rank's sequences get where one process has those of all ranks."""
    together = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    return _first(model(*together)).chunk(len(batches))[dist.get_rank()]


@torch.no_grad()
def _row(
    name: str,
    model: nn.Module,
    spread: Parallelized,
    batch: tuple[Any, ...],
    wanted: Tensor,
    counted: brt.Profile,
) -> Row:
    error = (_first(model(*batch)) - wanted).abs().max() / wanted.abs().max()
    dist.all_reduce(error, dist.ReduceOp.MAX)
    if error > _TOLERANCE:
        raise brt.BrtError(f"demo: the ranks differ from one process by {float(error)}")
    seconds = []
    for _ in range(_NUM_RUNS):
        dist.barrier()
        start = time.perf_counter()
        model(*batch)
        seconds.append(time.perf_counter() - start)
    moved, rows = 0, 0
    for path, counts_WP in _counts(counted).items():
        moved += moving_rows(counts_WP, spread.spreads[path].rank_P)
        rows += int(counts_WP.sum())
    return Row(name, moved, rows, 1e3 * min(seconds), float(error))


def _first(out: Any) -> Tensor:
    """The first tensor of what a model returns."""
    found: Tensor = next(leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor))
    return found


def _size(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million weights"


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
