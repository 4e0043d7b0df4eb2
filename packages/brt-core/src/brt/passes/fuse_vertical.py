"""fuse-vertical: batch norm and ReLU go into the layer before them, weights are laid out once.

Legend: O output channels, C H W channels, height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.nn import functional as F

from brt.passes.base import Context, Pass
from brt.passes.folded_layers import Folded, FoldedLayers
from brt.passes.folding import LAYERS, can_fold, is_hooked
from brt.passes.match import argument, module_of
from brt.passes.memory import layout_is_free
from brt.passes.packed_conv import ConvCall, can_pack
from brt.passes.vertical import add_to_results, is_relu, only_user, relu_first


@dataclass(frozen=True)
class FuseVertical(Pass):
    """Fold batch norm and ReLU into the convolution or linear layer before them.

    Also inside ``nn.Sequential``, and ahead of the first router. On a CPU the weights of
    convolutions are kept in the layout in which oneDNN computes. It holds for evaluation, in which
    batch norm is a scale and a shift for each channel; a model that trains runs its own layers.
    """

    name: ClassVar[str] = "fuse-vertical"
    after: ClassVar[tuple[str, ...]] = ("fuse-conv-chains", "fuse-horizontal", "defer-operations")

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Replace layer, norm and ReLU, wherever they follow each other."""
        num_moved = relu_first(graph, ctx)
        found: list[Folded] = []
        for node in list(graph.graph.nodes):
            module = module_of(node, ctx.scope)
            if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
                found += _fuse_sequential(graph, ctx, node, module)
            elif module is not None and type(module) in LAYERS:
                found += _fuse_nodes(graph, ctx, node, module)
            elif node.target in (torch.conv2d, F.conv2d):
                call = ConvCall.of(node, ctx.scope)
                found += [] if call is None else _fuse_nodes(graph, ctx, node, call)
        num_added = add_to_results(graph, ctx)
        for node in graph.graph.nodes:
            module = module_of(node, ctx.scope)
            if isinstance(module, FoldedLayers):
                module.keeps_layout = layout_is_free(node, ctx.scope)
        num_norms = sum(part.norm is not None for part in found)
        num_packed = sum(can_pack(part.layer) for part in found)
        done = {
            "batch norms are part of the layers before them": num_norms,
            "convolutions keep their weights in oneDNN's layout": num_packed,
            "scatters come behind the ReLU that their paths began with": num_moved,
            "layers add to their result what was added to it": num_added,
        }
        for what, num in done.items():
            if num:
                ctx.note(f"{num} {what}")
        return bool(found) or num_moved > 0

    def tolerance(self, dtype: torch.dtype) -> tuple[float, float]:
        """Folding rounds a product of scale and weight: ten times a pass that reorders sums."""
        relative, absolute = super().tolerance(dtype)
        return 10 * relative, absolute


def _fuse_sequential(
    graph: fx.GraphModule, ctx: Context, node: fx.Node, module: nn.Sequential
) -> list[Folded]:
    parts = list(_parts(list(_flat(module))))
    made = [part for part in parts if isinstance(part, Folded)]
    if made:
        node.target = ctx.insert(graph, FoldedLayers(parts), "folded_layers")
    return made


def _fuse_nodes(graph: fx.GraphModule, ctx: Context, node: fx.Node, layer: Any) -> list[Folded]:
    gone: list[fx.Node] = []
    follower = only_user(node)
    norm = None if follower is None else module_of(follower, ctx.scope)
    if follower is not None and norm is not None and can_fold(layer, norm):
        gone.append(follower)
    elif can_pack(layer):
        norm = None
    else:
        return []
    relu = only_user([node, *gone][-1])
    if relu is not None and is_relu(relu, ctx.scope):
        gone.append(relu)
    part = Folded(layer, norm, relu in gone)
    target = ctx.insert(graph, FoldedLayers([part]), "folded_layers")
    with graph.graph.inserting_before(node):
        made = graph.graph.call_module(target, (argument(node, 0, "input"),))
    [node, *gone][-1].replace_all_uses_with(made)
    for one in reversed([node, *gone]):
        graph.graph.erase_node(one)
    return [part]


def _flat(module: nn.Sequential) -> Iterator[nn.Module]:
    for part in module:
        is_sequential = isinstance(part, nn.Sequential) and not is_hooked(part)
        if is_sequential and type(part).forward is nn.Sequential.forward:
            assert isinstance(part, nn.Sequential)
            yield from _flat(part)
        else:
            yield part


def _parts(layers: list[nn.Module]) -> Iterator[nn.Module | Folded]:
    position = 0
    while position < len(layers):
        layer, *following = layers[position : position + 3]
        norm = following[0] if following and can_fold(layer, following[0]) else None
        if norm is None and not (can_pack(layer) and not is_hooked(layer)):
            yield layer
            position += 1
            continue
        following = following[norm is not None :]
        is_relu = bool(following) and type(following[0]) is nn.ReLU
        is_relu = is_relu and not is_hooked(following[0])
        yield Folded(layer, norm, is_relu)
        position += 1 + (norm is not None) + is_relu
