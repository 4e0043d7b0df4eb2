"""`conv_chain`: a small convolutional branch for each cell, all branches of a region in one call.

Legend: R cells, P paths (branches), C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STEP_NUMBERS = 9


def conv_chain(
    x_RCHW: Tensor,
    offsets_P1: Tensor,
    params: Sequence[Tensor],
    steps: Sequence[int],
    step_offsets_P1: Sequence[int],
    scales: Sequence[float],
    packed: Tensor | None = None,
) -> Tensor:
    """Run cells ``offsets[p]`` to ``offsets[p + 1]`` through branch p; ``[R, C', H', W']``.

    A branch is ``steps[9 * step_offsets[p] : 9 * step_offsets[p + 1]]``, nine numbers a step: src,
    dst, add (registers; register 0 is the cell; add -1 = none), weight, bias, slope (positions in
    ``params``; -1 = none), act (0 none, 1 ReLU, 2 PReLU by ``slope``), post (1 = ReLU after the
    addition) and shuffle (1 = none). With ``scales`` one value a step, a step is

        dst = pixel_shuffle(post(act(conv2d(src, weight, bias, padding="same")) * scale + add))

    of weights ``[O, I, 3, 3]`` or ``[O, I, 1, 1]``. The last step of a branch makes its result.
    A register keeps one shape. Rows past the last offset are zero. ``packed`` is what
    `conv_chain_pack` made of the same parameters; without it the weights are transformed anew.
    """
    return torch.ops.brt_kernels.conv_chain(
        x_RCHW, offsets_P1, params, steps, step_offsets_P1, scales, packed
    )


def conv_chain_pack(
    x_RCHW: Tensor,
    offsets_P1: Tensor,
    params: Sequence[Tensor],
    steps: Sequence[int],
    step_offsets_P1: Sequence[int],
    scales: Sequence[float],
) -> Tensor:
    """The weights of a chain as its kernel reads them, for the instruction set in use."""
    return torch.ops.brt_kernels.conv_chain_pack(
        x_RCHW, offsets_P1, params, steps, step_offsets_P1, scales
    )


def out_shape(
    x_RCHW: Tensor, params: Sequence[Tensor], steps: Sequence[int], step_offsets_P1: Sequence[int]
) -> tuple[int, int, int]:
    """(channels, height, width) of what the first branch makes."""
    shapes = {0: tuple(x_RCHW.shape[1:])}
    last = 0
    for i in range(step_offsets_P1[1]):
        src, last, _, weight, _, _, _, _, shuffle = steps[STEP_NUMBERS * i : STEP_NUMBERS * (i + 1)]
        _, height, width = shapes[src]
        channels = params[weight].shape[0] // shuffle**2
        shapes[last] = (channels, height * shuffle, width * shuffle)
    return shapes[last]  # type: ignore[return-value]


def register_fakes() -> None:
    """Shapes for fake tensors. Called once the library is loaded."""

    @torch.library.register_fake("brt_kernels::conv_chain")
    def _(
        x_RCHW: Tensor,
        offsets_P1: Tensor,
        params: Sequence[Tensor],
        steps: Sequence[int],
        step_offsets_P1: Sequence[int],
        scales: Sequence[float],
        packed: Tensor | None = None,
    ) -> Tensor:
        return x_RCHW.new_empty(
            (x_RCHW.shape[0], *out_shape(x_RCHW, params, steps, step_offsets_P1))
        )
