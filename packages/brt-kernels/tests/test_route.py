from __future__ import annotations

import pytest
import torch
from kernel_cases import ROUTES, RouteCase

from brt import reference
from brt_kernels.ops.route import route, route_mask


def left_to_others(case: RouteCase, device: torch.device) -> bool:
    """What the CUDA kernel refuses, and its plugin with it."""
    return (
        device.type == "cuda"
        and case.capacity is not None
        and (case.priority or case.group_size > 0)
    )


@pytest.mark.parametrize("case", ROUTES, ids=str)
def test_choices_equal_the_reference(case: RouteCase, device: torch.device) -> None:
    if left_to_others(case, device):
        pytest.skip("the reference serves priorities and groups on CUDA")
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
    if left_to_others(case, device):
        pytest.skip("the reference serves priorities and groups on CUDA")
    made = torch.Generator().manual_seed(2)
    mask = (torch.rand(case.num_cells, case.num_paths, generator=made) < 0.3).to(dtype)
    settings = case.settings()
    settings_there = [s.to(device) if isinstance(s, torch.Tensor) else s for s in settings]
    got = route_mask(mask.to(device), *settings_there)
    for a, b in zip(got, reference.route_mask(mask, *settings), strict=True):
        assert torch.equal(a.cpu(), b)


def test_other_choices_are_none(device: torch.device) -> None:
    choice = torch.tensor([[5, 0], [-7, 1], [2, 3]], device=device)
    got = route(choice, 3)
    for a, b in zip(got, reference.route(choice.cpu(), 3), strict=True):
        assert torch.equal(a.cpu(), b)


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
