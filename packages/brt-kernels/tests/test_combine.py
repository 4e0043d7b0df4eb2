from __future__ import annotations

import pytest
import torch
from kernel_cases import SMALL_ROUTES, RouteCase

from brt import reference
from brt_kernels.ops.combine import combine

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
    rows = torch.randn(cell_R.shape[0], *shape, generator=made).to(dtype)
    weight = torch.randn(cell_R.shape[0], generator=made) if weighted else None
    got = combine(
        rows.to(device),
        row_NK.to(device),
        cell_R.to(device),
        None if weight is None else weight.to(device),
    )
    torch.testing.assert_close(got.cpu(), reference.combine(rows, row_NK, cell_R, weight))
    again = combine(
        rows.to(device),
        row_NK.to(device),
        cell_R.to(device),
        None if weight is None else weight.to(device),
    )
    assert torch.equal(got, again)


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


@pytest.mark.parametrize("num_choices", [1, 2, 4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_larger_than_a_cache(
    dtype: torch.dtype, weighted: bool, num_choices: int, isa: str
) -> None:
    run(RouteCase(2500, 5, num_choices), (2047,), dtype, weighted, torch.device("cpu"))


def test_fake_agrees_with_the_schema() -> None:
    cell_R = torch.arange(5)
    torch.library.opcheck(
        torch.ops.brt_kernels.combine.default, (torch.randn(5, 3), cell_R[:, None], cell_R, None)
    )


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (
            (torch.zeros(2, 3), torch.tensor([[2]]), torch.zeros(2, dtype=torch.int64)),
            r"got 2 at position 0",
        ),
        (
            (torch.zeros(2, 3), torch.tensor([[0], [-3]]), torch.zeros(2, dtype=torch.int64)),
            r"got -3 at position 1",
        ),
        ((torch.zeros(2, 3), torch.tensor([0]), torch.zeros(2, dtype=torch.int64)), "2-D"),
        ((torch.zeros(2, 3), torch.tensor([[0]]), torch.zeros(3, dtype=torch.int64)), "cell_R"),
        (
            (torch.zeros(2, 3).int(), torch.tensor([[0]]), torch.zeros(2, dtype=torch.int64)),
            "float32",
        ),
    ],
)
def test_bad_input_is_an_exception(args: tuple[torch.Tensor, ...], match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        combine(*args)
