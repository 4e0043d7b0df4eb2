"""Layers of a branch as calls of oneDNN: a convolution with what follows it is one of them.

Legend: R rows, C O channels in and out, H W height and width, K kernel size, s growth, D offset of
a neighbour, T taps of a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from brt.passes.derived import DerivedTensors
from brt.passes.folding import folded, sources
from brt.passes.packed_conv import pack

# Transposed convolutions of fewer channels out leave most of a vector unused in oneDNN
_MOST_GROWN_CHANNELS = 16
# Images of fewer channels are what a network gives; more of them go on to a convolution
_FEW_CHANNELS = 8


class Settings(NamedTuple):
    """Those of a convolution, as oneDNN takes them."""

    padding: Any
    stride: Any = (1, 1)
    dilation: Any = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class Activation:
    """What follows a convolution, as oneDNN names it; ``owner`` is a PReLU that has the slope."""

    name: str = "none"
    slope: float | None = None
    owner: nn.PReLU | None = None

    def scalars(self) -> list[float]:
        """The slope, where it has one."""
        if self.owner is not None:
            return [float(self.owner.weight)]
        return [] if self.slope is None else [self.slope]


@dataclass(eq=False)
class ConvLayer:
    """A convolution, its batch norm (or None), what is added to that, and an activation.

    Folded and packed weights are made anew when the layer's change.
    """

    layer: Any
    norm: Any = None
    act: Activation = Activation()
    keeps_layout: bool = True
    """Whether images may come out channels last."""
    _derived: DerivedTensors = field(default_factory=DerivedTensors)

    def is_plain(self, grad: bool) -> bool:
        """Whether it may run now; ``grad``: gradients are recorded."""
        in_training = self.norm is not None and self.norm.training
        return not in_training and _are_plain(sources(self.layer, self.norm), self.act, grad)

    def __call__(self, x_RCHW: Tensor, other_ROHW: Tensor | None = None) -> Tensor:
        """``[R, C, H, W]`` -> ``act(norm(conv(x)) + other)``, ``[R, O, H', W']``."""
        layer = self.layer
        given = (layer.padding, layer.stride, layer.dilation, layer.groups)
        weight, *bias = self._derived.get(
            "packed",
            sources(layer, self.norm),
            lambda: pack(layer, *folded(layer, self.norm), x_RCHW.shape),
        )
        bias_O = bias[0] if bias else None
        out: Tensor
        if other_ROHW is None:
            out = torch.ops.mkldnn._convolution_pointwise(
                x_RCHW, weight, bias_O, *given, self.act.name, self.act.scalars(), ""
            )
        elif _is_float32(other_ROHW) and other_ROHW.shape == self._shape(x_RCHW):
            last = None if self.act.name == "none" else self.act.name
            out = torch.ops.mkldnn._convolution_pointwise.binary(
                x_RCHW, other_ROHW, weight, bias_O, *given, "add", None, last, [], None
            )
        else:  # it is spread over the images, or of another dtype
            out = torch.ops.mkldnn._convolution_pointwise(
                x_RCHW, weight, bias_O, *given, "none", [], ""
            )
            out = out + other_ROHW
            out = out.relu() if self.act.name == "relu" else out
        return out if self.keeps_layout else out.contiguous()

    def _shape(self, x_RCHW: Tensor) -> tuple[int, ...]:
        layer, sizes = self.layer, x_RCHW.shape[2:]
        num_out, _, *kernel = layer.weight.shape
        spans = (d * (k - 1) + 1 for d, k in zip(layer.dilation, kernel, strict=True))
        image = (
            (size + 2 * padding - span) // stride + 1
            for size, padding, span, stride in zip(
                sizes, layer.padding, spans, layer.stride, strict=True
            )
        )
        return (x_RCHW.shape[0], num_out, *image)


@dataclass(eq=False)
class GrowingLayer:
    """A transposed convolution that multiplies height and width, and an activation.

    It is a convolution that computes the s*s pixels that become of one as channels of their own,
    and a shuffle: `can_grow` says of which layers.
    """

    layer: nn.ConvTranspose2d
    act: Activation = Activation()
    _derived: DerivedTensors = field(default_factory=DerivedTensors)

    def is_plain(self, grad: bool) -> bool:
        """Whether it may run now; ``grad``: gradients are recorded."""
        return _are_plain(sources(self.layer, None), self.act, grad)

    def __call__(self, x_RCHW: Tensor) -> Tensor:
        """``[R, C, H, W]`` -> ``[R, O, s*H, s*W]``."""
        growth = self.layer.stride[0]
        settings = Settings(padding=(_reach(self.layer),) * 2)

        def made() -> tuple[Tensor, ...]:
            return pack(settings, *as_convolution(self.layer), x_RCHW.shape)

        weight, *bias = self._derived.get("packed", sources(self.layer, None), made)
        images = torch.ops.mkldnn._convolution_pointwise(
            x_RCHW, weight, bias[0] if bias else None, *settings, self.act.name,
            self.act.scalars(), "",
        )  # fmt: skip
        return shuffled(images, growth)


def can_grow(layer: Any) -> bool:
    """Whether a layer is one for `GrowingLayer`."""
    if type(layer) is not nn.ConvTranspose2d or layer.padding_mode != "zeros":
        return False
    every = (layer.kernel_size, layer.stride, layer.padding, layer.output_padding)
    pairs = [tuple(int(side) for side in sides) for sides in every]
    if any(a != b for a, b in pairs) or layer.dilation != (1, 1) or layer.groups != 1:
        return False
    kernel, growth, padding, more = (side for side, _ in pairs)
    weight = layer.weight
    return (
        kernel - 2 * padding + more == growth
        and layer.out_channels < _MOST_GROWN_CHANNELS
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
    )


def _reach(layer: nn.ConvTranspose2d) -> int:
    """How far away the pixels lie that a pixel's s*s ones are made of."""
    kernel, growth, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
    return max((growth - 1 + padding) // growth, (kernel - 1 - padding) // growth)


def as_convolution(layer: nn.ConvTranspose2d) -> tuple[Tensor, Tensor | None]:
    """Weight ``[O*s*s, C, K', K']`` and bias of the convolution before the shuffle."""
    weight_COTT = layer.weight
    kernel, growth, reach = layer.kernel_size[0], layer.stride[0], _reach(layer)
    # Pixel s*q + r of the result takes tap r + padding - s*d of the pixel q + d
    r_s, d_D = torch.arange(growth), torch.arange(-reach, reach + 1)
    tap_sD = r_s[:, None] + int(layer.padding[0]) - growth * d_D
    has_sD = ((tap_sD >= 0) & (tap_sD < kernel)).to(weight_COTT.dtype)
    tap_sD = tap_sD.clamp(0, kernel - 1)
    weight = weight_COTT[:, :, tap_sD][..., tap_sD]  # [C, O, s, D, s, D]
    weight = weight * has_sD[:, :, None, None] * has_sD
    weight = weight.permute(1, 2, 4, 0, 3, 5).flatten(0, 2).contiguous()
    bias = layer.bias
    return weight, None if bias is None else bias.repeat_interleave(growth**2)


def shuffled(x_RCHW: Tensor, growth: int) -> Tensor:
    """As ``pixel_shuffle``, and channels last where there are channels enough for it to matter."""
    apart = x_RCHW.unflatten(1, (-1, growth, growth))  # [R, C, s, s, H, W]
    num_rows, channels, _, _, height, width = apart.shape
    grown = num_rows, channels, height * growth, width * growth
    if channels < _FEW_CHANNELS:
        out = x_RCHW.new_empty(grown)
    else:
        out = x_RCHW.new_empty(grown[0], *grown[2:], channels).permute(0, 3, 1, 2)
    places = out.unflatten(3, (-1, growth)).unflatten(2, (-1, growth))  # [R, C, H, s, W, s]
    places.copy_(apart.permute(0, 1, 4, 2, 5, 3))
    return out


def _are_plain(weights: list[Tensor], act: Activation, grad: bool) -> bool:
    if act.owner is not None:
        weights = [*weights, act.owner.weight]
    return all(
        t.dtype == torch.float32 and t.is_cpu and not (grad and t.requires_grad) for t in weights
    )


def _is_float32(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.dtype == torch.float32
