"""Rows of each path times its weight, in Triton.

A program walks over tiles, all of the same cost; which path a tile belongs to it reads off the
offsets on the device. Tiles of rows that share a tile of weights follow one another.

Legend: R rows, P paths, M N K sizes of a tile: rows, features out, features in; X rows of x.
"""

# No postponed annotations here: Triton reads them. mypy does not see what its decorator makes.
# mypy: ignore-errors

import triton
import triton.language as tl

from brt_kernels.triton.tell import tell, tell_offsets


@triton.jit
def activate_in_registers(x, ACT: tl.constexpr):
    """An activation by its name."""
    if ACT == "relu":
        x = tl.where(x < 0, 0.0, x)  # NaN stays
    if ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACT == "gelu_tanh":
        # tanh(u) = 2 sigmoid(2 u) - 1
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if ACT == "silu":
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def span(offsets_P1, p, num_rows, mask):
    """First row of a path, and the row after its last."""
    begin = tl.load(offsets_P1 + p, mask=mask, other=0)
    end = tl.load(offsets_P1 + p + 1, mask=mask, other=0)
    # Whatever the offsets say, no row outside is touched
    begin = tl.minimum(tl.maximum(begin, 0), num_rows).to(tl.int32)
    end = tl.minimum(tl.maximum(end, begin), num_rows).to(tl.int32)
    return begin, end


