"""The reference as kernels, one for each operator and any device, registered like everyone's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from brt import reference
from brt.specs import ANY_DEVICE, KernelSpec

_OVERHEAD_US = 10.0
# Plain torch passes over the data several times: a deliberately modest rate
_BYTES_PER_US = 4_000.0
_FLOPS_PER_US = 50_000.0
_LAST_US = 1e6  # where another kernel does the same with less, and takes everything too


def _estimate_moving(*args: Any) -> float:
    size = sum(a.numel() * a.element_size() for a in args if isinstance(a, Tensor))
    return _OVERHEAD_US + size / _BYTES_PER_US


def _estimate_linear(x_RI: Tensor, offsets_P1: Tensor, weight_POI: Tensor, *_: Any) -> float:
    num_paths, num_out, num_in = weight_POI.shape
    return num_paths * _OVERHEAD_US + 2 * x_RI.shape[0] * num_in * num_out / _FLOPS_PER_US


def _estimate_outer(y_RO: Tensor, x_RI: Tensor, offsets_P1: Tensor) -> float:
    flops = 2 * x_RI.shape[0] * x_RI.shape[1] * y_RO.shape[1]
    return (offsets_P1.shape[0] - 1) * _OVERHEAD_US + flops / _FLOPS_PER_US


def _estimate_mlp(*args: Any) -> float:
    x_ND, cell_R, up_PHD, down_PDH = args[0], args[1], args[5], args[7]
    (num_paths, num_up, num_in), (_, num_out, hidden) = up_PHD.shape, down_PDH.shape
    flops = 2 * cell_R.shape[0] * (num_up * num_in + num_out * hidden)
    return 2 * num_paths * _OVERHEAD_US + flops / _FLOPS_PER_US + _estimate_moving(x_ND)


def _estimate_chain(
    x_RCHW: Tensor, offsets_P1: Tensor, params: list[Tensor], steps: list[int], *_: Any
) -> float:
    # As if every step ran on the rows of an average path, at the size of the input
    weights = sum(params[i].numel() for i in steps[3::9])
    num_paths = max(offsets_P1.shape[0] - 1, 1)
    pixels = x_RCHW.shape[0] * x_RCHW.shape[2] * x_RCHW.shape[3] / num_paths
    return _OVERHEAD_US * len(steps) / 9 + 2 * pixels * weights / _FLOPS_PER_US


def _estimate_convs(x_P: list[Tensor], *_: Any) -> float:
    return _LAST_US * len(x_P)


_ESTIMATES: dict[str, Callable[..., float]] = {
    "conv_chain": _estimate_chain,
    "grouped_conv2d": _estimate_convs,
    "grouped_linear": _estimate_linear,
    "grouped_outer": _estimate_outer,
    "expert_mlp": _estimate_mlp,
}
_OPS = (
    "route", "route_mask", "dispatch", "combine", "row_dot", "path_sizes", "compact",
    "grouped_linear", "grouped_outer", "expert_mlp", "conv_chain",
    "conv_chain_backward", "grouped_conv2d",
)  # fmt: skip

REFERENCE_KERNELS = tuple(
    KernelSpec(
        op=op,
        device=ANY_DEVICE,
        name="reference",
        forward=getattr(reference, op),
        estimate=_ESTIMATES.get(op, _estimate_moving),
    )
    for op in _OPS
)
