"""Routing cases that the tests of several operators share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from brt import reference


@dataclass(frozen=True)
class RouteCase:
    num_cells: int
    num_paths: int
    num_choices: int
    how: str = "random"  # random, one-path, none, some
    capacity: tuple[int, ...] | None = None
    priority: bool = False
    group_size: int = 0
    multiple: int = 1
    dtype: torch.dtype = torch.int64

    def __str__(self) -> str:
        parts = [f"N{self.num_cells}P{self.num_paths}K{self.num_choices}", self.how]
        parts += [f"cap{self.capacity}"] if self.capacity is not None else []
        parts += ["priority"] if self.priority else []
        parts += [f"group{self.group_size}"] if self.group_size else []
        parts += [f"multiple{self.multiple}"] if self.multiple > 1 else []
        parts += ["int32"] if self.dtype == torch.int32 else []
        return "-".join(parts)

    def choices(self, seed: int = 0) -> torch.Tensor:
        made = torch.Generator().manual_seed(seed)
        scores = torch.rand(self.num_cells, self.num_paths, generator=made)
        choice = scores.topk(self.num_choices, 1).indices
        if self.how == "one-path":
            choice = torch.full_like(choice, -1)
            choice[:, :1] = self.num_paths - 1
        elif self.how == "none":
            choice = torch.full_like(choice, -1)
        elif self.how == "some":
            choice[torch.rand(choice.shape, generator=made) < 0.5] = -1
        return choice.to(self.dtype)

    def settings(self, seed: int = 1) -> tuple[object, ...]:
        made = torch.Generator().manual_seed(seed)
        priority = torch.randint(0, 5, (self.num_cells,), generator=made).float()
        return (self.capacity, priority if self.priority else None, self.group_size, self.multiple)


ROUTES = [
    RouteCase(0, 4, 2),
    RouteCase(1, 1, 1),
    RouteCase(1, 8, 2),
    RouteCase(7, 3, 2, dtype=torch.int32),
    RouteCase(100, 5, 3),
    RouteCase(100, 5, 3, "one-path"),
    RouteCase(64, 4, 1, "none"),
    RouteCase(333, 17, 4, "some"),
    RouteCase(1025, 64, 2, "some", dtype=torch.int32),
    RouteCase(40000, 64, 2),
    RouteCase(50, 4, 2, "some", multiple=8),
    RouteCase(3, 5, 1, multiple=16),
    RouteCase(100, 4, 2, capacity=(7,)),
    RouteCase(100, 4, 2, capacity=(0, 3, 10, 200)),
    RouteCase(100, 4, 2, "some", capacity=(9,), priority=True),
    RouteCase(96, 4, 2, capacity=(3,), priority=True, group_size=32, multiple=4),
    RouteCase(100, 4, 2, capacity=(3,), group_size=32),
]
SMALL_ROUTES = [case for case in ROUTES if case.num_cells < 2000 and case.capacity is None]


def arguments(
    device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, tuple[object, ...]]:
    """A call of each operator."""
    case = RouteCase(30, 4, 2, "some")
    choice = case.choices()
    cell_R, _, row_NK, offsets = reference.route(choice, 4)
    x, rows = torch.randn(30, 8).to(dtype), torch.randn(60, 8).to(dtype)
    weight = torch.rand(60)
    up, down = torch.randn(4, 12, 8).to(dtype), torch.randn(4, 8, 12).to(dtype)
    made = {
        "route": (choice, 4, None, None, 0, 1),
        "route_mask": (choice > 1, None, None, 0, 1),
        "dispatch": (x, cell_R, row_NK, weight),
        "combine": (rows, row_NK, cell_R, weight),
        "row_dot": (rows, x, cell_R, row_NK),
        "compact": (choice[:, 0] > 0,),
        "grouped_linear": (rows, offsets, up, None, "gelu"),
        "grouped_outer": (torch.randn(60, 12).to(dtype), rows, offsets),
        "expert_mlp": (x, cell_R, row_NK, offsets, weight, up, None, down, None, "silu"),
    }
    return {
        op: tuple(a.to(device) if isinstance(a, torch.Tensor) else a for a in args)
        for op, args in made.items()
    }
