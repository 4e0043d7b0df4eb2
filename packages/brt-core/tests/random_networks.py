"""Small random dynamic networks, for tests that compare an optimised model with its original.

A network is drawn from a seed: mixtures of experts (nested, with shared experts, several flows,
weights on the way in or out, residuals, extra inputs and extra readers of branches), early exits
in sequence, by hand or by the router, loops. `steer` changes where its cells go without changing
anything else.

Legend: N cells, D features, P paths.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import brt
from brt import protocols

DIM = 4
FAR = 40.0


class Gate(nn.Module):
    """Scores, the bias of which decides which paths are always or never taken."""

    def __init__(self, rng: random.Random, num_paths: int) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, num_paths)
        self.softmax = rng.random() < 0.7
        self.steer(rng)

    def steer(self, rng: random.Random) -> None:
        num_paths = self.linear.out_features
        bias = [0.0] * num_paths
        how = rng.choice(["balanced", "dead", "dead", "permanent"])
        if how == "dead":
            bias = [rng.choice([0.0, -FAR]) for _ in bias]
        elif how == "permanent":
            bias = [rng.choice([3, 2, -1, -2]) * FAR for _ in bias]
        with torch.no_grad():
            self.linear.bias.copy_(torch.tensor(bias))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.linear(x)
        # As weights they multiply from block to block: keep them small
        return scores.softmax(-1) if self.softmax else scores / FAR


def expert(rng: random.Random) -> nn.Module:
    """Work on rows; some of it in place, some of it none at all."""
    kind = rng.randrange(8)
    if kind == 0:
        return nn.Identity()
    if kind == 1:
        return nn.ReLU(inplace=True)
    if kind == 2:
        return nn.Sequential(nn.Linear(DIM, 6), nn.ReLU(inplace=True), nn.Linear(6, DIM))
    if kind == 3:
        return Views()
    if kind == 4:
        return nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM), nn.Dropout(0.5))
    if kind == 5:
        return InPlace()
    return nn.Sequential(nn.Linear(DIM, DIM), nn.GELU())


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x.view(-1, 2, 2) * self.scale).flatten(1)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return F.relu(x, inplace=True)


def protocol(rng: random.Random, num_paths: int, positive: bool) -> protocols.Protocol:
    kind = rng.randrange(6)
    if kind == 0:
        return protocols.Threshold(0.3, residual_path=rng.choice([None, 0]))
    if kind == 1:
        return protocols.CapacityTopK(min(2, num_paths), capacity_factor=1.0)
    return protocols.TopK(
        rng.randint(1, min(3, num_paths)), renormalise=positive and rng.random() < 0.4
    )


class Experts(nn.Module):
    """Scatter, branches, gather, with the variations that one level can have."""

    def __init__(self, rng: random.Random, depth: int) -> None:
        super().__init__()
        num_paths = rng.randint(1, 4)
        self.gate = Gate(rng, num_paths)
        weighted_in = rng.random() < 0.25
        self.two_flows = rng.random() < 0.3
        self.scatter = brt.ScatterRouter(
            protocol(rng, num_paths, self.gate.softmax),
            num_paths,
            weighted=weighted_in and not self.two_flows,
        )
        shared = expert(rng)
        self.branches = nn.ModuleList(
            Experts(rng, depth - 1)
            if depth > 0 and rng.random() < 0.4
            else shared
            if rng.random() < 0.3
            else expert(rng)
            for _ in range(num_paths)
        )
        self.overflow = rng.choice(["drop", "drop", "residual"])
        self.add_residual = self.overflow == "drop" and rng.random() < 0.3
        self.listed = rng.random() < 0.2 and self.overflow == "drop" and not self.add_residual
        self.gather = brt.GatherRouter(
            weighted=not self.scatter.weighted and rng.random() < 0.7,
            overflow=self.overflow,  # type: ignore[arg-type]
            add_residual=self.add_residual,
        )
        self.mix_in = nn.Parameter(torch.randn(DIM)) if rng.random() < 0.3 else None
        self.read_too = rng.random() < 0.2
        self.use_each = rng.random() < 0.15 and not self.two_flows and depth == 0

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x)
        side = x.sum(-1, keepdim=True)
        paths, route = self.scatter((x, side) if self.two_flows else x, scores)
        outs = []
        more = None
        if self.use_each:
            outs = brt.each(self.branches, paths)
        else:
            for branch, path in zip(self.branches, paths, strict=True):
                rows = path[0] if self.two_flows else path
                out = branch(rows)
                if self.two_flows:
                    out = out * path[1]
                if self.mix_in is not None:
                    out = out + self.mix_in
                outs.append(out)
            if self.read_too:
                more = outs[0].sum(0)
        residual = x if self.overflow == "residual" or self.add_residual else None
        if self.listed:
            where = [route[p] for p in range(len(outs))]
            y = self.gather(outs, where)
        else:
            y = self.gather(outs, route, residual)
        return y if more is None else y + torch.tanh(more)


class Exits(nn.Module):
    """Early exits one after another, brought back by one gather at the end."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        num_stages = rng.randint(2, 4)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh()) for _ in range(num_stages)
        )
        self.gates = nn.ModuleList(Gate(rng, 2) for _ in range(num_stages - 1))
        self.scatters = nn.ModuleList(
            brt.ScatterRouter(protocols.TopK(1), 2) for _ in range(num_stages - 1)
        )
        self.heads = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(num_stages))
        self.gather = brt.GatherRouter(weighted=False)
        self.cells = brt.GatherRouter(result="union", weighted=False)

    def forward(self, x: Tensor) -> Tensor:
        rows, cells = brt.annotate(x, 0)[0], None
        left, where = [], []
        for i, stage in enumerate(self.stages):
            rows = stage(rows)
            if i == len(self.stages) - 1:
                left.append(self.heads[i](rows))
                where.append(cells)
                break
            paths, route = self.scatters[i](rows, self.gates[i](rows), cells)
            left.append(self.heads[i](paths[0]))
            where.append(route[0])
            rows, cells = paths[1], route[1]
        return self.gather(left, where)


