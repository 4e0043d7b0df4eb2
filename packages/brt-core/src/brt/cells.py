"""Cells: the unit that is routed, and the way back to the tensor they came from.

Legend: N cells, R rows, B batch, C channels, H W image height and width, S trailing cell dims.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from brt.errors import RouteError

_root_keys = itertools.count()


def _next_root_key() -> int:
    # A compiled graph keeps the key of its tracing: roots are told apart within one call.
    return next(_root_keys)


# All that torch.compiler.assume_constant_result does, without its import of the whole compiler
_next_root_key._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Root:
    """The set of cells that routes refer to; made by `annotate` or by the first scatter.

    Two sets of rows can be gathered together only where their roots are equal.
    """

    num_cells: int
    key: int = field(default_factory=_next_root_key)


@dataclass(frozen=True, eq=False)
class Cells:
    """Which cells a set of R rows is; no cell twice.

    Attributes:
        root: the set that the cells belong to.
        cell_R: int64 ``[R]``, the root cell of each row; None where the rows are all cells of the
            root, in order.
        weight_R: ``[R]`` the weight that the last route gave each row, or None (1).
        weighted: whether the rows were multiplied by ``weight_R`` on the way in.
    """

    root: Root
    cell_R: Tensor | None = None
    weight_R: Tensor | None = None
    weighted: bool = False

    @classmethod
    def of(cls, num_cells: int) -> Cells:
        """All cells of a new root, in order."""
        return cls(Root(num_cells))

    @property
    def num_rows(self) -> int:
        """R."""
        return self.root.num_cells if self.cell_R is None else self.cell_R.shape[0]

    def index_R(self, device: torch.device) -> Tensor:
        """Root cell of each row, int64 ``[R]``, also where `cell_R` is None."""
        if self.cell_R is not None:
            return self.cell_R
        return torch.arange(self.root.num_cells, device=device)


@dataclass(frozen=True, eq=False)
class Grid:
    """How cells lie in the tensor that `annotate` was given; `restore` puts them back.

    Attributes:
        dims: the dims of the tensor along which cells lie, non-negative, in the order given.
        sizes: the shape of the tensor.
        cells: the `Cells` of all of them; pass it to every scatter of these cells whose paths are
            to be gathered together.
        shape: the shape of a cell, where `annotate` was given one.
    """

    dims: tuple[int, ...]
    sizes: tuple[int, ...]
    cells: Cells
    shape: tuple[int, ...] | None = None

    def restore(self, rows: Tensor, scale: int = 1) -> Tensor:
        """Rows ``[N, *S]`` in cell order -> the tensor, cells at their places.

        Where a row has as many dims as a cell had, they return to their places with the sizes that
        they have now; otherwise the cell dims come first, in the order given. Cells that
        ``annotate(shape=...)`` regrouped return to their places in the shape they had.
        ``scale`` concerns grids of patches.
        """
        if scale != 1:
            raise RouteError(
                f"restore(scale={scale}) is for grids of patches (annotate_patches); "
                "other cells may change their size freely"
            )
        num_cells = self.cells.root.num_cells
        if rows.ndim < 1 or rows.shape[0] != num_cells:
            raise RouteError(
                f"restore: the grid has {num_cells} cells, got rows of shape {list(rows.shape)}; "
                "gather with result='all' gives one row for each"
            )
        rest = tuple(d for d in range(len(self.sizes)) if d not in self.dims)
        cell_sizes = tuple(self.sizes[d] for d in self.dims)
        order = self.dims + rest
        if self.shape is None:
            out = rows.reshape(cell_sizes + tuple(rows.shape[1:]))
            if rows.ndim - 1 != len(rest):
                return out
        elif tuple(rows.shape[1:]) == self.shape:
            out = rows.reshape(tuple(self.sizes[d] for d in order))
        elif num_cells == _product(cell_sizes):
            return rows.reshape(cell_sizes + tuple(rows.shape[1:]))
        else:
            raise RouteError(
                f"restore: annotate regrouped {list(self.sizes)} into cells of {list(self.shape)}; "
                f"rows of another shape, {list(rows.shape[1:])}, have no place there"
            )
        return out.permute(sorted(range(len(order)), key=order.__getitem__))


@dataclass(frozen=True, eq=False)
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

        Every pixel is the mean of the patches that cover it, taken in float32 or better.
        """
        if scale < 1:
            raise RouteError(f"restore: scale must be at least 1, got {scale}")
        batch, _, height, width = self.sizes
        num_y, num_x = len(self.tops), len(self.lefts)
        size_y, size_x = self.size[0] * scale, self.size[1] * scale
        num_cells = batch * num_y * num_x
        if rows.ndim != 4 or (rows.shape[0], *rows.shape[2:]) != (num_cells, size_y, size_x):
            raise RouteError(
                f"restore(scale={scale}): expected rows [{num_cells}, C, {size_y}, {size_x}], "
                f"got {list(rows.shape)}"
            )
        overlap = _is_overlapping(self.tops, self.size[0]) or _is_overlapping(
            self.lefts, self.size[1]
        )
        if overlap and not rows.is_floating_point():
            raise RouteError(f"restore averages overlapping patches: give floats, not {rows.dtype}")
        out = rows.unflatten(0, (batch, num_y, num_x)).permute(0, 3, 1, 4, 2, 5)
        if overlap:
            out = out.to(torch.promote_types(rows.dtype, torch.float32))
        out = _fold_mean(out, 4, self.lefts, self.size[1], width, scale)
        out = _fold_mean(out, 2, self.tops, self.size[0], height, scale)
        return out.to(rows.dtype)


