"""Guards: counting, and what a spill gives for no rows."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from dynamic_models import DIM, Mixture, to_paths
from torch import Tensor, fx, nn

import brt
from brt.guard import Count, Guard, Spill
from brt.optimize import optimize
from brt.profile import profile


def spill(branch: Any, scope: nn.Module | None = None) -> Spill:
    """A spill of the graph of a function of rows and more."""
    return Spill(
        Guard("test:here", "nothing comes"), scope or nn.Module(), fx.symbolic_trace(branch).graph
    )


class Counting(nn.Linear):
    """A layer that counts its calls."""

    def __init__(self) -> None:
        super().__init__(DIM, 3)
        self.calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input)


def test_guards_count_in_threads() -> None:
    guard = Guard("a", "b")
    threads = [
        threading.Thread(target=lambda: [guard.count(i % 4 == 0) for i in range(4000)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert guard.read() == Count(hits=4000, fallbacks=12000)
    guard.reset()
    assert guard.read() == Count()
    assert str(Count(1, 2)) == "1 hits, 2 fallbacks"


def test_a_copied_guard_counts_from_zero() -> None:
    guard = Guard("a", "b")
    guard.count(True)
    twin = copy.deepcopy(guard)
    assert twin.read() == Count()
    assert (twin.name, twin.assumes) == ("a", "b")
    twin.count(False)
    assert guard.read() == Count(1, 0)


@torch.no_grad()
def test_a_spill_learns_the_shape_once_and_then_runs_nothing() -> None:
    scope = nn.Module()
    scope.layer = Counting()
    graph = fx.Graph()
    rows = graph.placeholder("rows")
    graph.output(graph.call_module("layer", (rows,)))
    one = Spill(Guard("test:here", "nothing comes"), scope, graph)
    for _ in range(3):
        out = one(torch.zeros(0, DIM))
        assert out.shape == (0, 3)
    assert scope.layer.calls == 1
    rows_2D = torch.randn(2, DIM)
    assert torch.equal(one(rows_2D), scope.layer(rows_2D))
    assert scope.layer.calls == 3
    assert one.guard.read() == Count(hits=3, fallbacks=1)
    one.forget()
    one(torch.zeros(0, DIM))
    assert scope.layer.calls == 4
    assert "nothing comes" in repr(one)
    assert "layer" in repr(one)


@torch.no_grad()
def test_a_spill_learns_each_signature() -> None:
    one = spill(lambda rows, other: (rows @ other, rows.int()))
    for dtype in (torch.float32, torch.float64):
        for width in (2, 3):
            for _ in range(2):
                out, whole = one(
                    torch.zeros(0, DIM, dtype=dtype), torch.zeros(DIM, width, dtype=dtype)
                )
                assert (out.shape, out.dtype) == ((0, width), dtype)
                assert (whole.shape, whole.dtype) == ((0, DIM), torch.int32)


@torch.no_grad()
def test_outputs_of_a_spill_never_alias() -> None:
    one = spill(lambda rows: rows * 2)
    first, second = one(torch.zeros(0, 4)), one(torch.zeros(0, 4))
    assert first is not second


@torch.no_grad()
def test_what_is_not_empty_is_computed() -> None:
    one = spill(lambda rows, other: rows.sum(0) + other)
    for value in (1.0, 2.0):
        other = torch.full((4,), value)
        assert torch.equal(one(torch.zeros(0, 4), other), other)


@torch.no_grad()
def test_what_cannot_be_told_from_shapes_is_computed() -> None:
    class Odd:
        def __init__(self, width: int) -> None:
            self.width = width

    def widen(rows: Tensor, odd: Odd) -> Tensor:
        return rows.new_zeros(0, odd.width)

    graph = fx.Graph()
    rows, odd = graph.placeholder("rows"), graph.placeholder("odd")
    graph.output(graph.call_function(widen, (rows, odd)))
    one = Spill(Guard("test:here", "nothing comes"), nn.Module(), graph)
    for width in (2, 5):
        assert one(torch.zeros(0, 4), Odd(width)).shape == (0, width)


@torch.no_grad()
def test_numbers_are_part_of_the_signature() -> None:
    one = spill(lambda rows, width: rows.new_zeros(rows.shape[0], width))
    for width in (2, 5, 2):
        assert one(torch.zeros(0, 4), width).shape == (0, width)


@torch.no_grad()
def test_cells_of_no_rows_keep_the_root_of_the_call() -> None:
    one = spill(lambda rows, cells: (rows * 2, cells))
    for _ in range(3):
        cells = brt.Cells(brt.Root(7), torch.zeros(0, dtype=torch.int64))
        rows, came = one(torch.zeros(0, 4), cells)
        assert rows.shape == (0, 4)
        assert came.root is cells.root
        assert came.cell_R.shape == (0,)
    # A root that the branch made itself cannot be remembered
    two = spill(lambda rows, fresh: (rows * 2, fresh()))
    assert two(torch.zeros(0, 4), lambda: brt.Cells.of(0))[1].root.num_cells == 0


def test_with_gradients_the_branch_runs() -> None:
    scope = nn.Module()
    scope.layer = Counting()
    graph = fx.Graph()
    graph.output(graph.call_module("layer", (graph.placeholder("rows"),)))
    one = Spill(Guard("test:here", "nothing comes"), scope, graph)
    for _ in range(2):
        one(torch.zeros(0, DIM)).sum().backward()
    assert scope.layer.calls == 2
    assert torch.equal(scope.layer.weight.grad, torch.zeros(3, DIM))


@torch.no_grad()
def test_autocast_is_part_of_the_signature() -> None:
    scope = nn.Module()
    scope.layer = nn.Linear(DIM, 3)
    graph = fx.Graph()
    graph.output(graph.call_module("layer", (graph.placeholder("rows"),)))
    one = Spill(Guard("test:here", "nothing comes"), scope, graph)
    for _ in range(2):
        assert one(torch.zeros(0, DIM)).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert one(torch.zeros(0, DIM)).dtype == torch.bfloat16


@torch.no_grad()
def test_many_signatures_are_not_all_kept() -> None:
    one = spill(lambda rows, other: rows @ other)
    for width in range(200):
        assert one(torch.zeros(0, 4), torch.zeros(4, width)).shape == (0, width)
    assert len(one._branch._recipes) <= 64


@pytest.mark.parametrize("num_threads", [4])
def test_stats_of_a_model_used_by_threads(num_threads: int) -> None:
    model = Mixture()
    inside, outside = to_paths([0, 1, 0, 1]), to_paths([0, 2, 1, 2])
    fast = optimize(model, profile(model, [inside]), passes=["drop-dead-paths"], sample=inside)
    wanted = {id(x): model(x) for x in (inside, outside)}
    failed: list[str] = []

    def work() -> None:
        with torch.no_grad():
            for i in range(50):
                x = inside if i % 2 else outside
                if not torch.equal(fast(x), wanted[id(x)]):
                    failed.append("differs")

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert fast.stats["drop-dead-paths:scatter[2]"] == Count(25 * num_threads, 25 * num_threads)
