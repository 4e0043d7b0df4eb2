"""What networks on batches of images share.

Shape letters: N images, H height, W width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from brt.errors import BrtError


def check_images(owner: str, x_NCHW: Tensor, divisor: int = 1) -> None:
    """Raise unless these are float images of three colours whose sides ``divisor`` divides.

    It reads shapes: a module that is to be traced says ``torch.fx.wrap("check_images")``.
    """
    if x_NCHW.ndim != 4 or x_NCHW.shape[1] != 3 or not x_NCHW.is_floating_point():
        raise BrtError(
            f"{owner}: images must be floats [N, 3, H, W] (red, green, blue), got "
            f"{x_NCHW.dtype} {list(x_NCHW.shape)}"
        )
    if any(side < divisor or side % divisor for side in x_NCHW.shape[2:]):
        raise BrtError(
            f"{owner}: height and width must be multiples of {divisor}, got "
            f"{list(x_NCHW.shape[2:])}; pad the images"
        )


def is_eager(x: Tensor) -> bool:
    """Whether this is a plain call without gradients, neither traced nor compiled."""
    if not isinstance(x, Tensor) or torch.compiler.is_compiling():
        return False
    return not torch.is_grad_enabled()


def is_over(x: Tensor) -> bool:
    """Whether there is no row to compute, where nobody needs the computation of nothing.

    While tracing it is not known, a compiled graph is for any number of rows, and gradients of
    branches that no row reaches are zeros, not None.
    """
    return is_eager(x) and x.shape[0] == 0
