"""What holds for any route: searched for by hypothesis.

Legend: N cells, P paths, K choices per cell, R routed rows, S trailing cell dims.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("hypothesis")

import torch
from core_cases import close, plain_combine, plain_dispatch, plain_route
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

import brt
from brt import GatherRouter, ScatterRouter, ops

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# Derandomised and without a database: the same cases everywhere, nothing written
search = settings(
    max_examples=1000 if os.environ.get("BRT_THOROUGH", "") not in ("", "0") else 60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int]:
    """(choice_NK with -1 among them, no path twice in a cell; P)."""
    num_cells, num_paths = draw(st.integers(0, 40)), draw(st.integers(1, 9))
    num_choices = draw(st.integers(1, num_paths))
    rows = []
    for _ in range(num_cells):
        order = draw(st.permutations(range(num_paths)))[:num_choices]
        rows.append([p if draw(st.booleans()) else -1 for p in order])
    return torch.tensor(rows, dtype=torch.int64).view(num_cells, num_choices), num_paths


@st.composite
def routings(draw: st.DrawFn) -> tuple:
    """(choice_NK, P, capacity, priority, group_size, multiple)."""
    choice_NK, num_paths = draw(choices())
    num_cells = choice_NK.shape[0]
    limits = st.integers(0, 12)
    capacity = draw(
        st.none()
        | st.lists(limits, min_size=1, max_size=1)
        | st.lists(limits, min_size=num_paths, max_size=num_paths)
    )
    priority = None
    if draw(st.booleans()):  # of few values: ties
        priority = torch.from_numpy(
            draw(arrays("float32", num_cells, elements=st.sampled_from([-1.0, 0.0, 0.5])))
        )
    return (
        *(choice_NK, num_paths, capacity, priority),
        draw(st.integers(0, num_cells + 2)),
        draw(st.sampled_from([1, 1, 2, 5, 16])),
    )


def on(device: torch.device, arguments: tuple) -> tuple:
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in arguments)


@search
@given(arguments=routings())
def test_route_equals_the_loops(device: torch.device, arguments: tuple) -> None:
    choice_NK, num_paths, capacity, priority, *rest = arguments
    wanted = plain_route(
        choice_NK.tolist(),
        choice_NK.shape[1],
        num_paths,
        capacity,
        None if priority is None else priority.tolist(),
        *rest,
    )
    for came, want in zip(ops.route(*on(device, arguments)), wanted, strict=True):
        assert torch.equal(came.cpu(), torch.tensor(want, dtype=torch.int64).view(came.shape))


@search
@given(arguments=routings())
def test_what_a_route_promises(device: torch.device, arguments: tuple) -> None:
    choice_NK, num_paths, capacity, _, group_size, multiple = arguments
    num_cells, num_choices = choice_NK.shape
    cell_R, slot_R, row_NK, offsets = (t.cpu() for t in ops.route(*on(device, arguments)))
    # The two maps are each other's inverse
    for n in range(num_cells):
        for k in range(num_choices):
            row = int(row_NK[n, k])
            if row >= 0:
                assert (int(cell_R[row]), int(slot_R[row])) == (n, n * num_choices + k)
                path = int(choice_NK[n, k])
                assert offsets[path] <= row < offsets[path + 1]
    assert int((cell_R >= 0).sum()) == int((row_NK >= 0).sum())
    assert torch.equal(cell_R >= 0, slot_R >= 0)
    # Offsets rise in steps of the multiple, and nothing lies behind the last
    assert offsets[0] == 0
    assert bool((offsets.diff() >= 0).all())
    assert bool((offsets % multiple == 0).all())
    assert bool((cell_R[int(offsets[-1]) :] == -1).all())
    for p in range(num_paths):
        cells = cell_R[int(offsets[p]) : int(offsets[p + 1])]
        there = cells[cells >= 0]
        assert bool((there.diff() > 0).all())  # in cell order, no cell twice
        assert bool((cells[: len(there)] >= 0).all())  # padding comes last
        if capacity is not None:
            limit = capacity[p if len(capacity) > 1 else 0]
            group = there // group_size if group_size else torch.zeros_like(there)
            assert bool((torch.bincount(group, minlength=1) <= limit).all())


@search
@given(arguments=routings(), weighted=st.booleans(), trailing=st.sampled_from([(), (3,), (2, 2)]))
def test_dispatch_and_combine_equal_the_loops(
    device: torch.device, arguments: tuple, weighted: bool, trailing: tuple[int, ...]
) -> None:
    cell_R, _, row_NK, _ = ops.route(*on(device, arguments))
    x = torch.randn(arguments[0].shape[0], *trailing)
    weight = torch.randn(cell_R.shape[0]) if weighted else None
    moved = None if weight is None else weight.to(device)
    weights = None if weight is None else weight.tolist()
    rows = ops.dispatch(x.to(device), cell_R, row_NK, moved)
    close(rows, plain_dispatch(x, cell_R.tolist(), weights))
    close(
        ops.combine(rows, row_NK, cell_R, moved),
        plain_combine(rows.cpu(), row_NK.tolist(), weights),
        factor=3,
    )
    # O8 of the original: out and back is how often each cell was kept, times the cell
    back = ops.combine(ops.dispatch(x.to(device), cell_R, row_NK), row_NK, cell_R)
    kept_N = (row_NK >= 0).sum(1).view(-1, *[1] * len(trailing))
    close(back, x.to(device) * kept_N, factor=3)


@search
@given(arguments=routings())
def test_dispatch_and_combine_are_each_others_transpose(
    device: torch.device, arguments: tuple
) -> None:
    """<dispatch(x), r> = <x, combine(r)>: what the gradients rest on."""
    cell_R, _, row_NK, _ = ops.route(*on(device, arguments))
    x = torch.randn(arguments[0].shape[0], 2, dtype=torch.float64, device=device)
    rows = torch.randn(cell_R.shape[0], 2, dtype=torch.float64, device=device)
    weight = torch.randn(cell_R.shape[0], dtype=torch.float64, device=device)
    there = (ops.dispatch(x, cell_R, row_NK, weight) * rows).sum()
    back = (ops.combine(rows, row_NK, cell_R, weight) * x).sum()
    close(there, back, factor=10)
    by_row = (ops.row_dot(rows, x, cell_R, row_NK) * weight).sum()
    close(there, by_row, factor=10)


@search
@given(
    mask=arrays("bool", st.tuples(st.integers(0, 30), st.integers(1, 6))),
    policy=st.sampled_from(["drop", "residual", "add"]),
)
def test_any_mask_through_the_routers(device: torch.device, mask: object, policy: str) -> None:
    mask_NP = torch.from_numpy(mask).to(device)
    num_cells, num_paths = mask_NP.shape
    x, residual = torch.randn(2, num_cells, 3, device=device)
    scatter = ScatterRouter(brt.protocols.Threshold(0.5), num_paths)
    paths, route = scatter(x, mask_NP.float())
    rows = [path * (p + 1) for p, path in enumerate(paths)]
    factor = (mask_NP * torch.arange(1, num_paths + 1, device=device)).sum(1, keepdim=True)
    wanted = x * factor
    gather = GatherRouter(weighted=False)
    if policy == "residual":
        gather = GatherRouter(weighted=False, overflow="residual")
        wanted = torch.where(factor == 0, residual, wanted)
    elif policy == "add":
        gather = GatherRouter(weighted=False, add_residual=True)
        wanted = wanted + residual
    given_residual = () if policy == "drop" else (residual,)
    close(gather(rows, route, *given_residual), wanted, factor=3)
    assert torch.equal(route.decision().mask_NP, mask_NP)
    some = list(range(0, num_paths, 2))
    union, cells = GatherRouter(weighted=False, result="union")(
        [rows[p] for p in some], [route[p] for p in some]
    )
    delivered = mask_NP[:, some].any(1)
    assert torch.equal(cells.cell_R, delivered.nonzero().squeeze(1))
    part = (mask_NP[:, some] * torch.tensor([p + 1 for p in some], device=device)).sum(1)
    close(union, (x * part[:, None])[delivered], factor=3)


@search
@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    order=st.permutations(range(4)),
    count=st.integers(1, 4),
)
def test_any_annotation_comes_back(
    device: torch.device, shape: list[int], order: list[int], count: int
) -> None:
    dims = [d for d in order if d < len(shape)][:count]
    x = torch.randn(shape, device=device)
    cells, grid = brt.annotate(x, dims)
    assert torch.equal(grid.restore(cells), x)


@search
@given(
    height=st.integers(1, 14),
    width=st.integers(1, 14),
    size=st.integers(1, 6),
    stride=st.integers(1, 6),
    scale=st.sampled_from([1, 2, 3]),
)
def test_any_patches_come_back(
    device: torch.device, height: int, width: int, size: int, stride: int, scale: int
) -> None:
    size = min(size, height, width)
    x = torch.randn(2, 1, height, width, device=device)
    cells, grid = brt.annotate_patches(x, size, min(stride, size))
    torch.testing.assert_close(grid.restore(cells), x)
    grown = cells.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    wanted = x.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    torch.testing.assert_close(grid.restore(grown, scale), wanted)
