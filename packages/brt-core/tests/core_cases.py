"""Named cases that tests of brt-core share, and the operators as loops over Python lists.

The loops are written from the operators' documentation, apart from `brt.reference`.

Legend: N cells, P paths, K choices per cell, R routed rows, S trailing cell dims.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import brt
from brt import ops

NUM_CELLS = (0, 1, 2, 1023, 1024, 1025, 4096)
NUM_PATHS = (1, 2, 16, 256)
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


@dataclass(frozen=True)
class RouteCase:
    """Choices of cells, and the settings with which they are routed."""

    num_cells: int
    num_paths: int
    num_choices: int = 1
    how: str = "random"  # random, one-path, none, some (half are -1), few-paths (most are empty)
    capacity: tuple[int, ...] | None = None
    priority: str = ""  # "", random, ties
    group_size: int = 0
    multiple: int = 1
    dtype: torch.dtype = torch.int64

    def __str__(self) -> str:
        parts = [f"N{self.num_cells}P{self.num_paths}K{self.num_choices}", self.how]
        if self.capacity is not None:
            parts.append("cap" + "_".join(map(str, self.capacity[:4])))
        parts += [f"priority_{self.priority}"] if self.priority else []
        parts += [f"group{self.group_size}"] if self.group_size else []
        parts += [f"multiple{self.multiple}"] if self.multiple > 1 else []
        parts += ["int32"] if self.dtype == torch.int32 else []
        return "-".join(parts)

    def choices(self, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
        made = torch.Generator().manual_seed(seed)
        shape = (self.num_cells, self.num_choices)
        if self.how == "none":
            choice = torch.full(shape, -1)
        elif self.how == "one-path":
            choice = torch.full(shape, -1)
            choice[:, :1] = self.num_paths - 1
        else:
            scores = torch.rand(self.num_cells, self.num_paths, generator=made)
            if self.how == "few-paths":
                scores[:, self.num_choices + 1 :] = -1
            choice = scores.topk(self.num_choices, 1).indices
            if self.how == "some":
                choice[torch.rand(shape, generator=made) < 0.5] = -1
        return choice.to(device, self.dtype)

    def settings(self, device: torch.device | str = "cpu", seed: int = 1) -> tuple[Any, ...]:
        """(capacity, priority, group_size, multiple)."""
        made = torch.Generator().manual_seed(seed)
        priority = None
        if self.priority == "ties":
            priority = torch.randint(0, 3, (self.num_cells,), generator=made).float().to(device)
        elif self.priority:
            priority = torch.randn(self.num_cells, generator=made).to(device)
        capacity = None if self.capacity is None else list(self.capacity)
        return capacity, priority, self.group_size, self.multiple

    def route(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(cell_R, slot_R, row_NK, offsets_P1)."""
        return ops.route(self.choices(device), self.num_paths, *self.settings(device))


def size_cases() -> Iterator[RouteCase]:
    """Every number of cells with every number of paths, at random and in the extremes."""
    for num_cells in NUM_CELLS:
        for num_paths in NUM_PATHS:
            num_choices = min(2, num_paths)
            for how in ("random", "one-path", "none", "some", "few-paths"):
                yield RouteCase(num_cells, num_paths, num_choices, how)


def capacity_cases() -> Iterator[RouteCase]:
    """Capacity that binds or not, for all paths or each, in groups, by priority, with padding."""
    for num_cells, num_paths, num_choices in ((0, 2, 1), (1, 1, 1), (40, 4, 2), (1025, 16, 4)):
        for capacity in ((0,), (3,), (10_000,), tuple(range(num_paths))):
            for priority in ("", "random", "ties"):
                yield RouteCase(num_cells, num_paths, num_choices, "random", capacity, priority)
                yield RouteCase(num_cells, num_paths, num_choices, "some", capacity, priority, 16)
    for multiple in (2, 16):
        for how in ("random", "none", "one-path", "some"):
            yield RouteCase(50, 4, 2, how, None, "", 0, multiple)
            yield RouteCase(50, 4, 2, how, (5,), "ties", 7, multiple)
        yield RouteCase(0, 4, 2, multiple=multiple)
        yield RouteCase(3, 5, 1, multiple=multiple)
    yield RouteCase(64, 4, 4, "some", (1, 2, 3, 4), "ties", 64)
    for case in (RouteCase(1025, 16, 2, "some"), RouteCase(40, 4, 2, "random", (3,), "random", 8)):
        yield RouteCase(**{**case.__dict__, "dtype": torch.int32})


def moving_cases() -> Iterator[RouteCase]:
    """Routes for operators that move rows: fewer than `size_cases`, the extremes all there."""
    for num_cells in NUM_CELLS:
        for num_paths, how in ((1, "random"), (2, "some"), (16, "one-path"), (16, "few-paths")):
            yield RouteCase(num_cells, num_paths, min(2, num_paths), how)
    yield RouteCase(1025, 256, 2)
    yield RouteCase(4096, 256, 1, "some")
    yield RouteCase(64, 4, 2, "none")
    yield RouteCase(100, 32, 20, "some")  # many choices a cell
    yield RouteCase(100, 4, 2, "random", (7,), "random", 25)
    yield RouteCase(33, 4, 2, "some", None, "", 0, 8)


