"""Kernels that write to, and read from, the memory of other GPUs.

Legend: N cells, K choices per cell, W ranks, S slots of experts (W * G), D features, Q rows of a
buffer.
"""

# No postponed annotations here: Triton reads them. mypy does not see what its decorator makes.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def tell_counts(count_S, address_W, rank, num_slots, BLOCK: tl.constexpr):
    """One program a rank: this rank's counts become row `rank` of its table ``[W, S]``."""
    table = tl.load(address_W + tl.program_id(0)).to(tl.pointer_type(tl.int64))
    slot = tl.arange(0, BLOCK)
    there = slot < num_slots
    tl.store(table + rank * num_slots + slot, tl.load(count_S + slot, mask=there), mask=there)


@triton.jit
def push_rows(
    x_ND,
    rank_NK,  # whose memory a choice's row goes to
    place_NK,  # its row there; -1 = none
    address_W,
    num_choices,
    dim,
    stride,
    BLOCK: tl.constexpr,
):
    """One program a choice: a cell's features go to a row of a rank's buffer ``[Q, D]``."""
    choice = tl.program_id(0).to(tl.int64)
    place = tl.load(place_NK + choice)
    if place >= 0:
        address = tl.load(address_W + tl.load(rank_NK + choice))
        row = address.to(tl.pointer_type(x_ND.dtype.element_ty)) + place * dim
        cell = x_ND + (choice // num_choices) * stride
        for begin in range(0, dim, BLOCK):
            d = begin + tl.arange(0, BLOCK)
            tl.store(row + d, tl.load(cell + d, mask=d < dim), mask=d < dim)


@triton.jit
def pull_rows(
    out_ND,
    weight_NK,
    rank_NK,
    place_NK,
    address_W,
    num_choices,
    dim,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for a cell's BLOCK features: the sum of its weighted rows in ranks' buffers."""
    cell = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(0, num_choices):
        choice = cell * num_choices + k
        place = tl.load(place_NK + choice)
        if place >= 0:
            address = tl.load(address_W + tl.load(rank_NK + choice))
            row = address.to(tl.pointer_type(out_ND.dtype.element_ty)) + place * dim
            value = tl.load(row + d, mask=d < dim, other=0.0).to(tl.float32)
            if WEIGHTED:
                value *= tl.load(weight_NK + choice).to(tl.float32)
            total += value
    tl.store(out_ND + cell * dim + d, total.to(out_ND.dtype.element_ty), mask=d < dim)
