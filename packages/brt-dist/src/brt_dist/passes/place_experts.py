"""`place-experts`: experts on the ranks that a plan gives them.

Legend: P experts, W ranks, S places of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import fx

from brt import PassError
from brt.passes import Context, Pass
from brt_dist.passes.layers import Layer, gathered, layers, require_layers
from brt_dist.passes.placed import PlacedExperts
from brt_dist.placement import PlacementError, Plan, Traffic, plan
from brt_dist.spread import Spread


@dataclass(frozen=True)
class PlaceExperts(Pass):
    """Move experts to the ranks that a plan gives them, for inference.

    The plan is for the loads of all ranks' profiles, and each rank takes those shares of it that
    its own cells choose most. Every rank must optimise, with the profile of its own cells.

    Args:
        plan: another plan for the model, as `brt_dist.plan` makes them; it is applied as it is.
        replicas: how many experts of a layer stand on a second rank.
    """

    name: ClassVar[str] = "place-experts"

    plan: Plan | None = None
    replicas: int = 0

    def requires(self, graph: fx.GraphModule, ctx: Context) -> None:
        """A region with experts on several ranks, for inference, and a profile or a plan."""
        require_layers(graph, ctx)
        if ctx.scope.training:
            raise PassError(
                "it moves copies of weights, which training would not reach: call model.eval(), or "
                "train with brt_dist.parallelize(model, placement=plan)"
            )
        if self.plan is None and ctx.profile is None:
            raise PassError(
                "it needs a profile of the region, or a plan: "
                "brt.optimize(model, brt.profile(model, batches), passes=['place-experts'])"
            )

    def run(self, graph: fx.GraphModule, ctx: Context) -> bool:
        """Replace routers by those of another spread."""
        changed = False
        for layer in layers(graph, ctx):
            spread = self._spread(layer, ctx)
            if spread is None:
                continue
            placed = PlacedExperts(layer.router, spread, layer.router.transport)
            layer.replace(ctx.insert(graph, placed, "placed"))
            changed = True
        return changed

    def _spread(self, layer: Layer, ctx: Context) -> Spread | None:
        """Where the experts of a layer are to be; None where they stay."""
        old = layer.router.spread
        load_WP = _loads(layer, ctx)
        if self.plan is not None:
            new = _planned(self.plan, old, ctx.path(layer.target))
        elif not load_WP.any():
            ctx.leave(layer.target, "no cell of any rank's profile reached it")
            return None
        else:
            made = self._plan(load_WP, old, ctx.path(layer.target))
            new = _nearest(_planned(made, old, made.layers[0]), load_WP)
        if new.held_W == old.held_W:
            ctx.leave(layer.target, "its experts are where the plan puts them")
            return None
        if not load_WP.any():
            return new
        before, after = _figures(old, load_WP), _figures(new, load_WP)
        words = (
            f"highest load over the mean {before[0]:.2f} -> {after[0]:.2f}, rows that change rank "
            f"{before[1]:.0%} -> {after[1]:.0%}"
        )
        if self.plan is None and after[0] > 0.98 * before[0] and after[1] > 0.98 * before[1]:
            ctx.leave(layer.target, f"a plan would bring nothing: {words}")
            return None
        ctx.note(f"{layer.target}: {words}")
        return new

    def _plan(self, load_WP: np.ndarray, spread: Spread, path: str) -> Plan:
        traffic = Traffic(path, (path,), int(load_WP.sum()), load_WP.sum(0, keepdims=True))
        try:
            return plan(traffic, len(spread.held_W), "balance", replicas=self.replicas)
        except PlacementError as error:
            raise PassError(f"{path}: {error}") from error


def _loads(layer: Layer, ctx: Context) -> np.ndarray:
    """Rows that each rank's cells have for each expert, in the profiles."""
    load_P = torch.zeros(layer.router.num_paths, dtype=torch.float64)
    for call in range(len(layer.nodes)):
        seen = None if ctx.profile is None else ctx.profile.routers.get(f"{layer.target}#{call}")
        if seen is not None:
            load_P += seen.rows_FP.sum(0).double().cpu()
    load_WP: np.ndarray = gathered(load_P, layer.router.spread.group).numpy()
    return load_WP


def _planned(made: Plan, old: Spread, path: str) -> Spread:
    """A layer's spread by a plan."""
    if made.num_ranks != len(old.held_W) or made.num_experts != old.num_experts:
        raise PassError(
            f"{path}: the plan is for {made.num_experts} experts on {made.num_ranks} ranks, the "
            f"layer has {old.num_experts} on {len(old.held_W)}; plan again"
        )
    if path not in made.layers:
        raise PassError(f"{path}: the plan knows {', '.join(made.layers)}; plan again")
    expert_WS = made.expert_LWS[made.layers.index(path)]
    placement = [
        np.flatnonzero((expert_WS == expert).any(1)).tolist() for expert in range(old.num_experts)
    ]
    return Spread.of(old.num_experts, old.group, placement)


def _nearest(spread: Spread, load_WP: np.ndarray) -> Spread:
    """The same shares of experts, each on the rank whose cells choose it most."""
    home_WW = np.stack([load_WP[:, list(held)].sum(1) for held in spread.held_W], 1)
    ranks, shares = linear_sum_assignment(home_WW, maximize=True)
    rank_of = dict(zip(shares.tolist(), ranks.tolist(), strict=True))
    placement = [[rank_of[share] for share in held] for held in spread.ranks_P]
    return Spread.of(spread.num_experts, spread.group, placement)


def _figures(spread: Spread, load_WP: np.ndarray) -> tuple[float, float]:
    """(highest load of a rank over the mean, share of the rows that change rank)."""
    load_W, at_home = np.zeros(len(load_WP)), 0.0
    for expert, ranks in enumerate(spread.ranks_P):
        for rank in ranks:
            load_W[rank] += load_WP[:, expert].sum() / len(ranks)
            at_home += load_WP[rank, expert] / len(ranks)
    return float(load_W.max() / load_W.mean()), 1 - at_home / float(load_WP.sum())
