"""`brt.ops.route_mask` against loops over lists."""

from __future__ import annotations

import pytest
import torch
from core_cases import NUM_CELLS, NUM_PATHS, RouteCase, plain_route
from torch import Tensor

import brt
from brt import ops


def masks(num_cells: int, num_paths: int, how: str, device: torch.device) -> Tensor:
    made = torch.Generator().manual_seed(num_cells + num_paths)
    mask = torch.zeros(num_cells, num_paths, dtype=torch.bool)
    if how == "all":
        mask[:] = True
    elif how == "one-path":
        mask[:, -1] = True
    elif how != "none":
        mask = torch.rand(mask.shape, generator=made) < (0.5 if num_paths < 256 else 0.02)
    return mask.to(device)


def check(mask_NP: Tensor, what: str, *settings: object) -> None:
    num_paths = mask_NP.shape[1]
    choices = [[p if hot else -1 for p, hot in enumerate(row)] for row in mask_NP.tolist()]
    capacity, priority, *rest = settings or (None, None)
    priority = None if priority is None else priority.tolist()
    wanted = plain_route(choices, num_paths, num_paths, capacity, priority, *rest)
    found = ops.route_mask(mask_NP, *settings)
    for name, came, want in zip(("cell", "slot", "row", "offsets"), found, wanted, strict=True):
        want = torch.tensor(want, dtype=torch.int64).view(came.shape)
        assert torch.equal(came.cpu(), want), f"{what}: {name}"


@pytest.mark.parametrize("how", ["random", "all", "one-path", "none"])
@pytest.mark.parametrize("num_paths", NUM_PATHS)
def test_sizes(num_paths: int, how: str, device: torch.device) -> None:
    for num_cells in NUM_CELLS:
        if num_cells * num_paths <= 100_000 or how == "random":
            check(masks(num_cells, num_paths, how, device), f"{num_cells=} {num_paths=} {how}")


@pytest.mark.parametrize("capacity", [[3], [0], [1, 2, 3, 0]])
def test_settings(capacity: list[int], device: torch.device) -> None:
    mask = masks(50, 4, "random", device)
    priority = RouteCase(50, 4, priority="ties").settings(device)[1]
    check(mask, "capacity", capacity, None)
    check(mask, "priority", capacity, priority)
    check(mask, "all", capacity, priority, 7, 4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_integer_masks_and_other_layouts(dtype: torch.dtype, device: torch.device) -> None:
    mask = masks(33, 5, "random", device)
    wanted = ops.route_mask(mask)
    for other in (mask.to(dtype), mask.to(dtype).t().contiguous().t()):
        for came, want in zip(ops.route_mask(other), wanted, strict=True):
            assert torch.equal(came, want)


def test_agrees_with_route(device: torch.device) -> None:
    choice = RouteCase(40, 8, 3).choices(device).sort(dim=1).values
    decision = brt.Decision(8, choice_NK=choice)
    by_mask = ops.route_mask(decision.to_mask().mask_NP)
    by_choice = ops.route(choice, 8)
    num_rows = by_choice[0].shape[0]
    assert torch.equal(by_mask[0][:num_rows], by_choice[0])
    assert torch.equal(by_mask[3], by_choice[3])


def test_two_calls_do_not_alias(device: torch.device) -> None:
    first = ops.route_mask(masks(20, 4, "random", device))
    second = ops.route_mask(masks(20, 4, "all", device))
    pointers = [t.untyped_storage().data_ptr() for t in (*first, *second)]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("num_cells", [0, 1, 6])
def test_opcheck(num_cells: int, device: torch.device) -> None:
    mask = masks(num_cells, 3, "random", device)
    torch.library.opcheck(torch.ops.brt.route_mask, (mask, None, None, 0, 1))
    priority = torch.arange(num_cells, device=device).float()
    torch.library.opcheck(torch.ops.brt.route_mask, (mask, [2], priority, 4, 2))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(device: torch.device, dynamic: bool) -> None:
    compiled = torch.compile(ops.route_mask, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for how in ("random", "none", "all"):
        mask = masks(9, 4, how, device)
        for came, wanted in zip(compiled(mask), ops.route_mask(mask), strict=True):
            assert torch.equal(came, wanted), how


def test_bad_arguments() -> None:
    with pytest.raises(brt.RouteError, match=r"integers or bool, got torch.float32"):
        ops.route_mask(torch.zeros(3, 2))
    with pytest.raises(brt.RouteError, match=r"expected \[cells, choices\]"):
        ops.route_mask(torch.zeros(3, 2, 1, dtype=torch.bool))
    with pytest.raises(brt.RouteError, match=r"1 or P"):
        ops.route_mask(torch.zeros(3, 2, dtype=torch.bool), [1, 2, 3])
