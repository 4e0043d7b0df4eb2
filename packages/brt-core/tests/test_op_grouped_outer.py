"""`brt.ops.grouped_outer` against a loop over rows.

Legend: R rows, P paths, I features in, O features out.
"""

from __future__ import annotations

import pytest
import torch
from core_cases import FLOATS, NUM_CELLS, RouteCase, close, mixed_layouts
from torch import Tensor

import brt
from brt import ops

CASES = [
    *(RouteCase(n, 16, 1, how) for n in NUM_CELLS for how in ("random", "one-path", "few-paths")),
    RouteCase(1025, 1),
    RouteCase(1025, 256, 1, "some"),
    RouteCase(64, 4, 2, "none"),
]
SMALL_CASES = (RouteCase(7, 3, 2, "some"), RouteCase(0, 3), RouteCase(5, 4, 1, "one-path"))


def plain_grouped_outer(y_RO: Tensor, x_RI: Tensor, offsets: list[int]) -> Tensor:
    out = torch.zeros(len(offsets) - 1, y_RO.shape[1], x_RI.shape[1], dtype=torch.float64)
    for p in range(len(offsets) - 1):
        for r in range(offsets[p], offsets[p + 1]):
            out[p] += y_RO[r].double()[:, None] * x_RI[r].double()[None, :]
    return out.to(x_RI.dtype)


def inputs(
    case: RouteCase, dtype: torch.dtype = torch.float32, device: object = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    offsets = case.route()[3]
    num_rows = case.num_cells * case.num_choices
    y, x = torch.randn(num_rows, 3), torch.randn(num_rows, 4)
    return y.to(device, dtype), x.to(device, dtype), offsets.to(device)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sizes(case: RouteCase, device: torch.device) -> None:
    y, x, offsets = inputs(case, device=device)
    wanted = plain_grouped_outer(y.cpu(), x.cpu(), offsets.tolist())
    close(ops.grouped_outer(y, x, offsets), wanted, case, factor=20)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_dtypes_and_layouts(dtype: torch.dtype, device: torch.device) -> None:
    for case in SMALL_CASES:
        y, x, offsets = inputs(case, dtype, device)
        wanted = plain_grouped_outer(y.cpu(), x.cpu(), offsets.tolist())
        close(ops.grouped_outer(y, x, offsets), wanted, case, factor=2)
        close(ops.grouped_outer(y, x, offsets.int()), wanted, case, factor=2)
        other_y, other_x = mixed_layouts(y)["transposed"], mixed_layouts(x)["strided"]
        close(ops.grouped_outer(other_y, other_x, offsets), wanted, case, factor=2)


def test_two_calls_do_not_alias(device: torch.device) -> None:
    args = inputs(SMALL_CASES[0], device=device)
    first, second = ops.grouped_outer(*args), ops.grouped_outer(*args)
    assert len({t.untyped_storage().data_ptr() for t in (*args, first, second)}) == 5


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_gradients_and_opcheck(case: RouteCase, device: torch.device) -> None:
    y, x, offsets = inputs(case, torch.float64, device)
    leaves = (y.requires_grad_(), x.requires_grad_())

    def run(y: Tensor, x: Tensor) -> Tensor:
        return ops.grouped_outer(y, x, offsets)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)
    torch.library.opcheck(torch.ops.brt.grouped_outer, (*leaves, offsets))
    torch.library.opcheck(
        torch.ops.brt.grouped_outer, inputs(case, torch.float32, device), test_utils="test_schema"
    )


def test_compiles(device: torch.device) -> None:
    compiled = torch.compile(ops.grouped_outer, fullgraph=True, dynamic=True, backend="aot_eager")
    for case in SMALL_CASES:
        args = inputs(case, device=device)
        close(compiled(*args), ops.grouped_outer(*args), case)


def test_bad_arguments() -> None:
    offsets = torch.tensor([0, 3])
    with pytest.raises(brt.RouteError, match=r"rows of y and of x.*got 2 and 3"):
        ops.grouped_outer(torch.zeros(2, 1), torch.zeros(3, 1), offsets)
    with pytest.raises(brt.RouteError, match=r"expected y \[R, O\]"):
        ops.grouped_outer(torch.zeros(3), torch.zeros(3, 1), offsets)
    with pytest.raises(brt.RouteError, match=r"different devices"):
        ops.grouped_outer(torch.zeros(3, 1), torch.zeros(3, 1, device="meta"), offsets)
