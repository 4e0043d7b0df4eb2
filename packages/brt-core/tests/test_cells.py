"""Cells of tensors and of images, and the way back.

Legend: N cells, B batch, C channels, H W image height and width.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from core_cases import FLOATS
from torch import Tensor

import brt


def plain_cells(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """One cell for each index along dims, the last dim given counting fastest."""
    cells = []
    for index in itertools.product(*(range(x.shape[d]) for d in dims)):
        picked: list[int | slice] = [slice(None)] * x.ndim
        for d, i in zip(dims, index, strict=True):
            picked[d] = i
        cells.append(x[tuple(picked)])
    return torch.stack(cells)


@pytest.mark.parametrize(
    ("dims", "shape", "wanted"),
    [
        ((0, 1), None, (6, 4)),
        ((2, 1), None, (12, 2)),
        ((2,), (2, 3, 2), (2, 2, 3, 2)),
        ((0,), None, (2, 3, 4)),
        ((1, 2), None, (12, 2)),
        ((2, 0, 1), None, (24,)),
        (1, None, (3, 2, 4)),
        ((-1,), None, (4, 2, 3)),
        ((-1, 0), None, (8, 3)),
        ((0,), (4, 3), (2, 4, 3)),
        ((0, 1), (2, 2), (6, 2, 2)),
        ((0, 1), (4,), (6, 4)),
        ((0,), (12,), (2, 12)),
        ((0,), (1,), (24, 1)),
    ],
)
def test_brainstorms_cases(
    dims: int | tuple[int, ...],
    shape: tuple[int, ...] | None,
    wanted: tuple[int, ...],
    device: torch.device,
) -> None:
    """F1 of the original, with the dims in the order given."""
    x = torch.arange(24, device=device).view(2, 3, 4)
    cells, grid = brt.annotate(x, dims, shape)
    assert cells.shape == wanted
    assert grid.cells.root.num_cells == wanted[0]
    assert torch.equal(grid.restore(cells), x)
    named = (dims,) if isinstance(dims, int) else dims
    order = tuple(d % 3 for d in named)
    assert torch.equal(cells.flatten(), plain_cells(x, order).flatten())


def test_every_order_of_dims_comes_back(device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 5, device=device)
    for num_dims in range(1, 5):
        for dims in itertools.permutations(range(4), num_dims):
            cells, grid = brt.annotate(x, dims)
            assert torch.equal(cells, plain_cells(x, dims)), dims
            assert torch.equal(grid.restore(cells), x), dims
            negative, _ = brt.annotate(x, [d - 4 for d in dims])
            assert torch.equal(negative, cells), dims


def test_views_where_no_copy_is_needed(device: torch.device) -> None:
    x = torch.randn(2, 3, 4, device=device)
    pointer = x.untyped_storage().data_ptr()
    for dims in ((0,), (0, 1), (1,), (2,)):
        cells, grid = brt.annotate(x, dims)
        assert cells.untyped_storage().data_ptr() == pointer, dims
        assert grid.restore(cells).untyped_storage().data_ptr() == pointer, dims
    copied, _ = brt.annotate(x, (2, 0))
    assert copied.untyped_storage().data_ptr() != pointer
    patches, _ = brt.annotate_patches(torch.randn(1, 3, 8, 8, device=device), 8, 8)
    assert patches.shape == (1, 3, 8, 8)


def test_cells_that_changed_their_sizes(device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 5, device=device)
    _, grid = brt.annotate(x, (1, 0))  # cells of [3 * 2, 4, 5]
    assert grid.restore(torch.zeros(6, 8, 1, device=device)).shape == (2, 3, 8, 1)
    assert grid.restore(torch.zeros(6, 7, device=device)).shape == (3, 2, 7)
    assert grid.restore(torch.zeros(6, device=device)).shape == (3, 2)
    # As many elements as before in another rank: cell dims come first, as for any other number
    assert grid.restore(torch.zeros(6, 20, device=device)).shape == (3, 2, 20)
    assert grid.restore(torch.zeros(6, 2, 2, 5, device=device)).shape == (3, 2, 2, 2, 5)
    last, grid = brt.annotate(x, (3,))
    grown = last.repeat_interleave(2, dim=1)  # dim 0 of x doubles
    assert torch.equal(grid.restore(grown), x.repeat_interleave(2, dim=0))


def test_regrouped_cells(device: torch.device) -> None:
    x = torch.randn(2, 3, 4, device=device)
    _, grid = brt.annotate(x, (0, 1), shape=(2, 2))
    assert grid.restore(torch.zeros(6, 9, device=device)).shape == (2, 3, 9)
    cells, grid = brt.annotate(x, (2,), shape=(2, 3, 2))
    assert torch.equal(grid.restore(cells * 2), x * 2)
    with pytest.raises(brt.RouteError, match=r"regrouped \[2, 3, 4\] into cells of \[2, 3, 2\]"):
        grid.restore(torch.zeros(2, 5, device=device))


def test_nested_grids(device: torch.device) -> None:
    x = torch.randn(2, 3, 4, 5, device=device)
    outer, outer_grid = brt.annotate(x, (0,))
    inner, inner_grid = brt.annotate(outer, (0, 2))
    assert inner.shape == (8, 3, 5)
    assert outer_grid.cells.root != inner_grid.cells.root
    assert torch.equal(outer_grid.restore(inner_grid.restore(inner)), x)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (1, 1, 1)], ids=str)
def test_empty_and_single(shape: tuple[int, ...], device: torch.device) -> None:
    x = torch.randn(shape, device=device)
    for dims in ((0,), (0, 1), (2, 1), (0, 1, 2)):
        cells, grid = brt.annotate(x, dims)
        assert grid.restore(cells).shape == shape
        assert torch.equal(grid.restore(cells), x)


def test_other_layouts_and_dtypes(device: torch.device) -> None:
    for dtype in (*FLOATS, torch.int64, torch.bool):
        x = torch.randn(2, 3, 4, device=device).to(dtype).transpose(0, 2)
        cells, grid = brt.annotate(x, (1, 0))
        assert torch.equal(cells, plain_cells(x, (1, 0)))
        assert torch.equal(grid.restore(cells), x)


def test_gradient(device: torch.device) -> None:
    x = torch.randn(2, 3, 2, dtype=torch.float64, device=device, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        cells, grid = brt.annotate(x, (2, 0))
        return grid.restore(cells.sin())

    assert torch.autograd.gradcheck(run, (x,))


@pytest.mark.parametrize(
    ("dims", "shape", "message"),
    [
        ((3,), None, r"dim 3 of dims=\(3,\), but x has 3 dims"),
        ((-4,), None, "dim -4"),
        ((), None, "at least one dim, each once, got ()"),
        ((0, -3), None, r"each once, got \(0, -3\)"),
        ((0,), (5,), r"24 elements \[2, 3, 4\] do not divide into cells of \[5\]"),
        ((0,), (0,), "do not divide"),
        ((0,), (-1, 4), "do not divide"),
    ],
)
def test_bad_dims(dims: tuple[int, ...], shape: tuple[int, ...] | None, message: str) -> None:
    with pytest.raises(brt.RouteError, match=message):
        brt.annotate(torch.zeros(2, 3, 4), dims, shape)


def test_bad_rows() -> None:
    _, grid = brt.annotate(torch.zeros(2, 3, 4), (0, 1))
    with pytest.raises(brt.RouteError, match=r"6 cells, got rows of shape \[5, 4\].*result='all'"):
        grid.restore(torch.zeros(5, 4))
    with pytest.raises(brt.RouteError, match="restore\\(scale=2\\) is for grids of patches"):
        grid.restore(torch.zeros(6, 4), scale=2)
    with pytest.raises(brt.RouteError, match=r"got rows of shape \[\]"):
        grid.restore(torch.tensor(0.0))


# Patches of images


def plain_starts(full: int, size: int, stride: int) -> list[int]:
    starts = []
    start = 0
    while start + size < full:
        starts.append(start)
        start += stride
    return [*starts, full - size]


def plain_patches(x: Tensor, size: tuple[int, int], stride: tuple[int, int]) -> list[Tensor]:
    return [
        image[:, top : top + size[0], left : left + size[1]]
        for image in x
        for top in plain_starts(x.shape[2], size[0], stride[0])
        for left in plain_starts(x.shape[3], size[1], stride[1])
    ]


def plain_fold(
    rows: Tensor,
    shape: tuple[int, ...],
    size: tuple[int, int],
    stride: tuple[int, int],
    scale: int,
) -> Tensor:
    """The mean, pixel by pixel, of the patches that cover it."""
    total = torch.zeros(shape[0], rows.shape[1], shape[2] * scale, shape[3] * scale).double()
    count = torch.zeros_like(total)
    patches = iter(rows.double())
    for b in range(shape[0]):
        for top in plain_starts(shape[2], size[0], stride[0]):
            for left in plain_starts(shape[3], size[1], stride[1]):
                y = slice(top * scale, (top + size[0]) * scale)
                x = slice(left * scale, (left + size[1]) * scale)
                total[b, :, y, x] += next(patches)
                count[b, :, y, x] += 1
    return total / count


PATCHES = [
    ((2, 3, 8, 8), 4, 4),  # side by side
    ((2, 3, 8, 8), 4, 2),  # regular overlap
    ((1, 3, 9, 7), 4, 4),  # odd: the last ones are moved inwards
    ((1, 2, 10, 11), 4, 3),
    ((1, 1, 13, 9), 5, 2),
    ((1, 1, 12, 6), 6, 1),  # up to six deep
    ((1, 1, 5, 5), 5, 5),  # one patch
    ((2, 1, 5, 6), 5, 1),
    ((1, 1, 7, 9), (3, 4), (2, 3)),
    ((0, 3, 8, 8), 4, 4),
    ((1, 0, 8, 8), 4, 3),
    ((1, 1, 6, 6), 4, 4),  # two columns, moved
]


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize(("shape", "size", "stride"), PATCHES, ids=str)
def test_patches(
    shape: tuple[int, ...],
    size: int | tuple[int, int],
    stride: int | tuple[int, int],
    scale: int,
    device: torch.device,
) -> None:
    x = torch.randn(shape, device=device)
    cells, grid = brt.annotate_patches(x, size, stride)
    sizes = (size, size) if isinstance(size, int) else size
    strides = (stride, stride) if isinstance(stride, int) else stride
    wanted = plain_patches(x, sizes, strides)
    assert cells.shape == (len(wanted), shape[1], *sizes)
    assert grid.cells.root.num_cells == len(wanted)
    if wanted:
        assert torch.equal(cells, torch.stack(wanted))
    torch.testing.assert_close(grid.restore(cells), x)  # a mean of equals, whatever the overlap
    rows = torch.randn(len(wanted), 2, sizes[0] * scale, sizes[1] * scale, device=device)
    came = grid.restore(rows, scale)
    assert came.shape == (shape[0], 2, shape[2] * scale, shape[3] * scale)
    torch.testing.assert_close(
        came.cpu(), plain_fold(rows.cpu(), shape, sizes, strides, scale).float()
    )


def test_patches_of_views_and_channels_last(device: torch.device) -> None:
    x = torch.randn(2, 3, 9, 8, device=device)
    for other in (x.contiguous(memory_format=torch.channels_last), x.flip(0).flip(0)):
        cells, grid = brt.annotate_patches(other, 4, 3)
        assert torch.equal(cells, brt.annotate_patches(x, 4, 3)[0])
        torch.testing.assert_close(grid.restore(cells), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_means_of_half_precision_run_in_float32(dtype: torch.dtype, device: torch.device) -> None:
    rows = torch.rand(9, 1, 4, 4).to(device, dtype)
    _, grid = brt.annotate_patches(torch.zeros(1, 1, 6, 6, device=device), 4, 1)
    came = grid.restore(rows)
    wanted = plain_fold(rows.cpu(), (1, 1, 6, 6), (4, 4), (1, 1), 1)
    assert came.dtype == dtype
    assert torch.equal(came.cpu(), wanted.to(dtype))


def test_integers_are_folded_where_nothing_overlaps(device: torch.device) -> None:
    x = torch.randint(0, 255, (1, 3, 8, 8), device=device).to(torch.uint8)
    cells, grid = brt.annotate_patches(x, 4, 4)
    assert torch.equal(grid.restore(cells), x)
    cells, grid = brt.annotate_patches(x, 4, 2)
    with pytest.raises(brt.RouteError, match=r"give floats, not torch.uint8"):
        grid.restore(cells)


def test_folding_is_deterministic(device: torch.device) -> None:
    x = torch.randn(1, 3, 33, 40, device=device)
    rows, grid = brt.annotate_patches(x, 8, 3)
    rows = torch.randn_like(rows).requires_grad_()
    results = []
    for _ in range(3):
        rows.grad = None
        out = grid.restore(rows)
        out.square().sum().backward()
        results.append((out.detach(), rows.grad))
    for out, grad in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize(("size", "stride"), [(2, 2), (3, 2), (3, 1)])
def test_gradient_of_patches(size: int, stride: int, device: torch.device) -> None:
    x = torch.randn(1, 1, 6, 5, dtype=torch.float64, device=device, requires_grad=True)

    def cut(x: Tensor) -> Tensor:
        return brt.annotate_patches(x, size, stride)[0]

    cells, grid = brt.annotate_patches(x, size, stride)
    assert torch.autograd.gradcheck(cut, (x,))
    rows = torch.randn(cells.shape[0], 1, 2 * size, 2 * size, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(lambda r: grid.restore(r, 2), (rows.requires_grad_(),))


def test_patches_compile(device: torch.device) -> None:
    def run(x: Tensor) -> Tensor:
        cells, grid = brt.annotate_patches(x, 5, 3)
        return grid.restore(cells.repeat_interleave(2, 2).repeat_interleave(2, 3), scale=2)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for shape in ((1, 3, 11, 12), (2, 3, 11, 12), (3, 3, 9, 5)):
        x = torch.randn(shape, device=device)
        torch.testing.assert_close(compiled(x), run(x))


@pytest.mark.parametrize(
    ("shape", "size", "stride", "message"),
    [
        ((3, 8, 8), 4, 4, r"x must be \[B, C, H, W\], got \[3, 8, 8\]"),
        ((1, 3, 8, 8), 4, 5, "stride must be from 1 to size, got stride 5, size 4"),
        ((1, 3, 8, 8), 4, 0, "got stride 0"),
        ((1, 3, 8, 3), 4, 4, r"width 3 is less than a patch \(4\); pad the image"),
        ((1, 3, 2, 8), 4, 4, "height 2 is less"),
    ],
)
def test_bad_patches(shape: tuple[int, ...], size: int, stride: int, message: str) -> None:
    with pytest.raises(brt.RouteError, match=message):
        brt.annotate_patches(torch.zeros(shape), size, stride)


def test_bad_patch_rows() -> None:
    _, grid = brt.annotate_patches(torch.zeros(1, 3, 8, 8), 4, 4)
    with pytest.raises(brt.RouteError, match=r"expected rows \[4, C, 8, 8\], got \[4, 3, 4, 4\]"):
        grid.restore(torch.zeros(4, 3, 4, 4), scale=2)
    with pytest.raises(brt.RouteError, match="scale must be at least 1, got 0"):
        grid.restore(torch.zeros(4, 3, 4, 4), scale=0)