SMALL = RouteCase(7, 3, 2, "some")
SMALL_CASES = (
    SMALL,
    RouteCase(6, 3, 2),
    RouteCase(0, 3, 1),
    RouteCase(1, 2, 2),
    RouteCase(5, 4, 1, "one-path"),
    RouteCase(4, 2, 1, "none"),
    RouteCase(6, 3, 2, "some", (2,), "ties", 3, 2),
)


def plain_route(
    choice_NK: Sequence[Sequence[int]],
    num_choices: int,
    num_paths: int,
    capacity: Sequence[int] | None = None,
    priority_N: Sequence[float] | None = None,
    group_size: int = 0,
    multiple: int = 1,
) -> tuple[list[int], list[int], list[list[int]], list[int]]:
    """`brt.ops.route` as loops: (cell_R, slot_R, row_NK, offsets_P1)."""
    num_cells = len(choice_NK)
    kept: set[tuple[int, int]] = set()
    served = list(range(num_cells))
    if priority_N is not None:
        served.sort(key=lambda n: -priority_N[n])  # stable
    taken: Counter[tuple[int, int]] = Counter()
    for k in range(num_choices):
        for n in served:
            p = choice_NK[n][k]
            if not 0 <= p < num_paths:
                continue
            room = (p, n // group_size if group_size else 0)
            limit = None if capacity is None else capacity[p if len(capacity) > 1 else 0]
            if limit is None or taken[room] < limit:
                taken[room] += 1
                kept.add((n, k))
    num_rows = num_cells * num_choices + num_paths * (multiple - 1)
    cell_R, slot_R = [-1] * num_rows, [-1] * num_rows
    row_NK = [[-1] * num_choices for _ in range(num_cells)]
    by_path: list[list[tuple[int, int]]] = [[] for _ in range(num_paths)]
    for n, k in sorted(kept):
        by_path[choice_NK[n][k]].append((n, k))
    offsets, row = [0], 0
    for entries in by_path:
        for n, k in entries:
            cell_R[row], slot_R[row], row_NK[n][k] = n, n * num_choices + k, row
            row += 1
        row = -(-row // multiple) * multiple
        offsets.append(row)
    return cell_R, slot_R, row_NK, offsets


def plain_dispatch(
    x_NS: Tensor, cell_R: Sequence[int], weight_R: Sequence[float] | None = None
) -> Tensor:
    """`brt.ops.dispatch` as a loop, weights applied in float64."""
    rows = torch.zeros(len(cell_R), *x_NS.shape[1:], dtype=x_NS.dtype)
    for r, n in enumerate(cell_R):
        if n >= 0:
            rows[r] = x_NS[n] if weight_R is None else (x_NS[n].double() * weight_R[r]).to(x_NS)
    return rows


def plain_combine(
    rows_RS: Tensor, row_NK: Sequence[Sequence[int]], weight_R: Sequence[float] | None = None
) -> Tensor:
    """`brt.ops.combine` as a loop, in float64 (integers: in int64)."""
    wide = torch.float64 if rows_RS.is_floating_point() else torch.int64
    out = torch.zeros(len(row_NK), *rows_RS.shape[1:], dtype=wide)
    for n, rows in enumerate(row_NK):
        for r in rows:
            if r >= 0:
                out[n] += rows_RS[r].to(wide) * (1 if weight_R is None else weight_R[r])
    return out.to(rows_RS.dtype)


def close(came: Tensor, wanted: Tensor, what: object = "", factor: float = 1.0) -> None:
    """Assert that two tensors are equal: exactly for integers, else within their dtype."""
    assert came.dtype == wanted.dtype, f"{what}: {came.dtype} != {wanted.dtype}"
    assert came.shape == wanted.shape, f"{what}: {came.shape} != {wanted.shape}"
    if not came.is_floating_point():
        assert torch.equal(came.cpu(), wanted.cpu()), f"{what}: {came} != {wanted}"
        return
    bound = factor * TOLERANCE[came.dtype]
    torch.testing.assert_close(
        came.cpu(), wanted.cpu(), rtol=bound, atol=bound, msg=lambda text: f"{what}: {text}"
    )


def mixed_layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other strides."""
    spread = x.new_zeros((*x.shape, 2))
    spread[..., 0] = x
    layouts = {"contiguous": x, "strided": spread[..., 0]}
    if x.ndim > 1:
        layouts["transposed"] = x.transpose(0, 1).contiguous().transpose(0, 1)
        layouts["expanded"] = x[:, :1].expand_as(x)
    if x.ndim == 4:
        layouts["channels-last"] = x.contiguous(memory_format=torch.channels_last)
    return layouts


def grads_of(
    function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """(outputs, gradients of the float inputs) for a fixed, uneven sum of the float outputs."""
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    made = function(*leaves)
    outputs = made if isinstance(made, tuple) else (made,)
    total = leaves[0].new_zeros((), dtype=torch.float64)
    for out in outputs:
        if out.requires_grad:
            weight = torch.linspace(-1, 2, out.numel(), device=out.device, dtype=torch.float64)
            total = total + (out.double() * weight.view(out.shape)).sum()
    if total.requires_grad:
        total.backward()
    return tuple(out.detach() for out in outputs), tuple(leaf.grad for leaf in leaves)


def one_hot_scores(
    paths: Sequence[int], num_paths: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Scores that send cell n to ``paths[n]`` under top-1."""
    index = torch.tensor(list(paths), dtype=torch.int64, device=device)
    return torch.nn.functional.one_hot(index, num_paths).float()


def top_k(k: int = 1) -> brt.protocols.Protocol:
    return brt.protocols.TopK(k)
