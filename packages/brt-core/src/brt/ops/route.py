"""`route` and `route_mask`: decisions become rows grouped by path.

Legend: N cells, K choices per cell, P paths, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from brt.errors import RouteError
from brt.ops.dispatch import check_devices
from brt.ops.registry import Operator

_SETTINGS = (
    "SymInt[]? capacity, Tensor? priority_N, SymInt group_size, SymInt multiple"
    ") -> (Tensor cell_R, Tensor slot_R, Tensor row_NK, Tensor offsets_P1)"
)
_ROUTE = Operator("route", "(Tensor choice_NK, SymInt num_paths, " + _SETTINGS)
_ROUTE_MASK = Operator("route_mask", "(Tensor mask_NP, " + _SETTINGS)


def route(
    choice_NK: Tensor,
    num_paths: int,
    capacity: Sequence[int] | None = None,
    priority_N: Tensor | None = None,
    group_size: int = 0,
    multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choices ``[N, K]`` (int64 or int32, -1 = none) -> (cell_R, slot_R, row_NK, offsets_P1).

    All int64, on the device, path-major and in cell order inside a path: ``cell_R`` the cell of
    each row, ``slot_R = n * K + k`` the choice that made it, ``row_NK`` the row of each choice and
    ``offsets_P1`` where each path begins. -1 marks padding rows, rows past the last offset, and
    choices that were none or were dropped. R = N * K + P * (multiple - 1) is allocated whatever
    the load. ``capacity`` has one value for all paths or P values, and counts rows per group of
    ``group_size`` consecutive cells (0: all are one group).
    """
    _check("route", choice_NK, num_paths, capacity, priority_N, group_size, multiple)
    return _ROUTE(choice_NK, num_paths, capacity, priority_N, group_size, multiple)


def route_mask(
    mask_NP: Tensor,
    capacity: Sequence[int] | None = None,
    priority_N: Tensor | None = None,
    group_size: int = 0,
    multiple: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`route` for a mask ``[N, P]`` (bool, or integers 0 and 1); K = P."""
    _check("route_mask", mask_NP, mask_NP.shape[-1], capacity, priority_N, group_size, multiple)
    return _ROUTE_MASK(mask_NP, capacity, priority_N, group_size, multiple)


def _check(
    what: str,
    choice_NK: Tensor,
    num_paths: int,
    capacity: Sequence[int] | None,
    priority_N: Tensor | None,
    group_size: int,
    multiple: int,
) -> None:
    check_devices(what, choice_NK, priority_N)
    if choice_NK.ndim != 2:
        raise RouteError(f"{what}: expected [cells, choices], got {list(choice_NK.shape)}")
    if choice_NK.dtype.is_floating_point or choice_NK.dtype.is_complex:
        raise RouteError(f"{what}: choices and masks are integers or bool, got {choice_NK.dtype}")
    if capacity is not None and len(capacity) not in (1, num_paths):
        raise RouteError(f"{what}: {len(capacity)} capacities for {num_paths} paths; give 1 or P")
    if priority_N is not None and tuple(priority_N.shape) != (choice_NK.shape[0],):
        raise RouteError(
            f"{what}: priority must be [{choice_NK.shape[0]}], got {list(priority_N.shape)}"
        )
    if multiple < 1 or group_size < 0:
        raise RouteError(
            f"{what}: multiple must be >= 1 and group_size >= 0, got {multiple} and {group_size}"
        )


def _empty(choice_NK: Tensor, num_paths: int, multiple: int) -> tuple[Tensor, ...]:
    num_cells, num_choices = choice_NK.shape
    num_rows = num_cells * num_choices + num_paths * (multiple - 1)
    like = choice_NK.new_empty
    return (
        like(num_rows, dtype=torch.int64),
        like(num_rows, dtype=torch.int64),
        like((num_cells, num_choices), dtype=torch.int64),
        like(num_paths + 1, dtype=torch.int64),
    )


@torch.library.register_fake("brt::route")
def _(
    choice_NK: Tensor,
    num_paths: int,
    capacity: Sequence[int] | None = None,
    priority_N: Tensor | None = None,
    group_size: int = 0,
    multiple: int = 1,
) -> tuple[Tensor, ...]:
    _check("route", choice_NK, num_paths, capacity, priority_N, group_size, multiple)
    return _empty(choice_NK, num_paths, multiple)


@torch.library.register_fake("brt::route_mask")
def _(
    mask_NP: Tensor,
    capacity: Sequence[int] | None = None,
    priority_N: Tensor | None = None,
    group_size: int = 0,
    multiple: int = 1,
) -> tuple[Tensor, ...]:
    _check("route_mask", mask_NP, mask_NP.shape[-1], capacity, priority_N, group_size, multiple)
    return _empty(mask_NP, mask_NP.shape[1], multiple)
