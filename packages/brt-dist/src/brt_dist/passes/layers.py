"""Finding expert-parallel layers in a graph, and what they are called with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from brt import PassError
from brt.guard import compiled
from brt.passes import Context
from brt_dist.experts import ParallelExpertRouter
from brt_dist.groups import Group
from brt_dist.passes.placed import PlacedExperts
from brt_dist.routers import ParallelScatterRouter
from brt_dist.transport import Transport


@dataclass(frozen=True, eq=False)
class Layer:
    """A spread mixture with stacked weights, in a graph.

    Attributes:
        target: the name of its router in the region.
        router: the router that the cells go through.
        nodes: that call it.
        placed: what `place-experts` put before it; None where it did not.
    """

    target: str
    router: ParallelExpertRouter
    nodes: tuple[fx.Node, ...]
    placed: PlacedExperts | None = None

    def by(self, transport: Transport) -> nn.Module:
        """The same with another transport."""
        if self.placed is None:
            return ParallelExpertRouter(self.router.spread, transport)
        return PlacedExperts(self.placed.router, self.router.spread, transport)

    def replace(self, target: str) -> None:
        """Let another module answer its calls."""
        for node in self.nodes:
            node.target = target


def layers(graph: fx.GraphModule, ctx: Context) -> list[Layer]:
    """The layers of a region that a pass can change; others are left, with the reason."""
    called: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_module":
            called.setdefault(str(node.target), []).append(node)
    found = []
    for target, nodes in called.items():
        module = ctx.scope.get_submodule(target)
        if isinstance(module, ParallelScatterRouter):
            ctx.leave(target, "its branches are modules of their own, not stacked weights")
        elif type(module) is ParallelExpertRouter:
            found.append(Layer(target, module, tuple(nodes)))
        elif isinstance(module, PlacedExperts):
            found.append(Layer(target, module.placed, tuple(nodes), module))
    return found


def require_layers(graph: fx.GraphModule, ctx: Context) -> None:
    """Refuse a region in which no experts are spread over several ranks."""
    targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_module"}
    modules = [ctx.scope.get_submodule(target) for target in targets]
    spread = (ParallelExpertRouter, ParallelScatterRouter, PlacedExperts)
    if not any(isinstance(module, spread) for module in modules):
        raise PassError("it has no experts on several ranks: brt_dist.parallelize(model) first")


def first_call(
    layer: Layer, graph: fx.GraphModule, ctx: Context
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What a layer is called with in the first call of the region on the sample."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    handle = layer.router.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        call = ctx.sample[0]
        with torch.no_grad():
            compiled(graph.graph)(ctx.scope, *call.args, **call.kwargs)
    finally:
        handle.remove()
    return seen[0] if seen else None


def gathered(own: Tensor, group: Group) -> Tensor:
    """A tensor of the host, of every rank: ``[W, ...]``."""
    num_ranks = dist.get_world_size(group)
    device = "cpu" if dist.get_backend(group) != "nccl" else "cuda"
    sent = own.to(device)
    found = [torch.empty_like(sent) for _ in range(num_ranks)]
    dist.all_gather(found, sent, group=group)
    return torch.stack(found).cpu()
