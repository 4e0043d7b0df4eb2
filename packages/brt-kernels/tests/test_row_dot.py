from __future__ import annotations

import pytest
import torch
from kernel_cases import RouteCase

from brt import reference
from brt_kernels.ops.row_dot import row_dot


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (33,), (3, 5, 7), (1024,), (0,)], ids=str)
def test_equals_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, isa: str
) -> None:
    case = RouteCase(100, 5, 3, "some", multiple=4)
    cell_R, _, row_NK, _ = reference.route(case.choices(), case.num_paths, *case.settings())
    rows, cells = torch.randn(cell_R.shape[0], *shape).to(dtype), torch.randn(100, *shape).to(dtype)
    got = row_dot(rows.to(device), cells.to(device), cell_R.to(device), row_NK.to(device))
    # the order of the sum is free: an error of a few roundings of its largest part
    torch.testing.assert_close(
        got.cpu(), reference.row_dot(rows, cells, cell_R, row_NK), rtol=1e-4, atol=1e-4
    )


def test_fake_agrees_with_the_schema() -> None:
    cell_R = torch.arange(5)
    args = (torch.randn(5, 3), torch.randn(5, 3), cell_R, cell_R[:, None])
    torch.library.opcheck(torch.ops.brt_kernels.row_dot.default, args)


def test_bad_input_is_an_exception() -> None:
    index = torch.tensor([1])
    with pytest.raises(RuntimeError, match="size 1"):
        row_dot(torch.zeros(1, 3), torch.zeros(2, 4), index, index[:, None])
    with pytest.raises(RuntimeError, match="got 2 at position 0"):
        row_dot(torch.zeros(1, 3), torch.zeros(2, 3), index + 1, index[:, None])
