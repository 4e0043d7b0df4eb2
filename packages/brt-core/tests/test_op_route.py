"""`brt.ops.route` against loops over lists."""

from __future__ import annotations

import pytest
import torch
from core_cases import SMALL_CASES, RouteCase, capacity_cases, plain_route, size_cases
from torch import Tensor

import brt
from brt import KernelError, ops


def expected(choice_NK: Tensor, num_paths: int, settings: tuple) -> tuple[Tensor, ...]:
    capacity, priority_N, group_size, multiple = settings
    made = plain_route(
        choice_NK.tolist(),
        choice_NK.shape[1],
        num_paths,
        capacity,
        None if priority_N is None else priority_N.tolist(),
        group_size,
        multiple,
    )
    cell_R, slot_R, row_NK, offsets = (torch.tensor(t, dtype=torch.int64) for t in made)
    return cell_R, slot_R, row_NK.view(choice_NK.shape), offsets


def check(case: RouteCase, device: torch.device) -> None:
    choice_NK, settings = case.choices(device), case.settings(device)
    found = ops.route(choice_NK, case.num_paths, *settings)
    for name, came, wanted in zip(
        ("cell_R", "slot_R", "row_NK", "offsets_P1"),
        found,
        expected(choice_NK, case.num_paths, settings),
        strict=True,
    ):
        assert came.dtype == torch.int64, (str(case), name)
        assert came.device.type == device.type, (str(case), name)
        assert torch.equal(came.cpu(), wanted), f"{case}: {name}\n{came}\n{wanted}"


@pytest.mark.parametrize("case", list(size_cases()), ids=str)
def test_sizes(case: RouteCase, device: torch.device) -> None:
    check(case, device)


@pytest.mark.parametrize("case", list(capacity_cases()), ids=str)
def test_settings(case: RouteCase, device: torch.device) -> None:
    check(case, device)


def test_settings_of_many_cells(device: torch.device) -> None:
    for capacity in ((5,), (64,)):
        check(RouteCase(4096, 256, 2, "some", capacity, "ties", 1024), device)
    check(RouteCase(4096, 16, 2, "few-paths", (100,), "random", 0, 16), device)


def test_brainstorm_example(device: torch.device) -> None:
    """O1 and O2 of the original's operators: seats are ranks in cell order; capacity drops late."""
    mask = torch.tensor([[1, 0], [0, 1], [1, 0], [1, 0], [0, 0]], device=device)
    cell_R, _, row_NP, offsets = ops.route_mask(mask)
    assert cell_R[:4].tolist() == [0, 2, 3, 1]
    assert row_NP.tolist() == [[0, -1], [-1, 3], [1, -1], [2, -1], [-1, -1]]
    assert offsets.tolist() == [0, 3, 4]
    _, _, row_NP, offsets = ops.route_mask(mask, [2])
    assert row_NP.tolist() == [[0, -1], [-1, 2], [1, -1], [-1, -1], [-1, -1]]
    assert offsets.tolist() == [0, 2, 3]
    assert ops.route_mask(mask, [0])[3].tolist() == [0, 0, 0]


def test_first_choices_come_before_second_ones(device: torch.device) -> None:
    choice = torch.tensor([[1, 0], [0, 1], [0, 1]], device=device)
    _, _, row_NK, offsets = ops.route(choice, 2, [2])
    # Path 0 is full with the first choices of cells 1 and 2; path 1 has room for one second choice
    assert (row_NK >= 0).tolist() == [[True, False], [True, True], [True, False]]
    assert offsets.tolist() == [0, 2, 4]


def test_equal_priorities_keep_cell_order(device: torch.device) -> None:
    choice = torch.zeros(6, 1, dtype=torch.int64, device=device)
    priority = torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0, 1.0], device=device)
    cell_R = ops.route(choice, 1, [4], priority)[0]
    assert cell_R.tolist() == [1, 2, 3, 4, -1, -1]  # kept by priority, laid out in cell order


@pytest.mark.parametrize("bad", [5, 2, -2, -7])
def test_choices_outside_the_paths_are_an_error(bad: int, device: torch.device) -> None:
    choice = torch.tensor([[0], [bad], [1], [-1]], device=device)
    if device.type == "cpu":
        with pytest.raises(KernelError, match=rf"\[-1, 2\), got {bad} at position 1"):
            ops.route(choice, 2)
        return
    _, _, row_NK, offsets = ops.route(choice, 2)
    with pytest.raises(KernelError, match="choices must be paths, or -1 for none"):
        brt.check()
    assert row_NK.flatten().tolist() == [0, -1, 1, -1]
    assert offsets.tolist() == [0, 1, 2]


def test_other_layouts_and_int32(device: torch.device) -> None:
    choice = RouteCase(20, 4, 3, "some").choices(device)
    wanted = ops.route(choice, 4)
    for other in (choice.t().contiguous().t(), choice.int(), choice.repeat(1, 2)[:, :3]):
        for came, want in zip(ops.route(other, 4), wanted, strict=True):
            assert torch.equal(came, want)
    expanded = torch.full((1, 1), 2, device=device).expand(5, 1)
    assert ops.route(expanded, 4)[3].tolist() == [0, 0, 0, 5, 5]


def test_two_calls_do_not_alias(device: torch.device) -> None:
    case = RouteCase(20, 4, 2)
    first = case.route(device)
    kept = [t.clone() for t in first]
    second = ops.route(RouteCase(20, 4, 2).choices(device, seed=5), 4)
    pointers = [t.untyped_storage().data_ptr() for t in (*first, *second)]
    assert len(set(pointers)) == len(pointers)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_priority_may_need_gradients(device: torch.device) -> None:
    case = RouteCase(20, 4, 2, capacity=(3,), priority="random")
    capacity, priority_N, group_size, multiple = case.settings(device)
    found = ops.route(
        case.choices(device), 4, capacity, priority_N.requires_grad_(), group_size, multiple
    )
    for came, wanted in zip(found, case.route(device), strict=True):
        assert not came.requires_grad
        assert torch.equal(came, wanted)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_opcheck(case: RouteCase, device: torch.device) -> None:
    torch.library.opcheck(
        torch.ops.brt.route, (case.choices(device), case.num_paths, *case.settings(device))
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(device: torch.device, dynamic: bool) -> None:
    compiled = torch.compile(ops.route, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for case in (RouteCase(9, 4, 2), RouteCase(12, 4, 2, "some"), RouteCase(0, 4, 2)):
        args = (case.choices(device), 4, [3], None, 4, 2)
        for came, wanted in zip(compiled(*args), ops.route(*args), strict=True):
            assert torch.equal(came, wanted), str(case)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice_NK": torch.zeros(3, dtype=torch.int64)}, r"expected \[cells, choices\].*\[3\]"),
        ({"choice_NK": torch.zeros(3, 1)}, "integers or bool, got torch.float32"),
        ({"capacity": [1, 2, 3]}, "3 capacities for 2 paths"),
        ({"priority_N": torch.zeros(4)}, r"priority must be \[3\], got \[4\]"),
        ({"priority_N": torch.zeros(3, device="meta")}, r"different devices \(cpu, meta\)"),
        ({"multiple": 0}, "multiple must be >= 1"),
        ({"group_size": -1}, "group_size >= 0"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    args = {"choice_NK": torch.zeros(3, 1, dtype=torch.int64), "num_paths": 2} | change
    with pytest.raises(brt.RouteError, match=message):
        ops.route(**args)
