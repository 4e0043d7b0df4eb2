"""TaskMoE and SwinV2-MoE on several ranks: figures 17 and 18 of Brainstorm, at a size for a CPU.

    python packages/brt-dist/benchmarks/models.py taskmoe --ranks 2 4 8 --json taskmoe.json
    python packages/brt-dist/benchmarks/models.py swinv2-moe --ranks 2 4 8 --json swin.json
    python packages/brt-dist/benchmarks/models.py taskmoe --ranks 2 4 8 --mbit 1000 --json link.json

Needs brt-models. Each rank has a batch of its own. Experts stand in equal blocks, or where
`brt_dist.nearest` puts them by a profile of other batches. TaskMoE runs on sentences of all tasks,
and on such as a scheduler deals them: a rank has the sentences of some tasks. Outputs are compared
with the model in one process. OSDI 2023, whose published figures have one number more.

Legend: W ranks, P experts, N sentences, S tokens, T tasks.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from arms import Arm, measure, run
from torch import Tensor, nn

import brt
import brt_dist
from brt.bench import Result
from brt_models.swin_moe import SwinMoE, SwinMoEConfig
from brt_models.taskmoe import TaskMoE, TaskMoEConfig

NUM_PROFILED = 3
Batch = tuple[Tensor, ...]


def taskmoe(options: argparse.Namespace) -> list[Result]:
    """Sentences of any task on every rank, and of some tasks on each."""
    config = TaskMoEConfig(num_layers=options.layers, vocab_size=1024)
    torch.manual_seed(0)
    model = TaskMoE(config).eval()
    shape = f"{options.batch} sentences of {options.tokens} tokens a rank"
    return [
        compare(f"{shape}, {how}", model, partial(draw, config, options), options)
        for how, draw in (("of all tasks", any_tasks), ("dealt by task", dealt_tasks))
    ]


def any_tasks(config: TaskMoEConfig, options: argparse.Namespace, seed: int) -> Batch:
    """Sentences of any task."""
    return _sentences(config, options, seed, np.arange(config.num_tasks))


def dealt_tasks(config: TaskMoEConfig, options: argparse.Namespace, seed: int) -> Batch:
    """Sentences of the tasks of this rank: every W-th pair of those that take the same experts."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    task_T = np.arange(config.num_tasks)
    # Tasks t and T - 1 - t take the same two experts
    pair_T = np.minimum(task_T, config.num_tasks - 1 - task_T)
    return _sentences(config, options, seed, task_T[pair_T % num_ranks == rank])


def _sentences(
    config: TaskMoEConfig, options: argparse.Namespace, seed: int, tasks: np.ndarray
) -> Batch:
    made = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    ids_NS = torch.randint(config.vocab_size, (options.batch, options.tokens), generator=made)
    which_N = torch.randint(len(tasks), (options.batch,), generator=made)
    return ids_NS, torch.from_numpy(tasks)[which_N]


def swinv2_moe(options: argparse.Namespace) -> list[Result]:
    """Images of noise, through a network with weights as drawn."""
    config = replace(
        SwinMoEConfig.v2("tiny", 16),
        image_size=96,
        window_size=6,
        num_classes=100,
        depths=(2, 2, options.layers, 2),
        moe_blocks=((), (), tuple(range(1, options.layers, 2)), (1,)),
    )
    torch.manual_seed(0)
    model = SwinMoE(config).eval()
    for name, parameter in model.named_parameters():
        if ".norm" in name and name.endswith("weight"):
            nn.init.ones_(parameter)  # as trained: blocks that add nothing route all tokens alike
    num_images = max(1, options.batch // 8)

    def draw(seed: int) -> Batch:
        made = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
        return (torch.randn(num_images, 3, 96, 96, generator=made),)

    shape = f"{num_images} images a rank, capacity factor {config.capacity_factor}"
    return [compare(shape, model, draw, options)]


def compare(
    shape: str, whole: nn.Module, draw: Callable[[int], Batch], options: argparse.Namespace
) -> Result:
    """A model whose experts stand in equal blocks, and as placed."""
    batch = draw(0)
    counts = counted(whole, [draw(1 + i) for i in range(NUM_PROFILED)])
    placement = {path: brt_dist.nearest(counts_WP) for path, counts_WP in counts.items()}
    arms, moved = [], []
    for name, kind, where in (
        ("in equal blocks", "eager", None), ("placed by the solver", "brt", placement),
    ):  # fmt: skip
        model = copy.deepcopy(whole)
        done = brt_dist.parallelize(model, placement=where)
        moved.append(f"{moving(counts, done.spreads):.0%}")
        arms.append(Arm(name, kind, partial(model, *batch), torch.clone))
    return measure(
        options.workload,
        f"{shape}; rows that change rank: {' -> '.join(moved)}",
        arms,
        whole(*batch),
        seconds=options.seconds,
        tolerance=1e-4,
        moved=moved,
    )


def counted(model: nn.Module, batches: Sequence[Batch]) -> dict[str, np.ndarray]:
    """Rows that the cells of each rank have for each expert, by the path of the mixture."""
    found = {}
    for router in brt.profile(model, batches).routers.values():
        load_P = router.rows_FP.sum(0).long()
        load_WP = [torch.empty_like(load_P) for _ in range(dist.get_world_size())]
        dist.all_gather(load_WP, load_P)
        found[router.module.rpartition(".")[0]] = torch.stack(load_WP).numpy()
    return found


def moving(counts: Mapping[str, np.ndarray], spreads: Mapping[str, brt_dist.Spread]) -> float:
    """The share of the rows whose expert is on another rank."""
    at_home = sum(
        counts_WP[rank, expert]
        for path, counts_WP in counts.items()
        for expert, rank in enumerate(spreads[path].rank_P)
    )
    return 1 - float(at_home) / float(sum(counts_WP.sum() for counts_WP in counts.values()))


BENCHES: dict[str, Callable[[Any], list[Result]]] = {
    "taskmoe": taskmoe, "swinv2-moe": swinv2_moe,
}  # fmt: skip


@torch.no_grad()
def bench(options: argparse.Namespace) -> list[Result]:
    """The workload asked for."""
    return BENCHES[options.workload](options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("workload", choices=BENCHES)
    parser.add_argument("--batch", type=int, default=16, help="sentences of a rank; images / 8")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4, help="of the decoder; of Swin's stage 3")
    run(parser, bench)
