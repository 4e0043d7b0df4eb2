"""Batch norm as part of the layer before it.

Legend: O output channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from brt.passes.packed_conv import ConvCall

LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}


def folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer that does what ``layer`` and then ``norm`` do in evaluation."""
    if norm is None:
        return layer.weight, layer.bias
    scale_O = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale_O = scale_O * norm.weight.double()
    shift_O = -norm.running_mean.double() * scale_O
    if norm.bias is not None:
        shift_O = shift_O + norm.bias.double()
    if layer.bias is not None:
        shift_O = shift_O + layer.bias.double() * scale_O
    weight = layer.weight
    scaled = weight.double() * scale_O.view(-1, *[1] * (weight.ndim - 1))
    return scaled.to(weight.dtype), shift_O.to(weight.dtype)


def sources(layer: Any, norm: Any) -> list[Tensor]:
    """What a folded layer is made of."""
    every = [layer.weight, layer.bias]
    if norm is not None:
        every += [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    return [t for t in every if t is not None]


def can_fold(layer: Any, norm: nn.Module) -> bool:
    """Whether a layer can take over the batch norm that follows it."""
    return (
        (type(layer) in LAYERS or isinstance(layer, ConvCall))
        and type(norm) is LAYERS.get(type(layer), nn.BatchNorm2d)
        and isinstance(norm, nn.modules.batchnorm._BatchNorm)
        and norm.running_mean is not None
        and not norm.training
        and not (isinstance(layer, nn.Linear) and layer.weight.ndim != 2)
        and not (isinstance(layer, nn.Module) and is_hooked(layer))
        and not is_hooked(norm)
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether others watch what a module takes or gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
