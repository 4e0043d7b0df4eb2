"""Cells: the unit that is routed, and the way back to the tensor they came from.

Legend: N cells, R rows, B batch, C channels, H W image height and width, S trailing cell dims.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from brt.errors import RouteError

_root_keys = itertools.count()


@torch.compiler.assume_constant_result
def _next_root_key() -> int:
    # A compiled graph keeps the key of its tracing: roots are told apart within one call.
    return next(_root_keys)


@dataclass(frozen=True)
class Root:
    """The set of cells that routes refer to; made by `annotate` or by the first scatter.

    Two sets of rows can be gathered together only where their roots are equal.
    """

    num_cells: int
    key: int = field(default_factory=_next_root_key)


@dataclass(frozen=True)
class Cells:
    """Which cells a set of R rows is.

    Attributes:
        root: the set that the cells belong to.
        cell_R: int64 ``[R]``, the root cell of each row; None where the rows are all cells of the
            root, in order.
        weight_R: ``[R]`` the weight that the last route gave each row, or None (1).
    """

    root: Root
    cell_R: Tensor | None = None
    weight_R: Tensor | None = None

    @classmethod
    def of(cls, num_cells: int) -> Cells:
        """All cells of a new root, in order."""
        return cls(Root(num_cells))

    def index_R(self, device: torch.device) -> Tensor:
        """Root cell of each row, int64 ``[R]``, also where `cell_R` is None."""
        if self.cell_R is not None:
            return self.cell_R
        return torch.arange(self.root.num_cells, device=device)


@dataclass(frozen=True)
class Grid:
    """How cells lie in the tensor that `annotate` was given; `restore` puts them back.

    Attributes:
        dims: the dims of the tensor along which cells lie, non-negative, in the order given.
        sizes: the shape of the tensor.
        cells: the `Cells` of all of them; pass it to every scatter of these cells whose paths are
            to be gathered together.
    """

    dims: tuple[int, ...]
    sizes: tuple[int, ...]
    cells: Cells

    def restore(self, rows: Tensor, scale: int = 1) -> Tensor:
        """Rows ``[N, *S]`` in cell order -> the tensor, cells at their places.

        Where ``rows`` has the rank of the annotated cells (or as many elements as the tensor had),
        dims return to their places with the trailing sizes of ``rows``, each of which may have
        changed; otherwise the cell dims come first, in the order given. ``scale`` concerns grids
        of patches.
        """
        if scale != 1:
            raise RouteError(
                f"restore(scale={scale}) is for grids of patches (annotate_patches); "
                "other cells may change their size freely"
            )
        rest = tuple(d for d in range(len(self.sizes)) if d not in self.dims)
        cell_sizes = tuple(self.sizes[d] for d in self.dims)
        order = self.dims + rest
        num_cells = _product(cell_sizes)
        if rows.shape[0] == num_cells and rows.ndim - 1 == len(rest):
            out = rows.reshape(cell_sizes + tuple(rows.shape[1:]))
        elif rows.numel() == _product(self.sizes):  # annotate(shape=...) regrouped the cells
            out = rows.reshape(tuple(self.sizes[d] for d in order))
        elif rows.shape[0] == num_cells:
            return rows.reshape(cell_sizes + tuple(rows.shape[1:]))
        else:
            raise RouteError(
                f"restore: the grid has {num_cells} cells (sizes {cell_sizes} of dims "
                f"{self.dims}), got {rows.shape[0]} rows of shape {tuple(rows.shape[1:])}; gather "
                "with result='all' gives one row per cell"
            )
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return out.permute(inverse)


@dataclass(frozen=True)
class PatchGrid:
    """How overlapping patches lie in a batch of images; `restore` folds them back.

    Attributes:
        sizes: ``(B, C, H, W)`` of the images.
        size: height and width of a patch.
        tops, lefts: first row of each row of patches, first column of each column of patches.
        cells: the `Cells` of all patches (image-major, then row by row).
    """

    sizes: tuple[int, ...]
    size: tuple[int, int]
    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    cells: Cells

    def restore(self, rows: Tensor, scale: int = 1) -> Tensor:
        """Rows ``[N, C', size*scale, size*scale]`` -> images ``[B, C', H*scale, W*scale]``.

        Every pixel is the mean of the patches that cover it.
        """
        batch, _, height, width = self.sizes
        num_y, num_x = len(self.tops), len(self.lefts)
        wanted = (batch * num_y * num_x, self.size[0] * scale, self.size[1] * scale)
        if rows.ndim != 4 or (rows.shape[0], *rows.shape[2:]) != wanted:
            raise RouteError(
                f"restore(scale={scale}): expected rows [{wanted[0]}, C, {wanted[1]}, {wanted[2]}],"
                f" got {list(rows.shape)}"
            )
        channels = rows.shape[1]
        out = rows.reshape(batch, num_y, num_x, channels, wanted[1], wanted[2])
        out = out.permute(0, 3, 1, 4, 2, 5).reshape(
            batch, channels, num_y * wanted[1], num_x * wanted[2]
        )
        out = _fold_mean(out, 3, self.lefts, self.size[1], width, scale)
        return _fold_mean(out, 2, self.tops, self.size[0], height, scale)


def annotate(
    x: Tensor, dims: int | tuple[int, ...], shape: tuple[int, ...] | None = None
) -> tuple[Tensor, Grid]:
    """Name the cells of a tensor: (cells ``[N, *S]``, grid) with ``grid.restore`` undoing it.

    ``dims`` are the dims along which cells lie, in the order in which cells are counted (negative
    ones count from the end); the others are a cell's own, in their order. ``shape`` regroups the
    elements into cells of that shape. The cells are a view of ``x`` where strides permit.

    Source: ``annotate_cell`` of Brainstorm (OSDI 2023, section 3.1).
    """
    if has_torch_function_unary(x):
        return handle_torch_function(annotate, (x,), x, dims, shape)  # type: ignore[no-any-return]
    named = (dims,) if isinstance(dims, int) else tuple(dims)
    for d in named:
        if not -x.ndim <= d < x.ndim:
            raise RouteError(f"annotate: dim {d} of dims={named}, but x has {x.ndim} dims")
    order = tuple(d % x.ndim for d in named)
    if not order or len(set(order)) != len(order):
        raise RouteError(f"annotate: dims must name at least one dim, each once, got {named}")
    rest = tuple(d for d in range(x.ndim) if d not in order)
    sizes = tuple(x.shape)
    cell_shape = tuple(sizes[d] for d in rest) if shape is None else tuple(shape)
    if shape is None:
        num_cells = _product([sizes[d] for d in order])
    else:
        cell_numel = _product(cell_shape)
        if cell_numel <= 0 or x.numel() % cell_numel:
            raise RouteError(
                f"annotate: {x.numel()} elements {sizes} do not divide into cells of {cell_shape}"
            )
        num_cells = x.numel() // cell_numel
    cells = x.permute(order + rest).reshape((num_cells, *cell_shape))
    return cells, Grid(order, sizes, Cells.of(num_cells))


def annotate_patches(
    x_BCHW: Tensor, size: int | tuple[int, int], stride: int | tuple[int, int]
) -> tuple[Tensor, PatchGrid]:
    """Cut images into patches: (cells ``[N, C, size, size]``, grid).

    Patches start every ``stride`` pixels; the last of each row and column is moved inwards so that
    it ends at the border, and every pixel is covered (``stride <= size``). Images must be at least
    as large as a patch.
    """
    if has_torch_function_unary(x_BCHW):
        return handle_torch_function(  # type: ignore[no-any-return]
            annotate_patches, (x_BCHW,), x_BCHW, size, stride
        )
    if x_BCHW.ndim != 4:
        raise RouteError(f"annotate_patches: x must be [B, C, H, W], got {list(x_BCHW.shape)}")
    size_y, size_x = (size, size) if isinstance(size, int) else size
    stride_y, stride_x = (stride, stride) if isinstance(stride, int) else stride
    batch, channels, height, width = x_BCHW.shape
    for what, one, step, full in (
        ("height", size_y, stride_y, height),
        ("width", size_x, stride_x, width),
    ):
        if not 1 <= step <= one:
            raise RouteError(
                f"annotate_patches: stride must be from 1 to size, got stride {step}, size {one}"
            )
        if full < one:
            raise RouteError(
                f"annotate_patches: {what} {full} is less than a patch ({one}); pad the image"
            )
    tops = _starts(height, size_y, stride_y)
    lefts = _starts(width, size_x, stride_x)
    if len(tops) == 1 and len(lefts) == 1:
        cells = x_BCHW
    else:
        cells = _unfold(_unfold(x_BCHW, 2, tops, size_y, stride_y), 4, lefts, size_x, stride_x)
        # [B, C, num_y, size_y, num_x, size_x]
        cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels, size_y, size_x)
    grid = PatchGrid(
        (batch, channels, height, width), (size_y, size_x), tops, lefts, Cells.of(cells.shape[0])
    )
    return cells, grid


def _product(sizes: Iterable[int]) -> int:
    # Not math.prod: while tracing, sizes may be symbols
    product = 1
    for size in sizes:
        product = product * size
    return product


def _starts(full: int, size: int, stride: int) -> tuple[int, ...]:
    starts = list(range(0, full - size + 1, stride))
    if starts[-1] + size < full:
        starts.append(full - size)
    return tuple(starts)


def _unfold(x: Tensor, dim: int, starts: tuple[int, ...], size: int, stride: int) -> Tensor:
    """Replace ``dim`` by two: windows, and positions inside a window. A view where regular."""
    if x.shape[dim] == (len(starts) - 1) * stride + size:
        return x.unfold(dim, size, stride).movedim(-1, dim + 1)
    index = torch.tensor(
        [start + i for start in starts for i in range(size)], device=x.device
    )
    return x.index_select(dim, index).unflatten(dim, (len(starts), size))


def _fold_mean(
    x: Tensor, dim: int, starts: tuple[int, ...], size: int, full: int, scale: int
) -> Tensor:
    """Undo `_unfold` (windows and positions flattened in ``dim``) by the mean of overlaps.

    A sum of gathers, one for each layer of overlap: no atomics, so that it is deterministic.
    """
    covering: list[list[int]] = [[] for _ in range(full * scale)]
    for i, start in enumerate(starts):
        for j in range(size * scale):
            covering[start * scale + j].append(i * size * scale + j)
    out = None
    for layer in range(max((len(c) for c in covering), default=0)):
        index = torch.tensor([c[min(layer, len(c) - 1)] for c in covering], device=x.device)
        part = x.index_select(dim, index)
        if min(len(c) for c in covering) <= layer:
            there = torch.tensor([float(len(c) > layer) for c in covering], device=x.device)
            part = part * there.to(x.dtype).view([-1 if d == dim else 1 for d in range(x.ndim)])
        out = part if out is None else out + part
    if out is None:
        raise RouteError("restore: an image without pixels")
    if all(len(c) == 1 for c in covering):
        return out
    share = torch.tensor([1.0 / len(c) for c in covering], device=x.device).to(x.dtype)
    return out * share.view([-1 if d == dim else 1 for d in range(x.ndim)])


for _cls in (Root, Cells, Grid, PatchGrid):
    torch.export.register_dataclass(_cls)
