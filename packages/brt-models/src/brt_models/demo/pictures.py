"""The demo's pictures: which path each patch takes, and what comes out beside bicubic.

Shape letters: N patches, P paths, C colours, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from brt import PatchGrid
from brt.files import atomic_write
from brt_models.quality import luma

COLOURS = colormaps["plasma"]


def draw_routing(
    photo_CHW: Tensor,
    grid: PatchGrid,
    path_N: Sequence[int],
    path_names: Sequence[str],
    title: str,
    file: Path,
) -> None:
    """The photo beside itself with each patch in the colour of its path, and a legend of counts.

    Overlapping patches are drawn up to the middle of the overlap.
    """
    num_paths = len(path_names)
    height, width = photo_CHW.shape[1:]
    pixels_HWC = photo_CHW.permute(1, 2, 0).clamp(0, 1).cpu().numpy()
    grey_HWC = np.repeat(pixels_HWC.mean(2, keepdims=True), 3, 2)
    colour_P = [COLOURS(0.05 + 0.87 * p / max(1, num_paths - 1)) for p in range(num_paths)]

    tall = height > 1.2 * width
    size = (11, 8.6) if tall else (13, 13 * 0.5 * height / width + 1.5)
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    plain, routed = figure.subplots(1, 2)
    plain.imshow(pixels_HWC)
    routed.imshow(0.55 + 0.45 * grey_HWC, vmin=0, vmax=1)
    for axes in (plain, routed):
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        axes.axis("off")
    rows = _middles(grid.tops, grid.size[0], height)
    columns = _middles(grid.lefts, grid.size[1], width)
    places = [(y, x) for y in rows for x in columns]
    for path, ((top, bottom), (left, right)) in zip(path_N, places, strict=True):
        tile = Rectangle(
            (left - 0.5, top - 0.5),
            right - left,
            bottom - top,
            facecolor=(*colour_P[path][:3], 0.55),
            edgecolor=(1, 1, 1, 0.7),
            linewidth=0.6,
        )
        routed.add_patch(tile)
    counts = [list(path_N).count(path) for path in range(num_paths)]
    legend = [
        Patch(
            facecolor=(*colour_P[path][:3], 0.8),
            label=f"{name}\n{counts[path]} patches ({counts[path] / max(1, len(path_N)):.0%})",
        )
        for path, name in enumerate(path_names)
    ]
    figure.suptitle(title, fontsize=13)
    figure.legend(
        handles=legend, loc="outside lower center", ncols=min(num_paths, 5), frameon=False
    )
    with atomic_write(file) as beside:
        figure.savefig(beside, dpi=120)


def _middles(starts: Sequence[int], size: int, full: int) -> list[tuple[float, float]]:
    """From where to where each patch is drawn along one dim."""
    ends = [start + size for start in starts]
    cuts = [(end + start) / 2 for end, start in zip(ends, starts[1:], strict=False)]
    return list(zip([0.0, *cuts], [*cuts, float(full)], strict=True))


def draw_comparison(pictures: Mapping[str, Tensor], extent: int, file: Path) -> None:
    """The same square of several pictures [C, H, W] side by side, each under its name.

    It is the one with most detail in the last of them, ``extent`` pixels wide and high.
    """
    shown = list(pictures.values())
    top, left, extent = most_detailed(shown[-1], extent)
    figure = Figure(figsize=(4.2 * len(shown), 4.6), layout="constrained", facecolor="white")
    for axes, (name, x_CHW) in zip(figure.subplots(1, len(shown)), pictures.items(), strict=True):
        square_CHW = x_CHW[:, top : top + extent, left : left + extent]
        axes.imshow(square_CHW.permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation="nearest")
        axes.set_title(name, fontsize=12)
        axes.axis("off")
    with atomic_write(file) as beside:
        figure.savefig(beside, dpi=120)


def most_detailed(x_CHW: Tensor, extent: int) -> tuple[int, int, int]:
    """(top, left, extent) of the square whose luma changes most from pixel to pixel."""
    extent = min(extent, *x_CHW.shape[1:])
    luma_HW = luma(x_CHW)[0]
    change_HW = luma_HW.diff(dim=0).abs()[:, 1:] + luma_HW.diff(dim=1).abs()[1:]
    detail_HW = F.pad(change_HW, (1, 0, 1, 0))
    step = max(1, extent // 8)
    sums = F.avg_pool2d(detail_HW[None, None], extent, step)[0, 0]
    row, column = divmod(int(sums.argmax()), sums.shape[1])
    return row * step, column * step, extent
