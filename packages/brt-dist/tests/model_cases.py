"""What ranks do in test_parallelize: models on W ranks against themselves in one process.

Legend: W ranks, N cells of a rank, P paths, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layer_cases import close, hosts_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import brt
import brt_dist

DIM = 6


class Branches(nn.Module):
    """Scatter, branches in a list, gather."""

    def __init__(self, num_paths: int = 5, top_k: int = 2, each: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, num_paths)
        self.scatter = brt.ScatterRouter(brt.protocols.TopK(top_k), num_paths)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, 4), nn.ReLU(inplace=True), nn.Linear(4, DIM))
            for _ in range(num_paths)
        )
        self.gather = brt.GatherRouter()
        self.each = each

    def forward(self, x: Tensor) -> Tensor:
        paths, route = self.scatter(x, self.gate(x).softmax(-1))
        if self.each:
            rows = brt.each(self.experts, paths)
        else:
            rows = [expert(path) for expert, path in zip(self.experts, paths, strict=True)]
        out: Tensor = self.gather(rows, route)
        assert int(route.load_P.sum()) == x.shape[0] * route.row_NK.shape[1]
        return out


class Flows(Branches):
    """Two flows, one of them integers; weighted on the way in; cells without a path stay."""

    def __init__(self) -> None:
        super().__init__()
        protocol = brt.protocols.Threshold(0.25)
        self.scatter = brt.ScatterRouter(protocol, 5, weighted=True)
        self.gather = brt.GatherRouter(weighted=False, overflow="residual")

    def forward(self, x: Tensor) -> Tensor:
        flows = (x, x.double())
        paths, route = self.scatter(flows, self.gate(x).softmax(-1))
        rows = [
            (expert(one) + two.float(), one * 2)
            for expert, (one, two) in zip(self.experts, paths, strict=True)
        ]
        out, twice = self.gather(rows, route, residual=(x, x))
        result: Tensor = out + twice
        return result


class Stacked(nn.Module):
    """An ExpertRouter and the stacked weights that it is called with."""

    def __init__(self, num_experts: int = 5) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, num_experts)
        self.up = nn.Parameter(torch.randn(num_experts, 8, DIM))
        self.down = nn.Parameter(torch.randn(num_experts, 4, DIM).transpose(1, 2).contiguous())
        self.up_bias = nn.Parameter(torch.randn(num_experts, 8))
        self.router = brt.ExpertRouter(num_experts)

    def forward(self, x: Tensor) -> Tensor:
        weight, choice = self.gate(x).softmax(-1).topk(2)
        out: Tensor = self.router(x, choice, weight, self.up, self.down, up_bias_PH=self.up_bias)
        return out


class Experts(nn.Module):
    """Stacked weights, of which one lies input-major."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(num_experts, 8, DIM))
        self.up_bias = nn.Parameter(torch.randn(num_experts, 8))
        self.down = nn.Parameter(torch.randn(num_experts, DIM, 8).transpose(1, 2))

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        assert self.down.transpose(1, 2).is_contiguous()
        hidden = brt.ops.grouped_linear(rows, offsets, self.up, self.up_bias, "relu")
        return brt.ops.grouped_linear(hidden, offsets, self.down.transpose(1, 2))


class Packed(nn.Module):
    """Packed rows through a module with stacked weights."""

    def __init__(self, num_experts: int = 5) -> None:
        super().__init__()
        self.gate = nn.Linear(DIM, num_experts)
        self.scatter = brt.ScatterRouter(brt.protocols.TopK(2), num_experts, result="packed")
        self.experts = Experts(num_experts)
        self.gather = brt.GatherRouter()

    def forward(self, x: Tensor) -> Tensor:
        rows, route = self.scatter(x, self.gate(x).softmax(-1))
        out: Tensor = self.gather(self.experts(rows, route.offsets_P1), route)
        return out


