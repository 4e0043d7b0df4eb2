"""Benchmark of TaskMoE: sentences of random tasks through the decoder on one device.

Legend: N sentences, S tokens of one, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import brt
from brt.bench import Variant, Workload
from brt.bench.workload import Kind
from brt.protocols import Hash
from brt_models.taskmoe import TaskMoE, TaskMoEConfig
from brt_models.taskmoe.network import Layer

TOLERANCE = 1e-4  # float32 against float64, through six layers
NUM_SETS = 4


def sentences(
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch: int = 32,
    tokens: int = 32,
    num_tasks: int = 16,
    num_layers: int = 6,
    vocab_size: int = 8192,
) -> Workload:
    """Brainstorm took 256 or 512 sentences of 32 or 64 tokens a GPU, and a larger vocabulary."""
    config = TaskMoEConfig(num_tasks=num_tasks, num_layers=num_layers, vocab_size=vocab_size)
    options = {
        "batch": batch, "tokens": tokens, "num_tasks": num_tasks, "num_layers": num_layers,
        "vocab_size": vocab_size,
    }  # fmt: skip
    model = TaskMoE(config).eval().to(device, dtype)
    return task_workload(model, batch, tokens, options)


def task_workload(
    model: TaskMoE, batch: int, tokens: int, options: Mapping[str, object]
) -> Workload:
    """The workload of any such decoder."""
    config, first = model.config, next(model.parameters())

    def draw() -> list[tuple[Tensor, Tensor]]:
        return [
            (
                torch.randint(config.vocab_size, (batch, tokens), device=first.device),
                torch.randint(config.num_tasks, (batch,), device=first.device),
            )
            for _ in range(NUM_SETS)
        ]

    sets, others = draw(), draw()
    num_tokens, size = batch * tokens, config.hidden_size
    a_token = config.num_layers * (4 * size**2 + 4 * size * config.intermediate_size)
    flops = 2.0 * num_tokens * (a_token + size * config.vocab_size)

    def optimised() -> Callable[..., Tensor]:
        return brt.optimize(model, brt.profile(model, others), sample=others[0])

    def row(kind: Kind, name: str, make: Callable[[], Callable[..., Tensor]]) -> Variant:
        return Variant(kind=kind, name=name, make=make, flops=flops)

    return Workload(
        name="taskmoe",
        shapes=f"N={batch} S={tokens} D={size} T={config.num_tasks}",
        device=first.device,
        dtype=first.dtype,
        sets=sets,
        reference=IndexLoop(copy.deepcopy(model).double()),
        tolerance=TOLERANCE if first.dtype == torch.float32 else 3e-2,
        options=options,
        variants=[
            row("eager", "torch index loop", lambda: IndexLoop(model)),
            row("peer", "torch index loop, torch.compile", lambda: torch.compile(IndexLoop(model))),
            row("brt", "brt eager", lambda: model),
            row("brt", "brt optimised", optimised),
            row("limit", "dense product of as many operations", lambda: _product(first, flops)),
        ],
    )


class IndexLoop(nn.Module):
    """The same decoder as people write it: a loop over experts with index_select.

    It shares the modules of the decoder that it is made of.
    """

    def __init__(self, model: TaskMoE) -> None:
        super().__init__()
        self.model = model
        config = model.config
        protocol = Hash(config.num_tasks, config.seed, config.placement_aware)
        tasks_T = torch.arange(config.num_tasks)
        self.expert_T2 = protocol(tasks_T, config.num_tasks).choice_NK

    def forward(self, ids_NS: Tensor, task_N: Tensor) -> Tensor:
        """[N, S] and [N] -> [N, S, V]."""
        assert self.expert_T2 is not None
        choice_N2 = self.expert_T2.to(task_N.device)[task_N]
        x_NSD = self.model.embeddings(ids_NS)
        for layer in self.model.layer:
            assert isinstance(layer, Layer)
            x_NSD = layer.attention(x_NSD)
            out_NSD = torch.zeros_like(x_NSD)
            for path, expert in enumerate(layer.experts):
                index = (choice_N2 == path).any(1).nonzero()[:, 0]
                if len(index):
                    out_NSD.index_add_(0, index, expert(x_NSD.index_select(0, index)))
            x_NSD = out_NSD
        return self.model.lm_head(x_NSD)


def _product(like: Tensor, flops: float) -> Callable[..., Tensor]:
    width = 1024
    inner = max(1, round(flops / (2 * width**2)))
    a, b = like.new_ones(width, inner), like.new_ones(inner, width)
    return lambda ids_NS, task_N: torch.mm(a, b)
