"""Rows from inputs to outputs: proofs that padding changes nothing, and what they refuse.

Legend: B rows, S cells of a row, N = B * S cells, D features, P paths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import brt
from brt.cellflow.whole import RowsTogetherError, rows_apart
from brt.protocols import CapacityTopK, ExpertChoice, Switch, Threshold, TopK

SIZE, DIM = 5, 8


class Layer(nn.Module):
    """Rows of several cells each through a mixture, and a function of what comes back."""

    def __init__(
        self, protocol: Any = None, tail: Callable[..., Any] | None = None, by_row: bool = False
    ) -> None:
        super().__init__()
        self.by_row = by_row
        self.gate = nn.Linear(DIM, 3)
        self.scatter = brt.ScatterRouter(TopK(2) if protocol is None else protocol, 3)
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(3))
        self.gather = brt.GatherRouter()
        self.tail = tail

    def forward(self, x_BSD: Tensor) -> Any:
        cells_ND, grid = brt.annotate(x_BSD, dims=(0, 1))
        scores_BSP = self.gate(x_BSD).softmax(-1)
        scores = scores_BSP if self.by_row else scores_BSP.flatten(0, 1)
        paths, route = self.scatter(cells_ND, scores, grid.cells)
        y_BSD = grid.restore(self.gather(brt.each(self.experts, paths), route))
        return (y_BSD, scores_BSP) if self.tail is None else self.tail(y_BSD, x_BSD)


class Patches(nn.Module):
    """Photos cut into overlapping patches, and folded again."""

    def __init__(self) -> None:
        super().__init__()
        self.scatter = brt.ScatterRouter(Threshold(0.4), 2)
        self.branches = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.gather = brt.GatherRouter(weighted=False)

    def forward(self, x: Tensor) -> Tensor:
        cells, grid = brt.annotate_patches(x, 8, 6)
        scores = cells.mean((2, 3))[:, :2].softmax(-1)
        paths, route = self.scatter(cells, scores, grid.cells)
        return grid.restore(self.gather(brt.each(self.branches, paths), route))


class Nested(nn.Module):
    """A scatter inside a path, and one gather for all."""

    def __init__(self, inner: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.outer, self.nested = (brt.ScatterRouter(TopK(1), 2) for _ in range(2))
        self.gather = brt.GatherRouter(weighted=False)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        cells, grid = brt.annotate(x, 0)
        (a, b), route = self.outer(cells, cells[:, :2], grid.cells)
        b = self.inner(b)
        (c, d), again = self.nested(b, b[:, 2:4], route[1])
        return self.gather([a, c * 2, -d], [route[0], *again]) + x


def tail(function: Callable[..., Any]) -> Layer:
    return Layer(tail=function)


ROWS = torch.randn(4, SIZE, DIM)
PHOTOS = torch.rand(2, 3, 20, 14)
FLAT = torch.randn(6, DIM)

APART = [
    ("two results", Layer(), ROWS, SIZE),
    ("several paths", Layer(Threshold(0.3)), ROWS, SIZE),
    ("capacity within a row", Layer(Switch(capacity_factor=1.0), by_row=True), ROWS, SIZE),
    ("residual", tail(lambda y, x: (y + x).sum(1)), ROWS, SIZE),
    ("patches", Patches(), PHOTOS, 6),
    ("nested", Nested(), FLAT, 1),
]
TOGETHER = [
    ("capacity", Layer(CapacityTopK(1)), ROWS, "compete for a path"),
    ("capacity in rows", Layer(Switch(capacity=4)), ROWS, "compete for a path"),
    ("expert choice", Layer(ExpertChoice(1.0)), ROWS, "paths choose among all cells"),
    ("mean of rows", tail(lambda y, x: y - y.mean(0)), ROWS, "reduces over cells"),
    ("number of rows", tail(lambda y, x: y / y.shape[0]), ROWS, "uses the number of cells"),
    ("the number itself", tail(lambda y, x: (y, y.shape[0])), ROWS, "is a SymInt"),
    ("other order", tail(lambda y, x: y.flip(0)), ROWS, "rows lie elsewhere"),
    ("other dim", tail(lambda y, x: y.transpose(0, 1)), ROWS, "rows lie elsewhere"),
    ("cells, not rows", tail(lambda y, x: y.flatten(0, 1)), ROWS, "rows lie elsewhere"),
    ("mixed in a path", Nested(lambda b: b - b.mean(0)), FLAT, "reduces over cells"),
    ("moved in a path", Nested(lambda b: b.flip(0)), FLAT, "change places"),
    ("batch norm", nn.Sequential(Layer(tail=lambda y, x: y), nn.BatchNorm1d(SIZE)), ROWS, "norm"),
]


@pytest.mark.parametrize(("name", "model", "x", "cells"), APART, ids=[c[0] for c in APART])
def test_apart(name: str, model: nn.Module, x: Tensor, cells: int) -> None:
    found = rows_apart(brt.trace(model.eval(), x), x)
    assert list(found.values()) == [cells], name
    with torch.no_grad():
        padded = torch.cat([x, x[-1:], x[:1]])
        for few, all_of in zip(*(pytree.tree_leaves(model(v)) for v in (x, padded)), strict=True):
            torch.testing.assert_close(all_of[: len(x)], few)


@pytest.mark.parametrize(("name", "model", "x", "why"), TOGETHER, ids=[c[0] for c in TOGETHER])
def test_together(name: str, model: nn.Module, x: Tensor, why: str) -> None:
    model.train(name == "batch norm")
    with pytest.raises(RowsTogetherError, match=why):
        rows_apart(brt.trace(model, x), x)


def test_inputs_must_have_one_number_of_rows() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nested = Nested()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.nested(x) * y

    graph = brt.trace(Two())
    assert list(rows_apart(graph, (FLAT, FLAT.clone())).values()) == [1]
    with pytest.raises(RowsTogetherError, match="one number of rows"):
        rows_apart(graph, (FLAT, FLAT[:1]))


def test_what_is_of_all_rows_does_not_enter_a_path() -> None:
    class Joined(Nested):
        def forward(self, x: Tensor) -> Tensor:
            (a, b), route = self.outer(x, x[:, :2])
            return self.gather([a * x.amax(), b], route)

    with pytest.raises(RowsTogetherError, match="of all rows, on a path"):
        rows_apart(brt.trace(Joined()), FLAT)
