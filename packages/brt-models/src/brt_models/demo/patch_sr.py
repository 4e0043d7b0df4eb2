"""The demo of brt: profile the patch super-resolution network, optimise it, upscale a photo.

Shape letters: B photos (one), N patches, P paths, C colours, H height, W width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

import brt
from brt.errors import BrtError
from brt.files import atomic_write
from brt_models import patch_sr, photos, profiles, quality
from brt_models.demo import parts
from brt_models.demo.parts import step
from brt_models.demo.pictures import draw_comparison, draw_routing
from brt_models.demo.timing import alternate
from brt_models.patch_sr import PatchSR
from brt_models.patches import at_least
from brt_models.picture_files import read, write
from brt_models.quality import Quality
from brt_models.resampling import crop_to_multiple, enlarge, resize, shrink

PHOTO = "china"  # held out from training and profile
MAX_PIXELS = 1_000_000  # of what is upscaled: 16 times as many come out
MIN_EXTENT = 32  # pixels, so that of the photo shrunk to a quarter something is left to compare


def run(
    photo: Path | None = None,
    out: Path = Path("demo-out"),
    *,
    compiled: bool = True,
    seconds: float = 12.0,
    console: Console | None = None,
) -> Mapping[str, Any]:
    """Upscale a photo fourfold, tell what routing, profile and passes did; return the figures.

    Without a ``photo`` it is one that neither training nor profile has seen. Written into ``out``:
    the photo upscaled, a part of it beside bicubic, its routing drawn over it, the report of the
    optimisation. ``compiled=False`` leaves torch.compile out, which takes most of the time;
    ``seconds`` is how long the variants are timed.
    """
    console = console or Console()
    name = PHOTO if photo is None else photo.stem
    x_BCHW = _fitting(photos.load(photos.find(PHOTO)) if photo is None else read(photo), console)
    model = patch_sr.pretrained()
    config = model.config

    with step(console, "profiling on the photos of training"):
        profile = profiles.photo_patches(model)
    with step(console, "optimising"):
        first_BCHW = photos.load(photos.split("train")[0])[None]
        fast = brt.optimize(model, profile, sample=first_BCHW)
    variants: dict[str, Callable[[Tensor], Tensor]] = {"eager": model, "optimised": fast}
    if compiled:
        with step(console, "torch.compile, for comparison"):
            variants |= parts.compiled(model, x_BCHW, console)
    with step(console, "timing all of them in turns"):
        milliseconds = alternate(variants, x_BCHW, seconds)
    with step(console, "upscaling, drawing"):
        grid, path_N = _routing(model, x_BCHW)
        with torch.inference_mode():
            out_BCHW = fast(x_BCHW)
            difference = float((out_BCHW - model(x_BCHW)).abs().max())
            found = _compare(fast, x_BCHW, name, out / "comparison.png")
        write(out_BCHW[0], out / "upscaled.png")
        draw_routing(
            at_least(x_BCHW, config.size)[0],
            grid,
            path_N,
            config.path_names,
            f"{name}: {len(path_N)} patches, each to a network that fits its detail",
            out / "routing.png",
        )
        with atomic_write(out / "report.html") as beside:
            fast.report.to_html(beside)

    figures = {
        "photo": name,
        "size": list(x_BCHW.shape[2:]),
        "upscaled_size": list(out_BCHW.shape[2:]),
        "threads": torch.get_num_threads(),
        "milliseconds": milliseconds,
        "psnr": asdict(found),
        "paths": [
            {"network": network, "patches": path_N.count(path)}
            for path, network in enumerate(config.path_names)
        ],
        "compute_share": _compute_share(model, path_N),
        **parts.told(fast),
        "difference_from_eager": difference,
        "files": [
            str(out / file)
            for file in ("upscaled.png", "comparison.png", "routing.png", "report.html")
        ],
    }
    _show(figures, found, console)
    return figures


def _fitting(photo_CHW: Tensor, console: Console) -> Tensor:
    """[1, 3, H, W] of at most `MAX_PIXELS`."""
    height, width = photo_CHW.shape[1:]
    if min(height, width) < MIN_EXTENT:
        raise BrtError(
            f"demo: the photo has {width}x{height} pixels; it takes {MIN_EXTENT} each way"
        )
    ratio = math.sqrt(MAX_PIXELS / (height * width))
    if ratio >= 1:
        return photo_CHW[None]
    small = (max(MIN_EXTENT, int(height * ratio)), max(MIN_EXTENT, int(width * ratio)))
    console.print(
        f"the photo has {width}x{height} pixels; the demo shrinks it to {small[1]}x{small[0]} first"
    )
    return resize(photo_CHW[None], *small).clamp(0, 1)


@torch.inference_mode()
def _routing(model: PatchSR, x_BCHW: Tensor) -> tuple[brt.PatchGrid, list[int]]:
    """Where the patches of a photo lie, and the path that each takes."""
    path_N: list[int] = []

    def note(router: brt.Router, route: brt.Route, scores_NP: Tensor) -> None:
        mask_NP = route.decision().mask_NP
        assert mask_NP is not None
        path_N.extend(mask_NP.int().argmax(1).tolist())

    handle = model.scatter.register_observer(note)
    try:
        model(x_BCHW)
    finally:
        handle.remove()
    config = model.config
    _, grid = brt.annotate_patches(at_least(x_BCHW, config.size), config.size, config.stride)
    return grid, path_N


def _compare(upscale: Callable[[Tensor], Tensor], x_BCHW: Tensor, name: str, file: Path) -> Quality:
    """Shrink the photo to a quarter, upscale it again, compare with what it was; draw it."""
    scale = 4
    high_BCHW = crop_to_multiple(x_BCHW, scale)
    low_BCHW = shrink(high_BCHW, scale)
    made_BCHW = upscale(low_BCHW)
    found = quality.compare(high_BCHW, made_BCHW, scale, name)
    shown = {
        f"bicubic, {found.rgb_bicubic:.2f} dB": enlarge(low_BCHW, scale)[0],
        f"routed networks, {found.rgb:.2f} dB": made_BCHW[0],
        "the photo itself": high_BCHW[0],
    }
    draw_comparison(shown, 160, file)
    return found


def _compute_share(model: PatchSR, path_N: Sequence[int]) -> float:
    """Multiply-adds spent, as a fraction of sending every patch to the largest network."""
    macs_P = model.config.macs_P
    return sum(macs_P[path] for path in path_N) / (len(path_N) * max(macs_P))


def _show(figures: Mapping[str, Any], found: Quality, console: Console) -> None:
    (height, width), (high, wide) = figures["size"], figures["upscaled_size"]
    console.print(
        f"\n[bold]{escape(figures['photo'])}[/]: {width}x{height} -> {wide}x{high} pixels; "
        f"{figures['threads']} threads",
        highlight=False,
    )
    parts.show_times(figures["milliseconds"], console)

    table = Table("network", "patches", "", box=None, header_style="dim")
    total = sum(path["patches"] for path in figures["paths"])
    for path in figures["paths"]:
        share = path["patches"] / total
        table.add_row(path["network"], f"{path['patches']}", "#" * round(30 * share))
    console.print(table)
    console.print(
        f"multiply-adds: {figures['compute_share']:.0%} of sending every patch to the largest\n"
        f"PSNR, shrunk to a quarter and upscaled again: {found.rgb:.2f} dB, "
        f"bicubic {found.rgb_bicubic:.2f} dB ([bold]{found.rgb_gain:+.2f} dB[/])",
        highlight=False,
    )
    parts.show_rest(figures, console)
