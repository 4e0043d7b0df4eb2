"""The gradient of weights: for each path the product of its rows with its rows, in Triton.

Legend: R rows, P paths, O I features.
"""

# No postponed annotations here: Triton reads them. mypy does not see what its decorator makes.
# mypy: ignore-errors

import triton
import triton.language as tl

from brt_kernels.triton.grouped_gemm import span
from brt_kernels.triton.tell import tell_offsets


@triton.jit
def grouped_outer(
    y,  # descriptor of [R, O], boxes [R, O] of a step
    x,  # descriptor of [R, I]
    y_RO,
    x_RI,
    offsets_P1,
    out_POI,
    errors,
    num_rows,
    num_paths,
    num_out,
    num_in,
    y_stride,
    x_stride,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PATHS: tl.constexpr,
    TELL_OFFSETS: tl.constexpr,
):
    """For each path the sum over its rows of y times x, transposed."""
    if TELL_OFFSETS > 0:
        first = tl.program_id(0) == 0
        tell_offsets(errors, TELL_OFFSETS, offsets_P1, num_rows, num_paths, first, PATHS)
    num_tiles_o = (num_out + BLOCK_O - 1) // BLOCK_O
    num_tiles_i = (num_in + BLOCK_I - 1) // BLOCK_I
    num_tiles = num_tiles_o * num_tiles_i
    for t in range(tl.program_id(0), num_paths * num_tiles, tl.num_programs(0)):
        path = t // num_tiles
        o0 = t % num_tiles // num_tiles_i * BLOCK_O
        i0 = t % num_tiles_i * BLOCK_I
        begin, end = span(offsets_P1, path, num_rows, True)
        whole = begin + (end - begin) // BLOCK_R * BLOCK_R
        sums = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        for r0 in range(begin, whole, BLOCK_R):
            sums = tl.dot(y.load([r0, o0]).T, x.load([r0, i0]), sums)
        o = o0 + tl.arange(0, BLOCK_O)
        i = i0 + tl.arange(0, BLOCK_I)
        if whole < end:
            # A box would bring rows of the next path
            row = whole + tl.arange(0, BLOCK_R)
            here = (row < end)[:, None]
            at = row.to(tl.int64)[:, None]
            y_RO_tile = tl.load(
                y_RO + at * y_stride + o[None, :], mask=here & (o < num_out)[None, :], other=0.0
            )
            x_RI_tile = tl.load(
                x_RI + at * x_stride + i[None, :], mask=here & (i < num_in)[None, :], other=0.0
            )
            sums = tl.dot(y_RO_tile.T, x_RI_tile, sums)
        to = out_POI + (path.to(tl.int64) * num_out + o)[:, None] * num_in + i[None, :]
        made = sums.to(out_POI.dtype.element_ty)
        tl.store(to, made, mask=(o < num_out)[:, None] & (i < num_in)[None, :])
