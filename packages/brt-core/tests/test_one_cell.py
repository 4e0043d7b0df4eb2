"""One cell: the same routes, sums and errors as the routers give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import brt
from brt.cells import Cells
from brt.decision import Decision
from brt.errors import RouteError
from brt.passes.one_cell import is_one_cell, no_rows, one_cell_route, row_sum
from brt.protocols import BinaryThreshold, Protocol, ResidualThreshold, Threshold, TopK
from brt.route import Route


@dataclass(frozen=True)
class Says(Protocol):
    """What it is told."""

    name: ClassVar[str] = "tests.says"
    paper: ClassVar[str] = "none"
    choices: tuple[int, ...]
    capacity: int | None = None

    def decide(self, scores: Tensor, num_paths: int) -> Decision:
        """The same choices for all."""
        choice_NK = torch.tensor([self.choices] * len(scores), dtype=torch.int64)
        weight_NK = torch.linspace(0.1, 0.9, choice_NK.numel()).view(choice_NK.shape)
        return Decision(num_paths, choice_NK=choice_NK, weight=weight_NK, capacity=self.capacity)


PROTOCOLS = {
    "top-1": TopK(1), "top-2": TopK(2), "mask": Threshold(0.1), "none": Threshold(9.0),
    "residual": ResidualThreshold(0.0), "binary": BinaryThreshold(0.6), "says": Says((1, -1, 0)),
    "nothing": Says((-1,)), "no-choice": Says(()), "capacity": Says((1, 0), capacity=1),
    "full": Says((1, 0), capacity=0),
}  # fmt: skip


def assert_same(came: Route, wanted: Route) -> None:
    assert (came.num_paths, came.num_cells, came.sizes) == (2, 1, wanted.sizes)
    for name in ("cell_R", "row_NK", "offsets_P1", "weight_R"):
        a, b = getattr(came, name), getattr(wanted, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype, name
            assert torch.equal(a, b), name
    assert came.cells.root == wanted.cells.root
    for a, b in zip(came, wanted, strict=True):
        assert torch.equal(a.index_R(torch.device("cpu")), b.index_R(torch.device("cpu")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROTOCOLS)
def test_routes(name: str, dtype: torch.dtype) -> None:
    router = brt.ScatterRouter(PROTOCOLS[name], 2)
    root = Cells.of(3)
    nested = Cells(root.root, torch.tensor([2]), torch.tensor([0.5]))
    for cells in (Cells.of(1), nested):
        for _ in range(5):
            scores = torch.randn(1, 2).to(dtype)
            flows = (torch.randn(1, 4),)
            came = one_cell_route(router, flows, scores, cells)
            assert came is not None
            assert_same(came, router._decide(flows, scores, cells).with_sizes())


def test_others_are_left_to_the_router() -> None:
    class Own(brt.ScatterRouter):
        def _decide(self, *args: Any) -> Route:
            return super()._decide(*args)

    for router, num_cells in (
        (brt.ScatterRouter(TopK(1), 2), 0),
        (brt.ScatterRouter(TopK(1), 2), 2),
        (brt.ScatterRouter(TopK(1), 2, inherit_weights=True), 1),
        (Own(TopK(1), 2), 1),
    ):
        scores = torch.randn(num_cells, 2)
        assert one_cell_route(router, (scores,), scores, None) is None


def test_errors_are_those_of_the_router() -> None:
    scores = torch.randn(1, 2)
    for router, cells in (
        (brt.ScatterRouter(Says((2,)), 2), None),
        (brt.ScatterRouter(Says((-2,)), 2), None),
        (brt.ScatterRouter(TopK(1), 2), Cells.of(2)),
        (brt.ScatterRouter(TopK(1), 2), "cells"),
    ):
        with pytest.raises(RouteError) as wanted:
            router._decide((scores,), scores, cells)
        with pytest.raises(RouteError) as came:
            one_cell_route(router, (scores,), scores, cells)
        assert str(came.value) == str(wanted.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize("weights", ["none", "all", "first", "last"])
@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_sums(num_parts: int, weights: str, dtype: torch.dtype) -> None:
    root = Cells.of(1).root
    rows = [(4 * torch.randn(1, 3, 2, 2)).to(dtype) for _ in range(num_parts)]
    has = {"none": (), "all": range(num_parts), "first": (0,), "last": (num_parts - 1,)}[weights]
    if dtype == torch.int64:
        has = ()
    index_R = torch.zeros(1, dtype=torch.int64)
    where = [Cells(root, index_R, torch.rand(1) if i in has else None) for i in range(num_parts)]
    kept = [part.clone() for part in rows]
    router = brt.GatherRouter()
    assert is_one_cell(rows, where, router)
    for may_lend in (True, False):
        came = row_sum(list(zip(rows, where, strict=True)), True, may_lend=may_lend)
        torch.testing.assert_close(came, router(rows, where))
        assert (came is rows[0]) == (may_lend and num_parts == 1 and not has)
    for part, before in zip(rows, kept, strict=True):
        assert torch.equal(part, before)


@pytest.mark.parametrize("result", ["all", "union"])
def test_no_rows(result: Any) -> None:
    router = brt.GatherRouter(result=result)
    where = [Cells(Cells.of(1).root, torch.empty(0, dtype=torch.int64))]
    rows = [torch.empty(0, 3, 2, dtype=torch.bfloat16)]
    came, wanted = no_rows(rows[0], where[0], router), router(rows, where)
    if result == "union":
        assert came[1].root == wanted[1].root
        assert torch.equal(came[1].cell_R, wanted[1].cell_R)
        came, wanted = came[0], wanted[0]
    assert came.dtype == wanted.dtype
    assert torch.equal(came, wanted)