def annotate(
    x: Tensor, dims: int | Sequence[int], shape: Sequence[int] | None = None
) -> tuple[Tensor, Grid]:
    """Name the cells of a tensor: (cells ``[N, *S]``, grid) with ``grid.restore`` undoing it.

    ``dims`` are the dims along which cells lie, in the order in which cells are counted (negative
    ones count from the end); the others are a cell's own, in their order. ``shape`` regroups the
    elements, in that order, into cells of that shape. The cells are a view of ``x`` where strides
    permit.

    Source: ``annotate_cell`` of Brainstorm (OSDI 2023, section 3.1).
    """
    if has_torch_function_unary(x):
        return handle_torch_function(annotate, (x,), x, dims, shape)
    named = (dims,) if isinstance(dims, int) else tuple(dims)
    for d in named:
        if not -x.ndim <= d < x.ndim:
            raise RouteError(f"annotate: dim {d} of dims={named}, but x has {x.ndim} dims")
    order = tuple(d % x.ndim for d in named)
    if not order or len(set(order)) != len(order):
        raise RouteError(f"annotate: dims must name at least one dim, each once, got {named}")
    rest = tuple(d for d in range(x.ndim) if d not in order)
    sizes = tuple(x.shape)
    cell_shape = tuple(sizes[d] for d in rest)
    if shape is not None and tuple(shape) == cell_shape:
        shape = None
    if shape is None:
        num_cells = _product(sizes[d] for d in order)
    else:
        cell_shape = shape = tuple(shape)
        numel = _product(shape)
        if any(size < 1 for size in shape) or x.numel() % numel:
            raise RouteError(
                f"annotate: {x.numel()} elements {list(sizes)} do not divide into cells of "
                f"{list(shape)}"
            )
        num_cells = x.numel() // numel
    cells = x.permute(order + rest).reshape((num_cells, *cell_shape))
    return cells, Grid(order, sizes, Cells.of(num_cells), shape)


