"""What ranks do in the tests of passes: optimise a model alike, each with cells of its own."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from layer_cases import close
from model_cases import DIM, Branches, Stacked
from torch import Tensor, nn

import brt
import brt_dist
import brt_dist._plugin
from brt import plugins
from brt_dist.experts import ParallelExpertRouter
from brt_dist.passes import OverlapExchange, PlaceExperts
from brt_dist.passes.placed import PlacedExperts

NUM_CELLS = 24


def made(hot: bool = True) -> nn.Module:
    """Two layers; of the first, experts 0 and 1 get most cells, and these are on one rank."""
    torch.manual_seed(0)
    model = nn.Sequential(Stacked(6), nn.Tanh(), Stacked(4)).eval()
    if hot:
        with torch.no_grad():
            model[0].gate.bias[:2] += 4
    return model


def cells_of(rank: int, num_cells: int = NUM_CELLS) -> Tensor:
    return torch.randn(num_cells, DIM, generator=torch.Generator().manual_seed(rank))


def optimized(
    rank: int, passes: list[Any], model: nn.Module | None = None, profiled: bool = True
) -> tuple[nn.Module, Any]:
    """(the model, which is spread now, and the result)."""
    model = made() if model is None else model
    brt_dist.parallelize(model)
    x = cells_of(rank)
    profile = brt.profile(model, [x]) if profiled else None
    with plugins.using(brt_dist._plugin):
        return model, brt.optimize(model, profile, passes=passes, sample=x)


def records(fast: Any) -> list[Any]:
    return [record for region in fast.report.regions for record in region.records]


def inserted(fast: Any, kind: type) -> list[Any]:
    return [module for module in fast.inserted.values() if isinstance(module, kind)]


def placed(rank: int, replicas: int) -> list[list[int]]:
    """The experts of this rank; results stay, with and without gradients, and after a change."""
    whole = made()
    model, fast = optimized(rank, [PlaceExperts(replicas=replicas)])
    x = cells_of(rank, 9)
    modules = inserted(fast, PlacedExperts)
    with torch.no_grad():
        close(fast(x), whole(x), "placed")
        assert modules[0]._moved["up_PHD"].shape[0] == len(modules[0].placed.spread.held)
        for parameter in model[0].parameters():
            parameter *= 1.5
        for parameter in whole[0].parameters():
            parameter *= 1.5
        close(fast(x), whole(x), "changed")
    close(fast(x), whole(x).detach(), "with gradients")
    assert set(fast.state_dict()) == set(model.state_dict())
    assert all("highest load over the mean" in note for note in records(fast)[0].notes)
    close(copy.deepcopy(fast)(x), whole(x).detach(), "copied")
    return [list(module.placed.spread.held) for module in modules]


def placed_by_plan(rank: int, num_ranks: int) -> str:
    """By a plan of the user's; refused where it is for other ranks."""
    whole = made()
    profile = brt.profile(nn.Sequential(whole[0]).eval(), [cells_of(0)])
    plan = brt_dist.plan(profile, num_ranks, "balance")
    try:
        _, fast = optimized(rank, [PlaceExperts(plan)], nn.Sequential(made()[0]).eval())
    except brt.BrtError as error:
        return str(error)
    with torch.no_grad():
        x = cells_of(rank, 5)
        close(fast(x), whole[0](x), "by plan")
    return ""


def overlapped(rank: int, degrees: tuple[int, ...], least_gain: float) -> list[int]:
    """The degrees of the result's layers."""
    whole = made()
    passes = [OverlapExchange(degrees, repeats=1, least_gain=least_gain)]
    _, fast = optimized(rank, passes, profiled=False)
    x = cells_of(rank, 9).requires_grad_()
    other = x.detach().clone().requires_grad_()
    out, wanted = fast(x), whole(other)
    close(out, wanted.detach(), "overlapped")
    out.sum().backward()
    wanted.sum().backward()
    close(x.grad, other.grad, "cells")
    return [module.transport.degree for module in inserted(fast, ParallelExpertRouter)]


def both(rank: int) -> list[tuple[int, bool]]:
    """Overlap of what is placed."""
    whole = made()
    _, fast = optimized(rank, [OverlapExchange((2,), 1, -1e9), "place-experts"])
    assert fast.report.passes == ("place-experts", "overlap-exchange")
    with torch.no_grad():
        x = cells_of(rank, 7)
        close(fast(x), whole(x), "both")
    modules = inserted(fast, PlacedExperts)
    return [(m.placed.transport.degree, m.router.spread is m.placed.spread) for m in modules]


def refusal(rank: int, name: str, case: str) -> str:
    """Why a pass refuses, or leaves a layer alone."""
    model: nn.Module = made()
    transport = brt_dist.Transport()
    if case == "training":
        model.train()
    if case == "branches":
        model = Plain().eval()
    if case == "chosen":
        transport = brt_dist.Transport(replicated=True)
    if case != "not spread":
        brt_dist.parallelize(model, transport=transport)
    x = cells_of(rank)
    profile = None if case == "no profile" else brt.profile(model, [x])
    sample = None if case == "no sample" else x
    with plugins.using(brt_dist._plugin), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that every region was refused
        fast = brt.optimize(model, profile, passes=[name], sample=sample)
    (record,) = records(fast)
    return record.refused or "; ".join(left.why for left in record.left)


class Plain(Branches):
    """Branches whose forward can be traced."""

    def forward(self, x: Tensor) -> Tensor:
        paths, route = self.scatter(x, self.gate(x).softmax(-1))
        rows = [expert(path) for expert, path in zip(self.experts, paths, strict=True)]
        out: Tensor = self.gather(rows, route)
        return out


def default_passes(rank: int) -> None:
    """Nothing is raced on a model whose calls wait for other ranks."""
    whole = made()
    model = made()
    brt_dist.parallelize(model)
    x = cells_of(rank)
    fast = brt.optimize(model, brt.profile(model, [x]), sample=x)
    assert not any(region.candidates for region in fast.report.regions)
    close(fast(x), whole(x).detach())
