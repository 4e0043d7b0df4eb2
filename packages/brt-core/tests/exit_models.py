"""A network with exits for tests of passes: two scales, of which classifiers need one.

Shape letters: N images, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

import brt
from brt.protocols import BinaryThreshold


class Stage(nn.Module):
    """Both scales go on; the coarse one takes in the fine one as it was."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.down = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, fine: Tensor, coarse: Tensor) -> tuple[Tensor, Tensor]:
        return self.fine(fine), torch.relu(coarse + self.norm(self.down(fine)))


class ConvExits(nn.Module):
    """Images [N, C, 8, 8] -> logits [N, 3] of one of three exits."""

    def __init__(self, channels: int = 4, thresholds: Sequence[float] = (0.5, 0.5)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, channels, 2, stride=2)
        self.stages = nn.ModuleList(Stage(channels) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(channels, 3) for _ in range(3))
        self.exits = nn.ModuleList(brt.ScatterRouter(BinaryThreshold(t), 2) for t in thresholds)
        self.gather = brt.GatherRouter(weighted=False)

    def forward(self, x: Tensor) -> Tensor:
        fine, grid = brt.annotate(x, 0)
        coarse, cells, left, where = self.stem(fine), grid.cells, [], []
        for stage, head, scatter in zip(self.stages, self.heads, self.exits, strict=False):
            fine, coarse = stage(fine, coarse)
            logits = head(coarse.mean((2, 3)))
            (out, stay), route = scatter((fine, coarse, logits), logits, cells)
            left.append(out[2])
            where.append(route[0])
            fine, coarse, cells = stay[0], stay[1], route[1]
        _, coarse = self.stages[2](fine, coarse)
        left.append(self.heads[2](coarse.mean((2, 3))))
        where.append(cells)
        return self.gather(left, where)


def conv_exits(dtype: torch.dtype = torch.float32) -> ConvExits:
    """In evaluation; batch norms as after training, and about a third of noise leaves each time."""
    torch.manual_seed(3)
    model = ConvExits()
    x = torch.randn(64, 4, 8, 8)
    with torch.no_grad():
        model.train()(x)
        model.eval()
        for scatter, head in zip(model.exits, model.heads, strict=False):
            head.weight.mul_(3)
            scatter.protocol = BinaryThreshold(0.0)
            sure = model(x).softmax(1).amax(1)
            scatter.protocol = BinaryThreshold(float(sure.quantile(0.6)))
    return model.to(dtype)


def images(num: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(num, 4, 8, 8, generator=made).to(dtype)


def check_everywhere(fast: Any, model: nn.Module, dtype: torch.dtype) -> None:
    """The same as the model: other inputs, threads, copies, another state, another dtype."""
    bound = 1e-4 if dtype == torch.float32 else 0.1
    inputs = [images(n, seed, dtype) for seed, n in enumerate((0, 1, 1, 7, 32))]
    inputs += [3 * images(7, 9, dtype), torch.zeros_like(images(2, 0, dtype))]

    def same(module: nn.Module, x: Tensor, like: nn.Module = model) -> None:
        with torch.no_grad():
            torch.testing.assert_close(module(x), like(x), rtol=bound, atol=bound)

    for _ in range(2):
        for x in inputs:
            same(fast, x)
    with ThreadPoolExecutor(2) as threads:
        for found in [threads.submit(same, fast, x) for x in (*inputs, *reversed(inputs))]:
            found.result()
    twin, other = copy.deepcopy(fast), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    twin.load_state_dict(other.state_dict())
    for x in inputs:
        same(twin, x, other)
        same(fast, x)
    assert list(fast.state_dict()) == list(model.state_dict())
    twin, other = twin.double(), other.double()
    for x in inputs:
        same(twin, x.double(), other)


def check_gradients(fast: Any, model: nn.Module) -> None:
    """Those of the input and of every parameter, with rows everywhere and nowhere."""
    for x in (images(16), images(1)):
        found = []
        for module in (fast, model):
            model.zero_grad(set_to_none=True)
            given = x.clone().requires_grad_()
            module(given).square().sum().backward()
            found.append([given.grad, *(p.grad for p in model.parameters())])
        for a, b in zip(*found, strict=True):
            assert (a is None) == (b is None)
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
