"""A call of every operator at sizes that a user gives, for `brt ops --explain`.

Legend: N cells, P paths, K choices per cell, R rows, D cell width, H hidden width; of patches C
channels, H and W pixels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from brt.conv_steps import ConvStep, flatten_branches
from brt.errors import BrtError
from brt.path_conv import PathConv

# What a convolutional branch is shown with: cells are patches of this size.
PIXELS, CHANNELS = 32, 16
CONV = PathConv(padding=1)


def sample_calls(
    cells: int, paths: int, k: int, dim: int, hidden: int, dtype: str, device: str
) -> dict[str, tuple[Any, ...]]:
    """Operator -> its arguments, cells spread evenly at random over the paths."""
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
        raise BrtError(f"--dtype must be a float type of torch (float32, bfloat16), got {dtype!r}")
    if not 0 < k <= paths:
        raise BrtError(f"--k must be between 1 and --paths {paths}, got {k}")
    at = _device(device)

    scores_NP = torch.rand(cells, paths, device=at)
    choice_NK = scores_NP.topk(k, dim=-1).indices
    mask_NP = torch.zeros_like(scores_NP, dtype=torch.bool).scatter_(1, choice_NK, True)
    settings = (None, None, 0, 1)
    cell_R, _, row_NK, offsets_P1 = torch.ops.brt.route(choice_NK, paths, *settings)
    num_rows = cell_R.shape[0]
    weight_R = torch.rand(num_rows, device=at)

    def floats(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=kind, device=at)

    x_ND, rows_RD, rows_RH = floats(cells, dim), floats(num_rows, dim), floats(num_rows, hidden)
    patches_RCHW = floats(num_rows, 3, PIXELS, PIXELS)
    first, block = floats(CHANNELS, 3, 3, 3), floats(CHANNELS, CHANNELS, 3, 3)
    # Of every path: a convolution, then a residual block.
    params = [weight for _ in range(paths) for weight in (first, block, block)]
    branches = [
        [
            ConvStep(src=0, dst=1, weight=3 * p),
            ConvStep(src=1, dst=2, weight=3 * p + 1, act=1),
            ConvStep(src=2, dst=3, weight=3 * p + 2, add=1),
        ]
        for p in range(paths)
    ]
    steps, scales, step_offsets_P1 = flatten_branches(branches)
    chain = (patches_RCHW, offsets_P1, params, steps, step_offsets_P1, scales)
    convolved_P = list(patches_RCHW.tensor_split(paths))
    up_PHD, down_PDH = floats(paths, hidden, dim), floats(paths, dim, hidden)
    return {
        "route": (choice_NK, paths, *settings),
        "route_mask": (mask_NP, *settings),
        "dispatch": (x_ND, cell_R, row_NK, None),
        "combine": (rows_RD, row_NK, cell_R, weight_R),
        "row_dot": (rows_RD, x_ND, cell_R, row_NK),
        "path_sizes": (offsets_P1,),
        "compact": (mask_NP[:, 0].contiguous(),),
        "grouped_linear": (rows_RD, offsets_P1, up_PHD, None, "gelu"),
        "grouped_outer": (rows_RH, rows_RD, offsets_P1),
        "grouped_conv2d": (convolved_P, [first] * paths, [], paths * list(CONV), "relu"),
        "conv_chain": chain,
        "conv_chain_backward": (floats(num_rows, CHANNELS, PIXELS, PIXELS), *chain),
        "expert_mlp": (
            *(x_ND, cell_R, row_NK, offsets_P1, weight_R),
            *(up_PHD, None, down_PDH, None, "gelu"),
        ),
    }


def _device(name: str) -> torch.device:
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BrtError(f"--device {name} cannot be used here: {reason}") from error
    return found
