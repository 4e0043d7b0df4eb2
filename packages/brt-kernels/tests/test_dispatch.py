from __future__ import annotations

import pytest
import torch
from kernel_cases import SMALL_ROUTES, RouteCase

from brt import reference
from brt_kernels.ops.dispatch import dispatch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(64,), (1,), (33,), (3, 5, 7), (1024,), (0,)]


def run(
    case: RouteCase,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weighted: bool,
    device: torch.device,
) -> None:
    cell_R, _, row_NK, _ = reference.route(case.choices(), case.num_paths, *case.settings())
    made = torch.Generator().manual_seed(3)
    x = torch.randn(case.num_cells, *shape, generator=made).to(dtype)
    weight = torch.randn(cell_R.shape[0], generator=made) if weighted else None
    got = dispatch(
        x.to(device),
        cell_R.to(device),
        row_NK.to(device),
        None if weight is None else weight.to(device),
    )
    torch.testing.assert_close(
        got.cpu(), reference.dispatch(x, cell_R, row_NK, weight), rtol=0, atol=0
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL_ROUTES, ids=str)
def test_equals_the_reference(
    case: RouteCase, dtype: torch.dtype, weighted: bool, device: torch.device
) -> None:
    run(case, (65,), dtype, weighted, device)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_on_every_isa(
    shape: tuple[int, ...], dtype: torch.dtype, weighted: bool, isa: str
) -> None:
    run(RouteCase(100, 5, 3, "some", multiple=4), shape, dtype, weighted, torch.device("cpu"))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1023, 2048])
def test_larger_than_a_cache(width: int, dtype: torch.dtype, weighted: bool, isa: str) -> None:
    run(RouteCase(2500, 5, 2, "some"), (width,), dtype, weighted, torch.device("cpu"))


def test_index_tensors_that_disagree_follow_cell_R() -> None:
    x, row_NK = torch.randn(4, 8), torch.zeros(4, 1, dtype=torch.int64)
    cell_R = torch.tensor([3, 3, -1, 0])
    expected = x[cell_R.clamp(min=0)] * (cell_R >= 0)[:, None]
    assert torch.equal(dispatch(x, cell_R, row_NK), expected)
    assert torch.equal(dispatch(x, cell_R.int(), row_NK.int() + 99), expected)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float64]
)
def test_other_dtypes_move_unweighted(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randint(0, 2, (5, 7)).to(dtype)
    cell_R = torch.tensor([4, -1, 0])
    got = dispatch(x.to(device), cell_R.to(device), torch.full((5, 1), -1, device=device))
    assert torch.equal(got.cpu(), reference.dispatch(x, cell_R, cell_R[:, None]))


def test_strided_input(device: torch.device) -> None:
    x = torch.randn(20, 40, device=device)[:, ::2]
    cell_R = torch.arange(20, device=device).flip(0)
    assert torch.equal(dispatch(x, cell_R, cell_R[:, None]), x.flip(0))


def test_fake_agrees_with_the_schema() -> None:
    cell_R = torch.arange(5)
    torch.library.opcheck(
        torch.ops.brt_kernels.dispatch.default, (torch.randn(5, 3), cell_R, cell_R[:, None], None)
    )


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (
            (
                torch.zeros(()),
                torch.zeros(1, dtype=torch.int64),
                torch.zeros(1, 1, dtype=torch.int64),
            ),
            "at least 1",
        ),
        (
            (torch.zeros(2, 3), torch.tensor([2, 0]), torch.zeros(2, 1, dtype=torch.int64)),
            r"got 2 at position 0",
        ),
        (
            (torch.zeros(2, 3), torch.tensor([-2, 0]), torch.zeros(2, 1, dtype=torch.int64)),
            r"got -2 at position 0",
        ),
        (
            (torch.zeros(2, 3), torch.tensor([1.0]), torch.zeros(2, 1, dtype=torch.int64)),
            "int32 or int64",
        ),
        (
            (
                torch.zeros(2, 3).double(),
                torch.tensor([1]),
                torch.zeros(2, 1, dtype=torch.int64),
                torch.ones(1),
            ),
            "float64",
        ),
        (
            (torch.zeros(2, 3).cfloat(), torch.tensor([1]), torch.zeros(2, 1, dtype=torch.int64)),
            "x_NS must be",
        ),
        (
            (torch.zeros(2, 3), torch.tensor([1]), torch.zeros(3, 1, dtype=torch.int64)),
            "each of 2 cells",
        ),
        (
            (
                torch.zeros(2, 3),
                torch.tensor([1]),
                torch.zeros(2, 1, dtype=torch.int64),
                torch.ones(2),
            ),
            "weight_R",
        ),
    ],
)
def test_bad_input_is_an_exception(args: tuple[torch.Tensor, ...], match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        dispatch(*args)
