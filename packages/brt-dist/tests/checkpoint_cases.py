"""What ranks do in test_checkpoint: train, save, and go on elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from model_cases import DIM, Both, Normed
from torch import Tensor, nn

import brt_dist

NUM_CELLS = 12
MODELS = {"branches": lambda: Normed().eval(), "both": Both}


def made(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]().double()


def optimizer_of(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    gates = [p for name, p in model.named_parameters() if "gate" in name]
    others = [p for name, p in model.named_parameters() if "gate" not in name]
    groups = [{"params": others}, {"params": gates, "lr": lr / 2}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.8, 0.9))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: Sequence[int],
    spread: brt_dist.Parallelized | None = None,
) -> None:
    for step in steps:
        x = torch.randn(NUM_CELLS, DIM, generator=torch.Generator().manual_seed(step)).double()
        if spread is not None:
            x = x.tensor_split(dist.get_world_size())[dist.get_rank()]
        optimizer.zero_grad()
        model(x).square().sum().backward()
        if spread is not None:
            brt_dist.sum_gradients(model, but=spread.experts)
            spread.sum_replicas(model)
        optimizer.step()


def in_one_process(name: str, steps: int) -> dict[str, Tensor]:
    """The state after so many steps."""
    model = made(name, 0)
    train(model, optimizer_of(model, 0.1), range(steps))
    return model.state_dict()


def spread_out(model: nn.Module, turn: int) -> brt_dist.Parallelized:
    """Experts dealt out to the ranks, not in runs; at the second turn one is on every rank."""
    num_ranks = dist.get_world_size()
    sizes = {"": 5} if isinstance(model, Normed) else {"first": 4, "layers.1": 7}
    placement = {
        path: [[(p + turn) % num_ranks] for p in range(num_experts)]
        for path, num_experts in sizes.items()
    }
    if turn:
        placement[list(sizes)[-1]][2] = list(range(num_ranks))
    return brt_dist.parallelize(model, placement=placement)


def saves(rank: int, name: str, folder: str) -> None:
    """Two steps, then a checkpoint."""
    model = made(name, 0)
    spread = spread_out(model, 0)
    optimizer = optimizer_of(model, 0.1)
    train(model, optimizer, range(2), spread)
    dcp.save({"train": brt_dist.Checkpoint(model, optimizer, spread)}, checkpoint_id=folder)


def goes_on(rank: int, name: str, folder: str) -> dict[str, Tensor]:
    """Other weights and options, what was saved instead, and a third step; the whole state."""
    model = made(name, 1)
    spread = spread_out(model, 1)
    optimizer = optimizer_of(model, 7.0)
    dcp.load({"train": brt_dist.Checkpoint(model, optimizer, spread)}, checkpoint_id=folder)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.05]
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert optimizer.param_groups[0]["amsgrad"] is False
    train(model, optimizer, [2], spread)
    state = spread.state_dict(model)
    return {key: copy.deepcopy(tensor) for key, tensor in state.items()}


def wrong(rank: int) -> list[str]:
    """The errors of what cannot be saved."""
    model = made("both", 0)
    early = optimizer_of(model, 0.1)
    train(model, early, [0])
    spread = spread_out(model, 0)
    errors = []
    for optimizer in (early, keeping_words(model)):
        try:
            brt_dist.Checkpoint(model, optimizer, spread).state_dict()
        except brt_dist.ParallelError as error:
            errors.append(str(error))
    share = brt_dist.Checkpoint(model, None, spread).state_dict()["model.layers.1.up"]
    assert share.shape == (7, 8, DIM)
    try:
        share.sum()
    except brt_dist.ParallelError as error:
        errors.append(str(error))
    return errors


def keeping_words(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.5)
    for parameter in model.parameters():
        optimizer.state[parameter]["words"] = "some"
    return optimizer
