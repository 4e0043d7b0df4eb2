"""Kernels made of what torch and brt have, where they spare the host a look at the loads.

Legend: R rows, P paths, I features in, O features out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from brt.ops.expert_mlp import expert_mlp_parts
from brt.ops.grouped_linear import activate
from brt.path_conv import conv_works, extra_of, unflatten_convs
from brt.specs import ANY_DEVICE, KernelSpec

# The grouped product of torch reads 16 bytes at a time and takes this many groups
_ALIGNMENT_BYTES = 16
_MAX_GROUPS = 1023
_LAUNCH_US = 20.0
_FLOPS_PER_US = 2e8
_CPU_FLOPS_PER_US = 1e5
# Weights' gradients on an H200: writing them takes most of the time
_OUTER_FLOPS_PER_US = 8.4e8
_OUTER_BYTES_PER_US = 2.6e6

# Convolutions: the most operations in a microsecond, the channels of a group at which half of them
# are reached, and how steeply. Measured with one thread of an AVX-512 CPU that multiplies bfloat16.
_CONV_RATES: dict[Any, tuple[float, float, float]] = {
    "cpu": (1.05e5, 20.0, 1.0),
    ("cpu", torch.bfloat16): (2.3e5, 20.0, 2.0),
    "cuda": (2e7, 20.0, 1.0),
}
_CONV_LEAST_RATE = 1.5e4
_CONV_US = 20.0


def _grouped_linear(
    x_RI: Tensor,
    offsets_P1: Tensor,
    weight_POI: Tensor,
    bias_PO: Tensor | None,
    activation: str,
) -> Tensor:
    ends_P = offsets_P1[1:].to(torch.int32)
    out_RO = F.grouped_mm(x_RI, weight_POI.transpose(1, 2), offs=ends_P)
    row_R = torch.arange(x_RI.shape[0], device=x_RI.device)
    if bias_PO is not None:
        path_R = torch.bucketize(row_R, ends_P, right=True).clamp(max=weight_POI.shape[0] - 1)
        out_RO = out_RO + bias_PO.index_select(0, path_R)
    out_RO = activate(out_RO, activation)
    # Rows past the last offset are not computed: whatever lay there must not be seen
    return out_RO.masked_fill((row_R >= ends_P[-1])[:, None], 0)


def _grouped_outer(y_RO: Tensor, x_RI: Tensor, offsets_P1: Tensor) -> Tensor:
    return F.grouped_mm(y_RO.t(), x_RI, offs=offsets_P1[1:].to(torch.int32))


def _grouped_conv2d(
    x_P: Sequence[Tensor],
    weight_P: Sequence[Tensor],
    extras: Sequence[Tensor],
    convs: Sequence[int],
    activation: str,
) -> list[Tensor]:
    made = []
    for x, weight, conv in zip(x_P, weight_P, unflatten_convs(convs), strict=True):
        bias = extra_of(extras, conv.bias)
        image = F.conv2d(x, weight, bias, conv.stride, conv.padding, 1, conv.groups)
        if conv.residual >= 0:
            image += extras[conv.residual]
        if activation == "prelu":
            image = F.prelu(image, extras[conv.slope])
        elif activation != "none":
            _IN_PLACE[activation](image)
        made.append(image.contiguous())
    return made


_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "sigmoid": torch.sigmoid_,
    "silu": lambda image: F.silu(image, inplace=True),
}


def _refuses(x_RI: Tensor, num_paths: int, *others: Tensor) -> str | None:
    if x_RI.dtype != torch.bfloat16 or any(other.dtype != torch.bfloat16 for other in others):
        return "takes bfloat16"
    if torch.cuda.get_device_capability(x_RI.device) < (9, 0):
        return "waits for the host before sm_90"
    if not 1 <= num_paths <= _MAX_GROUPS or x_RI.shape[0] == 0:
        return f"takes 1 to {_MAX_GROUPS} paths and at least one row"
    for tensor in (x_RI, *others):
        if tensor.stride(-1) != 1 and tensor.stride(-2) != 1:
            return "takes rows or columns without gaps"
        leading = max(tensor.stride(-1), tensor.stride(-2))
        if leading * tensor.element_size() % _ALIGNMENT_BYTES or tensor.data_ptr() % 16:
            return f"takes strides of a multiple of {_ALIGNMENT_BYTES} bytes"
    return None


def _refuses_linear(x_RI: Tensor, offsets_P1: Tensor, weight_POI: Tensor, *_: Any) -> str | None:
    return _refuses(x_RI, weight_POI.shape[0], weight_POI)


def _refuses_outer(y_RO: Tensor, x_RI: Tensor, offsets_P1: Tensor) -> str | None:
    return _refuses(x_RI, offsets_P1.shape[0] - 1, y_RO)


def _estimate_linear(x_RI: Tensor, offsets_P1: Tensor, weight_POI: Tensor, *_: Any) -> float:
    flops = 2 * x_RI.shape[0] * weight_POI.shape[1] * weight_POI.shape[2]
    return _LAUNCH_US + flops / _FLOPS_PER_US


def _estimate_outer(y_RO: Tensor, x_RI: Tensor, offsets_P1: Tensor) -> float:
    num_weights = x_RI.shape[1] * y_RO.shape[1]
    made = (offsets_P1.shape[0] - 1) * num_weights * x_RI.element_size() / _OUTER_BYTES_PER_US
    return _LAUNCH_US + made + 2 * x_RI.shape[0] * num_weights / _OUTER_FLOPS_PER_US


def _estimate_parts(*args: Any) -> float:
    x_ND, cell_R, up_PHD, down_PDH = args[0], args[1], args[5], args[7]
    rows, dim = cell_R.shape[0], x_ND.shape[1]
    flops = 2 * rows * (up_PHD.shape[1] * dim + down_PDH.shape[1] * down_PDH.shape[2])
    rate = _FLOPS_PER_US if x_ND.is_cuda else _CPU_FLOPS_PER_US
    return 4 * _LAUNCH_US + flops / rate


def _estimate_convs(
    x_P: Sequence[Tensor], weight_P: Sequence[Tensor], _: Any, convs: Sequence[int], *__: Any
) -> float:
    kind = "cuda" if x_P[0].is_cuda else "cpu"
    rate, channels_at_half, power = _CONV_RATES.get((kind, x_P[0].dtype), _CONV_RATES[kind])
    time = _CONV_US * len(x_P)
    for flops, channels in conv_works(x_P, weight_P, convs):
        most = channels**power / (channels**power + channels_at_half**power)
        time += flops / max(rate * most, _CONV_LEAST_RATE)
    return time


TORCH_KERNELS = (
    KernelSpec(
        op="grouped_conv2d",
        device=ANY_DEVICE,
        name="torch-conv",
        forward=_grouped_conv2d,
        estimate=_estimate_convs,
    ),
    KernelSpec(
        op="expert_mlp",
        device=ANY_DEVICE,
        name="parts",
        forward=expert_mlp_parts,
        estimate=_estimate_parts,
    ),
    KernelSpec(
        op="grouped_linear",
        device="cuda",
        name="torch-grouped-mm",
        forward=_grouped_linear,
        refuses=_refuses_linear,
        estimate=_estimate_linear,
    ),
    KernelSpec(
        op="grouped_outer",
        device="cuda",
        name="torch-grouped-mm",
        forward=_grouped_outer,
        refuses=_refuses_outer,
        estimate=_estimate_outer,
    ),
)