def annotate_patches(
    x_BCHW: Tensor, size: int | tuple[int, int], stride: int | tuple[int, int]
) -> tuple[Tensor, PatchGrid]:
    """Cut images into patches: (cells ``[N, C, size, size]``, grid).

    Patches start every ``stride`` pixels; the last of each row and column is moved inwards so that
    it ends at the border, and every pixel is covered (``stride <= size``). Images must be at least
    as large as a patch.
    """
    if has_torch_function_unary(x_BCHW):
        return handle_torch_function(annotate_patches, (x_BCHW,), x_BCHW, size, stride)
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
    num_cells = batch * len(tops) * len(lefts)
    if len(tops) == 1 and len(lefts) == 1:
        cells = x_BCHW
    else:
        cells = _unfold(_unfold(x_BCHW, 2, tops, size_y), 4, lefts, size_x)
        # [B, C, num_y, size_y, num_x, size_x]
        cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(num_cells, channels, size_y, size_x)
    grid = PatchGrid(
        (batch, channels, height, width), (size_y, size_x), tops, lefts, Cells.of(num_cells)
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


def _stride(starts: tuple[int, ...]) -> int:
    return starts[1] - starts[0] if len(starts) > 1 else 1


def _is_overlapping(starts: tuple[int, ...], size: int) -> bool:
    return any(b - a < size for a, b in itertools.pairwise(starts))


def _unfold(x: Tensor, dim: int, starts: tuple[int, ...], size: int) -> Tensor:
    """Replace ``dim`` by two: windows, and positions inside a window. A view where regular."""
    stride, full = _stride(starts), x.shape[dim]
    num_regular = (full - size) // stride + 1
    x_regular = x.narrow(dim, 0, (min(num_regular, len(starts)) - 1) * stride + size)
    windows = x_regular.unfold(dim, size, stride).movedim(-1, dim + 1)
    if num_regular >= len(starts):
        return windows
    # The last window is moved inwards. Not one index_select: its backward adds in any order
    return torch.cat([windows, x.narrow(dim, full - size, size).unsqueeze(dim)], dim)


def _fold_mean(
    x: Tensor, dim: int, starts: tuple[int, ...], size: int, full: int, scale: int
) -> Tensor:
    """Undo `_unfold`: one dim for windows ``dim`` and positions ``dim + 1``, the mean of overlaps.

    Both ways add in one order, without atomics: deterministic, and equal to the last bit.
    """
    if not _is_overlapping(starts, size):
        return x.flatten(dim, dim + 1)
    # A compiler fuses the gathers into one loop; without one, each would be a pass over memory.
    if torch.compiler.is_compiling() or size > 2 * _stride(starts):
        return _fold_by_gathers(x.flatten(dim, dim + 1), dim, starts, size, full, scale)
    return _fold_by_segments(x, dim, [start * scale for start in starts], size * scale)


def _fold_by_segments(x: Tensor, dim: int, starts: Sequence[int], size: int) -> Tensor:
    """One slice for each stretch of pixels that the same windows cover."""
    edges = sorted({edge for start in starts for edge in (start, start + size)})
    segments = []
    for begin, end in itertools.pairwise(edges):
        first, *others = (
            x.select(dim, window).narrow(dim, begin - start, end - begin)
            for window, start in enumerate(starts)
            if start <= begin and end <= start + size
        )
        segments.append(sum(others, first) / (1 + len(others)) if others else first)
    return torch.cat(segments, dim)


def _fold_by_gathers(
    x: Tensor, dim: int, starts: tuple[int, ...], size: int, full: int, scale: int
) -> Tensor:
    """A sum of gathers, one for each layer of overlap."""
    num_layers = max(sum(a <= b < a + size for b in starts) for a in starts)
    # Made on the device, so that a CUDA graph can be captured
    start_W = torch.arange(len(starts), device=x.device) * _stride(starts)
    start_W = start_W.clamp(max=full - size) * scale
    pixel = torch.arange(full * scale, device=x.device)
    first = torch.searchsorted(start_W + size * scale, pixel, right=True)
    last = torch.searchsorted(start_W, pixel, right=True) - 1
    shape = [-1 if d == dim else 1 for d in range(x.ndim)]
    total = None
    for layer in range(num_layers):
        window = torch.minimum(first + layer, last)
        part = x.index_select(dim, window * (size * scale) + pixel - start_W[window])
        part = part.masked_fill((first + layer > last).view(shape), 0)
        total = part if total is None else total + part
    assert total is not None
    return total / (last - first + 1).view(shape)


for _cls in (Root, Cells, Grid, PatchGrid):
    torch.export.register_dataclass(_cls, serialized_type_name=f"brt.{_cls.__name__}")
