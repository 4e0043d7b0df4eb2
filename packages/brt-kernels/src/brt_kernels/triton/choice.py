"""What the Triton kernels take, and about how long: asked at every call, so it imports no Triton.

Legend: N cells, R rows, P paths, I O D H features.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_DTYPES = (torch.float16, torch.bfloat16)
_INDICES = (torch.int32, torch.int64)
_MOST_PATHS = 4096
_MOST_ROWS = 1 << 30  # row numbers are 32 bits wide
_PIECE = 8  # features in 16 bytes
_TRANSPOSED_PIECE = 32

# For the choice, in the terms that other kernels use: on an H200 these are the fastest in all cases
# of benchmarks/expert_mlp_gpu.py. Triton's launch costs the host more than that of a C++ operator,
# so what is computed in no time is left to those.
_LINEAR_US = 19.0
_MLP_US = 60.0
_SMALL_US = 30.0
_SMALL_FEATURES = 1 << 16  # weights a path
_FLOPS_PER_US = 5.5e8
# Not measured against torch's: only where that refuses
_OUTER_US = 30.0
_OUTER_FLOPS_PER_US = 1.8e8


def installed() -> bool:
    """Whether Triton is there; it is not imported."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def _refuses(x: Tensor, indices: Iterable[Tensor], num_paths: int, num_rows: int) -> str | None:
    if x.dtype not in _DTYPES:
        return f"takes float16 and bfloat16, not {x.dtype}"
    for index in indices:
        if index.dtype not in _INDICES:
            return f"takes int32 and int64 indices, not {index.dtype}"
    if not 1 <= num_paths <= _MOST_PATHS or not 1 <= num_rows <= _MOST_ROWS:
        return f"takes 1 to {_MOST_PATHS} paths and 1 to {_MOST_ROWS} rows"
    if not _is_hopper(x.device):
        return "its tiles are for compute capability 9.0"
    return None


def _weight_refuses(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool = False
) -> str | None:
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        return "takes one dtype"
    _, num_out, num_in = weight.shape
    if weight.data_ptr() % 16 or num_in % _PIECE or num_in == 0:
        return f"takes features in of a multiple of {_PIECE}, at 16 bytes"
    if weight.is_contiguous():
        return None
    if not transposed or not weight.transpose(1, 2).is_contiguous():
        return "takes contiguous weights"
    if num_in % _TRANSPOSED_PIECE or num_out % _PIECE:
        return f"takes transposed weights of {_TRANSPOSED_PIECE} a and {_PIECE} b features"
    return None


def linear_refuses(
    x_RI: Tensor, offsets_P1: Tensor, weight_POI: Tensor, bias_PO: Tensor | None, _: str
) -> str | None:
    """Why `grouped_linear` does not take these arguments."""
    return _refuses(x_RI, (offsets_P1,), weight_POI.shape[0], x_RI.shape[0]) or _weight_refuses(
        x_RI, weight_POI, bias_PO, transposed=True
    )


def outer_refuses(y_RO: Tensor, x_RI: Tensor, offsets_P1: Tensor) -> str | None:
    """Why `grouped_outer` does not take these arguments."""
    if y_RO.dtype != x_RI.dtype:
        return "takes one dtype"
    if y_RO.shape[1] % _PIECE or x_RI.shape[1] % _PIECE or 0 in (*y_RO.shape, *x_RI.shape):
        return f"takes features of a multiple of {_PIECE}"
    return _refuses(x_RI, (offsets_P1,), offsets_P1.shape[0] - 1, x_RI.shape[0])


def mlp_refuses(*args: Any) -> str | None:
    """Why `expert_mlp` does not take these arguments."""
    x_ND, cell_R, row_NK, offsets_P1, weight_R, up, up_bias, down, down_bias, _ = args
    if weight_R is not None and not weight_R.is_floating_point():
        return f"takes weights of rows in floats, not {weight_R.dtype}"
    return (
        _refuses(x_ND, (cell_R, row_NK, offsets_P1), up.shape[0], max(1, cell_R.shape[0]))
        or _weight_refuses(x_ND, up, up_bias)
        or _weight_refuses(x_ND, down, down_bias)
    )


def _estimate(launch_us: float, num_rows: int, num_features: int) -> float:
    small_us = _SMALL_US if num_features < _SMALL_FEATURES else 0.0
    return launch_us + small_us + 2 * num_rows * num_features / _FLOPS_PER_US


def linear_us(x_RI: Tensor, offsets_P1: Tensor, weight_POI: Tensor, *_: Any) -> float:
    """About how long `grouped_linear` takes."""
    return _estimate(_LINEAR_US, x_RI.shape[0], weight_POI.shape[1] * weight_POI.shape[2])


def outer_us(y_RO: Tensor, x_RI: Tensor, offsets_P1: Tensor) -> float:
    """About how long `grouped_outer` takes."""
    flops = 2 * x_RI.shape[0] * y_RO.shape[1] * x_RI.shape[1]
    return _OUTER_US + flops / _OUTER_FLOPS_PER_US


def mlp_us(*args: Any) -> float:
    """About how long `expert_mlp` takes."""
    up, down = args[5], args[7]
    features = up.shape[1] * up.shape[2] + down.shape[1] * down.shape[2]
    return _estimate(_MLP_US, args[1].shape[0], features)
