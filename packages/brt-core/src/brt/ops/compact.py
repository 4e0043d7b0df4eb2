"""`compact`: which cells go on.

Legend: N cells.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brt.errors import RouteError
from brt.ops.registry import Operator

_COMPACT = Operator("compact", "(Tensor keep_N) -> (Tensor index_N, Tensor count_1)")


def compact(keep_N: Tensor) -> tuple[Tensor, Tensor]:
    """(index_N, count_1): indices where ``keep`` holds, in order, then -1; and their number.

    Both int64 and on the device: nothing waits.
    """
    _check(keep_N)
    return _COMPACT(keep_N)


def _check(keep_N: Tensor) -> None:
    if keep_N.ndim != 1 or keep_N.dtype.is_floating_point or keep_N.dtype.is_complex:
        raise RouteError(f"compact: keep must be bool [N], got {keep_N.dtype}{list(keep_N.shape)}")


@torch.library.register_fake("brt::compact")
def _(keep_N: Tensor) -> tuple[Tensor, Tensor]:
    _check(keep_N)
    return keep_N.new_empty(keep_N.shape[0], dtype=torch.int64), keep_N.new_empty(
        1, dtype=torch.int64
    )