@triton.jit
def _tiles_before(offsets_P1, num_rows, num_paths, BLOCK_M: tl.constexpr, PATHS: tl.constexpr):
    """Number of tiles of rows of each path and of those before it."""
    p = tl.arange(0, PATHS)
    begin, end = span(offsets_P1, p, num_rows, p < num_paths)
    return tl.cumsum((end - begin + BLOCK_M - 1) // BLOCK_M, 0)


@triton.jit
def _find_tile(
    t, upto_P, offsets_P1, num_rows, num_tiles_n, BLOCK_M: tl.constexpr, GROUP_M: tl.constexpr
):
    """Path, rows and number of the tile of features of tile `t`."""
    done_P = upto_P * num_tiles_n <= t
    path = tl.sum(done_P.to(tl.int32), 0)
    before = tl.max(tl.where(done_P, upto_P, 0), 0)
    begin, end = span(offsets_P1, path, num_rows, True)
    num_tiles_m = (end - begin + BLOCK_M - 1) // BLOCK_M
    local = t - before * num_tiles_n
    group = local // (GROUP_M * num_tiles_n)
    first_m = group * GROUP_M
    width = tl.minimum(num_tiles_m - first_m, GROUP_M)
    local -= group * (GROUP_M * num_tiles_n)
    return path, begin + (first_m + local % width) * BLOCK_M, end, local // width


@triton.jit
def _zero_cells(
    out,
    row_NK,
    errors,
    num_cells,
    num_rows,
    num_out,
    TELL_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Zeros for the cells without a row; of one choice a cell."""
    start = tl.program_id(0) * BLOCK
    for n0 in range(start, num_cells, tl.num_programs(0) * BLOCK):
        n = n0 + tl.arange(0, BLOCK)
        row = tl.load(row_NK + n, mask=n < num_cells, other=0)
        none = (n < num_cells) & ((row < 0) | (row >= num_rows))
        if TELL_ROWS > 0:
            tell(errors, TELL_ROWS, none & (row != -1), row, num_rows, n)
        if tl.max(none.to(tl.int32), 0) > 0:
            to = out + n.to(tl.int64) * num_out
            for o0 in range(0, num_out, 64):
                o = o0 + tl.arange(0, 64)
                zero = tl.zeros((BLOCK, 64), out.dtype.element_ty)
                tl.store(to[:, None] + o[None, :], zero, mask=none[:, None] & (o < num_out)[None])


@triton.jit
def _tile(  # noqa: C901 (every branch is taken while compiling)
    x,
    cell_R,
    weight,
    bias_PO,
    out,
    weight_R,
    errors,
    num_x,
    num_in,
    num_out,
    x_stride,
    path,
    first_row,
    end,
    n0,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SWAP: tl.constexpr,
    HALVES: tl.constexpr,  # a tile leaves in two halves
    EVEN_K: tl.constexpr,
    TELL_CELLS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # 1. Which rows
    row = first_row + tl.arange(0, BLOCK_M)
    weight_row = path * (2 * num_out if GATED else num_out) + n0
    if GATHER:
        cell = tl.load(cell_R + row, mask=row < end, other=-1)
        there = (cell >= 0) & (cell < num_x)
        if TELL_CELLS > 0:
            bad = (row < end) & (cell != -1) & (there == 0) & (n0 == 0)
            tell(errors, TELL_CELLS, bad, cell, num_x, row)
        from_row = x + tl.where(there, cell, 0).to(tl.int64) * x_stride

    # 2. Sum over features in
    if SWAP:
        sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    sums_up = sums
    for k0 in range(0, num_in, BLOCK_K):
        if GATHER:
            k = k0 + tl.arange(0, BLOCK_K)
            if EVEN_K:
                x_MK = tl.load(from_row[:, None] + k[None, :], mask=there[:, None], other=0.0)
            else:
                here = there[:, None] & (k < num_in)[None, :]
                x_MK = tl.load(from_row[:, None] + k[None, :], mask=here, other=0.0)
        else:
            x_MK = x.load([first_row, k0])
        if TRANSPOSED:
            w_NK = weight.load([path * num_in + k0, n0]).T
        else:
            w_NK = weight.load([weight_row, k0])
        sums = tl.dot(w_NK, x_MK.T, sums) if SWAP else tl.dot(x_MK, w_NK.T, sums)
        if GATED:
            up_NK = weight.load([weight_row + num_out, k0])
            sums_up = tl.dot(up_NK, x_MK.T, sums_up) if SWAP else tl.dot(x_MK, up_NK.T, sums_up)

    # 3. Bias, activation, weight of the row
    if SWAP:
        sums = sums.T
        sums_up = sums_up.T
    n = n0 + tl.arange(0, BLOCK_N)
    if BIAS:
        if GATED:
            at = bias_PO + path * (2 * num_out) + n
            sums += tl.load(at, mask=n < num_out, other=0.0).to(tl.float32)[None, :]
            up = tl.load(at + num_out, mask=n < num_out, other=0.0)
            sums_up += up.to(tl.float32)[None, :]
        else:
            bias = tl.load(bias_PO + path * num_out + n, mask=n < num_out, other=0.0)
            sums += bias.to(tl.float32)[None, :]
    sums = sums * tl.sigmoid(sums) * sums_up if GATED else activate_in_registers(sums, ACT)
    there_M = row < end
    to_row = row
    if SCATTER:
        to_row = tl.load(cell_R + row, mask=there_M, other=-1)
        there_M = (to_row >= 0) & (to_row < num_x)
        if WEIGHTED:
            row_weight = tl.load(weight_R + row, mask=there_M, other=0.0)
            sums = sums * row_weight.to(tl.float32)[:, None]
    to_M = out + to_row.to(tl.int64) * num_out
    made = sums.to(out.dtype.element_ty)
    if HALVES:
        # Half the room in shared memory on the way out: that room buys a stage of the pipeline
        halves = tl.permute(tl.reshape(made, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        n = n0 + tl.arange(0, BLOCK_N // 2)
        tl.store(to_M[:, None] + n[None, :], left, mask=there_M[:, None] & (n < num_out)[None, :])
        n += BLOCK_N // 2
        tl.store(to_M[:, None] + n[None, :], right, mask=there_M[:, None] & (n < num_out)[None, :])
    else:
        tl.store(to_M[:, None] + n[None, :], made, mask=there_M[:, None] & (n < num_out)[None, :])


@triton.jit
def grouped_gemm(
    x,  # [X, I]; a descriptor of boxes [M, K] unless GATHER
    cell_R,  # the row of x of each row
    offsets_P1,
    weight,  # descriptor of [P * O, I], boxes [N, K]; TRANSPOSED of [P * I, O], boxes [K, N]
    bias_PO,
    out,  # [R, O]; SCATTER [X, O]
    weight_R,
    row_NK,
    errors,  # address of the word that a bad index is told to
    num_x,
    num_rows,
    num_paths,
    num_in,
    num_out,
    x_stride,
    ACT: tl.constexpr,
    GATED: tl.constexpr,  # weight has twice the features out: silu(gate) times the rest
    BIAS: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,  # results go to their cells, times the weight of the row
    WEIGHTED: tl.constexpr,
    ZERO_REST: tl.constexpr,  # rows past the last offset become zeros
    TRANSPOSED: tl.constexpr,
    SWAP: tl.constexpr,
    HALVES: tl.constexpr,  # a tile leaves in two halves
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PATHS: tl.constexpr,  # a power of two, at least P
    FLATTEN: tl.constexpr,
    TELL_OFFSETS: tl.constexpr,  # what bad ones are told as; 0: they are not looked for
    TELL_CELLS: tl.constexpr,
    TELL_ROWS: tl.constexpr,
    FIRST: tl.constexpr,  # another kernel of ours follows and may start early
    SECOND: tl.constexpr,  # x comes from the kernel before
):
    """Every tile of rows of every path times its weight."""
    if FIRST:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_tiles_n = (num_out + BLOCK_N - 1) // BLOCK_N
    upto_P = _tiles_before(offsets_P1, num_rows, num_paths, BLOCK_M, PATHS)
    num_tiles = tl.max(upto_P, 0) * num_tiles_n
    if SCATTER:
        _zero_cells(out, row_NK, errors, num_x, num_rows, num_out, TELL_ROWS, BLOCK=64)
    if TELL_OFFSETS > 0:
        first = tl.program_id(0) == 0
        tell_offsets(errors, TELL_OFFSETS, offsets_P1, num_rows, num_paths, first, PATHS)
    if SECOND:
        tl.extra.cuda.gdc_wait()

    for t in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        path, first_row, end, n_idx = _find_tile(
            t, upto_P, offsets_P1, num_rows, num_tiles_n, BLOCK_M, GROUP_M
        )
        n0 = n_idx * BLOCK_N
        _tile(
            x, cell_R, weight, bias_PO, out, weight_R, errors, num_x, num_in, num_out, x_stride,
            path, first_row, end, n0, ACT, GATED, BIAS, GATHER, SCATTER, WEIGHTED, TRANSPOSED,
            SWAP, HALVES, EVEN_K, TELL_CELLS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip

    if ZERO_REST:
        last = tl.load(offsets_P1 + num_paths)
        last = tl.minimum(tl.maximum(last, 0), num_rows).to(tl.int32)
        num_rest = (num_rows - last + BLOCK_M - 1) // BLOCK_M * num_tiles_n
        zero = tl.zeros((BLOCK_M, BLOCK_N), out.dtype.element_ty)
        for t in range(tl.program_id(0), num_rest, tl.num_programs(0)):
            row = last + t // num_tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
            n = t % num_tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
            to = out + row.to(tl.int64)[:, None] * num_out + n[None, :]
            tl.store(to, zero, mask=(row < num_rows)[:, None] & (n < num_out)[None, :])
