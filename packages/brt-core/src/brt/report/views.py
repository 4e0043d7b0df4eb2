"""Graphs and profiles as the light values that a report keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, fx, nn

from brt.guard import Guarded
from brt.passes.match import Chain, chains, module_of, router_of, scatters
from brt.report.data import GraphView, Kind, NodeView, RouterView
from brt.routers import GatherRouter, ScatterRouter

if TYPE_CHECKING:
    from brt.profile import RouterProfile

_PERCENTILES = (5, 25, 50, 75, 95, 99)


def view(
    graph: fx.Graph, scope: nn.Module, seen: Mapping[fx.Node, RouterView] | None = None
) -> GraphView:
    """A graph as it is now; ``seen`` is what the profile knows of its scatters, by node."""
    seen = seen or {}
    chain_of = chains(graph, scope)
    share_of = {
        (found.node, p): seen[found.node].share_P[p]
        for found in scatters(graph, scope)
        if found.node in seen
        for p in range(found.router.num_paths)
    }
    nodes = []
    for node in graph.nodes:
        chain: Chain = chain_of[node]
        module = module_of(node, scope)
        router = seen.get(node)
        nodes.append(
            NodeView(
                name=node.name,
                op=node.op,
                target=_target(node),
                type="" if module is None else type(module).__name__,
                kind=_kind(node, scope, chain),
                inputs=tuple(n.name for n in node.all_input_nodes),
                users=tuple(n.name for n in node.users),
                router=None if router is None else router.key,
                scatter=chain[-1][0].name if chain else None,
                path=chain[-1][1] if chain else None,
                share=share_of.get(chain[-1]) if chain else None,
            )
        )
    return GraphView(tuple(nodes))


def _target(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return node.name
    return node.target if isinstance(node.target, str) else node._pretty_print_target(node.target)


def _kind(node: fx.Node, scope: nn.Module, chain: Chain) -> Kind:
    kind: Kind = "branch" if chain else "other"
    if node.op == "placeholder":
        kind = "input"
    elif node.op == "output":
        kind = "output"
    elif (router := router_of(node, scope)) is not None:
        kind = "router"
        if isinstance(router, ScatterRouter):
            kind = "scatter"
        elif isinstance(router, GatherRouter):
            kind = "gather"
    elif isinstance(module_of(node, scope), Guarded):
        kind = "guard"
    return kind


def router_view(key: str, profile: RouterProfile) -> RouterView:
    """What a profile saw of one router, as plain numbers."""
    rows = profile.rows
    return RouterView(
        key=key,
        num_paths=profile.num_paths,
        num_forwards=profile.num_forwards,
        num_cells=profile.cells,
        share_P=_floats(profile.share_P),
        rows_mean_P=_floats(rows.mean_P),
        rows_min_P=_floats(rows.min_P),
        rows_max_P=_floats(rows.max_P),
        rows_percentiles_P={str(q): _floats(rows.percentile_P(q)) for q in _PERCENTILES},
        always_P=tuple(bool(value) for value in profile.always_P),
        never_P=tuple(bool(value) for value in profile.never_P),
        num_dropped=profile.dropped,
    )


def _floats(values_P: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in values_P)
