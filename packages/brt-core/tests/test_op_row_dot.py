"""`brt.ops.row_dot` against a loop over rows.

Legend: N cells, R rows, S trailing cell dims.
"""

from __future__ import annotations

import pytest
import torch
from core_cases import FLOATS, SMALL_CASES, RouteCase, close, mixed_layouts, moving_cases
from torch import Tensor

import brt
from brt import ops


def plain_row_dot(rows_RS: Tensor, cells_NS: Tensor, cell_R: list[int]) -> Tensor:
    out = torch.zeros(len(cell_R), dtype=torch.float64)
    for r, n in enumerate(cell_R):
        if n >= 0:
            out[r] = (rows_RS[r].double() * cells_NS[n].double()).sum()
    return out


def check(case: RouteCase, rows: Tensor, cells: Tensor, what: object) -> None:
    cell_R, _, row_NK, _ = case.route(rows.device)
    wanted = plain_row_dot(rows.cpu(), cells.cpu(), cell_R.tolist())
    dtype = torch.promote_types(rows.dtype, torch.float32)
    close(ops.row_dot(rows, cells, cell_R, row_NK), wanted.to(dtype), what)


@pytest.mark.parametrize("case", list(moving_cases()), ids=str)
def test_sizes(case: RouteCase, device: torch.device) -> None:
    num_rows = case.route()[0].shape[0]
    rows, cells = torch.randn(num_rows, 3), torch.randn(case.num_cells, 3)
    check(case, rows.to(device), cells.to(device), case)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_shapes_and_dtypes(
    dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """The result is float32 (float64 of float64), also for half rows: a weight's gradient."""
    for case in SMALL_CASES:
        num_rows = case.route()[0].shape[0]
        rows = torch.randn(num_rows, *shape).to(device, dtype)
        cells = torch.randn(case.num_cells, *shape).to(device, dtype)
        check(case, rows, cells, case)


def test_other_layouts(device: torch.device) -> None:
    case = RouteCase(7, 3, 2, "some")
    cells = mixed_layouts(torch.randn(7, 3, 4, 5, device=device))
    for name, rows in mixed_layouts(torch.randn(14, 3, 4, 5, device=device)).items():
        check(case, rows, cells[name], name)
        check(case, rows, cells["contiguous"], name)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_gradients_and_opcheck(case: RouteCase, device: torch.device) -> None:
    cell_R, _, row_NK, _ = case.route(device)
    rows = torch.randn(cell_R.shape[0], 2, dtype=torch.float64, device=device).requires_grad_()
    cells = torch.randn(case.num_cells, 2, dtype=torch.float64, device=device).requires_grad_()

    def run(rows: Tensor, cells: Tensor) -> Tensor:
        return ops.row_dot(rows, cells, cell_R, row_NK)

    assert torch.autograd.gradcheck(run, (rows, cells))
    assert torch.autograd.gradgradcheck(run, (rows, cells))
    torch.library.opcheck(torch.ops.brt.row_dot, (rows, cells, cell_R, row_NK))
    half = (rows.detach().bfloat16(), cells.detach().bfloat16(), cell_R, row_NK)
    torch.library.opcheck(torch.ops.brt.row_dot, half)


def test_compiles(device: torch.device) -> None:
    compiled = torch.compile(ops.row_dot, fullgraph=True, dynamic=True, backend="aot_eager")
    for case in SMALL_CASES:
        cell_R, _, row_NK, _ = case.route(device)
        rows = torch.randn(cell_R.shape[0], 4, device=device)
        args = (rows, torch.randn(case.num_cells, 4, device=device), cell_R, row_NK)
        close(compiled(*args), ops.row_dot(*args), case)


def test_two_calls_do_not_alias(device: torch.device) -> None:
    cell_R, _, row_NK, _ = RouteCase(6, 1).route(device)
    x = torch.randn(6, 1, device=device)
    first, second = ops.row_dot(x, x, cell_R, row_NK), ops.row_dot(x, x, cell_R, row_NK)
    assert len({t.untyped_storage().data_ptr() for t in (x, first, second)}) == 3


def test_bad_arguments() -> None:
    index, rows = torch.arange(3), torch.zeros(3, 2)
    with pytest.raises(brt.RouteError, match=r"rows given.*got 4 and 3"):
        ops.row_dot(torch.zeros(4, 2), rows, index, index[:, None])
    with pytest.raises(brt.RouteError, match=r"cells given.*got 4 and 3"):
        ops.row_dot(rows, torch.zeros(4, 2), index, index[:, None])
    with pytest.raises(brt.RouteError, match=r"takes floats, got torch.int64"):
        ops.row_dot(rows.long(), rows, index, index[:, None])
    with pytest.raises(brt.RouteError, match=r"differ in shape: \[2\] and \[5\]"):
        ops.row_dot(rows, torch.zeros(3, 5), index, index[:, None])
    with pytest.raises(brt.RouteError, match=r"different devices"):
        ops.row_dot(rows, rows.to("meta"), index, index[:, None])
