"""fuse-vertical: batch norm goes into the layer before it, and ReLU into its result.

Legend: O output channels, C H W channels, height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from brt.passes.base import Context, Pass
from brt.passes.derived import DerivedTensors
from brt.passes.match import module_of

_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
    nn.Linear: nn.BatchNorm1d,
}
_RELU = (F.relu, torch.relu, torch.relu_, "relu", "relu_")


@dataclass(frozen=True)
class FuseVertical(Pass):
    """Fold batch norm into the convolution or linear layer before it, and apply ReLU in place.

    Also inside ``nn.Sequential``, and ahead of the first router. It holds for evaluation, in which
    batch norm is a scale and a shift for each channel; a model that trains runs its own layers.
    """

    name: ClassVar[str] = "fuse-vertical"
    after: ClassVar[tuple[str, ...]] = ("fuse-conv-chains", "fuse-horizontal")

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Replace layer, norm and ReLU, wherever they follow each other."""
        num_fused = 0
        for node in list(graph.graph.nodes):
            module = module_of(node, ctx.scope)
            if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
                num_fused += _fuse_sequential(graph, ctx, node, module)
            elif module is not None and type(module) in _LAYERS:
                num_fused += _fuse_nodes(graph, ctx, node, module)
        if num_fused:
            ctx.note(f"{num_fused} batch norms are part of the layers before them")
        return num_fused > 0

    def tolerance(self, dtype: torch.dtype) -> tuple[float, float]:
        """Folding rounds a product of scale and weight: ten times a pass that reorders sums."""
        relative, absolute = super().tolerance(dtype)
        return 10 * relative, absolute


@dataclass(frozen=True, eq=False)
class Folded:
    """A layer, the batch norm that follows it, and whether ReLU does."""

    layer: Any
    norm: Any
    relu: bool


class FoldedLayers(nn.Module):
    """Layers one after the other, some with their batch norm folded: ``forward(x)``.

    It refers to the model's own layers; folded weights are made anew when one of these changes.
    """

    def __init__(self, parts: list[nn.Module | Folded]) -> None:
        super().__init__()
        self._parts = tuple(parts)
        self._derived = DerivedTensors()

    def forward(self, x: Tensor) -> Tensor:
        """What the layers give."""
        for position, part in enumerate(self._parts):
            x = self._folded(position, part, x) if isinstance(part, Folded) else part(x)
        return x

    def _folded(self, position: int, part: Folded, x: Tensor) -> Tensor:
        layer, norm = part.layer, part.norm
        sources = _sources(layer, norm)
        trains = torch.is_grad_enabled() and (
            x.requires_grad or any(t.requires_grad for t in sources)
        )
        if norm.training or trains or torch.is_autocast_enabled(x.device.type):
            out: Tensor = norm(layer(x))
            return F.relu(out) if part.relu else out
        weight, bias = self._derived.get(position, sources, lambda: folded(layer, norm))
        if isinstance(layer, nn.Linear):
            out = F.linear(x, weight, bias)
        else:
            out = layer._conv_forward(x, weight, bias)
        return out.relu_() if part.relu else out

    def extra_repr(self) -> str:
        """How many layers of each kind."""
        num_folded = sum(isinstance(part, Folded) for part in self._parts)
        return f"{num_folded} layers with their batch norm, {len(self._parts) - num_folded} others"


def folded(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that does what ``layer`` and then ``norm`` do in evaluation."""
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


def _sources(layer: Any, norm: Any) -> list[Tensor]:
    every = (layer.weight, layer.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return [t for t in every if t is not None]


def _fuse_sequential(
    graph: fx.GraphModule, ctx: Context, node: fx.Node, module: nn.Sequential
) -> int:
    parts = list(_parts(list(_flat(module))))
    num_folded = sum(isinstance(part, Folded) for part in parts)
    if num_folded:
        node.target = ctx.insert(graph, FoldedLayers(parts), "folded_layers")
    return num_folded


def _fuse_nodes(graph: fx.GraphModule, ctx: Context, node: fx.Node, layer: nn.Module) -> int:
    follower = _only_user(node)
    norm = None if follower is None else module_of(follower, ctx.scope)
    if follower is None or norm is None or not _can_fold(layer, norm):
        return 0
    last, relu = follower, _only_user(follower)
    is_relu = relu is not None and (
        relu.target in _RELU or type(module_of(relu, ctx.scope)) is nn.ReLU
    )
    if relu is not None and is_relu:
        last = relu
    part = Folded(layer, norm, is_relu)
    node.target = ctx.insert(graph, FoldedLayers([part]), "folded_layers")
    last.replace_all_uses_with(node)
    for gone in (relu if is_relu else None, follower):
        if gone is not None:
            graph.graph.erase_node(gone)
    return 1


def _only_user(node: fx.Node) -> fx.Node | None:
    """The node that reads another's result, where it is one and reads nothing else."""
    users = list(node.users)
    if len(users) != 1 or users[0].all_input_nodes != [node]:
        return None
    return users[0] if users[0].args[:1] == (node,) else None


def _flat(module: nn.Sequential) -> Iterator[nn.Module]:
    for part in module:
        is_sequential = isinstance(part, nn.Sequential) and not _is_hooked(part)
        if is_sequential and type(part).forward is nn.Sequential.forward:
            assert isinstance(part, nn.Sequential)
            yield from _flat(part)
        else:
            yield part


def _parts(layers: list[nn.Module]) -> Iterator[nn.Module | Folded]:
    position = 0
    while position < len(layers):
        layer, *following = layers[position : position + 3]
        if not following or not _can_fold(layer, following[0]):
            yield layer
            position += 1
            continue
        is_relu = len(following) > 1 and type(following[1]) is nn.ReLU
        is_relu = is_relu and not _is_hooked(following[1])
        yield Folded(layer, following[0], is_relu)
        position += 3 if is_relu else 2


def _can_fold(layer: nn.Module, norm: nn.Module) -> bool:
    return (
        type(layer) in _LAYERS
        and type(norm) is _LAYERS[type(layer)]
        and isinstance(norm, nn.modules.batchnorm._BatchNorm)
        and norm.running_mean is not None
        and not norm.training
        and not (isinstance(layer, nn.Linear) and layer.weight.ndim != 2)
        and not _is_hooked(layer)
        and not _is_hooked(norm)
    )


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
