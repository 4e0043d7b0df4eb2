"""`brt.ops.combine` against loops over cells.

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


def values(*shape: int, dtype: torch.dtype = torch.float32, device: object = "cpu") -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape).to(device, dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 50, shape).to(device, dtype)


@pytest.mark.parametrize("case", list(moving_cases()), ids=str)
def test_sizes(case: RouteCase, device: torch.device) -> None:
    cell_R, _, row_NK, _ = case.route(device)
    rows = values(cell_R.shape[0], 3, device=device)
    weight = values(cell_R.shape[0], device=device)
    close(ops.combine(rows, row_NK, cell_R), plain_combine(rows.cpu(), row_NK.tolist()), case)
    close(
        ops.combine(rows, row_NK, cell_R, weight),
        plain_combine(rows.cpu(), row_NK.tolist(), weight.tolist()),
        case,
    )


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (3, 4, 4), (0,)], ids=str)
@pytest.mark.parametrize(
    "dtype", [*FLOATS, torch.float64, torch.int64, torch.int32, torch.uint8], ids=str
)
def test_shapes_and_dtypes(
    dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    for case in SMALL_CASES:
        cell_R, _, row_NK, _ = case.route(device)
        rows = values(cell_R.shape[0], *shape, dtype=dtype, device=device)
        wanted = plain_combine(rows.cpu(), row_NK.tolist())
        close(ops.combine(rows, row_NK, cell_R), wanted, case)
        close(ops.combine(rows, row_NK.int(), cell_R.int()), wanted, f"{case} int32")


def test_bool_of_one_choice(device: torch.device) -> None:
    cell_R, _, row_NK, _ = RouteCase(20, 4, 1, "some").route(device)
    x = values(20, 3, dtype=torch.bool, device=device)
    came = ops.combine(ops.dispatch(x, cell_R, row_NK), row_NK, cell_R)
    assert torch.equal(came, x & (row_NK >= 0))


@pytest.mark.parametrize("weight_dtype", [*FLOATS, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weights(dtype: torch.dtype, weight_dtype: torch.dtype, device: torch.device) -> None:
    """Sums run in float32, whatever the weights are, and the result has the rows' dtype."""
    for case in SMALL_CASES:
        cell_R, _, row_NK, _ = case.route(device)
        rows = values(cell_R.shape[0], 4, dtype=dtype, device=device)
        weight = values(cell_R.shape[0], dtype=weight_dtype, device=device)
        close(
            ops.combine(rows, row_NK, cell_R, weight),
            plain_combine(rows.cpu(), row_NK.tolist(), weight.tolist()),
            case,
        )


@pytest.mark.parametrize("num_choices", [2, 20])  # the reference has two ways on the CPU
def test_sums_in_float32(num_choices: int, device: torch.device) -> None:
    cell_R, _, row_NK, _ = RouteCase(8, 32, num_choices).route(device)
    rows = torch.full((cell_R.shape[0], 2), 1.0, dtype=torch.bfloat16, device=device)
    rows[row_NK[:, 0]] = 256.0  # in bfloat16, 256 + 1 is 256
    came = ops.combine(rows, row_NK, cell_R)
    wanted = torch.full((8, 2), 255.0 + num_choices).bfloat16()
    assert torch.equal(came.cpu(), wanted)


def test_other_layouts(device: torch.device) -> None:
    cell_R, _, row_NK, _ = SMALL.route(device)
    for shape in ((14, 4), (14, 3, 4, 5)):
        for name, rows in mixed_layouts(values(*shape, device=device)).items():
            close(
                ops.combine(rows, row_NK, cell_R), plain_combine(rows.cpu(), row_NK.tolist()), name
            )
    rows = values(14, 4, device=device)
    close(
        ops.combine(rows, row_NK.t().contiguous().t(), cell_R.repeat_interleave(2)[::2]),
        ops.combine(rows, row_NK, cell_R),
    )


def test_rows_of_no_cell_are_not_looked_at(device: torch.device) -> None:
    case = RouteCase(4, 2, 1, "some", multiple=4)
    cell_R, _, row_NK, _ = case.route(device)
    rows = torch.ones(cell_R.shape[0], 2, device=device)
    rows[cell_R < 0] = float("nan")
    out = ops.combine(rows, row_NK, cell_R, rows[:, 0].clone())
    assert torch.equal(out, (row_NK >= 0).float().expand(4, 2))


