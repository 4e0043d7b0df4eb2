"""A pass: layers that do nothing leave the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from brt.passes import Context, Pass


@dataclass(frozen=True)
class DropIdentities(Pass):
    """Take identities, and dropout in evaluation, out of a graph.

    It holds for any input, so that it needs neither a profile nor a guard.
    """

    name: ClassVar[str] = "acme-drop-identities"

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        dropped = 0
        for node in list(graph.graph.nodes):
            if node.op != "call_module" or len(node.args) != 1:
                continue
            module = graph.get_submodule(str(node.target))
            off = isinstance(module, nn.Dropout) and not module.training
            if isinstance(module, nn.Identity) or off:
                node.replace_all_uses_with(node.args[0])
                graph.graph.erase_node(node)
                dropped += 1
        if dropped:
            ctx.note(f"{dropped} layers do nothing")
        return dropped > 0
