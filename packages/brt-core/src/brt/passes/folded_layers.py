"""Layers whose batch norm is in their weights, and what follows them in their result.

Legend: N rows, O output channels, C H W channels, height and width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from brt.passes.derived import DerivedTensors, Slots
from brt.passes.folding import folded, sources
from brt.passes.packed_conv import (
    as_product,
    can_pack,
    is_product,
    pack,
    packed_conv,
    takes_packed,
)


@dataclass(frozen=True, eq=False)
class Folded:
    """A layer, the batch norm that follows it (or None), and what is done to its result.

    Attributes:
        layer: a layer of torch, or a `ConvCall`.
        norm: a batch norm.
        relu: whether ReLU follows.
        adds: whether another tensor is added first.
    """

    layer: Any
    norm: Any
    relu: bool
    adds: bool = False


class FoldedLayers(nn.Module):
    """Layers one after the other, some with their batch norm folded: ``forward(x, other)``.

    ``other`` is what is added to the result of the last layer, where that says so. It refers to the
    model's own layers; folded weights are made anew when one of these changes.
    """

    def __init__(self, parts: list[nn.Module | Folded]) -> None:
        super().__init__()
        self._parts = tuple(parts)
        self._steps = tuple(_Step(p) if isinstance(p, Folded) else p for p in parts)
        first = next(i for i, part in enumerate(parts) if isinstance(part, Folded))
        self.inplace = any(_is_inplace(part) for part in parts[:first])
        """Whether it may write to what it is given."""
        self.gives_new_memory = first == 0
        self.takes_any_layout = first == 0
        self.keeps_layout = True
        """Whether images may come out channels last where they came in otherwise."""

    @property
    def last(self) -> Folded | None:
        """The last layer, where it is a folded one."""
        part = self._parts[-1]
        return part if isinstance(part, Folded) else None

    def with_last(self, last: Folded) -> FoldedLayers:
        """The same with another last layer."""
        return FoldedLayers([*self._parts[:-1], last])

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """What the layers give."""
        is_plain = not (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.is_autocast_enabled(x.device.type)
        )
        for step in self._steps:
            x = step(x, other, is_plain) if isinstance(step, _Step) else step(x)
        return x if self.keeps_layout else x.contiguous()

    def extra_repr(self) -> str:
        """How many layers of each kind."""
        num_folded = sum(isinstance(p, Folded) and p.norm is not None for p in self._parts)
        return f"{num_folded} layers with their batch norm, {len(self._parts) - num_folded} others"


class _Step:
    """One folded layer: ``step(x, other, is_plain)``.

    ``is_plain``: neither gradients nor a compiler, nor autocast. A call reads a layer's tensors
    by their slots, and looks at nothing that cannot change: what is done around a small
    convolution takes as long as the convolution.
    """

    def __init__(self, part: Folded) -> None:
        self._part = part
        self._derived = DerivedTensors()
        self._slots = Slots.of(_owned(part.layer, part.norm))
        self._can_pack = can_pack(part.layer)
        self._is_product = self._can_pack and is_product(part.layer)

    def __call__(self, x: Tensor, other: Tensor | None, is_plain: bool) -> Tensor:
        part = self._part
        layer, norm = part.layer, part.norm
        if is_plain and not (norm is not None and norm.training):
            return self._finished(*self._computed(x, _present(self._slots.read())), other)
        made_of = sources(layer, norm)
        needs_grad = x.requires_grad or any(t.requires_grad for t in made_of)
        in_training = norm is not None and norm.training
        trains = torch.is_grad_enabled() and needs_grad
        if not (in_training or trains or torch.is_autocast_enabled(x.device.type)):
            return self._finished(*self._computed(x, made_of), other)
        out: Tensor = layer(x) if norm is None else norm(layer(x))
        if part.adds:
            assert other is not None
            out = out + other
        return F.relu(out) if part.relu else out

    def _computed(self, x: Tensor, made_of: list[Tensor]) -> tuple[Tensor, bool]:
        """(the layer's result, whether ReLU is in it)."""
        layer, norm, relu = self._part.layer, self._part.norm, self._part.relu
        can_pack = self._can_pack and not torch.compiler.is_compiling()
        if can_pack and takes_packed(x, made_of[0]):
            if self._is_product and (rows := as_product(x, made_of[0])) is not None:
                weight, *bias = self._derived.get("folded", made_of, self._make)
                out = F.linear(rows, weight.flatten(1), bias[0] if bias else None)
                return out.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2), False
            packed = self._derived.get(
                "packed", made_of, lambda: pack(layer, *folded(layer, norm), x.shape)
            )
            relu = relu and not self._part.adds
            return packed_conv(layer, x, *packed, relu=relu), relu
        weight, *bias = self._derived.get("folded", made_of, self._make)
        bias_O = bias[0] if bias else None
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias_O), False
        return layer._conv_forward(x, weight, bias_O), False

    def _finished(self, out: Tensor, has_relu: bool, other: Tensor | None) -> Tensor:
        """The result with what is added and ReLU, in place: new memory takes longer than sums."""
        if self._part.adds:
            assert other is not None
            alike = other.shape == out.shape and other.dtype == out.dtype
            out = out.add_(other) if alike and not other.requires_grad else out + other
        return out.relu_() if self._part.relu and not has_relu else out

    def _make(self) -> tuple[Tensor, ...]:
        return tuple(_present(folded(self._part.layer, self._part.norm)))


def _owned(layer: Any, norm: Any) -> list[tuple[nn.Module, str]]:
    """Where a layer's and a norm's tensors are; the weight first."""
    if isinstance(layer, nn.Module):
        owned: list[tuple[nn.Module, str]] = [(layer, "weight"), (layer, "bias")]
    else:
        owned = [(layer.owner, layer.weight_name)]
        owned += [(layer.owner, layer.bias_name)] if layer.bias_name is not None else []
    if norm is not None:
        owned += [(norm, name) for name in ("weight", "bias", "running_mean", "running_var")]
    return owned


def _is_inplace(part: Any) -> bool:
    return any(getattr(module, "inplace", False) for module in part.modules())


def _present(tensors: Any) -> list[Tensor]:
    return [t for t in tensors if t is not None]