def test_no_rows(device: torch.device) -> None:
    """The original divided by zero here."""
    none = torch.empty(0, dtype=torch.int64, device=device)
    row_NK = torch.full((3, 1), -1, device=device)
    out = ops.combine(torch.empty(0, 2, device=device), row_NK, none)
    assert torch.equal(out.cpu(), torch.zeros(3, 2))


def test_deterministic(device: torch.device) -> None:
    cell_R, _, row_NK, _ = RouteCase(1025, 64, 20).route(device)
    rows = values(cell_R.shape[0], 8, device=device)
    first = ops.combine(rows, row_NK, cell_R)
    assert all(torch.equal(first, ops.combine(rows, row_NK, cell_R)) for _ in range(3))


def test_two_calls_do_not_alias(device: torch.device) -> None:
    cell_R, _, row_NK, _ = RouteCase(6, 1).route(device)
    rows = values(6, 4, device=device)
    first, second = ops.combine(rows, row_NK, cell_R), ops.combine(rows, row_NK, cell_R)
    assert len({t.untyped_storage().data_ptr() for t in (rows, first, second)}) == 3


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_gradients(case: RouteCase, device: torch.device) -> None:
    cell_R, _, row_NK, _ = case.route(device)
    rows = values(cell_R.shape[0], 2, dtype=torch.float64, device=device).requires_grad_()
    weight = values(cell_R.shape[0], dtype=torch.float64, device=device).requires_grad_()
    for inputs in ((rows,), (rows, weight), (rows.detach(), weight), (rows, weight.detach())):

        def run(rows: Tensor, weight: Tensor | None = None) -> Tensor:
            return ops.combine(rows, row_NK, cell_R, weight)

        assert torch.autograd.gradcheck(run, inputs)
        assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradient_is_dispatch(dtype: torch.dtype, device: torch.device) -> None:
    cell_R, _, row_NK, _ = RouteCase(100, 8, 2, "some").route(device)
    rows = values(cell_R.shape[0], 4, dtype=dtype, device=device)
    weight = values(cell_R.shape[0], device=device)
    _, (grad_rows, _) = grads_of(
        lambda rows, weight: ops.combine(rows, row_NK, cell_R, weight), rows, weight
    )
    grad = torch.linspace(-1, 2, 400, dtype=torch.float64).view(100, 4).to(dtype)
    close(grad_rows, plain_dispatch(grad, cell_R.tolist(), weight.tolist()), factor=3)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_opcheck(case: RouteCase, device: torch.device) -> None:
    cell_R, _, row_NK, _ = case.route(device)
    rows = values(cell_R.shape[0], 2, 3, device=device)
    weight = values(cell_R.shape[0], device=device)
    for args in (
        (rows, row_NK, cell_R, None),
        (rows.long(), row_NK, cell_R, None),
        (rows.requires_grad_(), row_NK, cell_R, weight.requires_grad_()),
    ):
        torch.library.opcheck(torch.ops.brt.combine, args)


def test_opcheck_channels_last(device: torch.device) -> None:
    cell_R, _, row_NK, _ = SMALL.route(device)
    rows = values(14, 3, 4, 5, device=device).contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(torch.ops.brt.combine, (rows, row_NK, cell_R, None))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(device: torch.device, dynamic: bool) -> None:
    def run(x: Tensor, choice: Tensor, weight: Tensor) -> Tensor:
        cell_R, slot_R, row_NK, _ = ops.route(choice, 4, None, None, 0, 2)
        weight_R = ops.dispatch(weight.flatten(), slot_R, row_NK.reshape(-1, 1))
        return ops.combine(ops.dispatch(x, cell_R, row_NK).sin(), row_NK, cell_R, weight_R)

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
        ({"rows_RS": torch.zeros(4, 2)}, "rows given and rows of the route.*got 4 and 3"),
        ({"rows_RS": torch.tensor(1.0)}, "rows must have a row dim, got a scalar"),
        ({"row_NK": torch.zeros(3).long()}, "cell_R must be 1-D and row_NK 2-D"),
        ({"row_NK": torch.zeros(3, 1)}, "indices are integers"),
        ({"weight_R": torch.zeros(2)}, "weights and rows.*got 2 and 3"),
        ({"rows_RS": torch.zeros(3, 2).long(), "weight_R": torch.ones(3)}, "only floats can be"),
        ({"rows_RS": torch.zeros(3, 2, device="meta")}, r"different devices \(cpu, meta\)"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    args = {
        "rows_RS": torch.zeros(3, 2),
        "row_NK": torch.arange(3)[:, None],
        "cell_R": torch.arange(3),
    }
    with pytest.raises(brt.RouteError, match=message):
        ops.combine(**(args | change))