class EarlyExits(nn.Module):
    """The router, some stages of which hand on two flows, one of which heads do not read."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        num_stages = rng.randint(2, 4)
        stages = [TwoFlows() for _ in range(num_stages)] if rng.random() < 0.5 else None
        if stages is None:
            make = lambda: nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())  # noqa: E731
            stages = [make() for _ in range(num_stages)]
        heads = [Second(isinstance(stage, TwoFlows)) for stage in stages]
        limits = [rng.choice([0.0, 0.3, 0.4, 0.6, 2.0]) for _ in range(num_stages - 1)]
        self.exits = brt.EarlyExit(stages, heads, [protocols.BinaryThreshold(t) for t in limits])
        self.two_flows = isinstance(stages[0], TwoFlows)

    def forward(self, x: Tensor) -> Tensor:
        return self.exits((x, x * 0.5)) if self.two_flows else self.exits(x)


class TwoFlows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.a(x)) + x, torch.tanh(self.b(x) + y)


class Second(nn.Module):
    def __init__(self, two_flows: bool) -> None:
        super().__init__()
        self.linear, self.two_flows = nn.Linear(DIM, DIM), two_flows

    def forward(self, *flows: Tensor) -> Tensor:
        return self.linear(flows[-1])


class Netlet(nn.Module):
    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.step = Experts(rng, 0) if rng.random() < 0.5 else nn.Linear(DIM, DIM)
        self.gate = Gate(rng, 2)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Tensor, Any]:
        x = torch.tanh(self.step(x))
        return x, self.gate(x), state


class Loop(nn.Module):
    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.loop = brt.LoopRouter(Netlet(rng), max_steps=rng.randint(1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.loop(x, ())[0]


class Untraceable(nn.Module):
    """Branches on values, so that only what is inside it can be traced."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() and float(x.detach().abs().max()) > 1e6:
            return x
        return self.inner(x)


class RandomNetwork(nn.Module):
    """A few blocks one after another; every one keeps ``[N, D]``."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.blocks = nn.ModuleList(self._block(rng) for _ in range(rng.randint(1, 3)))
        self.in_place = rng.random() < 0.2
        self.eval()

    def _block(self, rng: random.Random) -> nn.Module:
        kind = rng.randrange(10)
        if kind < 6:
            block: nn.Module = Experts(rng, depth=rng.choice([0, 1, 1, 2]))
        elif kind < 8:
            block = Exits(rng) if rng.random() < 0.5 else EarlyExits(rng)
        else:
            block = Loop(rng)
        return Untraceable(block) if rng.random() < 0.1 else block

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block(x)
            if self.in_place:
                y.add_(0.25)
            x = x + y
        return x


def steer(model: nn.Module, seed: int) -> None:
    """Send the cells elsewhere: new biases for the gates, in place."""
    rng = random.Random(seed)
    for module in model.modules():
        if isinstance(module, Gate):
            module.steer(rng)


def batches(seed: int, sizes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(size, DIM, generator=made).to(dtype) for size in sizes]
