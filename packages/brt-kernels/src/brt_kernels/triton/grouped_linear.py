"""`grouped_linear` and `grouped_outer` in Triton.

Legend: R rows, P paths, I features in, O features out.
"""

from __future__ import annotations

from torch import Tensor

from brt_kernels.triton import grouped_outer as outer
from brt_kernels.triton.product import boxable, boxes, num_sms, on_device, product
from brt_kernels.triton.tells import OF_LINEAR, OF_OUTER, error_word, told
from brt_kernels.triton.tiles import choose, fit_features_in, power_of_two

_OUTER = {"BLOCK_O": 128, "BLOCK_I": 256, "BLOCK_R": 64}


def grouped_linear(
    x_RI: Tensor,
    offsets_P1: Tensor,
    weight_POI: Tensor,
    bias_PO: Tensor | None,
    activation: str,
) -> Tensor:
    """Rows of path p times ``weight[p].T`` plus ``bias[p]``, activated; zeros past the last."""
    num_rows, (num_paths, num_out, num_in) = x_RI.shape[0], weight_POI.shape
    out_RO = x_RI.new_empty((num_rows, num_out))
    if num_rows == 0 or num_out == 0:
        return out_RO
    tile = choose(num_rows, num_paths, num_out, gated=False)
    if weight_POI.stride(2) != 1:
        tile = fit_features_in(tile, num_in)
    if bias_PO is not None:
        bias_PO = bias_PO.contiguous()
    with on_device(x_RI):
        product(
            boxable(x_RI), None, offsets_P1, weight_POI, bias_PO, out_RO, tile, activation,
            num_rows=num_rows, zero_rest=True, tells=told(OF_LINEAR, x_RI.device),
        )  # fmt: skip
    return out_RO


def grouped_outer(y_RO: Tensor, x_RI: Tensor, offsets_P1: Tensor) -> Tensor:
    """``out[p] = y_p.T @ x_p`` over the rows of path p; ``[P, O, I]``."""
    num_paths, num_out, num_in = offsets_P1.shape[0] - 1, y_RO.shape[1], x_RI.shape[1]
    if x_RI.shape[0] == 0:
        return x_RI.new_zeros((num_paths, num_out, num_in))
    out_POI = x_RI.new_empty((num_paths, num_out, num_in))
    y, x = boxable(y_RO), boxable(x_RI)
    block_o, block_i, block_r = _OUTER.values()
    tiles = num_paths * -(-num_out // block_o) * -(-num_in // block_i)
    with on_device(x):
        outer.grouped_outer[(min(num_sms(x.device), tiles),)](
            boxes(y, block_r, block_o), boxes(x, block_r, block_i), y, x, offsets_P1, out_POI,
            error_word(x.device), x.shape[0], num_paths, num_out, num_in, y.stride(0), x.stride(0),
            **_OUTER, PATHS=max(16, power_of_two(num_paths)),
            TELL_OFFSETS=told(OF_OUTER, x.device).offsets, num_warps=8, num_stages=3,
        )  # fmt: skip
    return out_POI
