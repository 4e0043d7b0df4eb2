"""One file an operator: its wrapper and its fake."""

from __future__ import annotations

import functools

from brt_kernels.ops import (
    combine,
    compact,
    conv_chain,
    dispatch,
    expert_mlp,
    grouped_conv2d,
    grouped_linear,
    grouped_outer,
    route,
    row_dot,
)

_FILES = (
    combine, compact, conv_chain, dispatch, expert_mlp, grouped_conv2d, grouped_linear,
    grouped_outer, route, row_dot,
)  # fmt: skip


@functools.cache
def register_all_fakes() -> None:
    """Give fake tensors the shapes of every operator. Called once the library is loaded."""
    for file in _FILES:
        file.register_fakes()
