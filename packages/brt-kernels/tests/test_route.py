from __future__ import annotations

import re

import pytest
import torch
from kernel_cases import ROUTES, RouteCase

from brt import reference
from brt_kernels.ops.route import route, route_mask


@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_choices_equal_the_reference(case: RouteCase, device: torch.device) -> None:
    choice, settings = case.choices(), case.settings()
    settings_there = [s.to(device) if isinstance(s, torch.Tensor) else s for s in settings]
    got = route(choice.to(device), case.num_paths, *settings_there)
    for name, a, b in zip(
        ("cell_R", "slot_R", "row_NK", "offsets_P1"),
        got,
        reference.route(choice, case.num_paths, *settings),
        strict=True,
    ):
        assert torch.equal(a.cpu(), b), name


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.int64])
@pytest.mark.parametrize("case", [c for c in ROUTES if c.num_cells < 2000], ids=str)
def test_masks_equal_the_reference(
    case: RouteCase, dtype: torch.dtype, device: torch.device
) -> None:
    made = torch.Generator().manual_seed(2)
    mask = (torch.rand(case.num_cells, case.num_paths, generator=made) < 0.3).to(dtype)
    settings = case.settings()
    settings_there = [s.to(device) if isinstance(s, torch.Tensor) else s for s in settings]
    got = route_mask(mask.to(device), *settings_there)
    for a, b in zip(got, reference.route_mask(mask, *settings), strict=True):
        assert torch.equal(a.cpu(), b)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("bad", [3, -2, -(2**31)])
def test_other_choices_are_an_error(bad: int, dtype: torch.dtype, device: torch.device) -> None:
    choice = torch.tensor([[0, 2], [-1, bad], [2, 1]], dtype=dtype, device=device)
    message = f"choice_NK must be in [-1, 3), got {bad} at position 3"
    if device.type == "cpu":
        for run in (route, reference.route):
            with pytest.raises(Exception, match=re.escape(message)):
                run(choice, 3)
        return
    got = route(choice, 3)
    told = torch.ops.brt_kernels.device_error(torch.cuda.current_device(), True)
    assert told == f"route: {message}"
    choice[1, 1] = -1
    for a, b in zip(got, reference.route(choice.cpu(), 3), strict=True):
        assert torch.equal(a.cpu(), b)


LARGE = [  # cells, paths, choices: more than a block takes at a time, and more than 16 bits count
    (16384, 256, 8),
    (70_001, 60, 5),
    (2000, 4096, 4),
    (9000, 513, 16),
    (50_000, 1, 1),
    (4_300_000, 700, 1),
    (2_200_000, 3, 8),
]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("multiple", [1, 48])
@pytest.mark.parametrize("capacity", [None, 0.5])
@pytest.mark.parametrize("sizes", LARGE, ids=str)
def test_large_routes_equal_the_reference(
    sizes: tuple[int, int, int], capacity: float | None, multiple: int, dtype: torch.dtype
) -> None:
    num_cells, num_paths, num_choices = sizes
    choice = torch.randint(-1, num_paths, (num_cells, num_choices), device="cuda", dtype=dtype)
    choice[: num_cells // 3, 0] = num_paths - 1  # one path has far more than the others
    limits = None
    if capacity is not None:
        limits = [int(capacity * num_cells * num_choices / num_paths)]
    got = route(choice, num_paths, limits, None, 0, multiple)
    again = route(choice, num_paths, limits, None, 0, multiple)
    expected = reference.route(choice, num_paths, limits, None, 0, multiple)
    for name, a, b, c in zip(
        ("cell_R", "slot_R", "row_NK", "offsets_P1"), got, again, expected, strict=True
    ):
        assert torch.equal(a, c), name
        assert torch.equal(a, b), name


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32])
@pytest.mark.parametrize("sizes", [(9000, 600), (100_000, 7), (3, 4096)], ids=str)
def test_large_masks_equal_the_reference(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    mask = (torch.rand(sizes, device="cuda") < 0.1).to(dtype)
    for settings in ((None, None, 0, 1), ([5], None, 0, 3)):
        for a, b in zip(
            route_mask(mask, *settings), reference.route_mask(mask, *settings), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.cuda
@pytest.mark.parametrize("multiple", [1, 5])
@pytest.mark.parametrize("priorities", [False, True])
@pytest.mark.parametrize("group_size", [0, 500, 700, 1000, 9000])
def test_large_routes_with_groups(group_size: int, priorities: bool, multiple: int) -> None:
    num_cells = 7300 if not priorities else 7000 if group_size == 700 else 8000
    choice = torch.randint(-1, 40, (num_cells, 6), device="cuda")
    priority = torch.randint(0, 9, (num_cells,), device="cuda").float() if priorities else None
    settings = ([3] * 39 + [90], priority, group_size, multiple)
    for a, b in zip(
        route(choice, 40, *settings), reference.route(choice, 40, *settings), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.cuda
def test_what_cuda_refuses() -> None:
    choice, priority = torch.zeros(100, 4, dtype=torch.int64, device="cuda"), torch.rand(100).cuda()
    with pytest.raises(RuntimeError, match="up to 4096 paths, got 5000"):
        route(choice, 5000)
    with pytest.raises(RuntimeError, match="of one size, got 100 cells in groups of 30"):
        route(choice, 4, [1], priority, 30)
    with pytest.raises(RuntimeError, match="up to 65536 choices, got 80000"):
        route(choice.repeat(300, 1), 4, [1], None, 20000)


@pytest.mark.cuda
def test_a_captured_route_follows_its_input() -> None:
    choice = torch.zeros(5000, 4, dtype=torch.int64, device="cuda")
    route(choice, 32, [400])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = route(choice, 32)
        limited = route(choice, 32, [400])
    for _ in range(5):
        choice.random_(-1, 32)
        graph.replay()
        for a, b in zip(got, reference.route(choice, 32), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(limited, reference.route(choice, 32, [400]), strict=True):
            assert torch.equal(a, b)


def test_transposed_choices(device: torch.device) -> None:
    choice = torch.randint(0, 4, (2, 50)).t()
    for a, b in zip(route(choice.to(device), 4), reference.route(choice, 4), strict=True):
        assert torch.equal(a.cpu(), b)


def test_fake_agrees_with_the_schema() -> None:
    choice = torch.randint(0, 4, (10, 2))
    torch.library.opcheck(torch.ops.brt_kernels.route.default, (choice, 4, None, None, 0, 2))
    torch.library.opcheck(torch.ops.brt_kernels.route_mask.default, (choice > 1, [2, 1]))


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ((torch.zeros(3), 4), "2-D"),
        ((torch.zeros(3, 2), 4), "int32 or int64"),
        ((torch.zeros(3, 2, dtype=torch.int64), -1), "num_paths"),
        ((torch.zeros(3, 2, dtype=torch.int64), 4, [1, 2]), "capacities"),
        ((torch.zeros(3, 2, dtype=torch.int64), 4, None, torch.zeros(2)), "priority_N"),
        ((torch.zeros(3, 2, dtype=torch.int64), 4, None, None, -1), "group_size"),
        ((torch.zeros(3, 2, dtype=torch.int64), 4, None, None, 0, 0), "multiple"),
    ],
)
def test_bad_input_is_an_exception(args: tuple[object, ...], match: str) -> None:
    with pytest.raises(RuntimeError, match=match):
        route(*args)
