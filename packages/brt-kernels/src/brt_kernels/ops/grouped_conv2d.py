"""`grouped_conv2d`: a convolution for each path, of sizes of its own, all in one call.

Legend: P paths, R rows of a path, C O channels in and out, H W height and width, k kernel size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CONV_NUMBERS = 6


def grouped_conv2d(
    x_P: Sequence[Tensor],
    weight_P: Sequence[Tensor],
    extras: Sequence[Tensor],
    convs: Sequence[int],
    activation: str,
) -> list[Tensor]:
    """``act(conv2d(x[p], weight[p], bias) + residual)`` for every path p, contiguous.

    ``x[p]`` is ``[R, C, H, W]`` and ``weight[p]`` ``[O, C / groups, k, k]``, with sizes of their
    own; one dtype for all. ``convs`` has six numbers a path: bias, residual and slope (positions in
    ``extras``; -1 = none), stride, padding (less than k) and groups. ``activation`` is none, relu,
    prelu (by the slope, of 1 or O values), sigmoid or silu.
    """
    return torch.ops.brt_kernels.grouped_conv2d(x_P, weight_P, extras, convs, activation)


def register_fakes() -> None:
    """Shapes for fake tensors. Called once the library is loaded."""

    @torch.library.register_fake("brt_kernels::grouped_conv2d")
    def _(
        x_P: Sequence[Tensor],
        weight_P: Sequence[Tensor],
        extras: Sequence[Tensor],
        convs: Sequence[int],
        activation: str,
    ) -> list[Tensor]:
        made = []
        for p, (x, weight) in enumerate(zip(x_P, weight_P, strict=True)):
            stride, padding = convs[CONV_NUMBERS * p + 3], convs[CONV_NUMBERS * p + 4]
            height, width = (
                (size + 2 * padding - weight.shape[-1]) // stride + 1 for size in x.shape[2:]
            )
            made.append(x.new_empty((x.shape[0], weight.shape[0], height, width)))
        return made
