"""An expert MLP for one cell: weights go from memory to sums, without tiles or tensor cores.

Legend: P paths, R rows, C choices of the cell (a power of two, at least K), D model and H hidden
features, K features of a step.
"""

# No postponed annotations here: Triton reads them. mypy does not see what its decorator makes.
# mypy: ignore-errors

import triton
import triton.language as tl

from brt_kernels.triton.grouped_gemm import activate_in_registers
from brt_kernels.triton.tell import tell, tell_offsets


@triton.jit
def one_cell_up(
    x,  # [D]
    cell_R,
    offsets_P1,
    up_PHD,
    bias_PH,
    hidden_RH,
    errors,  # address of the word that a bad index is told to
    num_paths,
    num_in,
    num_hidden,
    num_rows,
    TELL_OFFSETS: tl.constexpr,  # what bad ones are told as; 0: they are not looked for
    TELL_CELLS: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PATHS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Hidden features of one row: as many as a program takes."""
    if FIRST:
        # Whatever ran before is done; then the kernel below may start to fetch its weights
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(1)
    cell = tl.load(cell_R + row)
    p = tl.arange(0, PATHS)
    end_P = tl.load(offsets_P1 + 1 + p, mask=p < num_paths, other=2147483647)
    path = tl.sum((end_P <= row).to(tl.int32), 0)
    first = tl.program_id(0) == 0
    bad_cell = first & (path < num_paths) & ((cell < -1) | (cell > 0))
    if TELL_OFFSETS > 0:
        tell_offsets(
            errors, TELL_OFFSETS, offsets_P1, num_rows, num_paths, first & (row == 0), PATHS
        )
    if TELL_CELLS > 0:
        tell(errors, TELL_CELLS, bad_cell, cell, 1, row)
    if (path < num_paths) & (cell == 0):
        h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
        here = h < num_hidden
        k = tl.arange(0, BLOCK_K)
        first_h = path * (2 * num_hidden if GATED else num_hidden)
        from_H = up_PHD + (first_h + h).to(tl.int64) * num_in
        from_up_H = from_H + num_hidden.to(tl.int64) * num_in
        sums = tl.zeros((BLOCK_H, BLOCK_K), tl.float32)
        sums_up = sums
        for k0 in tl.range(0, num_in, BLOCK_K, num_stages=STAGES):
            mask = here[:, None] & (k0 + k < num_in)[None, :]
            w = tl.load(from_H[:, None] + (k0 + k)[None, :], mask=mask, other=0.0)
            x_K = tl.load(x + k0 + k, mask=k0 + k < num_in, other=0.0).to(tl.float32)
            sums += w.to(tl.float32) * x_K[None, :]
            if GATED:
                u = tl.load(from_up_H[:, None] + (k0 + k)[None, :], mask=mask, other=0.0)
                sums_up += u.to(tl.float32) * x_K[None, :]
        made = tl.sum(sums, 1)
        if BIAS:
            made += tl.load(bias_PH + first_h + h, mask=here, other=0.0).to(tl.float32)
        if GATED:
            up = tl.sum(sums_up, 1)
            if BIAS:
                bias = tl.load(bias_PH + first_h + num_hidden + h, mask=here, other=0.0)
                up += bias.to(tl.float32)
            made = made * tl.sigmoid(made) * up
        else:
            made = activate_in_registers(made, ACT)
        to = hidden_RH + row.to(tl.int64) * num_hidden + h
        tl.store(to, made.to(hidden_RH.dtype.element_ty), mask=here)


@triton.jit
def _prefetch(at):
    # Into the L2 cache, a line of 128 bytes each; nothing comes of it
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
        "=r,l",
        [at.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def one_cell_down(
    hidden_RH,
    row_K,
    offsets_P1,
    weight_R,
    down_PDH,
    bias_PD,
    out,  # [D]
    errors,
    num_rows,
    num_paths,
    num_hidden,
    num_out,
    num_choices,
    TELL_ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHOICES: tl.constexpr,
    STAGES: tl.constexpr,
    PATHS: tl.constexpr,
    LINES: tl.constexpr,  # of 64 features, a power of two: fetched before the wait
    SECOND: tl.constexpr,
):
    """The cell's result: all its choices at once, so that nothing is left to sum."""
    if SECOND:
        tl.extra.cuda.gdc_launch_dependents()
    # 1. Where the choices lie
    c = tl.arange(0, CHOICES)
    row = tl.load(row_K + c, mask=c < num_choices, other=-1)
    bad_row = ((row < -1) | (row >= num_rows)) & (tl.program_id(0) == 0)
    if TELL_ROWS > 0:
        tell(errors, TELL_ROWS, bad_row, row, num_rows, c)
    p = tl.arange(0, PATHS)
    end_P = tl.load(offsets_P1 + 1 + p, mask=p < num_paths, other=2147483647)
    path = tl.sum((end_P[None, :] <= row[:, None]).to(tl.int32), 1)
    there = (row >= 0) & (row < num_rows) & (path < num_paths)
    row = tl.where(there, row, 0)
    path = tl.where(there, path, 0)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    here_DC = (d < num_out)[:, None] & there[None, :]
    from_DC = down_PDH + (path[None, :] * num_out + d[:, None]).to(tl.int64) * num_hidden

    # 2. Weights on their way while the kernel above ends
    if SECOND:
        line = tl.minimum(tl.arange(0, LINES) * 64, num_hidden - 1)
        safe_DC = tl.where(here_DC, from_DC, down_PDH)
        _prefetch(safe_DC[:, :, None] + line[None, None, :])
        tl.extra.cuda.gdc_wait()

    # 3. Sum over hidden features, then over choices
    k = tl.arange(0, BLOCK_K)
    from_row = hidden_RH + row.to(tl.int64) * num_hidden
    sums = tl.zeros((BLOCK_D, CHOICES, BLOCK_K), tl.float32)
    for k0 in tl.range(0, num_hidden, BLOCK_K, num_stages=STAGES):
        inside = k0 + k < num_hidden
        w = tl.load(
            from_DC[:, :, None] + (k0 + k)[None, None, :],
            mask=here_DC[:, :, None] & inside[None, None, :],
            other=0.0,
        )
        h = tl.load(
            from_row[:, None] + (k0 + k)[None, :],
            mask=there[:, None] & inside[None, :],
            other=0.0,
        )
        sums += w.to(tl.float32) * h.to(tl.float32)[None, :, :]
    made_DC = tl.sum(sums, 2)
    if BIAS:
        bias = tl.load(bias_PD + path[None, :] * num_out + d[:, None], mask=here_DC, other=0.0)
        made_DC += bias.to(tl.float32)
    if WEIGHTED:
        weight = tl.load(weight_R + row, mask=there, other=0.0)
        made_DC *= weight.to(tl.float32)[None, :]
    made = tl.sum(tl.where(here_DC, made_DC, 0.0), 1)
    tl.store(out + d, made.to(out.dtype.element_ty), mask=d < num_out)
