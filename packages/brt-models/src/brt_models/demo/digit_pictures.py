"""The pictures of the demo of exits: which digit left where, and what a budget buys.

Shape letters: N images, C colours, H height, W width, K exits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from brt.files import atomic_write
from brt_models.digits import Digits, shades
from brt_models.msdnet.budgets import Point, Taken

COLOURS = colormaps["plasma"]
ACROSS, DOWN = 24, 2  # images shown of each exit
WRONG = "#d62728"


def draw_exits(test: Digits, taken: Taken, cost_K: Sequence[int], file: Path) -> None:
    """Digits in rows by the exit that they left at, the wrong ones first and framed.

    The others of a row are spread over all that left there, sure to unsure.
    """
    num_exits = len(cost_K)
    figure = Figure(figsize=(13, 1.5 * num_exits + 0.7), layout="constrained", facecolor="white")
    rows = figure.subplots(num_exits, 1, squeeze=False)[:, 0]
    guess_N = taken.logits_NC.argmax(1)
    sure_N = taken.logits_NC.softmax(1).amax(1)
    is_wrong_N = guess_N != test.labels
    for k, axes in enumerate(rows):
        here_M = (taken.exit_N == k).nonzero()[:, 0]
        wrong = int(is_wrong_N[here_M].sum())
        axes.set_title(
            f"exit {k + 1}: {len(here_M)} images ({len(here_M) / len(guess_N):.0%}), "
            f"{cost_K[k] / cost_K[-1]:.0%} of the multiply-adds, {wrong} not recognised",
            loc="left",
            fontsize=11,
            color=_colour(k, num_exits),
        )
        shown = _shown(here_M, is_wrong_N, sure_N)
        _tiles(axes, shades(test.images[shown]), is_wrong_N[shown], guess_N[shown])
    figure.suptitle("Handwritten digits, each at the exit where the network was sure", fontsize=13)
    with atomic_write(file) as beside:
        figure.savefig(beside, dpi=110)


def draw_budgets(
    points: Sequence[Point],
    whole: float,
    cost_K: Sequence[int],
    plain: Sequence[Mapping[str, Any]],
    file: Path,
) -> None:
    """Accuracy over mean multiply-adds, beside plain networks; and who leaves where by budget."""
    figure = Figure(figsize=(12, 4.4), layout="constrained", facecolor="white")
    curve, shares = figure.subplots(1, 2)
    cost = [point.macs / 1e3 for point in points]
    curve.plot(cost, [100 * point.accuracy for point in points], "o-", label="with exits")
    curve.axhline(100 * whole, color="grey", linestyle="--", linewidth=1)
    curve.annotate(
        f"the whole network, {cost_K[-1] / 1e3:.0f} thousand", (0.98, 100 * whole),
        xycoords=("axes fraction", "data"), xytext=(0, -12), textcoords="offset points",
        ha="right", color="grey", fontsize=9,
    )  # fmt: skip
    curve.plot(
        [row["plain_macs"] / 1e3 for row in plain],
        [100 * row["plain_accuracy"] for row in plain],
        "s--", label="plain convolutional networks",
    )  # fmt: skip
    curve.set(xlabel="thousand multiply-adds an image", ylabel="test images recognised (%)")
    curve.set_xlim(left=0)
    curve.legend(frameon=False)
    names = [f"{point.budget:.0%}" for point in points]
    bottom = [0.0] * len(points)
    for k in range(len(cost_K)):
        share = [100 * point.left_K[k] / sum(point.left_K) for point in points]
        colour = _colour(k, len(cost_K))
        shares.bar(names, share, bottom=bottom, color=colour, label=f"exit {k + 1}", width=0.6)
        bottom = [low + high for low, high in zip(bottom, share, strict=True)]
    shares.set(xlabel="budget, of the whole network's multiply-adds", ylabel="images (%)")
    figure.legend(*shares.get_legend_handles_labels(), frameon=False, loc="outside right center")
    for axes in (curve, shares):
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(file) as beside:
        figure.savefig(beside, dpi=110)


def _shown(here_M: Tensor, is_wrong_N: Tensor, sure_N: Tensor) -> Tensor:
    """Of the images of an exit, those that are shown."""
    wrong_M = here_M[is_wrong_N[here_M]][: ACROSS * DOWN // 2]
    right_M = here_M[~is_wrong_N[here_M]]
    right_M = right_M[sure_N[right_M].argsort(descending=True)]
    room = min(len(right_M), ACROSS * DOWN - len(wrong_M))
    if room == 0:
        return wrong_M
    spread = torch.linspace(0, len(right_M) - 1, room).round().long()
    return torch.cat([wrong_M, right_M[spread]])


def _tiles(axes: Axes, shades_NHW: Tensor, is_wrong_N: Tensor, guess_N: Tensor) -> None:
    """Images side by side, in rows."""
    axes.set(xlim=(0, ACROSS), ylim=(DOWN, 0), aspect="equal")
    axes.axis("off")
    for place, shades_HW in enumerate(shades_NHW):
        top, left = divmod(place, ACROSS)
        extent = (left + 0.06, left + 0.94, top + 0.94, top + 0.06)
        axes.imshow(1 - shades_HW.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
        if is_wrong_N[place]:
            frame = Rectangle(
                (left + 0.05, top + 0.05), 0.9, 0.9, fill=False, edgecolor=WRONG, linewidth=2
            )
            axes.add_patch(frame)
            axes.text(
                left + 0.93, top + 0.93, f"{int(guess_N[place])}?", color="white", fontsize=8,
                ha="right", va="bottom", weight="bold",
                bbox={"facecolor": WRONG, "edgecolor": "none", "pad": 1.2},
            )  # fmt: skip
    axes.set(xlim=(0, ACROSS), ylim=(DOWN, 0))  # imshow moves them


def _colour(k: int, num_exits: int) -> tuple[float, float, float, float]:
    return COLOURS(0.05 + 0.7 * k / max(1, num_exits - 1))
