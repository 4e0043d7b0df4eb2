"""The host's side of a grouped product: descriptors, grid and launch.

Legend: R rows, P paths, I features in, O features out, X rows of x.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from brt_kernels.triton.grouped_gemm import grouped_gemm
from brt_kernels.triton.tells import NOTHING, Tells, error_word
from brt_kernels.triton.tiles import Tile, power_of_two


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a device; 4 where Triton interprets on the CPU."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it that of ``x``."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def early(x: Tensor) -> bool:
    """Whether one kernel can start before the one that it depends on has ended."""
    return x.device.type == "cuda"


def boxes(x: Tensor, *block: int) -> TensorDescriptor:
    """A descriptor of a matrix whose rows are dense, fetched in boxes of this size."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def boxable(x: Tensor) -> Tensor:
    """``x``, or a copy whose rows start at multiples of 16 bytes."""
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def product(
    x: Tensor,
    cell_R: Tensor | None,
    offsets_P1: Tensor,
    weight_POI: Tensor,
    bias_PO: Tensor | None,
    out: Tensor,
    tile: Tile,
    activation: str,
    *,
    num_rows: int,
    to_cells: tuple[Tensor, Tensor, Tensor | None] | None = None,
    zero_rest: bool = False,
    first: bool = False,
    second: bool = False,
    tells: Tells = NOTHING,
) -> None:
    """``out[r] = act(weight[p] @ x[cell[r]] + bias[p])`` for the rows r of every path p.

    ``to_cells`` (cell_R, row_N1, weight_R) sends results to their cells, weighted. ``first`` and
    ``second`` mark two launches, each of which may start before what precedes it has ended.
    """
    gated = activation == "swiglu"
    num_paths, weight_rows, num_in = weight_POI.shape
    num_out = weight_rows // 2 if gated else weight_rows
    transposed = weight_POI.stride(2) != 1
    if transposed:
        flat = weight_POI.transpose(1, 2).view(num_paths * num_in, weight_rows)
        weight = boxes(flat, tile.block_k, tile.block_n)
    else:
        weight = boxes(weight_POI.view(num_paths * weight_rows, num_in), tile.block_n, tile.block_k)
    most_tiles = (num_rows // tile.block_m + min(num_paths, num_rows) + 1) * triton.cdiv(
        num_out, tile.block_n
    )
    gather = cell_R is not None
    to_cell_R, row_NK, weight_R = to_cells or (cell_R, None, None)
    grouped_gemm[(min(num_sms(x.device) * tile.programs_per_sm, most_tiles),)](
        x if gather else boxes(x, tile.block_m, tile.block_k),
        cell_R if to_cells is None else to_cell_R,
        offsets_P1,
        weight,
        bias_PO,
        out,
        weight_R,
        row_NK,
        error_word(x.device),
        out.shape[0] if to_cells is not None else x.shape[0],
        num_rows,
        num_paths,
        num_in,
        num_out,
        x.stride(0),
        ACT="none" if gated else activation,
        GATED=gated,
        BIAS=bias_PO is not None,
        GATHER=gather,
        SCATTER=to_cells is not None,
        WEIGHTED=weight_R is not None,
        ZERO_REST=zero_rest,
        TRANSPOSED=transposed,
        SWAP=tile.swap,
        HALVES=tile.halves,
        EVEN_K=num_in % tile.block_k == 0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GROUP_M=tile.group_m,
        PATHS=max(16, power_of_two(num_paths)),
        FLATTEN=tile.flatten,
        TELL_OFFSETS=tells.offsets,
        TELL_CELLS=tells.cells,
        TELL_ROWS=tells.rows,
        FIRST=first,
        SECOND=second,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **({"launch_pdl": True} if first or second else {}),
    )
