"""Routes: one routing decision as carried out. What a scatter returns, and a gather takes back.

Legend: N cells, P paths, K choices per cell, R routed rows, L listed sets of rows, S trailing dims.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from brt import checks, ops
from brt.cells import Cells, Root
from brt.decision import Decision
from brt.errors import RouteError


@dataclass(frozen=True, eq=False)
class Route:
    """Which rows each path takes, path-major and in cell order. All tensors lie on the device.

    ``route[p]`` is the `Cells` of path p, for a nested scatter or for a gather of several routes.

    Attributes:
        num_paths: P.
        num_cells: N, the rows that the scatter was given.
        cells: which cells those N rows are.
        cell_R: int64, the row of the scatter's input that each routed row is; -1 = padding.
        row_NK: int64, the routed row of each choice; -1 = none, or dropped by capacity. K = P where
            the decision was a mask.
        offsets_P1: int64 ``[P + 1]``; path p has rows ``[offsets[p], offsets[p + 1])``.
        weight_R: float, the weight of each routed row; None = 1.
        sizes: loads of the paths on the host; None until `with_sizes` fetched them.
        weighted: whether the rows were multiplied by their weights on the way in.
    """

    num_paths: int
    num_cells: int
    cells: Cells
    cell_R: Tensor
    row_NK: Tensor
    offsets_P1: Tensor
    weight_R: Tensor | None = None
    sizes: tuple[int, ...] | None = None
    weighted: bool = False

    @property
    def load_P(self) -> Tensor:
        """Rows of each path, int64 ``[P]``, on the device."""
        return self.offsets_P1.diff()

    def with_sizes(self) -> Route:
        """The route with `sizes`, its tensors cut to the rows there are; reads the device once."""
        if self.sizes is not None:
            return self
        if _is_zero(self.cell_R.shape[0]):
            return replace(self, sizes=(0,) * self.num_paths)
        sizes = ops.path_sizes(self.offsets_P1)
        total = _sum(sizes)
        cell_R, weight_R = self.cell_R, self.weight_R
        if torch.compiler.is_compiling():
            for size in sizes:
                torch._check(size >= 0)
            torch._check(total <= cell_R.shape[0])
        if torch.compiler.is_compiling() or total < cell_R.shape[0]:
            cell_R = cell_R.narrow(0, 0, total)
            weight_R = None if weight_R is None else weight_R.narrow(0, 0, total)
        return replace(self, cell_R=cell_R, weight_R=weight_R, sizes=sizes)

    def __len__(self) -> int:
        return self.num_paths

    def __iter__(self) -> Iterator[Cells]:
        return (self[p] for p in range(self.num_paths))

    def __getitem__(self, path: int) -> Cells:
        """Which cells the rows of a path are, with the weights that this route gave them."""
        if not -self.num_paths <= path < self.num_paths:
            raise RouteError(f"route[{path}]: the route has {self.num_paths} paths")
        path %= self.num_paths
        sized = self.with_sizes()
        assert sized.sizes is not None
        start, size = _sum(sized.sizes[:path]), sized.sizes[path]
        cell_R = sized.cell_R.narrow(0, start, size)
        if self.cells.cell_R is not None:
            cell_R = self.cells.cell_R.index_select(0, cell_R.clamp(min=0))
        weight_R = None if sized.weight_R is None else sized.weight_R.narrow(0, start, size)
        return Cells(self.cells.root, cell_R, weight_R, self.weighted)

    def split(self, rows_RS: Tensor) -> tuple[Tensor, ...]:
        """Packed rows -> the rows of each path, as views. Needs `sizes`."""
        assert self.sizes is not None
        return torch.split(rows_RS, list(self.sizes))

    def path_R(self) -> Tensor:
        """The path of each routed row, int64; P for rows past the last offset."""
        row_R = torch.arange(self.cell_R.shape[0], device=self.cell_R.device)
        return torch.bucketize(row_R, self.offsets_P1[1:], right=True)

    def decision(self) -> Decision:
        """The decision that was carried out, as a mask: without what capacity dropped."""
        num_choices = self.row_NK.shape[1]
        path_R = self.path_R()
        # Rows in no choice index the last, discarded entry
        row_NK = torch.where(self.row_NK < 0, self.cell_R.shape[0], self.row_NK).reshape(-1)
        path_R1 = torch.cat([path_R, path_R.new_full((1,), self.num_paths)])
        path_NK = path_R1.index_select(0, row_NK).view(self.num_cells, num_choices)
        choice_NK = torch.where(path_NK == self.num_paths, -1, path_NK)
        weight = None
        if self.weight_R is not None:
            weight_R1 = torch.cat([self.weight_R, self.weight_R.new_zeros(1)])
            weight = weight_R1.index_select(0, row_NK).view(self.num_cells, num_choices)
        return Decision(self.num_paths, choice_NK=choice_NK, weight=weight).to_mask()


torch.export.register_dataclass(Route, serialized_type_name="brt.Route")


def make_route(decision: Decision, num_cells: int, cells: Cells | None = None) -> Route:
    """Carry out a decision about ``num_cells`` rows: apply capacity, and lay rows out by path."""
    ops.same_size("rows of x and cells that the scores decide for", num_cells, decision.num_cells)
    if cells is None:
        cells = Cells.of(num_cells)
    elif isinstance(cells, Cells):
        ops.same_size(
            "rows of x and of cells= (for the rows of path p of a route pass route[p])",
            num_cells,
            cells.num_rows,
        )
    else:
        raise RouteError(
            f"cells= takes a Cells record (grid.cells, route[p]), got {type(cells).__name__}"
        )
    if decision.cell_PC is not None:
        decision = decision.to_mask()
    decided = decision.mask_NP if decision.choice_NK is None else decision.choice_NK
    assert decided is not None
    if cells.cell_R is not None and cells.cell_R.device != decided.device:
        raise RouteError(
            f"cells= is on {cells.cell_R.device}, but the scores are on {decided.device}"
        )
    limits = decision.capacity
    if limits is not None:
        limits = limits if isinstance(limits, tuple) else (limits,)
    settings = (limits, decision.priority_N, decision.group_size or 0)
    if decision.choice_NK is not None:
        choice_NK = decision.choice_NK
        if checks.wanted(choice_NK) and choice_NK.numel():
            least, most = torch.aminmax(choice_NK)
            checks.check_values(
                (least >= -1) & (most < decision.num_paths),
                f"a choice must be a path in range({decision.num_paths}) or -1",
                detail=lambda: f"got values from {int(least)} to {int(most)}",
                error=RouteError,
            )
        cell_R, slot_R, row_NK, offsets_P1 = ops.route(choice_NK, decision.num_paths, *settings)
    else:
        assert decision.mask_NP is not None
        cell_R, slot_R, row_NK, offsets_P1 = ops.route_mask(decision.mask_NP, *settings)
    weight_R = None
    if decision.weight is not None:
        # A row's weight is that of the choice that made it: a dispatch of single numbers
        weight_R = ops.dispatch(decision.weight.reshape(-1), slot_R, row_NK.reshape(-1, 1))
    return Route(decision.num_paths, num_cells, cells, cell_R, row_NK, offsets_P1, weight_R)


def _sum(sizes: Sequence[int]) -> int:
    # Not the built-in: the compiler makes torch.sym_sum of it, which torch.export cannot save
    total = 0
    for size in sizes:
        total = total + size
    return total


def _is_zero(size: int) -> bool:
    # Known without looking: a size that torch.export then never meets again cannot be loaded
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(size == 0)
    return size == 0


@dataclass(frozen=True, eq=False)
class Merge:
    """How L sets of rows that share a root come together: an inverse map, as a route has one."""

    root: Root
    row_NL: Tensor
    cell_R: Tensor
    weight_R: Tensor | None


def merge_cells(where: Sequence[Cells], device: torch.device) -> Merge:
    """The inverse map of rows listed one set after another; their roots must be one."""
    root = where[0].root
    for i, cells in enumerate(where):
        if cells.root is not root and cells.root != root:
            raise RouteError(
                f"gather: rows {i} belong to another root ({cells.root.num_cells} cells) than rows "
                f"0 ({root.num_cells} cells); to gather paths of several scatters, pass the same "
                "cells= to each: grid.cells, or route[p] of the scatter before"
            )
        if cells.cell_R is not None and cells.cell_R.device != device:
            raise RouteError(
                f"gather: the rows are on {device}, but the cells of rows {i} on "
                f"{cells.cell_R.device}"
            )
    num_sets, num_cells = len(where), root.num_cells
    parts = [cells.index_R(device) for cells in where]
    cell_R = torch.cat(parts)
    set_R = torch.cat([torch.full_like(part, i) for i, part in enumerate(parts)])
    row_R = torch.arange(cell_R.shape[0], device=device)
    row_NL = torch.full((num_cells * num_sets,), -1, dtype=torch.int64, device=device)
    row_NL = row_NL.scatter(0, cell_R * num_sets + set_R, row_R).view(num_cells, num_sets)
    weight_R = None
    given = [cells.weight_R for cells in where if cells.weight_R is not None]
    if given:
        dtype = given[0].dtype
        for weight in given[1:]:
            dtype = torch.promote_types(dtype, weight.dtype)
        weight_R = torch.cat(
            [
                part.new_ones(part.shape, dtype=dtype)
                if cells.weight_R is None
                else cells.weight_R.to(dtype)
                for cells, part in zip(where, parts, strict=True)
            ]
        )
    return Merge(root, row_NL, cell_R, weight_R)
