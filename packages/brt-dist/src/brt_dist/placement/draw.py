"""Plans as pictures: what goes between ranks, and the load of each, before and after.

Legend: L layers, E experts, W ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brt.files import atomic_write
from brt_dist.placement.errors import PlacementError
from brt_dist.placement.plan import Plan
from brt_dist.placement.problem import moved_WW
from brt_dist.placement.traffic import Floats, Ints, Traffic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_TICKS = 16


def draw(plan: Plan, source: Any, path: Path) -> None:
    """See `Plan.plot`."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlacementError("plot: needs matplotlib; pip install matplotlib") from error
    if source is None:
        raise PlacementError("plot: pass what was planned for: plan.plot(path, profile)")
    traffic = Traffic.of(source)
    if traffic.load_LE.shape != (len(plan.layers), plan.num_experts):
        raise PlacementError(f"plot: this plan is of {plan.model}, not of {traffic.model}")
    placements = {"contiguous": contiguous_LE(plan), "planned": None}
    rows = 2 if traffic.moves_LEE is not None and not plan.num_replicas else 1
    figure = Figure(figsize=(9, 3.6 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    for column, (name, rank_LE) in enumerate(placements.items()):
        if rank_LE is None:
            load_LW = plan.load_LW(traffic.load_LE)
        else:
            load_LW = _loads(rank_LE, plan, traffic)
        mean_L1 = np.maximum(load_LW.mean(1, keepdims=True), 1e-12)
        title = f"{name}: load over the mean"
        _heat(figure, axes[0, column], load_LW / mean_L1, title, "rank", "layer", 2.0)
        if rows == 2:
            share_WW = _moves(plan.rank_LE if rank_LE is None else rank_LE, traffic, plan.num_ranks)
            title = f"{name}: share of moves between layers"
            _heat(figure, axes[1, column], share_WW, title, "to rank", "from rank", None)
    figure.suptitle(f"{plan.model}, {plan.num_ranks} ranks, objective {plan.objective}")
    with atomic_write(path) as beside:
        figure.savefig(beside, format="png", dpi=120)


def contiguous_LE(plan: Plan) -> Ints:
    """The default placement of a plan's layers."""
    sizes = [len(part) for part in np.array_split(np.arange(plan.num_experts), plan.num_ranks)]
    return np.tile(np.repeat(np.arange(plan.num_ranks), sizes), (len(plan.layers), 1))


def _loads(rank_LE: Ints, plan: Plan, traffic: Traffic) -> Floats:
    pairs = zip(rank_LE, traffic.load_LE, strict=True)
    return np.stack([np.bincount(rank_E, load_E, plan.num_ranks) for rank_E, load_E in pairs])


def _moves(rank_LE: Ints, traffic: Traffic, num_ranks: int) -> Floats:
    assert traffic.moves_LEE is not None
    share_WW = np.zeros((num_ranks, num_ranks))
    for layer in range(len(traffic.moves_LEE)):
        flow_WW = moved_WW(traffic, rank_LE, layer)
        share_WW[: len(flow_WW), : len(flow_WW)] += flow_WW
    return share_WW / max(float(share_WW.sum()), 1.0)


def _heat(
    figure: Any, ax: Axes, values: Floats, title: str, across: str, down: str, most: float | None
) -> None:
    image = ax.imshow(values, cmap="Blues", aspect="auto", vmin=0, vmax=most)
    ax.set_title(title, fontsize=9, loc="left")
    ax.set_xlabel(across, fontsize=8)
    ax.set_ylabel(down, fontsize=8)
    ax.set_xticks(range(0, values.shape[1], 1 + values.shape[1] // _MOST_TICKS))
    ax.set_yticks(range(0, values.shape[0], 1 + values.shape[0] // _MOST_TICKS))
    figure.colorbar(image, ax=ax)
