"""`brt.ops.dispatch` against loops over rows.

Legend: N cells, K choices per cell, R rows, S trailing cell dims.
"""

from __future__ import annotations

import pytest
import torch
from core_cases import (
    FLOATS,
    SMALL,
    SMALL_CASES,
    RouteCase,
    close,
    grads_of,
    mixed_layouts,
    moving_cases,
    plain_combine,
    plain_dispatch,
)
from torch import Tensor

import brt
from brt import ops


def rows_of(case: RouteCase, x_NS: Tensor, weight_R: Tensor | None = None) -> Tensor:
    cell_R, _, row_NK, _ = case.route(x_NS.device)
    return ops.dispatch(x_NS, cell_R, row_NK, weight_R)


def values(*shape: int, dtype: torch.dtype = torch.float32, device: object = "cpu") -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape).to(device, dtype)
    return torch.randint(0, 100, shape).to(device, dtype)


@pytest.mark.parametrize("case", list(moving_cases()), ids=str)
def test_sizes(case: RouteCase, device: torch.device) -> None:
    cell_R, _, row_NK, _ = case.route(device)
    x = values(case.num_cells, 3, device=device)
    weight = values(cell_R.shape[0], device=device)
    close(ops.dispatch(x, cell_R, row_NK), plain_dispatch(x.cpu(), cell_R.tolist()), case)
    close(
        ops.dispatch(x, cell_R, row_NK, weight),
        plain_dispatch(x.cpu(), cell_R.tolist(), weight.tolist()),
        case,
    )


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (3, 4, 4), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize(
    "dtype", [*FLOATS, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool], ids=str
)
def test_shapes_and_dtypes(
    dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    for case in SMALL_CASES:
        cell_R, _, row_NK, _ = case.route(device)
        x = values(case.num_cells, *shape, dtype=dtype, device=device)
        close(ops.dispatch(x, cell_R, row_NK), plain_dispatch(x.cpu(), cell_R.tolist()), case)
        close(
            ops.dispatch(x, cell_R.int(), row_NK.int()),
            plain_dispatch(x.cpu(), cell_R.tolist()),
            f"{case} int32 indices",
        )


@pytest.mark.parametrize("weight_dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights(dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device) -> None:
    """The product is taken in float32, whatever the weights are, and has x's dtype."""
    for case in SMALL_CASES:
        cell_R, _, row_NK, _ = case.route(device)
        x = values(case.num_cells, 4, dtype=dtype, device=device)
        weight = values(cell_R.shape[0], dtype=weight_dtype, device=device)
        close(
            ops.dispatch(x, cell_R, row_NK, weight),
            plain_dispatch(x.cpu(), cell_R.tolist(), weight.tolist()),
            case,
        )


def test_other_layouts(device: torch.device) -> None:
    cell_R, _, row_NK, _ = SMALL.route(device)
    for shape in ((7, 4), (7, 3, 4, 5)):
        for name, x in mixed_layouts(values(*shape, device=device)).items():
            came = ops.dispatch(x, cell_R, row_NK)
            close(came, plain_dispatch(x.cpu(), cell_R.tolist()), name)
    x = values(7, 4, device=device)
    close(
        ops.dispatch(x, cell_R.repeat_interleave(2)[::2], row_NK.t().contiguous().t()),
        ops.dispatch(x, cell_R, row_NK),
    )


def test_padding_is_zero_whatever_the_cells_hold(device: torch.device) -> None:
    case = RouteCase(4, 2, 1, "some", multiple=4)
    cell_R, _, row_NK, _ = case.route(device)
    x = torch.full((4, 2), float("inf"), device=device)
    for weight in (None, torch.full(cell_R.shape, float("nan"), device=device)):
        rows = ops.dispatch(x, cell_R, row_NK, weight)
        assert bool((rows[cell_R < 0] == 0).all())


def test_two_calls_do_not_alias(device: torch.device) -> None:
    cell_R, _, row_NK, _ = RouteCase(6, 1).route(device)
    x = values(6, 4, device=device)
    first, second = ops.dispatch(x, cell_R, row_NK), ops.dispatch(x, cell_R, row_NK)
    assert len({t.untyped_storage().data_ptr() for t in (x, first, second)}) == 3
    kept = x.clone()
    first.zero_()
    assert torch.equal(x, kept)
    assert torch.equal(second, kept)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_gradients(case: RouteCase, device: torch.device) -> None:
    cell_R, _, row_NK, _ = case.route(device)
    x = values(case.num_cells, 2, dtype=torch.float64, device=device).requires_grad_()
    weight = values(cell_R.shape[0], dtype=torch.float64, device=device).requires_grad_()
    for inputs in ((x,), (x, weight), (x.detach(), weight), (x, weight.detach())):

        def run(x: Tensor, weight: Tensor | None = None) -> Tensor:
            return ops.dispatch(x, cell_R, row_NK, weight)

        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_is_combine(dtype: torch.dtype, device: torch.device) -> None:
    case = RouteCase(100, 8, 2, "some")
    cell_R, _, row_NK, _ = case.route(device)
    x = values(100, 4, dtype=dtype, device=device)
    weight = values(cell_R.shape[0], device=device)
    _, (grad_x, grad_weight) = grads_of(
        lambda x, weight: ops.dispatch(x, cell_R, row_NK, weight), x, weight
    )
    grad_rows = torch.linspace(-1, 2, cell_R.shape[0] * 4, dtype=torch.float64).view(-1, 4)
    grad_rows = grad_rows.to(dtype)
    close(grad_x, plain_combine(grad_rows, row_NK.tolist(), weight.tolist()), factor=3)
    picked = plain_dispatch(x.cpu(), cell_R.tolist())
    wanted = (picked.double() * grad_rows.double()).sum(1) * (cell_R.cpu() >= 0)
    close(grad_weight, wanted.float(), factor=3)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_opcheck(case: RouteCase, device: torch.device) -> None:
    cell_R, _, row_NK, _ = case.route(device)
    x = values(case.num_cells, 2, 3, device=device)
    weight = values(cell_R.shape[0], device=device)
    for args in (
        (x, cell_R, row_NK, None),
        (x.long(), cell_R, row_NK, None),
        (x.requires_grad_(), cell_R, row_NK, weight.requires_grad_()),
    ):
        torch.library.opcheck(torch.ops.brt.dispatch, args)


def test_opcheck_channels_last(device: torch.device) -> None:
    cell_R, _, row_NK, _ = SMALL.route(device)
    x = values(7, 3, 4, 5, device=device).contiguous(memory_format=torch.channels_last)
    weight = values(cell_R.shape[0], device=device)
    torch.library.opcheck(torch.ops.brt.dispatch, (x, cell_R, row_NK, None))
    torch.library.opcheck(torch.ops.brt.dispatch, (x, cell_R, row_NK, weight))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(device: torch.device, dynamic: bool) -> None:
    def run(x: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        cell_R, slot_R, row_NK, _ = ops.route(choice, 4)
        weight_R = ops.dispatch(weight.flatten(), slot_R, row_NK.reshape(-1, 1))
        return ops.dispatch(x * 2, cell_R, row_NK, weight_R)

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for case in (RouteCase(9, 4, 2), RouteCase(12, 4, 2, "one-path"), RouteCase(6, 4, 2, "none")):
        choice = case.choices(device)
        x, weight = values(case.num_cells, 3, device=device), values(*choice.shape, device=device)
        came = grads_of(lambda x, w: compiled(x, choice, w), x, weight)  # noqa: B023
        wanted = grads_of(lambda x, w: run(x, choice, w), x, weight)  # noqa: B023
        for a, b in zip((*came[0], *came[1]), (*wanted[0], *wanted[1]), strict=True):
            close(a, b, case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_NS": torch.zeros(4, 2)}, "cells of x and of the route.*got 4 and 3"),
        ({"x_NS": torch.tensor(1.0)}, "x must have a cell dim, got a scalar"),
        ({"cell_R": torch.zeros(3, 1).long()}, "cell_R must be 1-D and row_NK 2-D"),
        ({"cell_R": torch.zeros(3)}, "indices are integers, got torch.float32"),
        ({"weight_R": torch.zeros(2)}, "weights and rows.*got 2 and 3"),
        ({"weight_R": torch.zeros(3).long()}, "weight_R must be 1-D floats"),
        ({"x_NS": torch.zeros(3, 2).long(), "weight_R": torch.zeros(3)}, "only floats can be wei"),
        ({"x_NS": torch.zeros(3, 2, device="meta")}, r"different devices \(cpu, meta\)"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    args = {
        "x_NS": torch.zeros(3, 2),
        "cell_R": torch.arange(3),
        "row_NK": torch.arange(3)[:, None],
    }
    with pytest.raises(brt.RouteError, match=message):
        ops.dispatch(**(args | change))
