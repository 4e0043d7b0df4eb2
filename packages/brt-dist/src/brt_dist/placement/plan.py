"""A placement: which experts are on which rank, for which model, and what that brings.

Legend: L layers, E experts, W ranks, S places of a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brt_dist.placement.errors import PlacementError
from brt_dist.placement.traffic import Floats, Ints, unnamed

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Figures:
    """What a placement does with the traffic that it was planned for.

    Attributes:
        balance: highest load of a rank over the mean, on average over layers.
        worst: the same in the worst layer.
        traffic: with one expert a token, the share of moves between layers that change rank; with
            more, the ranks that a token visits in a layer; None where that is not known.
        cost: what the objective counts; lower is better.
    """

    balance: float
    worst: float
    traffic: float | None
    cost: float


@dataclass(frozen=True, eq=False)
class Plan:
    """Experts placed on ranks, layer by layer; made by `brt_dist.plan`.

    Attributes:
        model: what it was planned for.
        layers: the routers (their modules' paths, where a profile named them).
        num_experts: E, of each layer.
        num_ranks: W.
        objective: "traffic", "balance" or "both".
        admits: what the traffic lets a placement save: "affinity", "co-activation", "nothing".
        expert_LWS: int64, the experts of each rank, ascending; -1 = an empty place, at the end.
        default: figures of the contiguous placement.
        packed: figures of the published balanced packing (EPLB), with as many replicas.
        planned: figures of this one.
        bound: no placement has less: `balance`, `worst` and `cost` of it, and `traffic` where
            there is one host (0 where nothing better is known).
        how: how the bound was found.
        seconds: what planning took.
    """

    model: str
    layers: tuple[str, ...]
    num_experts: int
    num_ranks: int
    objective: str
    admits: str
    expert_LWS: Ints
    default: Figures
    packed: Figures
    planned: Figures
    bound: Figures
    how: str
    seconds: float

    @property
    def gap(self) -> float:
        """How far the cost may be above the least possible, as a share of that.

        Infinite where the bound is 0 and the cost is not. For balance alone, loads are compared
        (the mean over layers), not what is above the mean.
        """
        if self.objective == "balance":
            return max(self.planned.balance / self.bound.balance - 1, 0.0)
        over = self.planned.cost - self.bound.cost
        if self.bound.cost > 0:
            return max(over, 0.0) / self.bound.cost
        return float("inf") if over > 1e-9 else 0.0

    @property
    def num_replicas(self) -> int:
        """Places that hold an expert again, in each layer."""
        return int((self.expert_LWS[:1] >= 0).sum()) - self.num_experts if self.layers else 0

    def permutation(self, layer: int | str) -> Ints:
        """Experts of a layer, rank after rank: ``weights[permutation]`` and rows of the gate too.

        `counts` says where a rank's begin. With replicas an expert stands there several times.
        """
        expert_WS = self.expert_LWS[self._index(layer)]
        return expert_WS[expert_WS >= 0]

    def counts(self, layer: int | str) -> Ints:
        """Experts on each rank, ``[W]``."""
        counts_W: Ints = (self.expert_LWS[self._index(layer)] >= 0).sum(1)
        return counts_W

    @cached_property
    def rank_LE(self) -> Ints:
        """The rank of each expert; an error where there are replicas."""
        if self.num_replicas:
            raise PlacementError("plan: with replicas an expert has several ranks; see expert_LWS")
        rank_LE = np.empty((len(self.layers), self.num_experts), np.int64)
        layer, rank, place = np.nonzero(self.expert_LWS >= 0)
        rank_LE[layer, self.expert_LWS[layer, rank, place]] = rank
        return rank_LE

    def load_LW(self, load_LE: Floats) -> Floats:
        """Load of each rank, with replicas of an expert sharing its load equally."""
        num_layers = len(self.layers)
        layer, rank, place = np.nonzero(self.expert_LWS >= 0)
        expert = self.expert_LWS[layer, rank, place]
        pieces_LE = np.zeros((num_layers, self.num_experts))
        np.add.at(pieces_LE, (layer, expert), 1)
        load_LW = np.zeros((num_layers, self.num_ranks))
        np.add.at(load_LW, (layer, rank), load_LE[layer, expert] / pieces_LE[layer, expert])
        return load_LW

    def placement(self, model: nn.Module, num_ranks: int) -> dict[str, list[int]]:
        """For `brt_dist.parallelize`: for the path of each mixture, the rank of each expert.

        Raises `PlacementError` unless this is a plan for such a model and so many ranks.
        """
        routers = self.check(model, num_ranks)
        ranks = zip(routers, self.rank_LE.tolist(), strict=True)
        return {router.rpartition(".")[0]: rank_E for router, rank_E in ranks}

    def check(self, model: nn.Module, num_ranks: int) -> tuple[str, ...]:
        """Raise `PlacementError` unless this is a plan for such a model and so many ranks.

        Returns the paths of the routers that the layers are.
        """
        from brt.profile import signature

        if num_ranks != self.num_ranks:
            raise PlacementError(
                f"this plan is for {self.num_ranks} ranks, and there are {num_ranks}; plan again"
            )
        experts = {p: getattr(model.get_submodule(p), "num_paths", 0) for p in signature(model)}
        # A plan of a bare trace knows no names: then the routers' order stands for them
        layers = tuple(experts) if self.layers == unnamed(len(self.layers)) else self.layers
        if len(layers) != len(self.layers) or any(
            experts.get(layer) != self.num_experts for layer in layers
        ):
            raise PlacementError(
                f"this plan, of {self.model}, is for {len(self.layers)} routers of "
                f"{self.num_experts} paths ({', '.join(self.layers[:3])}, ...); "
                f"{type(model).__name__} has {experts or 'none'}"
            )
        return layers

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all."""
        from brt_dist.placement.files import save_plan

        save_plan(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read what `save` wrote; `PlacementError` where it is damaged or no plan."""
        from brt_dist.placement.files import load_plan

        return load_plan(Path(path))

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        from brt_dist.placement.files import as_json

        return as_json(self) | {"gap": self.gap if np.isfinite(self.gap) else None}

    def rows(self) -> list[dict[str, str]]:
        """The figures, a row for each placement and one for the bound, ready for a table."""
        what = {"affinity": "moves between ranks", "co-activation": "ranks a token visits"}
        name = what.get(self.admits, "traffic")
        rows = []
        named = {
            "contiguous": self.default,
            "packed (EPLB)": self.packed,
            "planned": self.planned,
            "bound": self.bound,
        }
        for placement, figures in named.items():
            known = figures.traffic is not None and self.default.traffic is not None
            saved = ""
            if known and figures.traffic is not None and self.default.traffic:
                saved = f"{1 - figures.traffic / self.default.traffic:.1%}"
            rows.append(
                {
                    "placement": placement,
                    name: f"{figures.traffic:.3f}" if known else "",
                    "saved": saved,
                    "max/mean load": f"{figures.balance:.3f}",
                    "worst layer": f"{figures.worst:.3f}",
                    "cost": f"{figures.cost:.4f}",
                }
            )
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
        lines = [
            f"Plan of {self.model}: {len(self.layers)} layers x {self.num_experts} experts on "
            f"{self.num_ranks} ranks, objective {self.objective}, {self.seconds:.2f} s",
            "  ".join(f"{name:<{width}}" for name, width in widths.items()).rstrip(),
        ]
        lines += ["  ".join(f"{row[n]:<{w}}" for n, w in widths.items()).rstrip() for row in rows]
        return "\n".join([*lines, self.says()])

    def says(self) -> str:
        """What the model admits, and how far this is from the bound."""
        why = {
            "affinity": "each token takes one expert and can stay there: affinity between layers",
            "co-activation": "rows of a token return: the ranks it visits in a layer count",
            "nothing": "only loads are known: balance alone can be planned",
        }[self.admits]
        far = f"the best is between {self.bound.cost:.4f} and {self.planned.cost:.4f}"
        near = f"at most {self.gap:.1%} above the best" if self.gap < 1 else far
        return f"{why}; {near} ({self.how})."

    def _index(self, layer: int | str) -> int:
        if isinstance(layer, int) and -len(self.layers) <= layer < len(self.layers):
            return layer
        if isinstance(layer, str) and layer in self.layers:
            return self.layers.index(layer)
        raise PlacementError(f"plan: no layer {layer!r}; it has {', '.join(self.layers)}")

    def plot(self, path: str | Path, traffic: Any = None) -> None:
        """Draw, as a PNG, what goes between ranks and their loads, before and after.

        `traffic` is what `brt_dist.plan` was given: the plan does not hold it. Needs matplotlib.
        """
        from brt_dist.placement.draw import draw

        draw(self, traffic, Path(path))