class Both(nn.Module):
    """Layers of several kinds, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Branches(4, 1)
        self.layers = nn.Sequential(nn.Linear(DIM, DIM), Stacked(7), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layers(x + self.first(x))
        return result


MODELS: dict[str, Callable[[], nn.Module]] = {
    "branches": Branches,
    "each": lambda: Branches(4, 2, each=True),
    "flows": Flows,
    "stacked": Stacked,
    "packed": Packed,
    "both": Both,
}


def cells_of(rank: int, num_cells: int) -> Tensor:
    made = torch.Generator().manual_seed(rank)
    return torch.randn(num_cells, DIM, generator=made)


def run_all(
    rank: int, name: str, sizes: Sequence[int], placed: str, transport: str, use_mesh: bool
) -> None:
    num_ranks = dist.get_world_size()
    torch.manual_seed(0)
    whole = MODELS[name]()
    model = copy.deepcopy(whole)
    xs = [cells_of(r, size).requires_grad_() for r, size in enumerate(sizes[:num_ranks])]
    wanted = whole(torch.cat(xs))
    wanted.square().sum().backward()

    placement = None
    if placed:
        path = {"both": "layers.1"}.get(name, "")
        num_experts = {"both": 7, "each": 4}.get(name, 5)
        ranks_P = [[(num_experts - p) % num_ranks] for p in range(num_experts)]
        if placed == "replicas":
            ranks_P[1] = list(reversed(range(num_ranks)))
            ranks_P[0] = sorted({*ranks_P[0], 0})
        placement = {path: ranks_P}
    hosts = hosts_of(2) if transport == "hosts" else None
    mesh = init_device_mesh("cpu", (num_ranks,)) if use_mesh else None
    done = brt_dist.parallelize(
        model, mesh, placement=placement,
        transport=brt_dist.Transport(
            hosts=hosts, degree=2 if transport == "overlap" else 1,
            replicated=transport == "replicated",
        ),
    )  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) <= sum(p.numel() for p in whole.parameters())
    x = cells_of(rank, sizes[rank]).requires_grad_()
    out = model(x)
    close(out, wanted.split(list(sizes[:num_ranks]))[rank].detach(), "output")
    out.square().sum().backward()
    brt_dist.sum_gradients(model, but=done.experts)
    done.sum_replicas(model)
    close(x.grad, xs[rank].grad, "cells")
    full = dict(whole.named_parameters())
    for key, parameter in model.named_parameters():
        grad = full[key].grad
        assert grad is not None
        if parameter.shape != full[key].shape:
            spread = next(s for path, s in done.spreads.items() if key.startswith(path))
            grad = grad[list(spread.held)]
        close(parameter.grad, grad, key)
    with torch.inference_mode():
        close(model(x), out.detach(), "without gradients")
    copy.deepcopy(model)
    assert all(path in str(done) for path, _ in done.changed)
    assert {key for key in done.experts if "gate" in key} == set()


def packed() -> nn.Module:
    model = Branches()
    model.scatter.result = "packed"
    return model


def tied() -> nn.Module:
    model = Branches()
    model.other = model.experts[3][0]
    return model


def with_one_module_twice() -> nn.Module:
    model = Branches()
    model.experts[1] = model.experts[2]
    return model


WRONG_MODELS: dict[str, Callable[[], nn.Module]] = {
    "nothing": lambda: nn.Linear(3, 3),
    "few": lambda: Branches(2, 1),
    "packed": packed,
    "exit": lambda: brt.EarlyExit([nn.Linear(4, 4)] * 2, [nn.Linear(4, 3)] * 2),
    "no weights": lambda: nn.Sequential(brt.ExpertRouter(3)),
    "tied": tied,
    "one module": with_one_module_twice,
    "twice": lambda: nn.Sequential(*[Branches()] * 2),
}
WRONG_ARGUMENTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "placement": lambda rank: {"placement": {"first": [0, 1, 9, 0]}},
    "unknown": lambda rank: {"placement": {"last": [0]}},
    "degree": lambda rank: {"transport": brt_dist.Transport(degree=2)},
    "mesh": lambda rank: {"ranks": init_device_mesh("cpu", (1, dist.get_world_size()))},
    "ranks differ": lambda rank: {"placement": {"first": [0, 1, rank % 2, 2]}},
}


def wrong(rank: int, kind: str) -> tuple[str, str]:
    """(type, message) of the error; nothing may have changed."""
    torch.manual_seed(0)
    model = WRONG_MODELS.get(kind, Both)()
    if kind == "one rank" and rank == 1:
        model = nn.Linear(3, 3)
    arguments = WRONG_ARGUMENTS.get(kind, lambda rank: {})(rank)
    before = {name: type(module) for name, module in model.named_modules()}
    try:
        brt_dist.parallelize(model, **arguments)
    except brt.BrtError as error:
        assert {name: type(module) for name, module in model.named_modules()} == before
        return type(error).__name__, str(error)
    return "", "no error"


class Normed(Branches):
    """Branches with buffers."""

    def __init__(self) -> None:
        super().__init__(5, 2)
        for expert in self.experts:
            expert.append(nn.BatchNorm1d(DIM))


def state_is_whole(rank: int, name: str) -> list[bytes]:
    """What comes out of the ranks is what went in, and what training made of it."""
    torch.manual_seed(0)
    whole = {"normed": Normed, "both": Both}[name]().double()
    model = copy.deepcopy(whole)
    done = brt_dist.parallelize(model)
    state = done.state_dict(model)
    assert list(state) == list(whole.state_dict())
    for key, tensor in whole.state_dict().items():
        assert torch.equal(state[key], tensor), key
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter += 1 if key in done.experts else 2
    state = done.state_dict(model)
    for key, tensor in whole.named_parameters():
        steps = (state[key] - tensor).round()
        is_expert = "experts" in key or "up" in key or "down" in key
        assert bool((steps == (1 if is_expert else 2)).all()), key
    again = copy.deepcopy(whole)
    again.load_state_dict(state)
    x = cells_of(rank, 4).double()
    again, model = again.eval(), model.eval()
    torch.testing.assert_close(model(x), again(x))
    return [tensor.numpy().tobytes() for tensor in state.values()]


def planned(rank: int, wrong_ranks: int, replicas: int) -> str:
    """Placed as `brt_dist.plan` says, which is refused for another number of ranks."""
    torch.manual_seed(0)
    whole = nn.Sequential(Branches(8, 1), nn.Tanh(), Branches(8, 1))
    batches = [cells_of(r, 64) for r in range(4)]
    profile = brt.profile(whole.eval(), batches)
    plan = brt_dist.plan(profile, dist.get_world_size() + wrong_ranks, "balance", replicas=replicas)
    model = copy.deepcopy(whole)
    try:
        brt_dist.parallelize(model, placement=plan)
    except brt.BrtError as error:
        return f"{type(error).__name__}: {error}"
    for layer, path in enumerate(("0", "2")):
        scatter = model.get_submodule(path).scatter
        held = scatter.spread.held
        assert list(held) == sorted({p for p in plan.expert_LWS[layer, rank].tolist() if p >= 0})
    x = cells_of(rank, 9)
    close(model(x), whole(x).detach())
    return ""


def compiled(rank: int, name: str) -> None:
    """Under torch.compile the exchange stays outside the graphs."""
    torch.manual_seed(0)
    model = MODELS[name]()
    brt_dist.parallelize(model)
    x = cells_of(rank, 5)
    wanted = model(x)
    torch.compiler.reset()
    close(torch.compile(model, backend="eager")(x), wanted.detach())


def left_alone(rank: int) -> None:
    model = Both()
    done = brt_dist.parallelize(model, leave=["first"])
    assert [path for path, _ in done.changed] == ["layers.1"]
    assert type(model.first.scatter) is brt.ScatterRouter
    with pytest.raises(brt_dist.ParallelError, match=r"'layers.1.router' is spread over ranks"):
        brt_dist.parallelize(model)


def wrong_call(rank: int, kind: str) -> str:
    model = Branches(4)
    brt_dist.parallelize(model)
    x = cells_of(rank, 3)
    try:
        if kind == "cells of one rank":
            model(x if rank else x[:, None])
        elif kind == "scores":
            scores = torch.rand(3, 4 if rank else 3)
            model.scatter(x, scores)
        paths, route = model.scatter(x, torch.rand(3, 4))
        if kind == "nested":
            route[0]
        elif kind == "missing paths":
            model.gather(list(paths)[1:], route)
        elif kind == "packed rows":
            model.gather(x[:1].expand(1000, DIM), route)
        elif kind == "rows":
            model.gather(
                [torch.cat([path, path[:1], path.new_ones(1, DIM)]) for path in paths], route
            )
    except brt.BrtError as error:
        return str(error)
    return "no error"


def profiled(rank: int) -> list[int]:
    """A profile of the model sees this rank's cells."""
    torch.manual_seed(0)
    model = Both()
    brt_dist.parallelize(model)
    profile = brt.profile(model, [cells_of(rank, 6)])
    return [router.cells for router in profile.routers.values()]
